"""Every scheduler of torch.optim.lr_scheduler: the reference's trajectory, torch's rates.

And what else a training script puts around ``step``: GradScaler, torch.distributed.checkpoint.
"""

import copy
import inspect
import itertools

import parameterfree
import pytest
import torch
import torch.distributed.checkpoint as dcp
import zoo
from framework import METHODS, assert_equal, every_method, values
from test_checkpoints import assert_same_state
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

import prodigy

STEPS = 24


def sequence(o):
    """Warm-up from a tenth, then cosine."""
    parts = [lr_scheduler.LinearLR(o, 0.1, 1.0, 6), lr_scheduler.CosineAnnealingLR(o, 20)]
    return lr_scheduler.SequentialLR(o, parts, milestones=[6])


def chain(o):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.2, 5), lr_scheduler.ExponentialLR(o, 0.95)])


def top(o):
    """The largest rate of a cycle: what the optimizer was given."""
    return [float(group["lr"]) for group in o.param_groups]


# Rates are above 0 throughout: a step at rate 0 is a departure, shown in other files.
SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.5 + 0.5 / k),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 5, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [4, 9], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.1, 6),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": sequence,
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS + 1, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS + 1),
    "ChainedScheduler": chain,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, [lr / 9 for lr in top(o)], top(o), 4, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, top(o), total_steps=STEPS + 1, cycle_momentum=False),
}
CYCLES = {  # with the momentum, or beta1, that falls while the rate rises
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [lr / 9 for lr in top(o)], top(o), 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, top(o), total_steps=STEPS + 1),
}
every_scheduler = pytest.mark.parametrize("kind", SCHEDULERS)
PLAIN = [case for case in zoo.CASES if case.name.endswith("-plain") and case.reference
         and case.reference is not parameterfree.COCOB]  # which has no rate
PLAIN += [case for case in zoo.CASES if case.name in (
    "ScheduleFreeWrapper-SGD", "ScheduleFreeWrapper-Prodigy", "Prodigy-safeguard")]


def test_the_table_holds_every_scheduler_of_torch():
    base = (lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau)
    every = {name for name, cls in vars(lr_scheduler).items()
             if inspect.isclass(cls) and issubclass(cls, base) and "LRScheduler" not in name}
    assert set(SCHEDULERS) == every


def run(optimizer, problem, schedule, steps=STEPS):
    """[rates and momenta of the groups before every step]."""
    scheduler = schedule(optimizer if isinstance(optimizer, torch.optim.Optimizer)
                         else optimizer.base)
    seen = []
    for step in range(steps):
        seen.append([(float(group["lr"]), group.get("momentum"), group.get("betas"))
                     for group in optimizer.param_groups])
        problem.fill(step)
        optimizer.step()
        advance(scheduler, problem)
    return seen


