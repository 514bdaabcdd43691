"""Our classes against the reference packages in float64, and where we differ on purpose.

Parity: 60 steps on the zoo's noisy least squares, parameters of mixed shapes, several sets of
options; the parameters in train mode, those in eval mode, and d after every step agree to 1e-8.
"""

import contextlib
import copy
import io
import re
from pathlib import Path

import dadaptation
import prodigyopt
import pytest
import schedulefree
import torch
import zoo

import prodigy
from prodigy.lab import textbook
from prodigy.pieces import join

REFERENCED = [case for case in zoo.CASES if case.reference]
FIRST = {case.name.split("-")[0]: case for case in reversed(REFERENCED)}  # of every class
LOST = [case for name, case in FIRST.items() if "DoG" not in name]  # dog stops with an assertion


def quietly(build, *args, **kwargs):
    """Call a reference's constructor without its prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return build(*args, **kwargs)


# parity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REFERENCED, ids=str)
def test_agrees_with_its_reference(case):
    ours, theirs = zoo.run(case), zoo.run(case, reference=True)
    start = zoo.final(zoo.problem())
    assert zoo.error(start, zoo.final(theirs.problem)) > 1e-3  # it has moved
    assert zoo.error(zoo.final(ours.problem), zoo.final(theirs.problem)) < case.rtol
    if case.estimates_d:
        torch.testing.assert_close(ours.d, theirs.d, rtol=case.rtol, atol=0)
        grows = case.kwargs.get("d0") != 10.0  # with beta1 = 0 only a constant d can agree
        assert bool(theirs.d[-1] > 1.5 * theirs.d[0]) == grows
    if case.schedule_free:
        ours.optimizer.eval()
        theirs.optimizer.eval()
        assert zoo.error(zoo.final(ours.problem), zoo.final(theirs.problem)) < case.rtol


def test_every_class_of_the_family_is_in_the_zoo():
    for name in prodigy.__all__:
        kinds = [case for case in zoo.CASES if case.name.split("-")[0] == name]
        assert len(kinds) >= 3
        assert any(case.schedule for case in kinds), f"{name}: no case with a scheduler"
        assert any(case.name.startswith(name) for case in zoo.METHODS)


def three_sequences(base_class, base_kwargs, steps, *, beta=0.9, r=0, power=2, holes=False):
    """Schedule-Free over any base, x, y and z kept apart: the base never knows.

    Weighs z_{t+1} by t^r max(lr)^power; a parameter without a gradient keeps its three points.
    """
    problem = zoo.problem(holes=holes)
    z = [p.detach().clone() for p in problem.params]
    x = [p.detach().clone() for p in problem.params]
    base = base_class(z, **base_kwargs)
    total = 0.0
    for step in range(steps):
        problem.fill(step)
        for p, q in zip(problem.params, z):
            q.grad = p.grad
        base.step()
        weight = (step + 1) ** r * base_kwargs["lr"] ** power
        total += weight
        with torch.no_grad():
            for y, a, b in zip(problem.params, x, z):
                if y.grad is not None:
                    a.lerp_(b, weight / total)
                    y.copy_(beta * a + (1 - beta) * b)
    return zoo.final(problem), torch.cat([a.flatten() for a in x])


@pytest.mark.parametrize("store_x", [False, True])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("base", ["AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_wrapper_agrees_with_three_sequences_over_any_base(base, holes, store_x):
    kwargs = dict(lr=0.05, weight_decay=0.1)
    base = getattr(torch.optim, base)
    y, x = three_sequences(base, kwargs, zoo.STEPS, beta=0.8, r=1, holes=holes)
    problem = zoo.problem(holes=holes)
    own = dict(momentum=0.8, r=1, store_x=store_x)
    optimizer = prodigy.ScheduleFreeWrapper(base(problem.params, **kwargs), **own)
    zoo.run(optimizer, problem=problem)
    assert zoo.error(zoo.final(problem), y) < 1e-8
    optimizer.eval()
    assert zoo.error(zoo.final(problem), x) < 1e-8


# departures (those of ProdigyPlusScheduleFree are in test_plus.py) ------------------------------


def test_every_departure_has_its_test():
    source = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))
    names = [row.test for row in zoo.DEPARTURES]
    assert len(set(names)) == len(names)
    for name in names:
        assert f"def {name}(" in source, name
    here = re.findall(r"^def (test_departure_\w+)\(", Path(__file__).read_text(), re.M)
    assert set(here) <= set(names)


def box_and_two(box_kwargs, **options):
    """Prodigy's printed box, our class and prodigyopt on one vector: (x, d) after 30 steps."""
    box = dict(box_kwargs)
    pair = []
    for build in (prodigy.Prodigy, prodigyopt.Prodigy):
        problem = zoo.problem(shapes=[(8,)])
        run = zoo.run(build(problem.params, **options), 30, problem=problem)
        pair.append((zoo.final(problem), run.d[-1]))
    problem = zoo.problem(shapes=[(8,)])
    p, steps = problem.params[0], iter(range(31))

    def grad(x):
        p.data.copy_(x)
        problem.fill(next(steps))
        return p.grad

    trace = textbook.prodigy_adam(grad, zoo.final(problem), 30, **box)
    return (trace.x[-1], trace.d[-1]), *pair


