"""Two and four processes take the steps of one: DDP, FSDP2 and DTensor, with gloo on the CPU.

In float64 and with the same data in the same order, d and the parameters agree to 1e-8, for a
network of every method over 50 steps; d is the same on all ranks bit for bit. ranks.py holds what
the processes run, all jobs of one number of processes in one start of them.
"""

import fcntl

import pytest
import ranks
import torch
import zoo
from torch.distributed.tensor import DTensor

import prodigy

TOLERANCE = 1e-8
NAMES = [case.name for case in ranks.DEFAULTS]
MORE = [case.name for case in ranks.MORE]
PLUS = "ProdigyPlusScheduleFree"
# methods that sample tensors, take their norms, or wrap another
WHOLE = [*MORE, "default-LDoG"]
OTHERS = [f"default-{name}" for name in ("SGD", "DoG", "DAdaptSGD", "ScheduleFreePolyak", "COCOB",
                                         "Mechanic-prodigy.AdamW", PLUS, f"{PLUS}-averaged")]
OTHERS += [f"{PLUS}-{name}" for name in ("cautious", "masked", "steps", "speed", "muon")]
KINDS = ("rows", "columns", "replicas", "twice")
# rows of a job: (name of the case, kind of sharding, options)
TWO = [(case.name, "rows", {}) for case in (*zoo.CASES, *ranks.MORE)]
TWO += [(name, "rows", {mode: True}) for mode in ("foreach", "capturable")
        for name in (*WHOLE, "default-DoG", "default-DAdaptSGD")]
TWO += [("Prodigy-slices", "rows", {"compile": True})]
TWO += [(name, "columns", {}) for name in WHOLE]
FOUR = [(name, kind, {}) for name in WHOLE for kind in KINDS]
FOUR += [(name, KINDS[i % 4], {}) for i, name in enumerate(OTHERS)]
NETWORKS = [(name, how, {}) for name in (*NAMES, *MORE) for how in ("ddp", "fsdp")]
HYBRID = [(name, "hsdp", {}) for name in (*WHOLE, "default-Prodigy", f"default-{PLUS}")]
STEPWISE = ["Prodigy-slices", *(f"default-{name}" for name in (
    "Prodigy", "DAdaptAdam", "AdamW", "AdamWScheduleFree", PLUS))]
MIXED = ["Prodigy-slices", *(f"default-{name}" for name in (
    "Prodigy", "DAdaptSGD", "DoG", "AdamW", PLUS))]
FREE = [case.name for case in ranks.DEFAULTS if case.schedule_free
        and case.cls not in zoo.WITH_LOSS.values()]
SAVED = [*NAMES, *MORE]
FOLDED = [name for name in SAVED if "torch" not in name]  # torch's own does not cut what it loads
FACTS = ["Prodigy", "Mechanic", "ScheduleFreeWrapper"]

