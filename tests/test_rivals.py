"""The rivals against their boxes, the public packages, and what their papers claim for them."""

import copy
import math

import dog
import jax
import mechanic_pytorch
import numpy as np
import optax
import pytest
import torch
import zoo

import prodigy
from prodigy.lab import problems, textbook
from prodigy.rivals import polynomial_average

STEPS = 60
WITH_LOSS = [prodigy.ScheduleFreePolyak, prodigy.ScheduleFreePlus]


def quadratic(scale=1.0):
    return problems.quadratic([0.1 * scale, 0.5 * scale, scale, 2 * scale], x0=[1.0, -2, 0.5, 1.5],
                              seed=3)


def descend(optimizer_of, problem, steps, each=None):
    """(all points where gradients were taken, the optimizer) of a run with the loss."""
    p = torch.nn.Parameter(problem.x0.clone())
    optimizer = optimizer_of([p])
    points = []

    def closure():
        p.grad = problem.grad(p.detach())
        return problem.value(p.detach())

    for step in range(steps):
        points.append(p.detach().clone())
        optimizer.step(closure)
        if each:
            each(step, p, optimizer)
    return torch.stack(points), optimizer


def close(a, b, rtol=1e-8):
    return zoo.error(torch.as_tensor(a), torch.as_tensor(b)) < rtol


# distance over gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("cls", [prodigy.DoG, prodigy.LDoG, prodigy.DoWG, prodigy.COCOB])
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_factor_on_the_loss_changes_nothing(cls, factor):
    options = {} if cls is prodigy.DoWG else {"eps": 1e-24}
    one, _ = descend(lambda p: cls(p, **options), quadratic(), STEPS)
    other, _ = descend(lambda p: cls(p, **options), quadratic(factor), STEPS)
    assert close(other, one)
    assert not close(one[-1], one[0], 1e-6)


def upwards(cls, steps, **options):
    """Distances from x_0 when the gradient is 1 everywhere: the minimiser is infinitely far."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = cls([p], **options)
    distances = []
    for _ in range(steps):
        p.grad = -torch.ones_like(p)
        optimizer.step()
        distances.append(p.item())
    return np.array(distances)


def test_dowg_grows_geometrically_where_dog_does_not():
    """q = 1 + sqrt(1 - 1/q^2), which is q^3 = q^2 + q + 1; DoG's factor is 1 + 1/sqrt(t)."""
    fast = upwards(prodigy.DoWG, 60, reps_rel=1e-12)
    slow = upwards(prodigy.DoG, 60, reps_rel=1e-12, eps=1e-30)
    assert fast[-1] / fast[-2] == pytest.approx(1.839286755214161, rel=1e-9)
    t = np.arange(2, 61)
    assert slow[1:] / slow[:-1] == pytest.approx(1 + 1 / np.sqrt(t), rel=1e-9)


def test_ldog_is_dog_for_every_tensor_by_itself():
    ours, theirs = zoo.problem(), zoo.problem()
    zoo.run(prodigy.LDoG(ours.params, reps_rel=0.01), STEPS, problem=ours)
    groups = [{"params": [p]} for p in theirs.params]
    zoo.run(prodigy.DoG(groups, reps_rel=0.01), STEPS, problem=theirs)
    assert close(zoo.final(ours), zoo.final(theirs), 1e-12)
    together = zoo.problem()
    zoo.run(prodigy.DoG(together.params, reps_rel=0.01), STEPS, problem=together)
    assert not close(zoo.final(ours), zoo.final(together), 1e-3)


def test_the_effective_rate_is_distance_over_gradients():
    points, optimizer = descend(lambda p: prodigy.DoG(p, lr=0.7), quadratic(), 20)
    gradients = [quadratic().grad(x).square().sum() for x in points]
    distance = max((x - points[0]).norm() for x in points)
    expected = 0.7 * float(distance) / math.sqrt(float(sum(gradients)) + 1e-8)
    assert optimizer.effective_lr() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cls", [prodigy.DoG, prodigy.LDoG, prodigy.DoWG])
def test_a_first_gradient_of_zero_does_not_stop_the_method(cls):
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = cls([p], reps_rel=0.1)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, torch.ones_like(p))
    for _ in range(30):
        p.grad = p.detach() - 3
        optimizer.step()
    assert (p - 3).abs().max() < 1


