"""What a step costs: the shapes, and the words that it must move."""

from functools import partial

import numpy as np
import pytest

import prodigy
from prodigy.lab import cost

COUNTED = {
    "AdamW": (prodigy.AdamW, 7),
    "SGD": (prodigy.SGD, 3),
    "Prodigy": (prodigy.Prodigy, 10),
    "Prodigy, slice_p = 11": (partial(prodigy.Prodigy, slice_p=11), 7 + 3 / 11),
    "D-Adapt Adam": (prodigy.DAdaptAdam, 9),
    "Schedule-Free AdamW": (prodigy.AdamWScheduleFree, 7),
    "DoG": (prodigy.DoG, 6),  # g, x and x0 once for the norms, then g, x and the new x
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_words_of_a_step_are_those_of_its_box(name):
    make, moved = COUNTED[name]
    assert cost.words(make) == pytest.approx(moved, rel=1e-4)


def test_networks_have_the_sizes_they_are_known_for():
    sizes = [(len(shapes), sum(map(np.prod, shapes))) for shapes in cost.NETWORKS.values()]
    assert [(n, round(total / 1e6, 1)) for n, total in sizes[:2]] == [(62, 11.2), (76, 15.6)]