def test_departure_prodigy_eps(record_property):
    """At a visible eps we follow the box and prodigyopt does not; the difference is O(eps)."""
    options = dict(eps=0.1, d0=1e-2)
    box, ours, theirs = box_and_two(options, **options)
    assert zoo.error(ours[0], box[0]) < 1e-12
    assert abs(ours[1] / box[1] - 1) < 1e-12
    assert zoo.error(theirs[0], box[0]) > 1e-4

    def difference(eps):
        runs = []
        for build in (prodigy.Prodigy, prodigyopt.Prodigy):
            problem = zoo.problem()
            zoo.run(build(problem.params, eps=eps), problem=problem)
            runs.append(zoo.final(problem))
        return zoo.error(*runs)

    default, tenth = difference(1e-8), difference(1e-9)
    record_property("relative difference from prodigyopt at eps=1e-8", default)
    print(f"relative difference from prodigyopt after 60 steps, eps=1e-8: {default:.1e}")
    assert 0 < default < 1e-5
    assert default / tenth == pytest.approx(10, rel=0.1)


def test_departure_prodigy_beta1_zero():
    options = dict(betas=(0.0, 0.99), d0=1e-2, eps=1e-24)
    box, ours, theirs = box_and_two(options, **options)
    assert zoo.error(ours[0], box[0]) < 1e-12
    assert zoo.error(theirs[0], box[0]) > 1e-3


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (prodigy.Prodigy, prodigyopt.Prodigy),
        (prodigy.DAdaptAdam, dadaptation.DAdaptAdam),
        (prodigy.DAdaptAdaGrad, dadaptation.DAdaptAdaGrad),
    ],
)
def test_departure_zero_gradient(ours, theirs):
    more = {} if ours is prodigy.DAdaptAdaGrad else dict(decouple=True, d0=0.1)
    moved, counted = [], []
    for build in (ours, theirs):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = quietly(build, [p], weight_decay=0.1 if more else 0.0, **more)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        counted.append(optimizer.param_groups[0]["k"])
        moved.append(bool((p != 1).all()))
    assert counted == [1, 0]
    assert moved == [bool(more), False]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (prodigy.Prodigy, prodigyopt.Prodigy),
        (prodigy.DAdaptSGD, dadaptation.DAdaptSGD),
        (prodigy.DAdaptAdam, dadaptation.DAdaptAdam),
    ],
)
def test_departure_missing_gradient(ours, theirs):
    """100 |u - 1| + |v - 1|, where u has no gradient in every second or third step."""

    def largest_d(build, every):
        u, v = (torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
        optimizer, d = build([u, v], d0=1e-3), []
        for k in range(200):
            u.grad = None if k % every == every - 1 else 100 * (u.detach() - 1).sign()
            v.grad = (v.detach() - 1).sign()
            optimizer.step()
            d.append(float(optimizer.param_groups[0]["d"]))
        return max(d)

    for every in (2, 3):
        usual = largest_d(ours, every=1000)
        assert largest_d(ours, every) < 1.5 * usual < 5
        assert largest_d(theirs, every) > 3 * usual
        if ours is not prodigy.DAdaptAdam:  # which proves no bound
            D = 1 if ours is prodigy.Prodigy else 2 * 2**0.5
            assert largest_d(ours, every) <= D < largest_d(theirs, every)


def test_departure_dadapt_sgd_first_gradient():
    first = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for gradient in (torch.zeros_like(first), None):
        for build in (prodigy.DAdaptSGD, dadaptation.DAdaptSGD):
            p = torch.nn.Parameter(torch.ones_like(first))
            p.grad = gradient
            optimizer = build([p], d0=1e-2)
            if build is dadaptation.DAdaptSGD:
                with pytest.raises(ZeroDivisionError):
                    optimizer.step()
                continue
            optimizer.step()
            assert torch.equal(p, torch.ones_like(p))
            p.grad = first.clone()
            optimizer.step()
            torch.testing.assert_close(p, 1 - 1e-2 * first / 5)  # g_0 is the first one not zero


def test_departure_dadapt_sgd_weight_decay():
    """From x_0 = 0, where decay adds nothing to g_0, we agree; elsewhere g_0 has lambda x_0."""
    for start, same in ((0.0, True), (1.0, False)):
        ends = []
        for build in (prodigy.DAdaptSGD, dadaptation.DAdaptSGD):
            problem = zoo.problem(start=start)
            zoo.run(build(problem.params, weight_decay=0.1, d0=1e-2), problem=problem)
            ends.append(zoo.final(problem))
        assert (zoo.error(*ends) < 1e-8) == same
    problem = zoo.problem()
    optimizer = prodigy.DAdaptSGD(problem.params, weight_decay=0.1)
    problem.fill(0)
    g0 = torch.cat([(p.grad + 0.1 * p).detach().flatten() for p in problem.params]).norm()
    optimizer.step()
    torch.testing.assert_close(optimizer.param_groups[0]["g0_norm"], g0)


SIZES = [
    (prodigy.Prodigy, prodigyopt.Prodigy),
    (prodigy.DAdaptSGD, dadaptation.DAdaptSGD),
    (prodigy.DAdaptAdaGrad, dadaptation.DAdaptAdaGrad),
    (prodigy.DAdaptAdam, dadaptation.DAdaptAdam),
]


@pytest.mark.parametrize(("ours", "theirs"), SIZES)
def test_departure_frozen_group(ours, theirs):
    momentum = {} if ours in (prodigy.Prodigy, prodigy.DAdaptAdam) else dict(momentum=0.9)
    for build in (ours, theirs):
        problem = zoo.problem(shapes=[(3,), (4,)])
        optimizer = build(zoo.deal(problem.params, ({}, {})), d0=0.1, **momentum)
        zoo.run(optimizer, 10, problem=problem)
        optimizer.param_groups[1]["lr"] = 0.0
        before = problem.params[1].detach().clone()
        zoo.run(optimizer, 2, problem=problem)
        assert torch.equal(problem.params[1], before) == (build is ours)


@pytest.mark.parametrize(("ours", "theirs"), SIZES)
@pytest.mark.parametrize("ratio", [0.1, 3.0])
def test_departure_lr_ratios(ours, theirs, ratio):
    """Two rates are one problem with one rate after x = rho u (x = sqrt(rho) u for SGD)."""
    exponent = 0.5 if ours is prodigy.DAdaptSGD else 1.0
    tiny = {} if ours is prodigy.DAdaptSGD else dict(eps=1e-24)
    rates = (1.0, ratio)
    scales = [(lr / max(rates)) ** exponent for lr in rates]

    problem = zoo.problem(shapes=[(3,), (2, 2)])
    groups = [dict(params=[p], lr=lr) for p, lr in zip(problem.params, rates)]
    optimizer = ours(groups, d0=1e-3, **tiny)
    ours_d = zoo.run(optimizer, problem=problem).d

    twin = zoo.problem(shapes=[(3,), (2, 2)])
    us = [torch.nn.Parameter(p.detach() / c) for p, c in zip(twin.params, scales)]
    single = ours(us, lr=max(rates), d0=1e-3, **tiny)
    if ours is prodigy.DAdaptAdaGrad:  # its a_0 = 1e-6 is in the units of g^2
        for u, c in zip(us, scales):
            single.state[u]["alphak"] = torch.full_like(u, 1e-6 * c**2)
    for step in range(zoo.STEPS):
        for u, p, c in zip(us, twin.params, scales):
            p.data.copy_(c * u)
        twin.fill(step)
        for u, p, c in zip(us, twin.params, scales):
            u.grad = c * p.grad
        single.step()
    for u, p, c in zip(us, problem.params, scales):
        torch.testing.assert_close(p.data, c * u.data, rtol=1e-8, atol=0)
    assert single.get_d() == pytest.approx(float(ours_d[-1]), rel=1e-8)

    problem = zoo.problem(shapes=[(3,), (2, 2)])
    groups = [dict(params=[p], lr=lr) for p, lr in zip(problem.params, rates)]
    problem.fill(0)
    if ours is prodigy.DAdaptAdaGrad:
        zoo.run(theirs(groups, d0=1e-3, **tiny), problem=problem)
        equal = zoo.problem(shapes=[(3,), (2, 2)])
        zoo.run(theirs(equal.params, d0=1e-3, **tiny), problem=equal)
        assert torch.equal(zoo.final(problem), zoo.final(equal))  # the second rate has no effect
    else:
        with pytest.raises(RuntimeError, match="different lr"):
            theirs(groups, d0=1e-3, **tiny).step()


@pytest.mark.parametrize(("ours", "theirs"), [SIZES[0], SIZES[3]])
def test_departure_betas_per_group(ours, theirs):
    """exp_avg_sq after one step is (1 - beta2) (d) g^2 with the group's own beta2."""
    for build in (ours, theirs):
        problem = zoo.problem(shapes=[(3,), (3,)])
        groups = [dict(params=[p], betas=(0.9, b)) for p, b in zip(problem.params, (0.999, 0.9))]
        optimizer = build(groups, d0=0.1)
        problem.fill(0)
        g = problem.params[1].grad.clone()
        optimizer.step()
        v = optimizer.state[problem.params[1]]["exp_avg_sq"]
        d2 = 0.01 if ours is prodigy.Prodigy else 1.0
        assert torch.allclose(v, 0.1 * d2 * g**2) == (build is ours)
        assert torch.allclose(v, 0.001 * d2 * g**2) == (build is theirs)


@pytest.mark.parametrize(("ours", "theirs"), [SIZES[0], SIZES[3]])
def test_departure_late_group_clock(ours, theirs):
    """Adam's correction makes the first step of a parameter d lr sign(g), in a late group too."""
    for build in (ours, theirs):
        problem = zoo.problem(shapes=[(3,)])
        late = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = build(problem.params, d0=0.1, use_bias_correction=True, growth_rate=1.0)
        zoo.run(optimizer, 20, problem=problem)
        optimizer.add_param_group(dict(params=[late]))
        late.grad = torch.full_like(late, 3.0)
        d = float(optimizer.param_groups[0]["d"])
        optimizer.step()
        moved = (1 - late.detach()) / d
        assert torch.allclose(moved, torch.ones_like(moved), rtol=1e-6) == (build is ours)


def test_departure_bfloat16_starves_d():
    wide, narrow, theirs = (
        zoo.problem(dtype) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    builds = (prodigy.Prodigy, prodigy.Prodigy, prodigyopt.Prodigy)
    d = [zoo.run(b(p.params), problem=p).d for b, p in zip(builds, (wide, narrow, theirs))]
    assert d[0][-1] > 1e-2
    assert 0.5 < d[1][-1] / d[0][-1] < 2
    assert d[2][-1] < 1e-5


ROUNDED = ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "SGDScheduleFree", "AdamWScheduleFree"]


@pytest.mark.parametrize("name", ROUNDED)
def test_departure_bfloat16_is_float32(name):
    """The same bfloat16 gradients: our bfloat16 run is the float32 run, the reference's is not."""
    package = schedulefree if "ScheduleFree" in name else torch.optim
    ends = {}
    for build in (getattr(prodigy, name), getattr(package, name)):
        for dtype in (torch.float32, torch.bfloat16):
            p = torch.nn.Parameter(torch.linspace(-1, 2, 30).bfloat16().to(dtype))
            optimizer = build([p], lr=1e-3)
            getattr(optimizer, "train", lambda: None)()
            generator = torch.Generator().manual_seed(0)
            for _ in range(20):
                p.grad = torch.randn(30, generator=generator).bfloat16().to(dtype)
                optimizer.step()
            low = optimizer.state[p].get("residual")
            ends[build, dtype] = join(p.detach(), low).float()
    wide, narrow, theirs_wide, theirs_narrow = ends.values()
    assert torch.equal(wide, narrow)
    assert not torch.equal(theirs_wide, theirs_narrow)


@pytest.mark.parametrize(("ours", "theirs"), SIZES)
def test_departure_host_reads(ours, theirs):
    for build in (ours, theirs):
        p = torch.nn.Parameter(torch.empty(3, device="meta"))
        p.grad = torch.empty_like(p)
        error = RuntimeError if build is theirs else None
        with pytest.raises(error) if error else contextlib.nullcontext():
            build([p]).step()


@pytest.mark.parametrize(("ours", "theirs"), [SIZES[0], SIZES[3]])
def test_departure_no_prints(ours, theirs, capsys):
    for build in (ours, theirs):
        build([torch.nn.Parameter(torch.ones(2))], decouple=True, weight_decay=0.1)
        assert bool(capsys.readouterr().out) == (build is theirs)


@pytest.mark.parametrize(
    "case",
    [
        zoo.ours_and(dadaptation.DAdaptSGD)("decay", weight_decay=0.1),
        zoo.ours_and(dadaptation.DAdaptAdaGrad)("decay", weight_decay=0.1),
        zoo.ours_and(dadaptation.DAdaptAdam)("decay", weight_decay=0.1),
        zoo.ours_and(prodigyopt.Prodigy)("decay", weight_decay=0.1, decouple=False),
        zoo.ours_and(schedulefree.SGDScheduleFree)("decay", weight_decay=0.1),
        zoo.ours_and(schedulefree.AdamWScheduleFree)("plain"),
        zoo.ours_and(schedulefree.RAdamScheduleFree)("decay", weight_decay=0.1),
    ],
    ids=str,
)
def test_departure_gradient_untouched(case):
    for reference in (False, True):
        problem = zoo.problem()
        build = zoo.make_reference if reference else zoo.make
        optimizer = build(case, problem.params)
        problem.fill(0)
        before = [p.grad.clone() for p in problem.params]
        optimizer.step()
        same = all(torch.equal(p.grad, g) for p, g in zip(problem.params, before))
        assert same != reference


@pytest.mark.parametrize("case", LOST, ids=str)
def test_departure_nonfinite(case):
    """One NaN: ours counts it and goes on as if that entry were 0; the reference is lost."""
    for reference in (False, True):
        problem = zoo.problem()
        build = zoo.make_reference if reference else zoo.make
        optimizer = build(case, problem.params)
        problem.fill(0)
        problem.params[0].grad[0, 0] = float("nan")
        optimizer.step()
        problem.fill(1)
        optimizer.step()
        assert zoo.final(problem).isfinite().all() != reference
        if not reference:
            assert optimizer.nonfinite() == 1


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_departure_sparse_and_complex(name):
    for build in (getattr(prodigy, name), getattr(torch.optim, name)):
        ours = build is getattr(prodigy, name)
        p = torch.nn.Parameter(torch.ones(4))
        optimizer = build([p], lr=0.1)
        p.grad = torch.sparse_coo_tensor([[1]], [2.0], (4,), check_invariants=True)
        with pytest.raises(RuntimeError, match="sparse") if ours else contextlib.nullcontext():
            optimizer.step()
        assert torch.equal(p, torch.ones(4)) == ours
        q = torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))
        with pytest.raises(TypeError, match="complex") if ours else contextlib.nullcontext():
            build([q], lr=0.1)