@pytest.mark.parametrize("name", ["DoG", "LDoG"])
def test_departure_dog_missing_gradient(name):
    def step(build):
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        params[0].grad = torch.ones(2)
        build(params).step()
        return params

    moved, still = step(getattr(prodigy, name))
    assert not torch.equal(moved, torch.ones(2)) and torch.equal(still, torch.ones(2))
    with pytest.raises((AttributeError, TypeError), match="NoneType"):
        step(getattr(dog, name))


def optax_run(transform, problem, steps):
    with jax.enable_x64(True):
        x = jax.numpy.asarray(problem.x0.numpy())
        state = transform.init(x)
        for _ in range(steps):
            g = jax.numpy.asarray(problem.grad(torch.tensor(np.array(x))).numpy())
            updates, state = transform.update(g, state, x)
            x = optax.apply_updates(x, updates)
        return torch.tensor(np.array(x))


@pytest.mark.parametrize("reps_rel", [1e-6, 1e-2])
def test_dowg_agrees_with_optax(reps_rel):
    problem = quadratic()
    first = reps_rel * (1 + float(problem.x0.norm()))
    theirs = optax_run(optax.contrib.dowg(1.0, first**2, eps=1e-30), problem, STEPS)
    points, _ = descend(lambda p: prodigy.DoWG(p, reps_rel=reps_rel), problem, STEPS + 1)
    assert close(points[-1], theirs)
    assert not close(theirs, problem.x0, 1e-2)


def test_polynomial_average_agrees_with_the_authors_package():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    theirs = dog.PolynomialDecayAverager(model, gamma=8.0)
    ours = torch.optim.swa_utils.AveragedModel(model, avg_fn=polynomial_average(8.0))
    for _ in range(10):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        theirs.step()
        ours.update_parameters(model)
    assert close(ours.module.weight.detach(), theirs.averaged_model.weight.detach(), 1e-12)


# coin betting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["constant", "signs", "uniform", "trend"])
def test_cocobs_wealth_is_exponential_in_the_squared_sum(kind):
    """For |g_i| <= L, L + R >= L exp(theta^2/(2 L (L+G)) - 1/2 sum |g_i|/(L + G_{i-1})).

    The sum is about log(1 + G/L): wealth, and with it the regret's bound, follows theta^2.
    """
    L, size, steps = 2.0, 50, 300
    generator = torch.Generator().manual_seed(0)
    uniform = 2 * torch.rand(steps, size, generator=generator, dtype=torch.float64) - 1
    signs = {"constant": 0 * uniform + 1, "signs": uniform.sign(), "uniform": uniform,
             "trend": (uniform - 0.3).clamp(-1, 1)}[kind]
    p = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = prodigy.COCOB([p], alpha=0.0, eps=L)
    lost = 0.0
    for row in signs:
        p.grad = L * row
        lost = lost + p.grad.abs() / (L + optimizer.state[p].get("grad_norm_sum", 0.0))
        optimizer.step()
        s = optimizer.state[p]
        G, theta, R = s["grad_norm_sum"], s["sum_negative_gradients"], s["reward"]
        bound = L * (theta.square() / (2 * L * (L + G)) - lost / 2).exp()
        assert (L + R >= bound * (1 - 1e-12)).all()
        assert ((p - s["x0"]).abs() <= (L + R) / L).all()  # never more than all it has


def test_cocob_warms_up_for_alpha_steps():
    """While G + L < alpha L the denominator is alpha L^2: steps of 1/alpha where g is constant."""
    distances = upwards(prodigy.COCOB, 5, alpha=1000.0)
    assert distances == pytest.approx(np.arange(1, 6) / 1000, rel=2e-2)


def test_cocob_does_not_see_a_constant_lr():
    one, _ = descend(lambda p: prodigy.COCOB(p, eps=1e-24), quadratic(), STEPS)
    other, _ = descend(lambda p: prodigy.COCOB(p, eps=1e-24, lr=0.1), quadratic(), STEPS)
    assert close(one, other)


# Mechanic --------------------------------------------------------------------------------------


def mechanic(base=torch.optim.SGD, lr=1.0, **options):
    return lambda params: prodigy.Mechanic(base(params, lr=lr), **options)