def advance(scheduler, problem):
    """scheduler.step(); a plateau gets the loss, in steps so large that it does find plateaus."""
    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    scheduler.step(*([problem.loss() // 4] if plateau else []))


@pytest.mark.parametrize("case", PLAIN, ids=str)
@every_scheduler
def test_the_trajectory_is_that_of_the_reference(case, kind):
    ours, theirs = zoo.problem(), zoo.problem()
    rates = run(zoo.make(case, ours.params), ours, SCHEDULERS[kind])
    assert len(set(map(str, rates))) > 1
    run(zoo.make_reference(case, theirs.params), theirs, SCHEDULERS[kind])
    assert zoo.error(zoo.final(ours), zoo.final(theirs)) < case.rtol


def cycles(case):
    """Whether there is a momentum, or a beta_1, to cycle."""
    optimizer = zoo.make(case, [torch.nn.Parameter(torch.ones(1))])
    return bool({"momentum", "betas"} & set(optimizer.defaults))


CYCLED = [case for case in PLAIN if cycles(case) and not case.schedule_free]


@pytest.mark.parametrize("case", CYCLED, ids=str)
@pytest.mark.parametrize("kind", CYCLES)
def test_cycled_momentum_is_that_of_the_reference(case, kind):
    """(schedulefree's x is corrupted by it: test_departure_schedulefree_beta_change.)"""
    ours, theirs = zoo.problem(), zoo.problem()
    seen = run(zoo.make(case, ours.params), ours, CYCLES[kind])
    assert len({(momentum, betas) for ((_, momentum, betas),) in seen}) > 4
    run(zoo.make_reference(case, theirs.params), theirs, CYCLES[kind])
    assert zoo.error(zoo.final(ours), zoo.final(theirs)) < case.rtol


WARMED = zoo.wrapper_case("warmed", torch.optim.SGD, None, {}, warmup_steps=7)


@pytest.mark.parametrize("case", [*METHODS, WARMED], ids=str)
@every_scheduler
def test_rates_are_those_of_torchs_sgd(case, kind):
    """Nothing but the scheduler writes group["lr"], and none of its entries gets lost."""
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    groups = [{"params": params[:1], "lr": 0.5}, {"params": params[1:], "lr": 0.25}]
    optimizer = zoo.make(case, copy.deepcopy(groups))
    plain = torch.optim.SGD(groups)
    schedules = [SCHEDULERS[kind](o) for o in (optimizer, plain)]
    for step in range(STEPS):
        assert top(optimizer) == top(plain)
        for o, scheduler in zip((optimizer, plain), schedules):
            for group in o.param_groups:
                group["params"][0].grad = torch.ones_like(group["params"][0])
            o.step()
            scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))


@every_method
@every_scheduler
def test_a_tensor_for_lr_changes_no_number(case, kind):
    """Two groups that were given one and the same tensor (torch's plateau needs one for each)."""
    ends = []
    for kind_of_lr in (float, lambda lr: torch.tensor(lr, dtype=torch.float64)):
        problem = zoo.problem()
        lr = kind_of_lr(0.5)
        groups = [{"params": problem.params[i::2], "lr": lr} for i in (0, 1)]
        if kind == "ReduceLROnPlateau":
            groups[1]["lr"] = kind_of_lr(0.5)
        optimizer = zoo.make(case, groups)
        run(optimizer, problem, SCHEDULERS[kind], steps=STEPS // 2)
        ends.append(zoo.final(problem))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-12)


MOMENTA = [("OneCycleLR-momentum", case) for case in METHODS if cycles(case)]
RESUMED = [*itertools.product(SCHEDULERS, METHODS), *MOMENTA]


@pytest.mark.parametrize("kind, case", RESUMED, ids=str)
def test_a_run_is_resumed_within_the_schedule(kind, case):
    """Optimizer and scheduler saved after seven steps, loaded by fresh ones."""
    schedule = CYCLES["OneCycleLR"] if "momentum" in kind else SCHEDULERS[kind]
    ends = []
    for resume in (False, True):
        problem = zoo.problem()
        optimizer = zoo.make(case, problem.params)
        scheduler = schedule(optimizer)
        for step in range(STEPS // 2):
            if resume and step == 7:
                saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
                optimizer = zoo.make(case, problem.params)
                scheduler = schedule(optimizer)
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            problem.fill(step)
            optimizer.step()
            advance(scheduler, problem)
        ends.append((zoo.final(problem), top(optimizer)))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_warm_restarts_with_the_safeguard():
    """d never falls, also where the rate jumps back to 1, and each cycle ends lower."""
    problem = zoo.problem()
    optimizer = prodigy.Prodigy(problem.params, safeguard_warmup=True, d0=1e-2)
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 20)
    ds, losses, rates = [optimizer.get_d()], [], []
    for step in range(80):
        rates.append(optimizer.param_groups[0]["lr"])
        problem.fill(step)
        optimizer.step()
        scheduler.step()
        ds.append(optimizer.get_d())
        losses.append(problem.loss())
    assert [k for k, lr in enumerate(rates) if lr == 1] == [0, 20, 40, 60]
    assert ds == sorted(ds) and ds[-1] > 10 * ds[0]
    ends = losses[19::20]
    assert ends == sorted(ends, reverse=True)


# GradScaler ------------------------------------------------------------------------------------


def scaled_run(case, scaler, poisoned=(), steps=12):
    """Least squares of a small network in float32, clipped; (network, optimizer, scheduler).

    The loss of the poisoned steps is infinite: the scaler skips them, and so does the scheduler.
    """
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    optimizer = zoo.make(case, [{"params": part.parameters()} for part in (net[0], net[2])])
    scheduler = lr_scheduler.StepLR(optimizer, 3, 0.5)
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(steps, 5, 4, generator=generator)
    for step in range(steps + len(poisoned)):
        batch = data[step - sum(k < step for k in poisoned)] if step not in poisoned else data[0]
        loss = (net(batch[:, :3]) - batch[:, 3:]).square().mean()
        if step in poisoned:
            loss = loss + float("inf") * net[2].bias.sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:
            scheduler.step()
    return net, optimizer, scaler


@every_method
def test_a_scaled_run_is_the_plain_run(case):
    """Scales are powers of two: exact in float32, also while they grow."""
    plain, one, _ = scaled_run(case, torch.amp.GradScaler("cpu", enabled=False))
    net, two, scaler = scaled_run(
        case, torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3))
    assert scaler.get_scale() == 8.0 * 2**4
    assert_equal(values(net), values(plain))
    assert_same_state(one.state_dict(), two.state_dict())