POINTS = [case for case in FIRST.values() if case.schedule_free]


@pytest.mark.parametrize("case", POINTS, ids=str)
def test_departure_schedulefree_starts_in_train_mode(case):
    problem = zoo.problem()
    problem.fill(0)
    zoo.make(case, problem.params).step()
    theirs = case.reference(problem.params, **case.reference_kwargs)
    with pytest.raises(Exception, match="train mode"):
        theirs.step()


@pytest.mark.parametrize("case", POINTS, ids=str)
def test_departure_schedulefree_zero_lr(case):
    for reference in (False, True):
        run = zoo.run(case, 10, reference=reference)
        for group in run.optimizer.param_groups:
            group["lr"] = 0.0
        run.optimizer.eval()
        before = zoo.final(run.problem)
        run.optimizer.train()
        zoo.run(run.optimizer, 5, problem=run.problem)
        run.optimizer.eval()
        assert (zoo.error(zoo.final(run.problem), before) < 1e-12) != reference


@pytest.mark.parametrize("case", POINTS, ids=str)
def test_departure_schedulefree_beta_change(case):
    """x at the end of training must not depend on the beta set just before eval()."""
    ends = {}
    for reference in (False, True):
        for changed in (False, True):
            run = zoo.run(case, 10, reference=reference)
            set_beta(run.optimizer, 0.5 if changed else 0.9)
            run.optimizer.eval()
            ends[reference, changed] = zoo.final(run.problem)
    assert zoo.error(ends[False, True], ends[False, False]) < 1e-12
    keeps_x = "Wrapper" in case.name  # its reference form stores x
    assert (zoo.error(ends[True, True], ends[True, False]) > 1e-3) != keeps_x