def test_mechanic_equals_its_box():
    problem = quadratic()
    options = dict(betas=(0.9, 0.99, 0.999), s_init=1e-8, eps=1e-8)
    points, optimizer = descend(mechanic(s_decay=0.1, **options), problem, STEPS)
    box = textbook.mechanic(problem.grad, problem.x0, STEPS - 1, decay=0.1, **options,
                            update=lambda k, x, g: -g)
    assert close(points, box.x)
    assert box.s[-1].sum() > 100 * box.s[1].sum()
    plain, _ = descend(mechanic(s_decay=0.0, **options), problem, STEPS)
    assert not close(points, plain, 1e-5)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("options", [{}, dict(s_init=1e-3, betas=(0.9, 0.99), eps=1e-6)])
def test_mechanic_agrees_with_its_package(base, options):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # the package keeps betas in it
    try:
        ours, theirs = zoo.problem(), zoo.problem()
        options = dict(options, s_decay=0.0)
        reference = mechanic_pytorch.mechanize(base, store_delta=True, **options)
        zoo.run(mechanic(base, **options)(ours.params), STEPS, problem=ours)
        zoo.run(reference(theirs.params, lr=1.0), STEPS, problem=theirs)
    finally:
        torch.set_default_dtype(before)
    assert close(zoo.final(ours), zoo.final(theirs))
    assert not close(zoo.final(theirs), zoo.final(zoo.problem()), 0.1)


