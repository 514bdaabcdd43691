"""Two and four processes take the steps of one: DDP, FSDP2 and DTensor, with gloo on the CPU.

In float64 and with the same data in the same order, d and the parameters agree to 1e-8 over 50
steps; d is the same on all ranks bit for bit. ranks.py holds what the processes run.
"""

import pytest
import ranks
import torch
import zoo

TOLERANCE = 1e-8

# Every case on two ranks (an uneven shard, an empty one); on four, in other layouts, those that
# look at whole tensors, sample them, or have a gradient in part only.
ROWS = [(case.name, "rows", {}) for case in (*zoo.CASES, *ranks.MORE)]
WHOLE = [case.name for case in (*ranks.DEFAULTS, *ranks.MORE)]
WHOLE += [f"ProdigyPlusScheduleFree-{name}" for name in ("cautious", "masked", "steps")]
KINDS = ("rows", "columns", "replicas", "twice")
FOUR = [(name, KINDS[i % 4], {}) for i, name in enumerate(WHOLE)]
SAMPLED = ("Prodigy-slices", "Prodigy-split", "ProdigyPlusScheduleFree-muon-shared",
           "ProdigyPlusScheduleFree-speed-holes", "default-LDoG")
FOUR += [(name, kind, {}) for name in SAMPLED for kind in KINDS if (name, kind, {}) not in FOUR]
MODES = [(name, "rows", {mode: True}) for mode in ("foreach", "capturable")
         for name in (*SAMPLED, "default-DoG", "default-DAdaptSGD")]


def label(row):
    name, kind, options = row
    return "-".join((name, kind, *options))


class Job:
    """The results of a job, started when the first test asks."""

    def __init__(self, world, job, rows, /, **arguments):
        self.rows, self.world, self.job, self.arguments = rows, world, job, arguments
        self.results = None

    def of(self, row):
        if self.results is None:
            self.results = ranks.launch(self.world, self.job, **self.arguments)
        mine = [result[self.rows.index(row)] for result in self.results]
        for result in mine:
            assert not isinstance(result, str), result
        return mine


def agree(mine, one, tolerance=TOLERANCE):
    """The ranks among themselves, bit for bit; the first of them with one process."""
    for other in mine[1:]:
        assert torch.equal(other["d"], mine[0]["d"])
        assert torch.equal(other["final"], mine[0]["final"])
        assert other["books"] == mine[0]["books"]
    assert torch.isfinite(one["final"]).all()
    assert (mine[0]["d"] - one["d"]).abs().le(tolerance * one["d"].abs()).all()
    assert zoo.error(mine[0]["final"], one["final"]) < tolerance
    for here, there in zip(mine[0]["books"], one["books"], strict=True):
        assert here == pytest.approx(there, rel=tolerance, abs=1e-300, nan_ok=True)


def alone(name, **options):
    case = ranks.KNOWN[name]
    return ranks.run(case, zoo.problem(holes=case.holes, shapes=ranks.SHAPES), **options)


two = Job(2, "least_squares", ROWS + MODES, rows=ROWS + MODES)
four = Job(4, "least_squares", FOUR, rows=FOUR)


@pytest.mark.parametrize("row", two.rows, ids=label)
def test_two_ranks_take_the_steps_of_one(row):
    agree(two.of(row), alone(row[0], **row[2]))


@pytest.mark.parametrize("row", four.rows, ids=label)
def test_four_ranks_in_other_layouts_take_the_steps_of_one(row):
    agree(four.of(row), alone(row[0], **row[2]))


LACKING = [case.name for case in (*ranks.DEFAULTS, *ranks.MORE)]
lacking = Job(2, "lacking", LACKING, names=LACKING)


@pytest.mark.parametrize("name", lacking.rows)
def test_a_gradient_that_one_rank_lacks_is_zero_there(name):
    agree(lacking.of(name), ranks.run(ranks.KNOWN[name], ranks.Halved(2)))


NETWORKS = [(case.name, how, {}) for case in ranks.DEFAULTS for how in ("ddp", "fsdp")]
NETWORKS += [(name, how, {}) for name in SAMPLED for how in ("ddp", "fsdp")
             if (name, how, {}) not in NETWORKS]