def set_beta(optimizer, beta):
    for group in optimizer.param_groups:
        own = group.get("schedule_free", group)
        if "betas" in own:
            own["betas"] = (beta, own["betas"][1])
        elif "schedule_free" in group or isinstance(optimizer, torch.optim.Optimizer):
            own["momentum"] = beta
        else:
            optimizer.momentum = beta


@pytest.mark.parametrize("case", [c for c in POINTS if "Wrapper" not in c.name], ids=str)
def test_departure_schedulefree_late_group(case):
    """A group added while training comes out of eval() holding its x: (y - (1-beta) z)/beta."""
    for reference in (False, True):
        run = zoo.run(case, 10, reference=reference)
        late = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        run.optimizer.add_param_group(dict(params=[late]))
        run.problem.params.append(late)
        for _ in range(8):
            late.grad = late.detach() - 5
            run.optimizer.step()
        y, z = late.detach().clone(), run.optimizer.state[late]["z"].clone()
        run.optimizer.eval()
        assert torch.allclose(late, (y - 0.1 * z) / 0.9) != reference


@pytest.mark.parametrize("case", [c for c in POINTS if "Wrapper" not in c.name], ids=str)
def test_departure_schedulefree_idle_group(case):
    for reference in (False, True):
        problem = zoo.problem(shapes=[(3,), (4,)])
        two = zoo.Case("", case.cls, case.kwargs, case.reference, case.kwargs, groups=({}, {}))
        optimizer = (zoo.make_reference if reference else zoo.make)(two, problem.params)
        problem.fill(0)
        problem.params[1].grad = None
        optimizer.step()
        assert [group["k"] for group in optimizer.param_groups] == [1, 1 if reference else 0]


