"""A run that was saved, loaded and continued is the run that was not, bit for bit.

And a run that a reference package began continues here as it would have continued there.
"""

import contextlib
import copy
import io
import itertools
import pickle

import dadaptation
import prodigyopt
import pytest
import schedulefree
import torch
import torch.distributed.checkpoint as dcp
import zoo
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import prodigy
from prodigy import Prodigy, ScheduleFreeWrapper, SGDScheduleFree
from prodigy.optimizer import BOOKS

PRECISIONS = {
    "float32": [torch.float32],
    "bfloat16": [torch.bfloat16],
    "mixed": [torch.bfloat16, torch.float32, torch.float16, torch.float64],
}
every_method = pytest.mark.parametrize("case", zoo.METHODS, ids=str)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def saved_and_loaded(state_dict):
    """Through a file that holds nothing but tensors, numbers and containers."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def parameters(precision="float32", seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtypes = itertools.cycle(PRECISIONS[precision])
    shapes = [(4, 3), (5,), (), (2, 3, 2, 2)]
    return [
        torch.nn.Parameter((0.3 * torch.randn(shape, generator=generator)).to(dtype))
        for shape, dtype in zip(shapes, dtypes)
    ]


def groups_of(params):
    return [{"params": params[:2]}, {"params": params[2:]}]


def pull(params, step):
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        xi = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (p.detach().double() - 0.3 + 0.1 * xi).to(p.dtype)


def walk(optimizer, params, steps):
    for step in steps:
        pull(params, step)
        optimizer.step()


def values(params):
    return [p.detach().clone() for p in params]


def assert_equal(a, b):
    assert len(a) == len(b)
    for s, t in zip(a, b):
        assert s.dtype == t.dtype
        assert torch.equal(s, t)


def flat(value, name=""):
    """{path: leaf} of nested dictionaries and lists."""
    if isinstance(value, dict):
        rows = value.items()
    elif isinstance(value, (list, tuple)):
        rows = enumerate(value)
    else:
        return {name: value}
    return {k: v for key, entry in rows for k, v in flat(entry, f"{name}/{key}").items()}


def assert_same_state(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name
        else:
            assert value == b[name], name


# resume ----------------------------------------------------------------------------------------


@every_method
@every_precision
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_resumed_run_is_the_same_run(case, precision, mode, foreach):
    """Saved after 7 steps, loaded by a fresh optimizer over fresh parameters, 7 more."""
    if mode == "eval" and not case.schedule_free:
        mode = "train"
    params = parameters(precision)
    optimizer = zoo.make(case, groups_of(params), foreach=foreach)
    walk(optimizer, params, range(7))
    if mode == "eval":
        optimizer.eval()
    saved = saved_and_loaded({"params": values(params), "optimizer": optimizer.state_dict()})
    if mode == "eval":
        optimizer.train()
    walk(optimizer, params, range(7, 14))

    others = parameters(precision, seed=1)
    fresh = zoo.make(case, groups_of(others), foreach=foreach)
    for p, q in zip(others, saved["params"]):
        p.data.copy_(q)
    fresh.load_state_dict(saved["optimizer"])
    assert_same_state(fresh.state_dict(), saved["optimizer"])
    if mode == "eval":
        with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
            fresh.step()
        fresh.train()
    walk(fresh, others, range(7, 14))
    assert_equal(values(params), values(others))
    assert_same_state(optimizer.state_dict(), fresh.state_dict())


@pytest.mark.parametrize("case", zoo.CASES, ids=str)
def test_every_set_of_options_resumes(case):
    def run(problem, optimizer, steps):
        for step in steps:
            problem.fill(step)
            optimizer.step()

    problem, other = zoo.problem(holes=case.holes), zoo.problem(holes=case.holes, seed=0)
    optimizer, fresh = zoo.make(case, problem.params), zoo.make(case, other.params)
    run(problem, optimizer, range(6))
    saved = saved_and_loaded(optimizer.state_dict())
    for p, q in zip(other.params, problem.params):
        p.data.copy_(q)
    fresh.load_state_dict(saved)
    run(problem, optimizer, range(6, 12))
    run(other, fresh, range(6, 12))
    assert torch.equal(zoo.final(problem), zoo.final(other))


COPIES = {
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "deepcopy": copy.deepcopy,
}


@every_method
@every_precision
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_parameters_and_optimizer_is_the_same_run(case, precision, how):
    params = parameters(precision)
    optimizer = zoo.make(case, groups_of(params))
    walk(optimizer, params, range(7))
    others, twin = COPIES[how]((params, optimizer))
    assert twin.param_groups[0]["params"][0] is others[0]
    walk(optimizer, params, range(7, 14))
    walk(twin, others, range(7, 14))
    assert_equal(values(params), values(others))
    assert_same_state(optimizer.state_dict(), twin.state_dict())
    assert not any(p.data_ptr() == q.data_ptr() for p, q in zip(params, others))


@every_method
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_before_the_first_step_works(case, how):
    params = parameters()
    others, twin = COPIES[how]((params, zoo.make(case, groups_of(params))))
    walk(zoo.make(case, groups_of(params)), params, range(6))
    walk(twin, others, range(6))
    assert_equal(values(params), values(others))


# torch.distributed.checkpoint ------------------------------------------------------------------


def model_of(precision, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in ((4, 3), (3, 3), (3, 2))))
    dtypes = PRECISIONS[precision]
    for layer, dtype in zip(model, itertools.cycle(dtypes)):
        layer.to(dtype)
    return model


def layers(model):
    return [{"params": list(model[:2].parameters())}, {"params": list(model[2:].parameters())}]


DCP_METHODS = [*zoo.METHODS]
DCP_METHODS += [
    zoo.Case("SGDScheduleFree-closure", SGDScheduleFree, {"closure_form": True}),
    zoo.Case("SGDScheduleFree-store_x", SGDScheduleFree, {"store_x": True}, schedule_free=True),
    zoo.Case("Prodigy-split", Prodigy, {"split_groups": True}, estimates_d=True),
    zoo.Case("Prodigy-cosine", Prodigy, {"cosine_decay": True}, estimates_d=True),
    zoo.Case("DAdaptSGD-capturable", prodigy.DAdaptSGD, {"capturable": True}, estimates_d=True),
]


def train(optimizer, model, steps):
    params = list(model.parameters())
    for step in steps:

        def closure():
            pull(params, step)
            return 0.0

        optimizer.step(closure)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("case", DCP_METHODS, ids=str)
@every_precision
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_distributed_checkpoint_fills_a_fresh_optimizer(case, precision, mode, tmp_path):
    """dcp.load writes into the tensors of a state dict, so a fresh optimizer must offer them."""
    switching = case.schedule_free and mode == "eval"
    model = model_of(precision)
    optimizer = zoo.make(case, layers(model))
    train(optimizer, model, range(7))
    if switching:
        optimizer.eval()
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    reference = copy.deepcopy(optimizer.state_dict())
    if switching:
        optimizer.train()
    train(optimizer, model, range(7, 14))

    other = model_of(precision, seed=1)
    fresh = zoo.make(case, layers(other))
    state = {
        "model": get_model_state_dict(other),
        "optimizer": get_optimizer_state_dict(other, fresh),
    }
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(other, state["model"])
    set_optimizer_state_dict(other, fresh, state["optimizer"])
    assert_same_state(fresh.state_dict(), reference)
    if switching:
        fresh.train()
    train(fresh, other, range(7, 14))
    assert_equal(values(model.parameters()), values(other.parameters()))
    assert_same_state(optimizer.state_dict(), fresh.state_dict())


@every_method
def test_priming_a_fresh_optimizer_does_not_move_it(case):
    """get_optimizer_state_dict steps once with zero gradients and lr = 0."""
    model, other = model_of("float32"), model_of("float32")
    primed, plain = zoo.make(case, model.parameters()), zoo.make(case, other.parameters())
    get_optimizer_state_dict(model, primed)
    assert_equal(values(model.parameters()), values(other.parameters()))
    if not case.schedule_free and not case.estimates_d:
        return  # classical methods count that step, as torch's own do
    if case.cls.__name__ == "build" and not case.estimates_d:
        return
    train(primed, model, range(8))
    train(plain, other, range(8))
    assert_equal(values(model.parameters()), values(other.parameters()))


# what a saved dictionary holds -----------------------------------------------------------------


@every_method
def test_a_saved_dictionary_is_a_snapshot_of_the_groups(case):
    """Scalars do not follow the run (the per-parameter tensors do, as in torch.optim)."""
    params = parameters()
    for modes in ({}, {"capturable": True}):
        if modes and "torch" in case.name:
            continue
        optimizer = zoo.make(case, groups_of(params), **modes)
        walk(optimizer, params, range(8))
        saved = optimizer.state_dict()
        before = copy.deepcopy(saved["param_groups"])
        walk(optimizer, params, range(8, 16))
        assert_same_state(saved["param_groups"], before)
        if case.estimates_d:
            assert saved["param_groups"][0]["d"] != optimizer.param_groups[0]["d"]


@every_method
@every_precision
def test_loaded_tensors_are_nobodys_but_the_optimizers(case, precision):
    params = parameters(precision)
    optimizer = zoo.make(case, groups_of(params))
    walk(optimizer, params, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    others = parameters(precision)
    fresh = zoo.make(case, groups_of(others))
    fresh.load_state_dict(saved)
    before = copy.deepcopy(saved)
    walk(fresh, others, range(4, 8))
    assert_same_state(saved, before)
    storages = {t.data_ptr() for t in flat(saved).values() if isinstance(t, torch.Tensor)}
    mine = flat({"groups": fresh.param_groups, "state": list(fresh.state.values())})
    used = {t.data_ptr() for t in mine.values() if isinstance(t, torch.Tensor) and t.numel()}
    assert not used & storages


@every_method
def test_float32_state_beside_bfloat16_weights_keeps_its_dtype(case):
    if "torch" in case.name:
        case = zoo.wrapper_case("prodigy.AdamW", prodigy.AdamW, None, {})
    params = parameters("bfloat16")
    exact = dict(stochastic_rounding=False) if "ProdigyPlus" in case.name else {}
    optimizer = zoo.make(case, params, **exact)
    walk(optimizer, params, range(4))
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    walk(optimizer, params, range(4, 6))
    kinds = {"residual": torch.int16, "y_residual": torch.int16, "p0": torch.bfloat16}
    kinds |= {"x0": torch.bfloat16, "ref": torch.bfloat16}
    states = [optimizer.state[p] for p in params]
    states += [optimizer.base.state[p] for p in params] if hasattr(optimizer, "base") else []
    names = set()
    for name, value in ((k, v) for state in states for k, v in state.items()):
        assert value.dtype == kinds.get(name, torch.float32), name
        names.add(name)
    assert "residual" in names and len(names) >= 2


OTHERS = {
    "torch.AdamW": lambda ps: torch.optim.AdamW(ps),
    "torch.SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "schedulefree": lambda ps: schedulefree.AdamWScheduleFree(ps),
    "prodigyopt": lambda ps: prodigyopt.Prodigy(ps),
    **{name: getattr(prodigy, name) for name in ("AdamW", "Prodigy", "DAdaptAdam", "DoG", "COCOB",
                                                 "SGDScheduleFree", "ScheduleFreePolyak")},
}


@pytest.mark.parametrize("saver", OTHERS)
@pytest.mark.parametrize("loader", ["AdamW", "RMSprop", "Prodigy", "DAdaptSGD", "DAdaptAdam",
                                    "DoG", "COCOB", "AdamWScheduleFree", "SGDScheduleFree",
                                    "ScheduleFreePolyak", "ProdigyPlusScheduleFree"])
def test_a_checkpoint_of_another_method_is_refused(saver, loader):
    """Unless it is of the same class, its reference, or of one that keeps the same tensors."""
    params, others = parameters(), parameters()
    theirs = OTHERS[saver](params)
    if hasattr(theirs, "train"):
        theirs.train()
    pull(params, 0)
    theirs.step(*[lambda: torch.tensor(1.0)] * (saver == "ScheduleFreePolyak"))
    ours = getattr(prodigy, loader)(others)
    before = copy.deepcopy(ours.state_dict())
    alike = {("torch.AdamW", "AdamW"), ("schedulefree", "AdamWScheduleFree"),
             ("prodigyopt", "Prodigy")}
    if saver == loader or (saver, loader) in alike:
        ours.load_state_dict(theirs.state_dict())
        return
    with pytest.raises(ValueError, match=f"not a checkpoint of {loader} or its reference"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == before.keys() and not ours.state
    assert ours.state_dict()["param_groups"] == before["param_groups"]


@every_method
def test_missing_keys_take_this_optimizers_values(case):
    """An older checkpoint lacks what was added since: the constructor's value stands in."""
    if "torch" in case.name:
        return  # what a foreign base does without its keys is its own affair
    params = parameters()
    optimizer = zoo.make(case, groups_of(params))
    walk(optimizer, params, range(4))
    full = optimizer.state_dict()
    needed = {"params", "nonfinite", "schedule_free", "mechanic", "k", "initial_lr", *BOOKS[:5]}
    for name in set(full["param_groups"][0]) - needed:
        saved = copy.deepcopy(full)
        for group in saved["param_groups"]:
            del group[name]
        others = parameters()
        fresh = zoo.make(case, groups_of(others))
        default = copy.deepcopy(fresh.param_groups[0].get(name))
        default = full["param_groups"][0]["k"] if name == "clock" else default
        fresh.load_state_dict(saved)
        if fresh.param_groups[0].get(name) is None:
            assert default is None
        else:
            assert fresh.param_groups[0][name] == default, name
        walk(fresh, others, range(4, 6))


