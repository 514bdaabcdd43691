"""What every class must do whatever its method: the behaviours that users ask for.

bfloat16 weights, non-finite gradients, untouched ``p.grad``, all-or-nothing steps, lr = 0, and
hyperparameters, rates and clocks of their own for every parameter group.
"""

import contextlib
import itertools
from functools import partial

import pytest
import schedulefree
import torch
import zoo

import prodigy
from prodigy import Prodigy, SGDScheduleFree

ESTIMATORS = [prodigy.DAdaptSGD, prodigy.DAdaptAdaGrad, prodigy.DAdaptAdam, prodigy.Prodigy]
# torch's own AdamW refuses a tensor lr with foreach, and capturable on a CPU
OWN_METHODS = [case for case in zoo.METHODS if "torch" not in case.name]
OWN_METHODS += [zoo.wrapper_case("prodigy.AdamW", prodigy.AdamW, None, {})]
FREEZERS = [case for case in OWN_METHODS if case.estimates_d or case.schedule_free]
FREEZERS = FREEZERS[:-1]  # under lr = 0 the averages of a classical base go on, as in torch.optim
every_own_method = pytest.mark.parametrize("case", OWN_METHODS, ids=str)
every_method = pytest.mark.parametrize("case", zoo.METHODS, ids=str)
every_case = pytest.mark.parametrize("case", zoo.CASES, ids=str)
every_freezer = pytest.mark.parametrize("case", FREEZERS, ids=str)
every_estimator = pytest.mark.parametrize("cls", ESTIMATORS)


def parameters(shapes=((4, 3), (5,)), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes
    ]


def pull(params, step=0, target=0.3, noise=0.1):
    """p.grad of |p - target|^2/2 with noise that depends on the step and the index alone."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        xi = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (p.detach().double() - target + noise * xi).to(p.dtype)


def tensors(optimizer):
    """Every tensor an optimizer keeps, by a name, and every number of its groups."""
    found = {}

    def visit(name, value):
        if isinstance(value, torch.Tensor):
            found[name] = value.detach().clone()
        elif isinstance(value, dict):
            for key, entry in value.items():
                visit(f"{name}.{key}", entry)
        elif isinstance(value, (list, tuple)):
            for key, entry in enumerate(value):
                visit(f"{name}[{key}]", entry)
        elif isinstance(value, (int, float)):
            found[name] = torch.tensor(float(value), dtype=torch.float64)

    for i, group in enumerate(optimizer.param_groups):
        params = group["params"]
        visit(f"group{i}", {k: v for k, v in group.items() if k != "params"})
        for j, p in enumerate(params):
            visit(f"p{i}.{j}", p)
            owners = [optimizer, getattr(optimizer, "base", optimizer)]
            for owner in owners:
                visit(f"{type(owner).__name__}.state{i}.{j}", dict(owner.state.get(p, {})))
    return found


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def relative(a, b):
    a = torch.cat([t.detach().double().flatten() for t in a])
    b = torch.cat([t.detach().double().flatten() for t in b])
    return float((a - b).norm() / b.norm())


# 1. d starts from bfloat16 weights as from float32 ---------------------------------------------

STARTS = {
    "normal": lambda generator: 0.3 * torch.randn(64, 64, generator=generator),
    "far from zero": lambda generator: 0.1 + 0.3 * torch.rand(64, 64, generator=generator),
    "ones": lambda generator: torch.ones(64, 64),
    "zeros": lambda generator: torch.zeros(64, 64),
}


def steps_until_d_starts(make, dtype, noise, start, seed=0, most=800):
    """How many steps on |A(W - S)|^2/2, 64 x 64, with gradient noise, until d > 1e-3."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(64, 64, generator=generator) / 8
    solution = torch.randn(64, 64, generator=generator)
    p = torch.nn.Parameter(STARTS[start](generator).to(dtype))
    optimizer = make([p])
    for k in range(1, most + 1):
        g = a.T @ (a @ (p.detach().float() - solution))
        p.grad = (g + noise * torch.randn(64, 64, generator=generator)).to(dtype)
        optimizer.step()
        if optimizer.get_d() > 1e-3:
            return k
    return float("inf")


PLUS = prodigy.ProdigyPlusScheduleFree
STARTERS = {"Prodigy": prodigy.Prodigy, "DAdaptAdam": prodigy.DAdaptAdam, "plus": PLUS,
              "plus, nearest": partial(PLUS, stochastic_rounding=False),
              "plus, without Schedule-Free": partial(PLUS, use_schedulefree=False)}