def test_departure_schedulefree_beta_zero():
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="Momentum"):
        schedulefree.SGDScheduleFree([p], momentum=0.0)
    theirs = schedulefree.AdamWScheduleFree([p], betas=(0.0, 0.999))
    theirs.train()
    p.grad = torch.ones_like(p)
    theirs.step()
    with pytest.raises(ZeroDivisionError):
        theirs.eval()
    with pytest.raises(ValueError, match="store_x=True"):
        prodigy.SGDScheduleFree([p], momentum=0.0)
    with pytest.raises(ValueError, match="store_x=True"):
        prodigy.AdamWScheduleFree([p], betas=(0.0, 0.999))
    problem, plain = zoo.problem(), zoo.problem()
    optimizer = prodigy.SGDScheduleFree(problem.params, lr=0.3, momentum=0.0, store_x=True)
    iterates = []
    sgd = torch.optim.SGD(plain.params, lr=0.3)
    zoo.run(sgd, 10, problem=plain, each=lambda *_: iterates.append(zoo.final(plain)))
    zoo.run(optimizer, 10, problem=problem)
    assert zoo.error(zoo.final(problem), iterates[-1]) < 1e-12
    optimizer.eval()
    assert zoo.error(zoo.final(problem), torch.stack(iterates).mean(0)) < 1e-12