def test_missing_entries_of_the_wrapper_take_their_defaults():
    params = parameters()
    optimizer = ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.1), schedulefree_c=2.0)
    walk(optimizer, params, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("schedulefree_c", "y_beta", "nonfinite", "scheduled_lr", "closure_form"):
        del saved["param_groups"][0]["schedule_free"][name]
    fresh = ScheduleFreeWrapper(torch.optim.SGD(parameters(), lr=0.1), schedulefree_c=3.0)
    fresh.load_state_dict(saved)
    entries = fresh.param_groups[0]["schedule_free"]
    assert entries["schedulefree_c"] == 3.0 and entries["y_beta"] == 0.9
    assert entries["nonfinite"] == 0 and entries["k"] == 4


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_beta_that_y_was_built_with_is_saved(mode):
    """A beta that changes between loading and the next switch does not reach x."""
    params = parameters()
    optimizer = SGDScheduleFree(params, lr=0.1)
    walk(optimizer, params, range(10))
    if mode == "eval":
        optimizer.eval()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = SGDScheduleFree(others, lr=0.1, momentum=0.5)
    fresh.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    fresh.param_groups[0]["momentum"] = 0.6
    optimizer.eval()
    fresh.eval()
    for p, q in zip(params, others):
        torch.testing.assert_close(p, q)


@every_method
def test_a_checkpoint_of_other_groups_is_refused_before_anything_changes(case):
    params = parameters()
    optimizer = zoo.make(case, groups_of(params))
    walk(optimizer, params, range(4))
    other = zoo.make(case, parameters())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(other.state_dict())
    assert_same_state(before, optimizer.state_dict())


@every_method
def test_loading_does_not_change_the_dictionary(case):
    params = parameters()
    optimizer = zoo.make(case, groups_of(params))
    walk(optimizer, params, range(4))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    zoo.make(case, groups_of(parameters())).load_state_dict(saved)
    assert_same_state(saved, before)


@every_method
def test_a_scheduler_goes_on_over_a_loaded_optimizer(case):
    ends = []
    for resume in (False, True):
        params = parameters()
        optimizer = zoo.make(case, params)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for step in range(12):
            if resume and step == 6:
                saved = saved_and_loaded([optimizer.state_dict(), scheduler.state_dict()])
                optimizer = zoo.make(case, params)
                scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            walk(optimizer, params, [step])
            scheduler.step()
        ends.append((values(params), optimizer.param_groups[0]["lr"]))
    assert_equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


# the reference packages' checkpoints -----------------------------------------------------------


def quietly(build, *args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()):
        return build(*args, **kwargs)


FOREIGN = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.1}),
    (dadaptation.DAdaptSGD, {"momentum": 0.9, "d0": 1e-3}),
    (dadaptation.DAdaptAdaGrad, {"momentum": 0.9, "d0": 1e-3}),
    (dadaptation.DAdaptAdam, {"decouple": True, "weight_decay": 0.1}),
    (dadaptation.DAdaptAdam, {"use_bias_correction": True, "growth_rate": 1.3}),
    (prodigyopt.Prodigy, {"eps": 1e-24}),
    (prodigyopt.Prodigy, {"eps": 1e-24, "slice_p": 3, "weight_decay": 0.1, "betas": (0.8, 0.99)}),
    (prodigyopt.Prodigy, {"eps": 1e-24, "growth_rate": 1.3, "use_bias_correction": True}),
    (schedulefree.SGDScheduleFree, {"lr": 0.1, "warmup_steps": 9}),
    (schedulefree.AdamWScheduleFree, {"lr": 0.1, "r": 1.0, "weight_decay": 0.1}),
    (schedulefree.RAdamScheduleFree, {"lr": 0.1}),
]