def test_departure_mechanic_decay_point():
    """The package decays with x_t + u_t, the box and we with x_t."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        problem = quadratic()
        ours, _ = descend(mechanic(s_decay=0.1), problem, STEPS)
        reference = mechanic_pytorch.mechanize(torch.optim.SGD, store_delta=True, s_decay=0.1)
        theirs, _ = descend(lambda p: reference(p, lr=1.0), problem, STEPS)
    finally:
        torch.set_default_dtype(before)
    betas = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
    box = textbook.mechanic(problem.grad, problem.x0, STEPS - 1, decay=0.1, betas=betas,
                            update=lambda k, x, g: -g)
    assert close(ours, box.x) and not close(theirs, box.x, 1e-5)


def test_mechanic_finds_the_scale_of_any_base_rate():
    problem = quadratic()
    gaps = []
    for lr in (1e-3, 1.0, 1e3):
        points, optimizer = descend(mechanic(lr=lr), problem, 400)
        gaps.append(float(problem.gap(points[-1])))
        assert 1e-2 < optimizer.effective_lr() < 10
    assert max(gaps) < 0.05 * problem.gap(problem.x0)


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.RMSprop, prodigy.AdamW,
                                  prodigy.Prodigy, prodigy.DAdaptSGD, torch.optim.Adagrad])
def test_mechanic_saves_copies_and_resumes_over_any_base(base, tmp_path):
    straight, first, second = zoo.problem(), zoo.problem(), zoo.problem()
    whole = mechanic(base)(straight.params)
    zoo.run(whole, 20, problem=straight)
    half = mechanic(base)(first.params)
    zoo.run(half, 10, problem=first)
    torch.save(half.state_dict(), tmp_path / "saved.pt")
    for p, q in zip(first.params, second.params):
        q.data.copy_(p.data)
    resumed = mechanic(base)(second.params)
    resumed.load_state_dict(torch.load(tmp_path / "saved.pt"))
    params, copied = copy.deepcopy((first.params, half))
    for optimizer, its in ((resumed, second.params), (copied, params)):
        second.params = its
        for step in range(10, 20):
            second.fill(step)
            optimizer.step()
        assert close(zoo.final(second), zoo.final(straight), 1e-14)
        assert optimizer.effective_lr() == whole.effective_lr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mechanic_beside_low_precision_weights_is_the_float32_run(dtype):
    wide = [torch.nn.Parameter(p.detach().to(dtype).float()) for p in zoo.problem().params]
    narrow = [torch.nn.Parameter(p.detach().to(dtype)) for p in wide]
    optimizers = [mechanic(prodigy.AdamW, s_init=1e-3)(params) for params in (wide, narrow)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        for p, q in zip(wide, narrow):
            q.grad = torch.randn(q.shape, generator=generator).to(dtype)
            p.grad = q.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p.detach().to(dtype), q.detach()) for p, q in zip(wide, narrow))
    assert optimizers[0].effective_lr() == optimizers[1].effective_lr() > 1e-6


def test_mechanic_leaves_gradients_frozen_groups_and_holes_alone():
    a, b, c = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
    groups = [{"params": [a, c]}, {"params": [b], "lr": 0.0}]
    optimizer = prodigy.Mechanic(torch.optim.SGD(groups, lr=1.0, weight_decay=0.1), s_init=0.1)
    for step in range(5):
        a.grad = torch.tensor([1.0, float("nan"), 1.0], dtype=torch.float64)
        b.grad = torch.ones_like(b)
        before = a.grad
        optimizer.step()
        assert a.grad is before and a.grad.isnan().sum() == 1
    assert torch.equal(b, torch.ones_like(b)) and torch.equal(c, torch.ones_like(c))
    assert optimizer.nonfinite() == 5
    assert (a[[0, 2]] < 1).all() and a.isfinite().all()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert optimizer.param_groups[2]["mechanic"]["s"] is optimizer.param_groups[0]["mechanic"]["s"]


def test_mechanic_with_a_tensor_rate_that_freezes():
    ends = []
    for zero in (0.0, torch.tensor(0.0, dtype=torch.float64)):
        problem = zoo.problem()
        half = len(problem.params) // 2
        groups = [{"params": problem.params[:half]}, {"params": problem.params[half:], "lr": zero}]
        base = prodigy.SGD(groups, lr=1.0, capturable=isinstance(zero, torch.Tensor))
        zoo.run(prodigy.Mechanic(base, s_init=1e-3), 20, problem=problem)
        ends.append(zoo.final(problem))
        still = zoo.problem().params[half:]
        assert all(torch.equal(p, q) for p, q in zip(problem.params[half:], still))
    assert close(ends[0], ends[1], 1e-12)


def test_mechanic_never_reads_the_device():
    params = [torch.nn.Parameter(torch.empty(s, device="meta")) for s in ((3, 2), ())]
    optimizer = mechanic(prodigy.AdamW)(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
    with pytest.raises(RuntimeError):
        optimizer.effective_lr()


@pytest.mark.parametrize("options, error, message", [
    (dict(betas=()), ValueError, "betas must hold at least one number"),
    (dict(betas=(0.9, 1.5)), ValueError, r"betas\[1\] must lie in \[0, 1\], got 1.5"),
    (dict(s_init=0.0), ValueError, r"s_init must lie in \(0, inf\)"),
    (dict(s_decay=-1.0), ValueError, r"s_decay must lie in \[0, inf\)"),
    (dict(eps="1"), TypeError, "eps must be a number"),
])
def test_mechanic_names_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        mechanic(**options)(zoo.problem().params)


def test_mechanic_refuses_bases_that_are_no_base():
    p = torch.nn.Parameter(torch.ones(2))
    for base in ([p], prodigy.SGDScheduleFree([p]), mechanic()([p])):
        with pytest.raises(TypeError, match="base must be an Optimizer"):
            prodigy.Mechanic(base)
    with pytest.raises(RuntimeError, match="steps its base as a whole"):
        mechanic()([p]).step_param(p, None)


# Polyak steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options, box", [
    ({}, {}),
    (dict(momentum=0.5, f_star=-0.3), dict(beta=0.5, f_star=-0.3)),
    (dict(safeguard=3.0), dict(M=3.0)),
    (dict(momentum=0.0, store_x=True), dict(beta=0.0)),
    (dict(adam=True, beta2=0.9), dict(adam=(0.9, 1e-8))),
    (dict(adam=True, beta2=0.99, eps=1e-3, safeguard=0.5, store_x=True),
     dict(adam=(0.99, 1e-3), M=0.5)),
])
def test_the_polyak_step_equals_its_box(options, box):
    problem = quadratic()
    steps = 20  # a Polyak step on a quadratic is chaotic, as steepest descent is
    ours, optimizer = descend(lambda p: prodigy.ScheduleFreePolyak(p, **options), problem, steps)
    trace = textbook.schedule_free_polyak(problem.grad, problem.x0, steps, loss=problem.value,
                                          **box)
    assert close(ours, trace.y[:-1])
    optimizer.eval()
    assert close(optimizer.param_groups[0]["params"][0].detach(), trace.x[-1])
    assert not close(trace.y[-1], trace.y[0], 0.1)


@pytest.mark.parametrize("options, box", [
    ({}, {}),
    (dict(anneal_steps=30, momentum=0.8), dict(anneal=30, momentum=(0.8, 0.965))),
    (dict(weight_decay=2.0, c_warmup=7, f_star=-0.1), dict(decay=2.0, c_warmup=7, f_star=-0.1)),
    (dict(r=1.0, weight_lr_power=1.0, betas=(0.8, 0.9), eps=1e-2, beta_polyak=0.5),
     dict(r=1.0, power=1, betas=(0.8, 0.9), eps=1e-2, beta_polyak=0.5)),
])
@pytest.mark.parametrize("store_x", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_schedule_free_plus_equals_its_box(options, box, store_x, capturable):
    problem = quadratic()
    modes = dict(store_x=store_x, capturable=capturable)
    ours, optimizer = descend(
        lambda p: prodigy.ScheduleFreePlus(p, **options, **modes), problem, STEPS)
    trace = textbook.schedule_free_plus(problem.grad, problem.x0, STEPS, loss=problem.value, **box)
    assert close(ours, trace.y[:-1])
    optimizer.eval()
    assert close(optimizer.param_groups[0]["params"][0].detach(), trace.x[-1])
    optimizer.train()
    assert close(optimizer.param_groups[0]["params"][0].detach(), trace.y[-1])


def test_the_polyak_step_never_moves_z_away_under_interpolation():
    """|z_{t+1} - x_*|^2 <= |z_t - x_*|^2 - [gap]^2/|g|^2, with every batch's own loss."""
    torch.manual_seed(0)
    solution = torch.randn(6, dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = prodigy.ScheduleFreePolyak([p])
    distances = [float(solution.norm())]
    for _ in range(300):
        A = torch.randn(2, 6, dtype=torch.float64)

        def closure():
            residual = A @ (p.detach() - solution)
            p.grad = A.T @ residual
            return residual.square().sum() / 2

        y, loss, g = p.detach().clone(), float(closure()), p.grad.clone()
        z = optimizer.state[p]["z"].clone() if optimizer.state[p] else y
        optimizer.step(closure)
        gap = max(loss + float(g @ (z - y)), 0.0)
        new = optimizer.state[p]["z"]
        before, after = (float((a - solution).square().sum()) for a in (z, new))
        assert after <= before - gap**2 / float(g @ g) + 1e-12
        distances.append(after**0.5)
    assert distances[-1] < 0.1 * distances[0]


def test_the_polyak_step_is_good_at_every_step_without_a_horizon():
    """f(x_t) - f_* <= D G/sqrt(t) for every t, knowing none of them, on a piecewise linear f."""
    problem = problems.max_affine(problems.gaussian((9, 4), 1), problems.gaussian((4,), 2),
                                  [0.0] * 4)
    steps, gaps, largest = 300, [], 0.0

    def each(step, p, optimizer):
        nonlocal largest
        largest = max(largest, float(p.grad.norm()))
        with optimizer.averaged():
            gaps.append(float(problem.value(p.detach()) - problem.f_star))
        assert gaps[-1] <= problem.D * largest / math.sqrt(step + 1)

    descend(lambda p: prodigy.ScheduleFreePolyak(p, f_star=float(problem.f_star)), problem, steps,
            each)
    assert gaps[-1] < 0.1 * gaps[0]


@pytest.mark.parametrize("cls", WITH_LOSS)
def test_the_polyak_step_does_not_see_a_factor_on_the_loss(cls):
    options = {"eps": 1e-24} if cls is prodigy.ScheduleFreePlus else {}
    one, _ = descend(lambda p: cls(p, **options), quadratic(), STEPS)
    other, _ = descend(lambda p: cls(p, **options), quadratic(1e3), STEPS)
    assert close(one, other)


def test_the_safeguard_bounds_the_step():
    problem = quadratic()
    M, sizes = 40.0, []

    def each(step, p, optimizer):
        sizes.append(optimizer.effective_lr())

    points, _ = descend(lambda p: prodigy.ScheduleFreePolyak(p, safeguard=M), problem, 20, each)
    assert max(float(problem.grad(x).square().sum()) for x in points) < M
    assert sizes[0] == pytest.approx(float(problem.value(points[0])) / M, rel=1e-12)
    free = []
    descend(lambda p: prodigy.ScheduleFreePolyak(p), problem, 1,
            lambda step, p, optimizer: free.append(optimizer.effective_lr()))
    assert sizes[0] < free[0] / 2


@pytest.mark.parametrize("cls", WITH_LOSS)
def test_groups_share_one_polyak_step_in_the_norm_of_their_rates(cls):
    """Rates 1 and 1/4 are one problem in u = x/sqrt(rho), for plain gradients."""
    problem = quadratic()
    rho = torch.tensor([1.0, 1.0, 0.25, 0.25], dtype=torch.float64)
    parts = [torch.nn.Parameter(x.clone()) for x in problem.x0.split(2)]
    groups = [{"params": parts[:1]}, {"params": parts[1:], "lr": 0.25}]
    if cls is prodigy.ScheduleFreePlus:
        groups[1]["lr"] = 1.0  # the 1-norm has no such change of variables: equal rates only
        rho = torch.ones_like(rho)
    apart = cls(groups)
    scaled = torch.nn.Parameter(problem.x0 / rho.sqrt())
    together = cls([scaled])
    for _ in range(30):
        def split():
            x = torch.cat([p.detach() for p in parts])
            for p, g in zip(parts, problem.grad(x).split(2)):
                p.grad = g.clone()
            return problem.value(x)

        def whole():
            x = scaled.detach() * rho.sqrt()
            scaled.grad = problem.grad(x) * rho.sqrt()
            return problem.value(x)

        apart.step(split)
        together.step(whole)
    assert close(torch.cat([p.detach() for p in parts]), scaled.detach() * rho.sqrt(), 1e-10)


def test_the_1_norm_stands_for_adams_norm_of_gaussian_gradients():
    """sqrt(pi/2) |g|_1 and |g|^2 under D^-1 have one mean: both are the sum of the deviations."""
    generator = torch.Generator().manual_seed(0)
    deviations = torch.logspace(-2, 2, 40, dtype=torch.float64)
    g = deviations * torch.randn(20000, 40, generator=generator, dtype=torch.float64)
    one = math.sqrt(math.pi / 2) * g.abs().sum(1).mean()
    two = (g.square() / g.square().mean(0).sqrt()).sum(1).mean()
    assert float(one / two) == pytest.approx(1, rel=5e-3)


def test_momentum_is_annealed_along_a_geometric_sequence_and_averaging_waits():
    betas, ends = [], []

    def each(step, p, optimizer):
        betas.append(float(optimizer.param_groups[0]["y_beta"]))
        with optimizer.averaged():
            ends.append(close(p.detach(), optimizer.state[p]["z"], 1e-12))

    descend(lambda p: prodigy.ScheduleFreePlus(p, anneal_steps=10, c_warmup=6), quadratic(), 14,
            each)
    logs = np.log(1 - np.array(betas))
    assert np.diff(logs[:11]) == pytest.approx(math.log(0.035 / 0.1) / 10)
    assert betas[0] == pytest.approx(0.9) and betas[10:] == pytest.approx([0.965] * 4)
    assert ends == [True] * 7 + [False] * 7


@pytest.mark.parametrize("cls", WITH_LOSS)
def test_the_loss_is_needed_and_must_be_a_number(cls):
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = cls([p])
    with pytest.raises(RuntimeError, match=f"{cls.__name__} needs the loss: call step"):
        optimizer.step()
    for loss in (None, torch.ones(2), "1"):
        with pytest.raises(TypeError, match="the closure must return the loss as one number"):
            optimizer.step(lambda: loss)
    assert torch.equal(p, torch.ones(2))
    with pytest.raises(RuntimeError, match="needs all gradients first"):
        optimizer.step_param(p, optimizer.param_groups[0])
    with pytest.raises(ValueError, match="f_star must be the same for all parameter groups"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "f_star": 1.0})
    assert optimizer.step(lambda: 1.0) == 1.0
    assert not torch.equal(p, torch.ones(2))