FAILING_BASES = [torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop, torch.optim.NAdam]


@pytest.mark.parametrize("base", [*FAILING_BASES, dadaptation.DAdaptSGD])
def test_departure_wrapper_bases(base):
    for wrap in (
        prodigy.ScheduleFreeWrapper,
        schedulefree.ScheduleFreeWrapper,
        schedulefree.ScheduleFreeWrapperReference,
    ):
        problem = zoo.problem(shapes=[(3, 2)])
        optimizer = wrap(base(problem.params))
        optimizer.train()
        problem.fill(0)
        fails = wrap is not prodigy.ScheduleFreeWrapper
        with pytest.raises(KeyError) if fails else contextlib.nullcontext():
            optimizer.step()


def test_departure_wrapper_missing_gradient():
    """The fast form of schedulefree leaves such a parameter alone, as we do."""
    shapes = [(3, 2), (4,)]
    ends = []
    for wrap in (
        prodigy.ScheduleFreeWrapper,
        schedulefree.ScheduleFreeWrapper,
        schedulefree.ScheduleFreeWrapperReference,
    ):
        problem = zoo.problem(shapes=shapes)
        optimizer = wrap(torch.optim.SGD(problem.params, lr=0.3))
        optimizer.train()
        zoo.run(optimizer, 5, problem=problem)
        before = problem.params[1].detach().clone()
        problem.fill(5)
        problem.params[1].grad = None
        optimizer.step()
        is_third = wrap is schedulefree.ScheduleFreeWrapperReference
        assert torch.allclose(problem.params[1], before, rtol=1e-12) != is_third
        ends.append(zoo.final(problem))
    assert zoo.error(ends[0], ends[1]) < 1e-12