@pytest.mark.parametrize("name", STARTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("noise", [0, 3, 30])
def test_d_starts_from_low_precision_weights_as_from_float32(noise, start, dtype, name):
    for seed in range(3):
        wide, narrow = (steps_until_d_starts(STARTERS[name], kind, noise, start, seed)
                        for kind in (torch.float32, dtype))
        assert wide < 500
        assert wide / 2 <= narrow <= 2 * wide


@pytest.mark.parametrize("cls", [prodigy.DAdaptSGD, prodigy.DAdaptAdaGrad])
@pytest.mark.parametrize("start", STARTS)
def test_d_of_the_other_estimators_starts_too(cls, start):
    wide = steps_until_d_starts(cls, torch.float32, 0, start)
    narrow = steps_until_d_starts(cls, torch.bfloat16, 0, start)
    assert wide < 800
    assert wide / 2 <= narrow <= 2 * wide


@pytest.mark.parametrize(
    "cls, name, options",
    [
        (prodigy.Adam, "exp_avg_sq", {}),
        (prodigy.AdamW, "exp_avg_sq", {}),
        (prodigy.RMSprop, "square_avg", {"alpha": 0.999}),
        (prodigy.DAdaptAdam, "exp_avg_sq", {}),
        (prodigy.Prodigy, "exp_avg_sq", {}),
        (prodigy.Prodigy, "s", {}),
        (prodigy.AdamWScheduleFree, "exp_avg_sq", {}),
        (prodigy.RAdamScheduleFree, "exp_avg_sq", {}),
    ],
)
def test_averages_beside_bfloat16_weights_decay(cls, name, options):
    """0.999 times a bfloat16 number rounds back to it; the averages must be wider than that."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = cls([p], **options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    start = optimizer.state[p][name].abs().max().item()
    for _ in range(700):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    beta = 0.999**0.5 if name == "s" else 0.999
    end = optimizer.state[p][name].abs().max().item()
    assert end == pytest.approx(start * beta**700, rel=1e-3)


@every_own_method  # a foreign base computes in the parameter's own dtype
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("foreach", [False, True])
def test_low_precision_weights_follow_the_float32_run(case, dtype, foreach):
    """Same gradients for both; the narrow weights are the wide ones, rounded once."""
    start = zoo.problem(torch.float32, start=0.3)
    for p in start.params:
        p.data.copy_(p.data.to(dtype))
    wide = [torch.nn.Parameter(p.detach().clone()) for p in start.params]
    narrow = [torch.nn.Parameter(p.detach().to(dtype)) for p in start.params]
    exact = dict(stochastic_rounding=False) if "ProdigyPlus" in case.name else {}
    optimizers = zoo.make(case, wide), zoo.make(case, narrow, foreach=foreach, **exact)
    for step in range(40):
        pull(narrow, step)
        for p, q in zip(wide, narrow):
            p.grad = q.grad.to(torch.float32)
        for optimizer in optimizers:
            optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(narrow, [s.to(dtype) for s in start.params]))
    spacing = torch.finfo(dtype).eps
    for p, q in zip(wide, narrow):
        assert (p - q.float()).abs().max() <= spacing * p.abs().max() + 1e-6


# 2. non-finite gradients -----------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("foreach", [False, True])
def test_non_finite_entries_count_as_missing(case, foreach):
    """The run with holes equals the run with zeros in their place, bit for bit."""
    bad = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=torch.float64)
    runs, count = [], 0
    for broken in (True, False):
        problem = zoo.problem(holes=case.holes)
        optimizer = zoo.make(case, problem.params, foreach=foreach)
        for step in range(12):
            problem.fill(step)
            for i, p in enumerate(problem.params):
                if p.grad is not None and step in (0, 3, 4) and i in (0, 2, 3):
                    dense = p.grad if p.dim() < 4 else p.grad.permute(0, 2, 3, 1)
                    entries = dense.view(-1)
                    entries[: min(3, p.numel())] = bad[: p.numel()] if broken else 0.0
                    count += min(3, p.numel()) * broken
            optimizer.step()
        runs.append(tensors(optimizer))
        assert optimizer.nonfinite() == count * broken
    assert count > 0
    runs = [{k: v for k, v in run.items() if "nonfinite" not in k} for run in runs]
    assert_same(*runs)
    assert all(value.isfinite().all() for name, value in runs[0].items() if "growth" not in name)


@every_method
def test_training_goes_on_after_a_gradient_without_a_finite_entry(case):
    problem = zoo.problem()
    optimizer = zoo.make(case, problem.params)
    for step in range(3):
        problem.fill(step)
        optimizer.step()
    for p in problem.params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    before = zoo.final(problem)
    for step in range(4, 40):
        problem.fill(step)
        optimizer.step()
    after = zoo.final(problem)
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    assert optimizer.nonfinite() == sum(p.numel() for p in problem.params)


@every_method
def test_a_step_that_gradscaler_skips_changes_nothing(case):
    params = parameters(dtype=torch.float32)
    optimizer = zoo.make(case, params)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def backward(factor):
        optimizer.zero_grad()
        loss = sum((p - 0.3).square().sum() for p in params) * factor
        scaler.scale(loss).backward()

    backward(1.0)
    scaler.step(optimizer)
    scaler.update()
    before = tensors(optimizer)
    backward(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert_same(before, tensors(optimizer))
    assert scaler.get_scale() < 4.0
    for _ in range(6):
        backward(1.0)
        scaler.step(optimizer)
        scaler.update()
    assert not torch.equal(before["p0.0"], params[0])


# 5. gradients are read only, steps are all or nothing ------------------------------------------


@every_case
@pytest.mark.parametrize("foreach", [False, True])
def test_gradients_are_never_written(case, foreach):
    problem = zoo.problem(holes=case.holes)
    optimizer = zoo.make(case, problem.params, foreach=foreach)
    for step in range(4):
        problem.fill(step)
        if step == 2:
            problem.params[0].grad.view(-1)[0] = float("nan")
        grads = [p.grad for p in problem.params]
        kept = [None if g is None else g.clone() for g in grads]
        optimizer.step()
        for p, g, old in zip(problem.params, grads, kept):
            assert p.grad is g
            assert g is None or torch.equal(g.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("modes", [{}, {"foreach": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("method", [
    partial(prodigy.AdamW, weight_decay=0.1), prodigy.Prodigy, prodigy.SGDScheduleFree,
    partial(prodigy.AdamWScheduleFree, weight_decay=0.1), prodigy.DoG,
])
def test_a_gradient_in_its_parameters_own_memory_counts_as_it_was(method, modes):
    """That of |x|^2/2 is x: it moves with the parameter while the step still reads it."""
    ends = []
    for take in (torch.Tensor.detach, torch.Tensor.clone):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
        optimizer = method([p], lr=0.1, **modes)
        for _ in range(5):
            p.grad = take(p.detach())
            optimizer.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "base",
    [
        lambda params: schedulefree.AdamWScheduleFreeReference(params, weight_decay=0.1),
        lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.1, maximize=True),
    ],
)
def test_the_wrapper_hides_gradients_from_a_base_that_overwrites_them(base):
    params = parameters()
    inner = base(params)
    if hasattr(inner, "train"):
        inner.train()
    optimizer = prodigy.ScheduleFreeWrapper(inner, weight_decay_at_y=0.1)
    pull(params)
    grads = [(p.grad, p.grad.clone()) for p in params]
    optimizer.step()
    for p, (g, old) in zip(params, grads):
        assert p.grad is g
        assert torch.equal(g, old)


def spoil(p, how):
    if how == "sparse":
        p.grad = torch.zeros_like(p).to_sparse()
    elif how == "shape":
        p.data = p.data[:1].clone()
    elif how == "dtype":
        p.data = p.data.float()


@every_method
@pytest.mark.parametrize("how", ["sparse", "shape", "dtype"])
def test_one_bad_gradient_stops_the_step_before_anything_is_written(case, how):
    params = parameters(((4, 3), (5,), (2, 2)))
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = zoo.make(case, groups)
    for step in range(2):
        pull(params, step)
        optimizer.step()
    pull(params, 2)
    spoil(params[-1], how)
    before = tensors(optimizer)
    with pytest.raises(RuntimeError, match="sparse|must match"):
        optimizer.step()
    assert_same(before, tensors(optimizer))


# 6. lr = 0 -------------------------------------------------------------------------------------

RATES = {
    "float": (lambda lr: lr, {}),
    "tensor": (lambda lr: torch.tensor(lr), {}),
    "device tensor": (lambda lr: torch.tensor(lr), {"capturable": True}),
}
every_rate = pytest.mark.parametrize("kind", RATES)


def weights_of(case):
    """The weight-decay argument of a method, switched on."""
    wrapper = case.cls.__name__ == "build"
    return {"weight_decay_at_y" if wrapper else "weight_decay": 0.1}


@every_own_method
@every_rate
@pytest.mark.parametrize("foreach", [False, True])
def test_lr_zero_means_no_motion_from_the_first_step(case, kind, foreach):
    convert, modes = RATES[kind]
    params = parameters()
    start = [p.detach().clone() for p in params]
    groups = [{"params": params, "lr": convert(0.0)}]
    optimizer = zoo.make(case, groups, **weights_of(case), **modes, foreach=foreach)
    for step in range(4):
        pull(params, step)
        optimizer.step()
        for p, x in zip(params, start):
            assert torch.equal(p, x)
    optimizer.param_groups[0]["lr"] = convert(0.1)
    for step in range(4, 12):
        pull(params, step)
        optimizer.step()
    for p, x in zip(params, start):
        assert p.isfinite().all()
        assert not torch.equal(p, x)


@every_own_method
@every_rate
def test_lr_zero_freezes_one_group_in_mid_run_and_lets_the_others_go_on(case, kind):
    """Stale momentum, decay and averaging weights move nothing; d goes on for the others."""
    convert, modes = RATES[kind]
    params = parameters()
    groups = [{"params": [params[0]]}, {"params": [params[1]]}]
    optimizer = zoo.make(case, groups, **weights_of(case), **modes)
    first = optimizer.param_groups[0]
    for group in optimizer.param_groups:
        group["lr"] = convert(0.5)
    for step in range(5):
        pull(params, step)
        optimizer.step()
    held = [p.detach().clone() for p in params]
    first["lr"] = convert(0.0)
    for step in range(5, 10):
        pull(params, step)
        optimizer.step()
        assert torch.equal(params[0], held[0])
    assert not torch.equal(params[1], held[1])
    if case.schedule_free:
        x = [p.detach().clone() for p in params]
        optimizer.eval()
        average = params[0].detach().clone()
        optimizer.train()
        torch.testing.assert_close(params[0].detach(), x[0], rtol=1e-12, atol=1e-14)
        assert average.isfinite().all()
    first["lr"] = convert(0.5)
    pull(params, 10)
    optimizer.step()
    assert not torch.equal(params[0], held[0])


@every_freezer
def test_frozen_steps_leave_no_trace_whatever_lr_is_made_of(case):
    """Five frozen steps in the middle: the run goes on as if they had not been, for every kind."""
    ends = []
    for frozen, kind in itertools.product((0, 5), RATES):
        convert, modes = RATES[kind]
        params = parameters()
        optimizer = zoo.make(case, params, **modes)
        schedule = [0.5] * 5 + [0.0] * frozen + [0.25] * 5
        for step, lr in enumerate(schedule):
            pull(params, step if step < 5 else step - frozen)
            optimizer.param_groups[0]["lr"] = convert(lr)
            optimizer.step()
        if case.schedule_free:
            optimizer.eval()
        ends.append([p.detach().clone() for p in params])
    for end in ends[1:]:
        assert relative(end, ends[0]) < 1e-12


@pytest.mark.parametrize("cls", ESTIMATORS)
@every_rate
def test_a_frozen_group_has_no_say_in_the_others_d(cls, kind):
    """Frozen from the start on, with gradients of its own: d as without that group."""
    convert, modes = RATES[kind]
    trajectories = []
    for with_frozen in (True, False):
        params = parameters()
        groups = [{"params": [params[0]], "lr": convert(1.0)}]
        groups += [{"params": [params[1]], "lr": convert(0.0)}] * with_frozen
        optimizer = cls(groups, d0=1e-3, **modes)
        trajectory = []
        for step in range(20):
            pull(params, step)
            optimizer.step()
            trajectory.append(optimizer.get_d())
        trajectories.append(trajectory)
    assert trajectories[0] == pytest.approx(trajectories[1], rel=1e-12)
    assert trajectories[0][-1] > 1e-3


@pytest.mark.parametrize("cls", ESTIMATORS)
@every_rate
def test_a_group_that_was_frozen_wakes_with_the_d_of_the_others(cls, kind):
    convert, modes = RATES[kind]
    params = parameters()
    groups = [
        {"params": [params[0]], "lr": convert(1.0)},
        {"params": [params[1]], "lr": convert(0.0)},
    ]
    optimizer = cls(groups, d0=1e-3, **modes)
    for step in range(20):
        pull(params, step)
        optimizer.step()
    assert optimizer.get_d(1) == optimizer.get_d(0) > 1e-3
    optimizer.param_groups[1]["lr"] = convert(1.0)
    for step in range(20, 25):
        pull(params, step)
        optimizer.step()
        assert optimizer.get_d(1) == optimizer.get_d(0)


@every_method
def test_schedules_may_start_at_zero(case):
    params = parameters()
    start = [p.detach().clone() for p in params]
    optimizer = zoo.make(case, params)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, k / 5))
    for step in range(10):
        pull(params, step)
        optimizer.step()
        scheduler.step()
        if step == 0:
            assert all(torch.equal(p, x) for p, x in zip(params, start))
    assert all(p.isfinite().all() for p in params)
    assert not torch.equal(params[0], start[0])


@every_method
@pytest.mark.parametrize("foreach", [False, True])
def test_all_zero_gradients_are_harmless(case, foreach):
    params = parameters()
    start = [p.detach().clone() for p in params]
    optimizer = zoo.make(case, params, foreach=foreach)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    if "AdamW" not in case.name or case.cls is prodigy.AdamWScheduleFree:  # no decay by default
        assert all(torch.equal(p, x) for p, x in zip(params, start))
    if case.estimates_d:
        assert optimizer.get_d() == pytest.approx(case.kwargs.get("d0", 1e-6))
    for step in range(10):
        pull(params, step)
        optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert not torch.equal(params[0], start[0])


@every_method
def test_steps_without_any_gradient_are_harmless(case):
    params = parameters()
    start = [p.detach().clone() for p in params]
    optimizer = zoo.make(case, params)
    for _ in range(3):
        optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(params, start))
    pull(params)
    optimizer.step()
    for p in params:
        p.grad = None
    before = tensors(optimizer)
    optimizer.step()
    if case.cls.__name__ != "build":
        assert_same(before, tensors(optimizer))
    assert torch.equal(before["p0.0"], params[0])


# 7. parameter groups ---------------------------------------------------------------------------


def descend(optimizer, fill, steps=40):
    """Steps on fill(step); the d of every step."""
    trajectory = []
    for step in range(steps):
        fill(step)
        optimizer.step()
        trajectory.append(optimizer.get_d())
    return trajectory


@every_estimator
@pytest.mark.parametrize("ratio", [0.1, 0.5, 7.0, 1000.0])
@pytest.mark.parametrize("schedule", [lambda k: 1.0, lambda k: 1 / (1 + k / 10)])
def test_rates_of_any_ratio_equal_one_problem_in_other_units(cls, ratio, schedule):
    """Groups with rates gamma rho_g are one group with rate gamma in the units u = x / rho_g.

    For DAdaptSGD, whose steps are linear in the gradient, u = x / sqrt(rho_g).
    """
    rates = [1 / max(1.0, ratio), ratio / max(1.0, ratio)]
    top, rho = 1.0, rates
    scale = [r**0.5 if cls is prodigy.DAdaptSGD else r for r in rho]
    kwargs = dict(d0=1e-3, **({} if cls is prodigy.DAdaptSGD else {"eps": 1e-30}))

    params = parameters()
    optimizer = cls([{"params": [p], "lr": lr} for p, lr in zip(params, rates)], **kwargs)
    units = [torch.nn.Parameter(p.detach() / a) for p, a in zip(parameters(), scale)]
    together = cls(units, lr=top, **kwargs)
    targets = [0.3, -0.7]

    def gradient(x, i, step):
        generator = torch.Generator().manual_seed(100 * step + i)
        xi = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return x - targets[i] + 0.1 * xi

    def fill_x(step):
        for i, p in enumerate(params):
            p.grad = gradient(p.detach(), i, step)
        for group, lr in zip(optimizer.param_groups, rates):
            group["lr"] = lr * schedule(step)

    def fill_u(step):
        for i, (u, a) in enumerate(zip(units, scale)):
            u.grad = a * gradient(a * u.detach(), i, step)
        together.param_groups[0]["lr"] = top * schedule(step)

    if cls is prodigy.DAdaptAdaGrad:  # alpha_0 = 1e-6 in units of g^2 scales with the gradient
        fill_x(0), fill_u(0)
        optimizer.update(), together.update()
        for u, a in zip(units, scale):
            square = u.grad.square() + 1e-6 * a**2
            together.state[u]["alphak"].copy_(square)
            s = together.state[u]["sk"]
            u.data.copy_(together.state[u]["x0"] - s / square.sqrt())
        g = together.param_groups[0]
        state = [together.state[u] for u in units]
        for name in ("sksq_weighted", "gsq_weighted"):
            g[name] = sum(((s["sk"].square()) / s["alphak"].sqrt()).sum() for s in state)
        g["d"] = torch.tensor(1e-3, dtype=torch.float64)
        for group in optimizer.param_groups:
            group["d"] = torch.tensor(1e-3, dtype=torch.float64)
    a = descend(optimizer, fill_x)
    b = descend(together, fill_u)
    assert a == pytest.approx(b, rel=1e-9)
    assert a[-1] > 2e-3
    assert relative(params, [u.detach() * c for u, c in zip(units, scale)]) < 1e-9


@every_estimator
def test_split_groups_are_optimizers_of_their_own(cls):
    params, others = parameters(), parameters()
    options = [dict(lr=1.0, d0=1e-3), dict(lr=0.5, d0=1e-2, growth_rate=1.2)]
    split = cls(
        [dict(o, params=[p]) for o, p in zip(options, params)], split_groups=True
    )
    apart = [cls([p], **o) for o, p in zip(options, others)]
    for step in range(30):
        pull(params, step)
        pull(others, step)
        split.step()
        for i, one in enumerate(apart):
            one.step()
            assert split.get_d(i) == pytest.approx(one.get_d(), rel=1e-14)
    assert split.get_d(0) != split.get_d(1)
    assert relative(params, others) < 1e-14


OWN = [
    (prodigy.SGD, "momentum", 0.5),
    (prodigy.SGD, "weight_decay", 0.3),
    (prodigy.SGD, "dampening", 0.5),
    (prodigy.SGD, "nesterov", False),
    (prodigy.SGD, "maximize", True),
    (prodigy.Adagrad, "lr_decay", 0.3),
    (prodigy.Adagrad, "eps", 0.1),
    (prodigy.Adagrad, "initial_accumulator_value", 0.5),
    (prodigy.Adagrad, "weight_decay", 0.3),
    (prodigy.RMSprop, "alpha", 0.5),
    (prodigy.RMSprop, "eps", 0.1),
    (prodigy.RMSprop, "momentum", 0.5),
    (prodigy.RMSprop, "centered", True),
    (prodigy.Adam, "betas", (0.5, 0.7)),
    (prodigy.Adam, "eps", 0.1),
    (prodigy.Adam, "amsgrad", True),
    (prodigy.Adam, "decoupled_weight_decay", True),
    (prodigy.AdamW, "weight_decay", 0.3),
    (prodigy.AdamW, "maximize", True),
    (prodigy.DAdaptSGD, "momentum", 0.5),
    (prodigy.DAdaptSGD, "weight_decay", 0.3),
    (prodigy.DAdaptAdaGrad, "eps", 0.1),
    (prodigy.DAdaptAdaGrad, "momentum", 0.5),
    (prodigy.DAdaptAdaGrad, "weight_decay", 0.3),
    (prodigy.DAdaptAdam, "betas", (0.5, 0.7)),
    (prodigy.DAdaptAdam, "eps", 0.1),
    (prodigy.DAdaptAdam, "decouple", True),
    (prodigy.DAdaptAdam, "use_bias_correction", True),
    (prodigy.DAdaptAdam, "layer_scale", 0.5),
    (prodigy.Prodigy, "betas", (0.5, 0.7)),
    (prodigy.Prodigy, "beta3", 0.5),
    (prodigy.Prodigy, "eps", 0.1),
    (prodigy.Prodigy, "decouple", False),
    (prodigy.Prodigy, "use_bias_correction", True),
    (prodigy.Prodigy, "safeguard_warmup", True),
    (prodigy.Prodigy, "slice_p", 3),
    (prodigy.Prodigy, "d_coef", 3.0),
    (prodigy.Prodigy, "growth_rate", 1.01),
    (prodigy.SGDScheduleFree, "momentum", 0.5),
    (prodigy.SGDScheduleFree, "warmup_steps", 7),
    (prodigy.SGDScheduleFree, "r", 2.0),
    (prodigy.SGDScheduleFree, "weight_lr_power", 0.5),
    (prodigy.SGDScheduleFree, "schedulefree_c", 3.0),
    (prodigy.AdamWScheduleFree, "betas", (0.5, 0.7)),
    (prodigy.AdamWScheduleFree, "eps", 0.1),
    (prodigy.AdamWScheduleFree, "weight_decay", 0.3),
    (prodigy.AdamWScheduleFree, "inner_momentum", 0.5),
    (prodigy.RAdamScheduleFree, "silent_sgd_phase", False),
    (prodigy.RAdamScheduleFree, "betas", (0.5, 0.7)),
]


@pytest.mark.parametrize("cls, name, value", OWN, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("which", [0, 1])
def test_every_group_reads_its_own_hyperparameters(cls, name, value, which):
    """An option of one group moves that group's parameters alone (through d, the others' too)."""
    common = {"weight_decay": 0.1, "lr": 0.1, "foreach": False}
    common |= {"momentum": 0.9, "nesterov": True} if cls is prodigy.SGD else {}
    common |= {"split_groups": True, "d0": 1e-2} if cls in ESTIMATORS else {}
    if name == "dampening":
        common |= {"nesterov": False}
    if name == "r":
        common |= {"warmup_steps": 3}
    ends = []
    for special in (False, True):
        params = parameters()
        groups = [{"params": [p]} for p in params]
        if special:
            groups[which][name] = value
        optimizer = cls(groups, **common)
        for step in range(12):
            pull(params, step)
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * (1 + step) if cls not in ESTIMATORS else 1.0 / (1 + step)
            optimizer.step()
        ends.append(params)
    assert torch.equal(ends[0][1 - which], ends[1][1 - which])
    assert not torch.equal(ends[0][which], ends[1][which])


@pytest.mark.parametrize("capturable", [False, True])
def test_groups_with_one_d_keep_their_own_growth(capturable):
    """growth_rate and d_coef of a group apply to what that group makes of the common dhat."""
    params = parameters(((4, 3), (5,), (3,)))
    options = [{}, {"growth_rate": 1.01}, {"d_coef": 0.5}]
    groups = [dict(option, params=[p]) for option, p in zip(options, params)]
    optimizer = Prodigy(groups, capturable=capturable)
    trajectory = [[], [], []]
    for step in range(30):
        pull(params, step)
        optimizer.step()
        for i in range(3):
            trajectory[i].append(optimizer.get_d(i))
    free, slow, half = torch.tensor(trajectory, dtype=torch.float64)
    assert (slow[2:] <= slow[1:-1] * 1.01 * (1 + 1e-12)).all() and slow[0] == 1e-6
    assert (slow <= free).all() and slow[-1] < free[-1]
    grown = half > 1e-6
    assert grown.any()
    torch.testing.assert_close(half[grown], free[grown] / 2, rtol=1e-9, atol=0)


@every_own_method
def test_capturable_changes_no_number(case):
    """Step counts and books on the device, groups with different options: the same run."""
    ends = []
    for on in (False, True):
        params = parameters()
        groups = [{"params": [params[0]], "lr": 0.5}, {"params": [params[1]], "lr": 0.1}]
        if case.cls is Prodigy:
            groups[1] |= {"growth_rate": 1.5, "d_coef": 0.7}
        optimizer = zoo.make(case, groups, capturable=on)
        for step in range(20):
            pull(params, step)
            optimizer.step()
        ends.append(params)
    assert relative(*ends) < 1e-12


@every_method
def test_empty_groups_take_no_part(case):
    ends = []
    for empty in (True, False):
        params = parameters()
        groups = [{"params": []}] * empty + [{"params": params}]
        optimizer = zoo.make(case, groups)
        if empty:
            optimizer.add_param_group({"params": [], "lr": 10.0})
        for step in range(10):
            pull(params, step)
            optimizer.step()
        assert all(optimizer.effective_lr(i) >= 0 for i in range(len(optimizer.param_groups)))
        ends.append(params)
    assert relative(*ends) < 1e-14


@pytest.mark.parametrize("case", [c for c in zoo.METHODS if c not in zoo.ONE_SIZE], ids=str)
def test_a_late_group_has_its_own_clock(case):
    """Bias corrections and averaging weights of a group added later start from 1."""
    if case.estimates_d:
        case = zoo.Case("split", case.cls, dict(case.kwargs))
    params, others = parameters(), parameters()
    alone = case.cls in (*ESTIMATORS, prodigy.DAdaptResetting)
    split = {"split_groups": True} if alone else {}
    bias = {"use_bias_correction": True} if case.cls in ESTIMATORS[2:] else {}
    together = zoo.make(case, [params[0]], **split, **bias)
    first = zoo.make(case, [others[0]], **bias)
    if case.cls.__name__ == "build" and case.cls.base is prodigy.Prodigy:
        together = prodigy.ScheduleFreeWrapper(Prodigy([params[0]], split_groups=True))
    for step in range(7):
        pull(params[:1], step)
        pull(others[:1], step)
        together.step()
        first.step()
    together.add_param_group({"params": [params[1]]})
    second = zoo.make(case, [others[1]], **bias)
    for step in range(7, 14):
        pull(params, step)
        pull(others, step)
        together.step()
        first.step()
        second.step()
    assert relative(params, others) < 1e-13


@every_estimator
@pytest.mark.parametrize("capturable", [False, True])
def test_a_late_group_inherits_d(cls, capturable):
    params = parameters()
    optimizer = cls([params[0]], d0=1e-3, capturable=capturable)
    for step in range(15):
        pull(params[:1], step)
        optimizer.step()
    d = optimizer.get_d()
    assert d > 1e-3
    optimizer.add_param_group({"params": [params[1]]})
    assert optimizer.get_d(1) == d
    start = params[1].detach().clone()
    pull(params, 15)
    optimizer.step()
    assert optimizer.get_d(1) == optimizer.get_d(0) >= d
    moved = (params[1] - start).abs().max().item()
    assert moved > 0.05 * d


def test_a_late_group_in_low_precision_inherits_d():
    params = parameters() + parameters(((6,),), dtype=torch.bfloat16)
    optimizer = Prodigy(params[:2], d0=1e-3)
    for step in range(15):
        pull(params[:2], step)
        optimizer.step()
    optimizer.add_param_group({"params": params[2:]})
    assert optimizer.get_d(1) == pytest.approx(optimizer.get_d(0), rel=1e-6)
    for step in range(15, 20):
        pull(params, step)
        optimizer.step()
        assert optimizer.get_d(1) == pytest.approx(optimizer.get_d(0), rel=1e-6)


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_groups_that_share_d_must_start_from_one_d0(cls):
    def groups():
        return [{"params": [p], "d0": d0} for p, d0 in zip(parameters(), (1e-6, 1e-4))]

    with pytest.raises(ValueError, match="d0 must be the same"):
        cls(groups())
    assert cls(groups(), split_groups=True).get_d(1) == pytest.approx(1e-4)


# 10. arguments, numbers to read, nothing printed -----------------------------------------------


@every_method
def test_maximize_is_the_mirror_of_minimize(case):
    params, others = parameters(), parameters()
    down, up = zoo.make(case, params), zoo.make(case, others, maximize=True)
    for step in range(10):
        pull(params, step)
        for p, q in zip(params, others):
            q.grad = -p.grad
        down.step()
        up.step()
    assert relative(params, others) < 1e-14


@every_method
def test_the_effective_rate_is_a_float_and_follows_lr(case):
    params = parameters()
    optimizer = zoo.make(case, params)
    for step in range(12):
        pull(params, step)
        optimizer.step()
    full = optimizer.effective_lr()
    assert type(full) is float and full > 0
    optimizer.param_groups[0]["lr"] /= 2
    assert optimizer.effective_lr() == pytest.approx(full / 2)
    if case.estimates_d:
        assert type(optimizer.get_d()) is float
        assert optimizer.get_d() == float(optimizer.param_groups[0]["d"])


@every_method
def test_nothing_is_printed(case, capsys):
    params = parameters()
    optimizer = zoo.make(case, params, **weights_of(case))
    pull(params)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == ""


@every_method
def test_closures_get_gradients_under_an_outer_no_grad(case):
    params = parameters()
    optimizer = zoo.make(case, params)

    def closure():
        optimizer.zero_grad()
        loss = sum((p - 0.3).square().sum() for p in params)
        loss.backward()
        return loss

    start = params[0].detach().clone()
    for context in (torch.no_grad, contextlib.nullcontext) * 5:
        with context():
            loss = optimizer.step(closure)
        assert loss.requires_grad and loss > 0
    assert not torch.equal(params[0], start)


def test_bodies_never_touch_parameters_without_a_gradient():
    params = parameters()
    optimizer = SGDScheduleFree(params, weight_decay=0.5)
    pull(params[:1])
    held = params[1].detach().clone()
    optimizer.step()
    optimizer.eval()
    assert torch.equal(params[1], held)
    assert params[1] not in optimizer.state or not optimizer.state[params[1]]


def test_a_base_that_refuses_leaves_the_wrapper_as_it_was():
    class Moody(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["moody"]:
                raise ArithmeticError("not today")
            return super().step(closure)

    params = parameters()
    optimizer = prodigy.ScheduleFreeWrapper(Moody([{"params": params, "moody": False}], lr=0.1))
    pull(params)
    optimizer.step()
    pull(params, 1)
    before, grads = tensors(optimizer), [p.grad for p in params]
    optimizer.param_groups[0]["moody"] = True
    with pytest.raises(ArithmeticError):
        optimizer.step()
    optimizer.param_groups[0]["moody"] = False
    after = tensors(optimizer)
    assert all(p.grad is g for p, g in zip(params, grads))
    assert optimizer.param_groups[0]["lr"] == 0.1
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-14, atol=1e-14, msg=name)
