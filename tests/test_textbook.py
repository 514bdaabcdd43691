"""The textbook forms against published numbers, closed forms, each other, and bad input."""
import math

import numpy as np
import pytest
import torch

from prodigy.lab import problems, published, textbook
from prodigy.lab.textbook import averages

STEPS = 60


def close(a, b, rtol=1e-12, atol=1e-14):
    return torch.allclose(a, b, rtol=rtol, atol=atol)


def quadratic():
    return problems.quadratic([0.1, 0.5, 1.0, 2.0], x0=[1.0, -2.0, 0.5, 1.5], seed=3)


def first_growth(trace):
    """The first k with d_k > d_0."""
    return int((trace.d > trace.d[0]).nonzero()[0])


def upwards(x):
    """The gradient -1 everywhere: a minimiser infinitely far away."""
    return -torch.ones_like(x)


# ------------------------------------------------------------------ published numbers
def test_figure_1_of_d_adaptation():
    paper = published.curve("dadaptation_fig1_abs")
    assert paper["step"].tolist() == list(range(99))

    def distance(d0):
        trace = textbook.dadapt_dual_averaging(torch.sign, [1.0], 98, d0=d0, option=1)
        return max(np.abs(trace.d.numpy() - paper["d_k"]).max(),
                   np.abs(trace.dhat.numpy() - paper["dhat_k"]).max())

    assert distance(0.05) < 1e-6
    assert distance(0.1) > 0.2


# ------------------------------------------------------------------ closed forms
def test_first_increase():
    prodigy = textbook.prodigy_dual_averaging(upwards, [0.0], 20, d0=1e-3, G=1.0)
    adapted = textbook.dadapt_dual_averaging(upwards, [0.0], 20, d0=1e-3)
    assert first_growth(adapted) == 8
    assert first_growth(prodigy) == 5
    n = np.arange(2, 6)
    closed = [sum(i / math.sqrt(i + 1) for i in range(1, m)) / m for m in n]
    assert prodigy.dhat[2:6].numpy() / 1e-3 == pytest.approx(closed)


def test_growth_factors_on_constant_gradients():
    gd = textbook.prodigy_gd(upwards, [0.0], 100, d0=1e-9, G=1.0)
    assert float(gd.d[100] / gd.d[99]) == pytest.approx(math.sqrt(1.5), rel=1e-9)
    da = textbook.prodigy_dual_averaging(upwards, [0.0], 300, d0=1e-9, G=1.0)
    q = float(da.d[300] / da.d[299])
    assert math.sqrt(q**2 - 1) == pytest.approx(q * (q**3 - 1), rel=1e-9)
    assert q == pytest.approx(1.1394, abs=5e-5)
    for trace in (gd, da, textbook.dadapt_gd(upwards, [0.0], 100, d0=1e-9, G=1.0)):
        assert (trace.d[1:] / trace.d[:-1]).max() < 2


# ------------------------------------------------------------------ D-Adaptation's boxes
def test_option_2_is_never_below_option_1():
    problem = problems.least_absolute(problems.gaussian((9, 3), 5), [1.0, 2.0, -1.0], [0.0] * 3)
    one = textbook.dadapt_dual_averaging(problem.grad, problem.x0, STEPS, d0=1e-3, option=1)
    two = textbook.dadapt_dual_averaging(problem.grad, problem.x0, STEPS, d0=1e-3, option=2)
    first = min(first_growth(one), first_growth(two))
    assert (two.dhat[:first + 1] >= one.dhat[:first + 1] - 1e-15).all()
    assert two.d[-1] > one.d[-1]


def test_gradient_descent_walks_along_s():
    problem = quadratic()
    trace = textbook.dadapt_gd(problem.grad, problem.x0, STEPS, d0=0.1, G=10.0)
    assert close(trace.x, problem.x0 - trace.s)
    numerator = (trace.lam * (trace.g * trace.s).sum(1)).cumsum(0)[:-1]
    assert close(trace.dhat[1:], numerator / trace.s[1:].norm(dim=1), rtol=1e-9, atol=1e-9)