networks = Job(2, "networks", NETWORKS, rows=NETWORKS)


@pytest.mark.parametrize("row", networks.rows, ids=label)
def test_a_network_trains_as_on_one_process(row):
    name, _, options = row
    one, mine = ranks.train(ranks.KNOWN[name], "plain", **options), networks.of(row)
    agree(mine, one)
    assert zoo.error(mine[0]["loss"], one["loss"]) < TOLERANCE


# beyond the step -------------------------------------------------------------------------------

STEPWISE = ["default-Prodigy", "Prodigy-slices", "default-DAdaptAdam", "default-AdamW",
            "default-AdamWScheduleFree", "default-ProdigyPlusScheduleFree"]
MIXED = ["default-Prodigy", "Prodigy-slices", "default-DAdaptSGD", "default-DoG", "default-AdamW",
         "default-ProdigyPlusScheduleFree"]
FREE = [case.name for case in ranks.DEFAULTS if case.schedule_free
        and case.cls not in zoo.WITH_LOSS.values()]
MORE = [("fused", name, {}) for name in STEPWISE] + [("mixed", name, {}) for name in MIXED]
MORE += [("modes", name, {}) for name in FREE]


class Parts(Job):
    def of(self, row):
        if self.results is None:
            lists = ranks.launch(self.world, self.job, **self.arguments)
            self.results = [sum(parts, []) for parts in lists]
        return super().of(row)


more = Parts(2, "more", MORE, fused_names=STEPWISE, mixed_names=MIXED, modes_names=FREE)


@pytest.mark.parametrize("name", STEPWISE)
def test_fused_backward_over_shards_is_the_step(name):
    mine = more.of(("fused", name, {}))
    agree([hooked for _, hooked in mine], mine[0][0])


@pytest.mark.parametrize("name", MIXED)
def test_mixed_precision_keeps_float32_shards_and_their_d(name):
    mine = more.of(("mixed", name, {}))
    here, replayed = mine[0]["d"].T
    assert torch.equal(mine[0]["d"], mine[1]["d"])
    assert mine[0]["dtypes"] <= {torch.float32}
    torch.testing.assert_close(here, replayed, rtol=1e-4, atol=0)
    torch.testing.assert_close(*mine[0]["ends"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FREE)
def test_x_is_seen_and_left_over_shards(name):
    mine, one = more.of(("modes", name, {})), ranks.modes(ranks.KNOWN[name], "plain")
    assert torch.equal(mine[0], mine[1])
    assert zoo.error(mine[0], one) < TOLERANCE


SAVED = [case.name for case in ranks.DEFAULTS] + ["Prodigy-slices", "Prodigy-split",
                                               "ProdigyPlusScheduleFree-speed-holes"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saved on two ranks; how they went on; how one and four went on from there."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    first = ranks.launch(2, "checkpoint", names=SAVED, folder=folder, resume=False)
    later = {n: ranks.launch(n, "checkpoint", names=SAVED, folder=folder, resume=True)
             for n in (1, 4)}
    return folder, first, later


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_with_four(name, world, saved):
    _, first, later = saved
    at = SAVED.index(name)
    for result in (first[0][at], *(rank[at] for rank in later[world])):
        assert not isinstance(result, str), result
    agree([rank[at] for rank in later[world]], first[0][at])


@pytest.mark.parametrize("name", SAVED)
def test_a_whole_state_dict_goes_on_without_shards(name, saved):
    folder, first, _ = saved
    one = ranks.unsharded(ranks.KNOWN[name], f"{folder}/{name}.pt")
    agree([one], first[0][SAVED.index(name)])


FOLDED = [name for name in SAVED if "torch" not in name]  # torch's own does not cut what it loads
folds = Job(2, "fold", FOLDED, names=FOLDED)


@pytest.mark.parametrize("name", FOLDED)
def test_a_state_dict_of_one_process_goes_on_over_shards(name):
    model = ranks.network()
    optimizer, data = zoo.make(ranks.KNOWN[name], model.parameters()), ranks.batches(16)
    ranks.train_alone(model, optimizer, data[:8])
    agree(folds.of(name), ranks.steps(model, optimizer, data[8:], "plain"))