def test_the_safeguard_is_one_for_all_groups():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="safeguard must be the same for all parameter groups"):
        prodigy.ScheduleFreePolyak([{"params": [a]}, {"params": [b], "safeguard": 1.0}])


@pytest.mark.parametrize("cls", WITH_LOSS)
def test_what_one_loss_decides_is_one_for_all_groups(cls):
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    for name, value in dict(f_star=1.0, maximize=True).items():
        with pytest.raises(ValueError, match=f"{name} must be the same for all parameter groups"):
            cls([{"params": [a]}, {"params": [b], name: value}])
    if cls is prodigy.ScheduleFreePlus:
        with pytest.raises(ValueError, match="beta_polyak must be the same"):
            cls([{"params": [a]}, {"params": [b], "beta_polyak": 0.5}])


@pytest.mark.parametrize("cls", WITH_LOSS)
def test_to_maximize_is_to_minimize_the_negative(cls):
    """f_star is in the loss's own units: 2 for 2 - |x|^2 / 2, as it is -2 for its negative."""
    points = []
    for sign in (1, -1):
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = cls([p], f_star=-2.0 * sign, maximize=sign < 0)

        def closure():
            p.grad = sign * p.detach()
            return sign * (p.detach().square().sum() / 2 - 2)

        for _ in range(20):
            optimizer.step(closure)
        points.append(p.detach().clone())
    assert torch.equal(*points) and points[0].norm() < 1


