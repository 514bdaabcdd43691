"""Our classes against the papers' boxes, written out over one vector in prodigy.lab.textbook.

Where a class departs from its box (it follows the package, see its docstring), the box is run with
that one line changed by hand, and the difference from the printed box is asserted too.
"""

from types import SimpleNamespace

import pytest
import torch

import prodigy
from prodigy.lab import textbook

STEPS = 60


def problem(smooth, size=8, seed=0):
    """(gradient of a convex function, x0): a least-squares or an absolute-value loss in R^size."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(20, size, generator=generator, dtype=torch.float64)
    b = torch.randn(20, generator=generator, dtype=torch.float64)
    x0 = torch.randn(size, generator=generator, dtype=torch.float64)
    if smooth:
        return (lambda x: a.T @ (a @ x - b) / 20), x0
    return (lambda x: a.T @ (a @ x - b).sign() / 20), x0


def walk(optimizer_class, grad, x0, steps=STEPS, schedule=None, **options):
    """x_0..x_steps and d_0..d_steps of a class, as the boxes return them."""
    p = torch.nn.Parameter(x0.clone())
    optimizer = optimizer_class([p], **options)
    xs, ds = [], []
    for k in range(steps + 1):
        xs.append(p.detach().clone())
        ds.append(torch.as_tensor(optimizer.param_groups[0].get("d", 0.0)).double())
        if schedule:
            optimizer.param_groups[0]["lr"] = schedule(k)
        p.grad = grad(p.detach())
        optimizer.step()
    return SimpleNamespace(x=torch.stack(xs), d=torch.stack(ds))


def check_same(run, box, tolerance=1e-9):
    """Whole trajectories, relative to their largest entry; d entry by entry."""
    assert (run.x - box.x).abs().max() < tolerance * box.x.abs().max()
    torch.testing.assert_close(run.d, box.d, rtol=tolerance, atol=0)
    assert box.d[-1] > 3 * box.d[0]  # it did grow


def warm_up(k):
    """gamma_k: up over ten steps, then down."""
    return min((k + 1) / 10, 1.0) * (1 - k / 100)


either_loss = pytest.mark.parametrize("smooth", [True, False], ids=["squares", "absolute"])
either_gamma = pytest.mark.parametrize("gamma", [None, warm_up], ids=["", "scheduled"])


@either_loss
@either_gamma
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)])
def test_prodigy_is_its_box(smooth, gamma, betas):
    """Algorithm 4 as printed, eps d_k too (eps is large enough here to matter)."""
    grad, x0 = problem(smooth)
    options = dict(d0=1e-3, betas=betas, eps=1e-2)
    run = walk(prodigy.Prodigy, grad, x0, schedule=gamma, **options)
    check_same(run, textbook.prodigy_adam(grad, x0, STEPS, gamma=gamma or 1.0, **options))


@either_loss
@pytest.mark.parametrize("beta", [0.0, 0.9])
@either_gamma
def test_dadapt_sgd_is_its_box(smooth, beta, gamma):
    """Algorithm 4 with G = |g_0|."""
    grad, x0 = problem(smooth)
    run = walk(prodigy.DAdaptSGD, grad, x0, schedule=gamma, d0=1e-2, momentum=beta)
    check_same(run, textbook.dadapt_sgd(grad, x0, STEPS, gamma=gamma or 1.0, beta=beta, d0=1e-2))


@either_loss
@either_gamma
def test_dadapt_adam_is_its_box_with_the_old_denominator(smooth, gamma):
    """Algorithm 5 prints <g, s> under A_{k+1}; the package, and our class, have A_k."""
    grad, x0 = problem(smooth)
    betas, eps, d0 = (0.8, 0.99), 1e-6, 1e-3
    run = walk(prodigy.DAdaptAdam, grad, x0, schedule=gamma, betas=betas, eps=eps, d0=d0)

    x, s, m, v = x0, *torch.zeros(3, len(x0), dtype=torch.float64)
    r, d, root, rows = 0.0, torch.tensor(d0, dtype=torch.float64), betas[1] ** 0.5, []
    for k in range(STEPS + 1):
        rows.append((x, d))
        g, lam = grad(x), d * (gamma(k) if gamma else 1.0)
        old = v.sqrt() + eps
        r = root * r + (1 - root) * lam * (g * s / old).sum()
        s = root * s + (1 - root) * lam * g
        m = betas[0] * m + (1 - betas[0]) * lam * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        x = x - m / (v.sqrt() + eps)
        d = torch.maximum(d, r / ((1 - root) * s.abs().sum()))
    x, d = (torch.stack(column) for column in zip(*rows))
    check_same(run, SimpleNamespace(x=x, d=d))

    box = textbook.dadapt_adam(grad, x0, STEPS, gamma=gamma or 1.0, betas=betas, eps=eps, d0=d0)
    assert torch.allclose(run.x[:2], box.x[:2], rtol=1e-12)  # s_0 = 0: the first step is the same
    assert not torch.allclose(run.d, box.d, rtol=1e-3)
    assert 0.1 < run.d[-1] / box.d[-1] < 10


@either_loss
def test_dadapt_adagrad_is_its_box_with_the_packages_constants(smooth):
    """Algorithm 3, but a_0 = 1e-6 for G_inf^2, A_{i+1} in the sum, and no factor 1/2 in dhat."""
    grad, x0 = problem(smooth)
    eps, d0 = 1e-6, 1e-3
    steps = 24  # from there on this problem blows a rounding error of x_0 up by 1e7
    run = walk(prodigy.DAdaptAdaGrad, grad, x0, steps, d0=d0, eps=eps)

    x, s, a = x0, torch.zeros_like(x0), torch.full_like(x0, 1e-6)
    squares, d, rows = 0.0, torch.tensor(d0, dtype=torch.float64), []
    for _ in range(steps + 1):
        rows.append((x, d))
        g = grad(x)
        a = a + g**2
        A = a.sqrt() + eps
        s = s + d * g
        squares = squares + d**2 * (g**2 / A).sum()
        d = torch.maximum(d, ((s**2 / A).sum() - squares) / s.abs().sum())
        x = x0 - s / A
    x, d = (torch.stack(column) for column in zip(*rows))
    check_same(run, SimpleNamespace(x=x, d=d))

    box = textbook.dadapt_adagrad(grad, x0, steps, G_inf=1e-3, d0=d0)  # G_inf^2 = a_0
    assert not torch.allclose(run.d, box.d, rtol=1e-3)


LR = 0.05
RAMP = 7


def ramp(t):
    """lr_t with a linear warm-up, t = 1, 2, ..."""
    return LR * min(1.0, t / RAMP)


def y_and_x(optimizer_class, grad, x0, **options):
    """x_1.. and y_1.. of a Schedule-Free class in STEPS steps."""
    p = torch.nn.Parameter(x0.clone())
    optimizer = optimizer_class([p], **options)
    ys, xs = [x0], [x0]
    for _ in range(STEPS):
        p.grad = grad(p.detach())
        optimizer.step()
        ys.append(p.detach().clone())
        with optimizer.averaged():
            xs.append(p.detach().clone())
    return SimpleNamespace(x=torch.stack(xs), y=torch.stack(ys))


def check_points(run, box):
    for name in ("x", "y"):
        ours, theirs = getattr(run, name), getattr(box, name)
        assert (ours - theirs).abs().max() < 1e-10 * theirs.abs().max(), name


@either_loss
@pytest.mark.parametrize("beta", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("store_x", [False, True])
@pytest.mark.parametrize("r", [0.0, 2.0])
def test_schedule_free_sgd_is_the_three_sequences(smooth, beta, store_x, r):
    """Any beta, the weights t^r lr_max^2 of a warm-up: z_{t+1} gets the weight of step t."""
    grad, x0 = problem(smooth)
    options = dict(lr=LR, momentum=beta, warmup_steps=RAMP, r=r, store_x=store_x)
    run = y_and_x(prodigy.SGDScheduleFree, grad, x0, **options)

    # the box weighs z_t by w_t and has z_1 = x_0 in the average; the class weighs z_{t+1} by w_t
    # and leaves z_1 out
    def weights(t):
        return (t - 1) ** r * ramp(t - 1) ** 2 if t > 1 else 1e-300

    box = textbook.schedule_free_sgd(grad, x0, STEPS, lr=ramp, beta=beta, weights=weights)
    check_points(run, box)


@either_loss
def test_beta_one_is_primal_averaging_and_beta_zero_is_polyak(smooth):
    grad, x0 = problem(smooth)

    def weights(t):
        return 1.0 if t > 1 else 1e-300

    kwargs = dict(lr=LR, weight_lr_power=0.0, store_x=True)
    for beta, box in ((1.0, textbook.primal_averaging), (0.0, textbook.polyak_averaging)):
        run = y_and_x(prodigy.SGDScheduleFree, grad, x0, momentum=beta, **kwargs)
        check_points(run, box(grad, x0, STEPS, lr=LR, weights=weights))


@either_loss
def test_the_wrapper_over_sgd_is_the_three_sequences(smooth):
    grad, x0 = problem(smooth)

    def wrapped(params):
        return prodigy.ScheduleFreeWrapper(prodigy.SGD(params, lr=LR), momentum=0.8)

    def weights(t):
        return 1.0 if t > 1 else 1e-300

    box = textbook.schedule_free_sgd(grad, x0, STEPS, lr=LR, beta=0.8, weights=weights)
    check_points(y_and_x(wrapped, grad, x0), box)