@every_method
def test_skipped_steps_leave_no_trace(case):
    """Infinite losses at the first step, twice in a row and at the last: as if never drawn."""
    plain, one, _ = scaled_run(case, torch.amp.GradScaler("cpu", init_scale=2.0**10))
    net, two, scaler = scaled_run(
        case, torch.amp.GradScaler("cpu", init_scale=2.0**10), poisoned=(0, 5, 6, 15))
    assert scaler.get_scale() == 2.0**6
    assert_equal(values(net), values(plain))
    assert_same_state(one.state_dict(), two.state_dict())


# torch.distributed.checkpoint ------------------------------------------------------------------


def layered(case, seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    return net, zoo.make(case, [{"params": part.parameters()} for part in net])


def walk(net, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = p.detach() - torch.randn(p.shape, generator=generator)
        optimizer.step()


FORMS = {"flat": StateDictOptions(flatten_optimizer_state_dict=True),
         "full": StateDictOptions(full_state_dict=True, cpu_offload=True)}
# torch refuses "full" for optimizers without tensors, its own SGD included
FORMED = [(form, case) for form in FORMS for case in METHODS
          if not (form == "flat" and hasattr(case.cls, "base"))
          and not (form == "full" and case.cls is prodigy.SGD)]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form, case", FORMED, ids=str)
def test_checkpoints_in_every_form_fill_a_fresh_optimizer(form, case, tmp_path):
    """Names of tensors alone, as pipelines save them; and whole, on the CPU."""
    net, optimizer = layered(case)
    walk(net, optimizer, range(7))
    saved = get_optimizer_state_dict(net, optimizer, options=FORMS[form])
    dcp.save({"net": net.state_dict(), "optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    walk(net, optimizer, range(7, 12))

    fresh, again = layered(case, seed=1)
    state = {"net": fresh.state_dict(),
             "optimizer": get_optimizer_state_dict(fresh, again, options=FORMS[form])}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    fresh.load_state_dict(state["net"])
    set_optimizer_state_dict(fresh, again, state["optimizer"], options=FORMS[form])
    walk(fresh, again, range(7, 12))
    assert_equal(values(fresh), values(net))
    assert_same_state(again.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("case", [case for case in METHODS if hasattr(case.cls, "base")],
                         ids=str)
def test_a_wrapper_notices_what_flattening_loses(case):
    """torch asks the wrapper alone for names of tensors, and drops those of its base."""
    net, optimizer = layered(case)
    walk(net, optimizer, range(3))
    flat = get_optimizer_state_dict(net, optimizer, options=FORMS["flat"])
    fresh, again = layered(case)
    with pytest.raises(ValueError, match="flatten_optimizer_state_dict"):
        set_optimizer_state_dict(fresh, again, flat, options=FORMS["flat"])