@pytest.mark.parametrize("store_x", [False, True])
def test_an_annealed_momentum_takes_idle_parameters_along(store_x):
    """While mu moves, x of a parameter without a gradient stays, and y is where mu says."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2)]
    optimizer = prodigy.ScheduleFreePlus(params, momentum=0.5, momentum_max=0.99, anneal_steps=20,
                                         weight_lr_power=0, store_x=store_x)

    def step(those):
        def closure():
            for p in params:
                p.grad = p.detach() - 0.3 if any(p is q for q in those) else None
            return sum((p.detach() - 0.3).square().sum() / 2 for p in those)
        optimizer.step(closure)

    def average():
        with optimizer.averaged():
            return params[1].detach().clone()

    for _ in range(8):
        step(params)
    before = average()
    for _ in range(8):
        step(params[:1])
    assert close(average(), before, 1e-12)
    mu, z = float(optimizer.param_groups[0]["y_beta"]), optimizer.state[params[1]]["z"]
    assert close(params[1].detach(), (1 - mu) * z + mu * before, 1e-12)


def test_an_annealed_momentum_of_zero_needs_x():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="momentum_max = 0 needs store_x=True"):
        prodigy.ScheduleFreePlus([p], momentum_max=0.0, anneal_steps=10)


def test_the_boxes_stand_still_at_a_minimiser():
    for options in ({}, dict(f_star=10.0)):
        problem = problems.quadratic([1.0, 2.0], x0=[0.0, 0.0])
        trace = textbook.schedule_free_plus(problem.grad, problem.x0, 3, loss=problem.value,
                                            **options)
        assert not trace.x.any()


@pytest.mark.parametrize("cls", WITH_LOSS)
@pytest.mark.parametrize("loss", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_leaves_z_where_it_is(cls, loss):
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = cls([p])
    value = 1.0

    def closure():
        p.grad = p.detach().clone()
        return torch.tensor(value)

    for value in (1.0, loss):
        before = optimizer.state[p]["z"].clone() if optimizer.state[p] else None
        optimizer.step(closure)
    assert torch.equal(optimizer.state[p]["z"], before) and p.isfinite().all()


@pytest.mark.parametrize("cls", WITH_LOSS)
@pytest.mark.parametrize("maximize", [False, True])
def test_no_learning_rate_is_needed_on_a_real_problem(cls, maximize):
    """Logistic regression on separable data, f_* = 0: the loss falls by a factor of 10."""
    torch.manual_seed(0)
    X = torch.randn(60, 5)
    y = (X @ torch.randn(5) > 0).float()
    model = torch.nn.Linear(5, 1)
    optimizer = cls(model.parameters(), maximize=maximize)
    sign = -1 if maximize else 1
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = sign * torch.nn.functional.binary_cross_entropy_with_logits(model(X)[:, 0], y)
        loss.backward()
        return loss

    for _ in range(200):
        losses.append(sign * float(optimizer.step(closure).detach()))
    assert losses[-1] < 0.1 * losses[0]


# restarts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("d0", [1e-3, 0.05])
def test_resetting_equals_its_box(d0):
    problem = problems.least_absolute(problems.gaussian((9, 3), 5), [1.0, 2.0, -1.0], [0.0] * 3)
    for problem in (problem, quadratic()):
        ds = []
        points, _ = descend(lambda p: prodigy.DAdaptResetting(p, d0=d0), problem, 150,
                            lambda step, p, optimizer: ds.append(optimizer.get_d()))
        trace = textbook.dadapt_resetting(problem.grad, problem.x0, 150, d0=d0)
        assert close(points, trace.x[:-1])
        assert ds == pytest.approx(trace.d[1:].tolist(), rel=1e-9)
        assert trace.start[-1] >= 2


def test_resetting_restarts_when_dhat_exceeds_2d_and_d_stays_below_D():
    problem = problems.absolute_value()
    d, restarts = [1e-4], 0

    def each(step, p, optimizer):
        nonlocal restarts
        group = optimizer.param_groups[0]
        d.append(optimizer.get_d())
        if d[-1] != d[-2]:
            restarts += 1
            assert d[-1] > 2 * d[-2] and d[-1] == float(group["d_hat"])
            assert torch.equal(p.detach(), problem.x0)
            assert optimizer.state[p]["s"].abs().sum() == group["squares"] == 0
        else:
            assert group["d_hat"] <= 2 * d[-1] and not torch.equal(p.detach(), problem.x0)

    descend(lambda p: prodigy.DAdaptResetting(p, d0=1e-4), problem, 300, each)
    assert 3 <= restarts <= math.log2(problem.D / 1e-4)
    assert problem.D / 8 < d[-1] <= problem.D


@pytest.mark.parametrize("how", ["None", "group", "tensor lr"])
def test_resetting_where_something_takes_no_part(how):
    """A tensor or group that is absent in the step that resets starts anew as well: d <= D."""
    u, v = (torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    if how == "None":
        optimizer = prodigy.DAdaptResetting([u, v], d0=1e-3)
    else:
        lr = torch.tensor(1.0) if how == "tensor lr" else 1.0
        optimizer = prodigy.DAdaptResetting(
            [{"params": [u]}, {"params": [v], "lr": lr}], d0=1e-3, capturable=how == "tensor lr")
    ends, moves = [], []
    for k in range(200):
        absent = k % 2 == 1
        u.grad = 100 * (u.detach() - 1).sign()
        v.grad = None if how == "None" and absent else (v.detach() - 1).sign()
        if how == "group":
            optimizer.param_groups[1]["lr"] = 0.0 if absent else 1.0
        elif how == "tensor lr":
            optimizer.param_groups[1]["lr"].fill_(0.0 if absent else 1.0)
        before = optimizer.get_d(), v.detach().clone()
        optimizer.step()
        moves.append(float((v.detach() - before[1]).abs()))
        if optimizer.get_d() > before[0]:  # all sums are cleared, at the latest in the next step
            ends.append(float(optimizer.state[v]["s"]) * float(
                optimizer.param_groups[-1].get("fresh", 1.0)))
    assert len(ends) > 5 and not any(ends)
    assert optimizer.get_d() <= 2**0.5 and max(moves) < 1


@pytest.mark.parametrize("ratio", [0.25, 4.0])
def test_resetting_with_rates_of_any_ratio_equals_one_problem_in_other_units(ratio):
    problem = quadratic()
    rho = torch.tensor([1.0, 1.0, ratio, ratio], dtype=torch.float64) / max(ratio, 1.0)
    parts = [torch.nn.Parameter(x.clone()) for x in problem.x0.split(2)]
    groups = [{"params": parts[:1], "lr": float(rho[0])},
              {"params": parts[1:], "lr": float(rho[2])}]
    apart = prodigy.DAdaptResetting(groups, d0=1e-2)
    scaled = torch.nn.Parameter(problem.x0 / rho.sqrt())
    together = prodigy.DAdaptResetting([scaled], d0=1e-2)
    for _ in range(60):
        for p, g in zip(parts, problem.grad(torch.cat([p.detach() for p in parts])).split(2)):
            p.grad = g.clone()
        scaled.grad = problem.grad(scaled.detach() * rho.sqrt()) * rho.sqrt()
        apart.step()
        together.step()
    assert apart.get_d() == pytest.approx(together.get_d(), rel=1e-9) and apart.get_d() > 0.05
    assert close(torch.cat([p.detach() for p in parts]), scaled.detach() * rho.sqrt())


@pytest.mark.parametrize("seed", range(3))
def test_schedule_free_plus_needs_its_warm_up_of_c(seed):
    """What its docstring warns of: without noise, equal averaging from the first step diverges."""
    A, centre = problems.gaussian((40, 20), seed), problems.gaussian(20, seed + 100)
    problem = problems.least_absolute(A, centre, torch.zeros(20))

    def final(**options):
        p = torch.nn.Parameter(problem.x0.clone())
        optimizer = prodigy.ScheduleFreePlus([p], **options)

        def closure():
            p.grad = problem.grad(p.detach())
            return problem.value(p.detach())

        for _ in range(1000):
            optimizer.step(closure)
        optimizer.eval()
        return problem.gap(p.detach()) / problem.gap(problem.x0)

    assert not final() < 1
    for options in (dict(c_warmup=50), dict(betas=(0.5, 0.95)), dict(weight_lr_power=0.0)):
        assert final(**options) < 1