def test_adagrad_in_one_dimension_is_guarded_dual_averaging():
    adagrad = textbook.dadapt_adagrad(torch.sign, [1.0], STEPS, d0=0.05, G_inf=1.0)
    averaging = textbook.dadapt_dual_averaging(torch.sign, [1.0], STEPS, d0=0.05, G=1.0)
    assert close(adagrad.d, averaging.d) and close(adagrad.x, averaging.x)
    assert close(adagrad.a[:, 0], 1 / averaging.gamma)


def test_sgd_options_agree_for_its_constant_normaliser():
    problem = quadratic()
    trace = textbook.dadapt_sgd(problem.grad, problem.x0, STEPS, d0=0.1, beta=0.9)
    assert close(trace.z, problem.x0 - trace.s)
    steps = (trace.lam**2 * (trace.g**2).sum(1)).cumsum(0)[:-1]
    length = trace.s[1:].norm(dim=1)
    assert close(trace.dhat[1:], (length**2 - steps) / length, rtol=1e-9, atol=1e-9)
    assert trace.d[-1] > 2 * trace.d[0]
    worst = {beta: textbook.dadapt_sgd(torch.sign, [1.0], 1500, beta=beta).d[-1].item()
             for beta in (0.0, 0.9)}  # D = 1
    assert 1 < worst[0.0] <= 2 and worst[0.9] == pytest.approx(5.787, abs=5e-4)


def test_adam_takes_the_new_denominator():
    problem = quadratic()
    trace = textbook.dadapt_adam(problem.grad, problem.x0, STEPS, d0=0.01, betas=(0.8, 0.99))
    root = 0.99**0.5
    product = (trace.g[:-1] * trace.s[:-1] / (trace.v[1:].sqrt() + 1e-8)).sum(1)
    weights = root ** torch.arange(STEPS - 1, -1, -1, dtype=torch.float64) * (1 - root)
    assert close(trace.r[-1], (weights * trace.lam[:-1] * product).sum(), rtol=1e-10)
    old = (trace.g[1:-1] * trace.s[1:-1] / (trace.v[1:-1].sqrt() + 1e-8)).sum(1)
    assert not close((weights[1:] * trace.lam[1:-1] * old).sum(), trace.r[-1], rtol=1e-3)


def test_adam_without_memory_is_signed_dual_averaging():
    """Adam's weights undone (Appendix F): b1 = 0 and eps = 0 make x a sum of g / sqrt(v)."""
    problem = quadratic()
    trace = textbook.dadapt_adam(problem.grad, problem.x0, STEPS, d0=0.01, betas=(0, 0.99), eps=0)
    walked = (trace.lam[:-1, None] * trace.g[:-1] / trace.v[1:].sqrt()).cumsum(0)
    assert close(trace.x[1:], problem.x0 - walked)


# ------------------------------------------------------------------ Prodigy's boxes
def test_prodigy_with_a_frozen_d_is_d_adaptation_with_a_frozen_d():
    """With d_0 > D neither estimate moves, and the two step formulas are the same."""
    problem = problems.absolute_value()
    for ours, theirs in ((textbook.prodigy_gd, textbook.dadapt_gd),
                         (textbook.prodigy_dual_averaging, textbook.dadapt_dual_averaging)):
        a = ours(problem.grad, problem.x0, STEPS, d0=1.5, G=1.0)
        b = theirs(problem.grad, problem.x0, STEPS, d0=1.5, G=1.0)
        assert (a.d == 1.5).all() and (b.d == 1.5).all()
        assert close(a.x, b.x)


def test_prodigy_keeps_below_D_and_above_d_adaptation():
    problem = problems.max_affine(problems.gaussian((12, 4), 1), problems.gaussian(4, 2), [0.] * 4)
    start = dict(d0=1e-4 * problem.D, G=problem.G)
    for ours, theirs in ((textbook.prodigy_gd, textbook.dadapt_gd),
                         (textbook.prodigy_dual_averaging, textbook.dadapt_dual_averaging)):
        a = ours(problem.grad, problem.x0, 100, **start)
        b = theirs(problem.grad, problem.x0, 100, **start)
        assert (a.d <= problem.D).all() and (a.d.diff() >= 0).all()
        assert a.d[-1] > 2 * b.d[-1]