def label(value):
    return getattr(value, "__name__", str(value))


def continued(params, optimizer, loaded, others, mode):
    """Both go on for 15 steps from where the reference stands; their distance, relative."""
    if mode == "eval":
        optimizer.train()
        loaded.train()
    walk(optimizer, params, range(10, 25))
    walk(loaded, others, range(10, 25))
    if hasattr(loaded, "train"):
        optimizer.eval()
        loaded.eval()
    a = torch.cat([p.detach().flatten() for p in params])
    b = torch.cat([p.detach().flatten() for p in others])
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("reference, kwargs", FOREIGN, ids=label)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("several", [False, True], ids=["one", "groups"])
def test_a_reference_checkpoint_continues_as_there(reference, kwargs, mode, several):
    """10 steps there, save, load here, 15 more: within 1e-8 of 25 steps there, in float64.

    One tensor starts at zero, where prodigyopt keeps p0 as a single number.
    """
    mode = mode if reference.__module__.startswith("schedulefree") else "train"

    def start():
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(s, generator=generator).double() for s in ((4, 3), (5,), (), (3, 3))]
        params[1].zero_()
        params = [torch.nn.Parameter(p) for p in params]
        return params, groups_of(params) if several else params

    params, groups = start()
    optimizer = quietly(reference, groups, **kwargs)
    if hasattr(optimizer, "train"):
        optimizer.train()
    walk(optimizer, params, range(10))
    if mode == "eval":
        optimizer.eval()
    saved = saved_and_loaded(optimizer.state_dict())

    others, groups = start()
    loaded = getattr(prodigy, reference.__name__)(groups)
    for p, q in zip(others, params):
        p.data.copy_(q)
    loaded.load_state_dict(saved)
    assert continued(params, optimizer, loaded, others, mode) < 1e-8
    again = getattr(prodigy, reference.__name__)(start()[1])
    again.load_state_dict(saved_and_loaded(loaded.state_dict()))
    assert_same_state(again.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("base", [torch.optim.SGD, prodigyopt.Prodigy], ids=lambda b: b.__name__)
@pytest.mark.parametrize("several", [False, True], ids=["one", "groups"])
def test_a_checkpoint_of_schedulefrees_wrapper_continues_as_there(base, several):
    kwargs = {"eps": 1e-24} if base is prodigyopt.Prodigy else {"lr": 0.1, "momentum": 0.5}

    def start():
        generator = torch.Generator().manual_seed(0)
        shapes = ((4, 3), (5,), (2,), (3, 3))
        params = [torch.nn.Parameter(torch.randn(s, generator=generator).double()) for s in shapes]
        return params, groups_of(params) if several else params

    params, groups = start()
    optimizer = schedulefree.ScheduleFreeWrapper(quietly(base, groups, **kwargs), momentum=0.8)
    optimizer.train()
    walk(optimizer, params, range(10))
    saved = saved_and_loaded(optimizer.state_dict())
    ours = Prodigy if base is prodigyopt.Prodigy else torch.optim.SGD
    others, groups = start()
    loaded = ScheduleFreeWrapper(ours(groups, **kwargs), momentum=0.8)
    for p, q in zip(others, params):
        p.data.copy_(q)
    loaded.load_state_dict(saved)
    assert continued(params, optimizer, loaded, others, "train") < 1e-8


def test_a_reference_checkpoint_keeps_its_two_tensors_where_x_was_asked_for():
    """x lies in none of the reference's tensors: a stored x would start from y."""
    params = parameters()
    optimizer = schedulefree.SGDScheduleFree(params, lr=0.1)
    optimizer.train()
    walk(optimizer, params, range(10))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = SGDScheduleFree(others, lr=0.1, store_x=True)
    loaded.load_state_dict(optimizer.state_dict())
    optimizer.eval()
    loaded.eval()
    for p, q in zip(params, others):
        torch.testing.assert_close(p, q)


def test_load_hooks_run():
    params = parameters()
    optimizer = Prodigy(params)
    walk(optimizer, params, range(3))
    calls = []

    def halve(_, state_dict):
        calls.append("before")
        state = {i: dict(s, exp_avg=s["exp_avg"] / 2) for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    fresh = Prodigy(parameters())
    fresh.register_load_state_dict_pre_hook(halve)
    fresh.register_load_state_dict_post_hook(lambda _: calls.append("after"))
    fresh.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after"]
    mine = fresh.state[fresh.param_groups[0]["params"][0]]["exp_avg"]
    assert torch.equal(mine, optimizer.state[params[0]]["exp_avg"] / 2)


@pytest.mark.parametrize("case", [c for c in zoo.METHODS if "torch" not in c.name], ids=str)
@pytest.mark.parametrize("dtypes", itertools.permutations(
    [torch.float64, torch.float32, torch.bfloat16, torch.float16], 2), ids=str)
@pytest.mark.parametrize("how", ["load", "cast"])
def test_a_run_goes_on_in_another_precision(case, dtypes, how):
    """Nothing that stood beside weights of one dtype is taken for something of another."""
    if how == "cast" and torch.float64 in dtypes:
        return  # the averages are float32 then, as in torch.optim, which refuses the step too

    def params_in(dtype):
        generator = torch.Generator().manual_seed(0)
        return [torch.nn.Parameter((0.3 * torch.randn(s, generator=generator)).to(dtype))
                for s in ((4, 3), (5,))]

    params = params_in(dtypes[0])
    optimizer = zoo.make(case, params)
    walk(optimizer, params, range(4))
    if how == "load":
        others = params_in(dtypes[1])
        with torch.no_grad():
            for p, q in zip(others, params):
                p.copy_(q)
        fresh = zoo.make(case, others)
        fresh.load_state_dict(optimizer.state_dict())
    else:
        fresh, others = optimizer, params
        for p in params:
            p.grad = None
            p.data = p.data.to(dtypes[1])
    before = torch.cat([p.detach().double().flatten() for p in others])
    walk(fresh, others, range(4, 6))
    after = torch.cat([p.detach().double().flatten() for p in others])
    assert after.isfinite().all() and (after - before).abs().max() < 3


def test_hooks_of_checkpoints_are_torchs():
    """Post-hooks see, and may change, what is kept and what is returned."""
    params = parameters()
    optimizer = prodigy.Adam(params)
    walk(optimizer, params, range(2))
    fresh = prodigy.Adam(parameters())
    fresh.register_load_state_dict_post_hook(
        lambda loaded: [s.update(tag=1) for s in loaded.state.values()])
    fresh.load_state_dict(optimizer.state_dict())
    assert all(s["tag"] == 1 for s in fresh.state.values())
    optimizer.register_state_dict_post_hook(lambda _, saved: {"optimizer": saved})
    assert set(optimizer.state_dict()) == {"optimizer"}


def test_a_count_of_steps_may_be_an_integer():
    """As torch.optim saved it before 1.12, and others do."""
    params, others = parameters(), parameters()
    for build, ps in ((torch.optim.AdamW, params), (prodigy.AdamW, others)):
        saved = torch.optim.AdamW(ps).state_dict()
        old = torch.optim.AdamW(ps)
        walk(old, ps, range(2))
        saved = old.state_dict()
        for s in saved["state"].values():
            s["step"] = int(s["step"])
        optimizer = build(ps)
        optimizer.load_state_dict(saved)
        walk(optimizer, ps, range(2, 4))
    for p, q in zip(params, others):
        torch.testing.assert_close(p, q)


def test_a_class_derived_elsewhere_shares_checkpoints_with_its_base():
    class Mine(prodigy.Prodigy):
        pass

    for build, other in ((Mine, prodigy.Prodigy), (prodigy.Prodigy, Mine)):
        params = parameters()
        optimizer = build(params)
        walk(optimizer, params, range(2))
        other(parameters()).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="it is one of DoG"):
        prodigy.DoWG(params).load_state_dict(prodigy.DoG(params).state_dict())


def test_an_option_changed_in_mid_run_does_not_lose_the_checkpoint():
    for cls, name, value in ((prodigy.SGD, "momentum", 0.9), (prodigy.Adam, "amsgrad", True),
                             (prodigy.Adam, "amsgrad", False),
                             (prodigy.Prodigy, "betas", (0, 0.9)),
                             (prodigy.ProdigyPlusScheduleFree, "factored", False)):
        params, others = parameters(), parameters()
        more = dict(amsgrad=not value) if name == "amsgrad" else {}
        optimizer = cls(params, **more, **(dict(lr=0.1) if cls is prodigy.SGD else {}))
        walk(optimizer, params, range(2))
        optimizer.param_groups[0][name] = value
        fresh = cls(others)
        fresh.load_state_dict(optimizer.state_dict())
        assert fresh.param_groups[0][name] == value