def test_departure_wrapper_layouts():
    for p in (torch.ones((), dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64).t()):
        for wrap in (prodigy.ScheduleFreeWrapper, schedulefree.ScheduleFreeWrapper):
            q = torch.nn.Parameter(p.clone())
            optimizer = wrap(torch.optim.SGD([q], lr=0.1))
            optimizer.train()
            q.grad = torch.ones_like(q)
            fails = wrap is schedulefree.ScheduleFreeWrapper
            with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
                optimizer.step()
                assert torch.allclose(q, torch.full_like(q, 0.9))


def test_departure_wrapper_is_an_optimizer():
    problem = zoo.problem(shapes=[(3, 2)])
    theirs = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(problem.params, lr=0.1))
    with pytest.raises(TypeError, match="Optimizer"):
        torch.optim.lr_scheduler.LambdaLR(theirs, zoo.halves)
    assert not any("mode" in key for group in theirs.state_dict()["param_groups"] for key in group)
    base = torch.optim.SGD(problem.params, lr=0.1)
    ours = prodigy.ScheduleFreeWrapper(base, momentum=0.7)
    torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 0.5)
    assert base.param_groups[0]["lr"] == 0.05
    ours.eval()
    saved = copy.deepcopy(ours.state_dict())
    other = prodigy.ScheduleFreeWrapper(torch.optim.SGD(problem.params, lr=0.1))
    other.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="train()"):
        other.step()
    assert other.param_groups[0]["schedule_free"]["momentum"] == 0.7
