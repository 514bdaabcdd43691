"""What a step costs: the shapes, the words counted, and ratios that come from turns."""

from functools import partial

import pytest
import torch

import prodigy
from prodigy.lab import cost

SIZES = [torch.Size((66, 55)), torch.Size((110,))]  # multiples of 11 entries
COUNTED = {
    "AdamW": (prodigy.AdamW, 7, 2),
    "AdamW, torch": (torch.optim.AdamW, 7, 2),
    "SGD": (prodigy.SGD, 3, 0),
    "Prodigy": (prodigy.Prodigy, 10, 4),
    "Prodigy, slice_p = 11": (partial(prodigy.Prodigy, slice_p=11), 7 + 3 / 11, 2 + 2 / 11),
    "D-Adapt Adam": (prodigy.DAdaptAdam, 9, 3),
    "Schedule-Free AdamW": (prodigy.AdamWScheduleFree, 7, 2),
    "Mechanic": (lambda params: prodigy.Mechanic(prodigy.SGD(params)), 6, 2),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_words_of_a_step_are_counted_from_what_it_changes(name):
    make, moved, kept = COUNTED[name]
    assert cost.words(*cost.ready(make, SIZES, torch.device("cpu"))) == pytest.approx((moved, kept))


def test_shapes_have_the_sizes_they_are_known_for():
    found = {name: cost.shapes(name) for name in ("resnet18", "gpt", "gpt-2")}
    assert [len(sizes) for sizes in found.values()] == [62, 76, 28]
    totals = [sum(size.numel() for size in sizes) for sizes in found.values()]
    assert totals == [11_173_962, 15_562_752, 3_942_912]
    with pytest.raises(ValueError, match="model must be"):
        cost.shapes("vgg")


def test_the_baseline_is_as_fast_as_itself():
    """And three steps take longer than one, also on a busy machine."""
    sizes = [torch.Size((1000, 500))]
    table = cost.cost(sizes, {"again": cost.ADAMW, "thrice": thrice}, rounds=21)
    again, slow = table.to_dict("records")
    assert slow["ratio"] > 1.5 * again["ratio"] and again["floor"] == slow["floor"] == 1
    assert (again["words"], again["bytes"]) == (7, 8) and slow["low"] <= slow["high"]


class Thrice(torch.optim.AdamW):
    """Three steps for one."""

    def step(self, closure=None):
        for _ in range(3):
            super().step(closure)


def thrice(params):
    return Thrice(params, fused=True)