def test_prodigy_gd_weights_are_the_reviewers_divided_form():
    """eta_k = d_k / sqrt(G^2 / w_k^2 + sum (d_i w_i / (d_k w_k))^2 |g_i|^2)."""
    problem = quadratic()
    trace = textbook.prodigy_gd(problem.grad, problem.x0, STEPS, d0=0.1, G=10.0,
                                weights=lambda k: 1 + 0.1 * k)
    w = 1 + 0.1 * torch.arange(STEPS + 1, dtype=torch.float64)
    scaled = trace.d * w
    squares = (scaled**2 * (trace.g**2).sum(1)).cumsum(0) / scaled**2
    assert close(trace.lam, trace.d / torch.sqrt(100.0 / w**2 + squares))
    assert close(trace.x[1:], problem.x0 - (trace.lam[:, None] * trace.g).cumsum(0)[:-1])


def test_prodigy_adam_at_constant_d_is_adam_without_bias_correction():
    problem = quadratic()
    d0 = 100.0
    trace = textbook.prodigy_adam(problem.grad, problem.x0, STEPS, d0=d0, gamma=1e-3)
    assert (trace.d == d0).all()
    x, m, v = problem.x0, torch.zeros(4), torch.zeros(4)
    for _ in range(STEPS):
        g = problem.grad(x)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        x = x - 1e-3 * d0 * m / (v.sqrt() + 1e-8)
    assert close(trace.x[-1], x, rtol=1e-9)


def test_prodigy_adam_uses_one_d_in_step_and_eps():
    problem = quadratic()
    trace = textbook.prodigy_adam(problem.grad, problem.x0, STEPS, d0=1e-3, eps=1e-2)
    assert trace.d[-1] > 2e-3
    d = trace.d[:-1, None]
    step = d * trace.m[1:] / (trace.v[1:].sqrt() + d * 1e-2)
    assert close(trace.x[:-1] - trace.x[1:], step, rtol=1e-9)


# ------------------------------------------------------------------ averaging
def test_schedule_free_x_is_the_weighted_mean_of_z():
    problem = quadratic()
    for weights in (1.0, lambda t: t**2, lambda t: 1 / t):
        trace = textbook.schedule_free_sgd(problem.grad, problem.x0, STEPS, lr=0.3,
                                           beta=0.9, weights=weights)
        w = torch.tensor([textbook.at(weights, t) for t in range(1, STEPS + 2)],
                         dtype=torch.float64)
        assert close(trace.x, averages(trace.z, w))
    plain = textbook.schedule_free_sgd(problem.grad, problem.x0, STEPS, lr=0.3)
    assert close(plain.x[-1], plain.z.mean(0))
    assert close(plain.y, 0.1 * plain.z + 0.9 * plain.x)


def test_schedule_free_ends_are_polyak_and_primal_averaging():
    problem = quadratic()
    settings = dict(lr=lambda t: 0.5 / t**0.5, weights=lambda t: t)
    for beta, box in ((0.0, textbook.polyak_averaging), (1.0, textbook.primal_averaging)):
        a = textbook.schedule_free_sgd(problem.grad, problem.x0, STEPS, beta=beta, **settings)
        b = box(problem.grad, problem.x0, STEPS, **settings)
        for key in ("x", "y", "z"):
            assert close(getattr(a, key), getattr(b, key))


def test_polyak_averaging_averages_gradient_descent():
    problem = quadratic()
    trace = textbook.polyak_averaging(problem.grad, problem.x0, STEPS, lr=0.3)
    z = [problem.x0]
    for _ in range(STEPS):
        z.append(z[-1] - 0.3 * problem.grad(z[-1]))
    assert close(trace.z, torch.stack(z)) and close(trace.x[-1], torch.stack(z).mean(0))


def test_linear_decay_is_schedule_free_with_a_moving_beta():
    """With w = 1 and beta_t = t / T, y_t is SGD whose steps fall linearly to 0 at T."""
    problem, T, lr = quadratic(), 40, 0.4
    trace = textbook.schedule_free_sgd(problem.grad, problem.x0, T - 1, lr=lr,
                                       beta=lambda t: t / T)
    y = problem.x0
    for t in range(1, T):
        assert close(trace.y[t - 1], y, rtol=1e-10)
        y = y - lr * (T - t) / T * problem.grad(y)
    assert close(trace.x[T - 1], y, rtol=1e-10)