JOBS = {
    2: dict(least_squares=TWO, lacking=SAVED, networks=NETWORKS, fused=STEPWISE, mixed=MIXED,
            modes=FREE, save=SAVED, fold=FOLDED, facts=FACTS),
    4: dict(least_squares=FOUR, networks=HYBRID, resume=SAVED),
    1: dict(resume=SAVED),
}


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """One folder for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "ranks"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def of(shared):
    """of(world, job, row): what each rank returned; the first to ask starts the processes."""
    known = {}

    def results(world):
        file = shared / f"{world}.pt"
        with open(shared / f"{world}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                torch.save(ranks.launch(world, JOBS[world], str(shared)), file)
        return torch.load(file, weights_only=False)

    def look(world, job, row):
        if world != 2 and job == "resume":
            look(2, "save", row)
        if world not in known:
            known[world] = results(world)
        mine = [result[job][JOBS[world][job].index(row)] for result in known[world]]
        for result in mine:
            assert not isinstance(result, str), result
        return mine

    return look


def label(row):
    name, kind, options = row
    return "-".join((name, kind, *options))


def agree(mine, one):
    """The ranks among themselves, bit for bit; the first of them with one process."""
    for other in mine[1:]:
        assert torch.equal(other["d"], mine[0]["d"])
        assert torch.equal(other["final"], mine[0]["final"])
        assert other["books"] == mine[0]["books"]
    assert torch.isfinite(one["final"]).all()
    assert (mine[0]["d"] - one["d"]).abs().le(TOLERANCE * one["d"].abs()).all()
    assert zoo.error(mine[0]["final"], one["final"]) < TOLERANCE
    for here, there in zip(mine[0]["books"], one["books"], strict=True):
        assert here == pytest.approx(there, rel=TOLERANCE, abs=1e-300, nan_ok=True)


def alone(name, **options):
    case = ranks.KNOWN[name]
    return ranks.run(case, zoo.problem(holes=case.holes, shapes=ranks.SHAPES), **options)


@pytest.mark.parametrize("row", TWO, ids=label)
def test_two_ranks_take_the_steps_of_one(row, of):
    agree(of(2, "least_squares", row), alone(row[0], **row[2]))


@pytest.mark.parametrize("row", FOUR, ids=label)
def test_four_ranks_in_any_layout_take_the_steps_of_one(row, of):
    agree(of(4, "least_squares", row), alone(row[0]))


@pytest.mark.parametrize("name", SAVED)
def test_a_gradient_that_one_rank_lacks_is_zero_there(name, of):
    agree(of(2, "lacking", name), ranks.run(ranks.KNOWN[name], ranks.Halved(2)))


@pytest.mark.parametrize("row", NETWORKS + HYBRID, ids=label)
def test_a_network_trains_as_on_one_process(row, of):
    one, mine = ranks.train(row[0], "plain"), of(4 if row in HYBRID else 2, "networks", row)
    agree(mine, one)
    assert zoo.error(mine[0]["loss"], one["loss"]) < TOLERANCE


@pytest.mark.parametrize("name", STEPWISE)
def test_fused_backward_over_shards_is_the_step(name, of):
    mine = of(2, "fused", name)
    agree([hooked for _, hooked in mine], mine[0][0])


@pytest.mark.parametrize("name", MIXED)
def test_mixed_precision_keeps_float32_shards_and_their_d(name, of):
    mine = of(2, "mixed", name)
    here, replayed = mine[0]["d"].T
    assert torch.equal(mine[0]["d"], mine[1]["d"])
    assert mine[0]["dtypes"] <= {torch.float32}
    torch.testing.assert_close(here, replayed, rtol=1e-4, atol=0)
    torch.testing.assert_close(*mine[0]["ends"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FREE)
def test_x_is_seen_and_left_over_shards(name, of):
    mine, one = of(2, "modes", name), ranks.modes(name, "", "plain")
    assert torch.equal(mine[0], mine[1])
    assert zoo.error(mine[0], one) < TOLERANCE


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_with_four(name, world, of):
    agree(of(world, "resume", name), of(2, "save", name)[0])


@pytest.mark.parametrize("name", SAVED)
def test_a_whole_state_dict_goes_on_without_shards(name, of, shared):
    first = of(2, "save", name)[0]
    agree([ranks.unsharded(name, shared / f"{name}.pt")], first)


@pytest.mark.parametrize("name", FOLDED)
def test_a_state_dict_of_one_process_goes_on_over_shards(name, of):
    agree(of(2, "fold", name), ranks.train(name, "plain", 16, skip=8))


@pytest.mark.parametrize("base", FACTS)
def test_holes_count_once_and_samples_are_as_small_as_on_one_process(base, of):
    for mine in of(2, "facts", base):
        assert mine["holes"] == 1 and mine["gradient"].isnan().sum() == 1
        words = 2 + 2 / 11 + dict(Prodigy=0, Mechanic=2, ScheduleFreeWrapper=1)[base]
        assert mine["bytes"] / 4 == pytest.approx(words, rel=1e-6)
        assert mine["types"] == {DTensor} and mine["sampled"] == (44, 100)


def test_flat_parameters_of_fsdp1_are_refused_in_words():
    p = torch.nn.Parameter(torch.ones(3))
    p._fsdp_flattened = True
    with pytest.raises(TypeError, match="use fully_shard"):
        prodigy.SGD([p], lr=0.1)