# ------------------------------------------------------------------ traces and bad input
def test_trace_has_one_row_for_every_step():
    problem = quadratic()
    trace = textbook.prodigy_adam(problem.grad, problem.x0, 7)
    for key, value in vars(trace).items():
        assert len(value) == 8 and value.dtype == torch.float64, key
    assert trace.x.shape == (8, 4) and trace.d.shape == (8,)
    assert close(trace.g, torch.stack([problem.grad(x) for x in trace.x]))


def test_zero_first_gradient_returns_the_start():
    for box in (textbook.dadapt_dual_averaging, textbook.dadapt_sgd):
        trace = box(torch.zeros_like, [2.0], 5, d0=0.1)
        assert trace.x.tolist() == [[2.0]]


def test_points_where_s_vanishes_say_nothing():
    answers = iter([1.0, -1.0, 1.0, 1.0])
    trace = textbook.dadapt_dual_averaging(lambda x: torch.full_like(x, next(answers)), [0.0], 3,
                                           d0=0.1)
    assert trace.s[2].item() == 0 and trace.dhat[2].item() == 0
    assert trace.d.isfinite().all()


@pytest.mark.parametrize("change, message", [
    (dict(x0=[[1.0]]), "x0 must be one vector"),
    (dict(steps=0), "steps must be a positive integer"),
    (dict(steps=2.5), "steps must be a positive integer"),
    (dict(d0=0.0), "d0 must be positive"),
    (dict(d0=float("nan")), "d0 must be positive"),
    (dict(G=-1.0), "G must be positive"),
    (dict(option=3), "option must be 1 or 2"),
])
def test_bad_input(change, message):
    arguments = dict(x0=[1.0], steps=3, d0=0.1) | change
    with pytest.raises(ValueError, match=message):
        textbook.dadapt_dual_averaging(torch.sign, **arguments)


# ------------------------------------------------------------------ problems
def all_problems():
    A, b = problems.gaussian((15, 4), 1), problems.gaussian(15, 2)
    y = (b > 0).long() + (b > 1).long()
    return [problems.absolute_value(2.0, 3.0), quadratic(), problems.least_squares(A, b),
            problems.max_affine(A, [1.0, 2.0, 0.0, -1.0], [0.0] * 4),
            problems.least_absolute(A, [1.0, 2.0, 0.0, -1.0], [0.0] * 4),
            problems.softmax_regression(A, y), problems.softmax_regression(A, y, decay=0.1)]


@pytest.mark.parametrize("problem", all_problems(), ids=lambda problem: problem.name)
def test_problems_keep_their_promises(problem):
    points = [problem.x0 + problems.gaussian(problem.x0.shape, seed) for seed in range(20)]
    for x in points:
        leaf = x.clone().requires_grad_()
        slope, = torch.autograd.grad(problem.value(leaf), leaf)
        assert close(slope, problem.grad(x), 1e-9, 1e-9)
        if problem.G is not None:
            assert problem.grad(x).norm() <= problem.G * (1 + 1e-12)
        if problem.x_star is not None:
            assert problem.gap(x) >= -1e-12
        for y in points:
            bregman = problem.value(y) - problem.value(x) - problem.grad(x) @ (y - x)
            assert bregman >= (problem.mu or 0.0) / 2 * ((y - x)**2).sum() - 1e-9
            if problem.L is not None:
                assert bregman <= problem.L / 2 * ((y - x)**2).sum() + 1e-9
    if problem.x_star is not None:
        assert abs(problem.gap(problem.x_star)) < 1e-12
        assert problem.D == pytest.approx((problem.x0 - problem.x_star).norm().item())
    else:
        with pytest.raises(ValueError, match="minimiser"):
            _ = problem.D


def test_problems_refuse_bad_input():
    with pytest.raises(ValueError, match="spectrum"):
        problems.quadratic([1.0, -1.0])
    with pytest.raises(ValueError, match="y must hold integers"):
        problems.softmax_regression(torch.ones(2, 1), [0, 3], classes=2)
