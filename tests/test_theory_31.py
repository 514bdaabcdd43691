"""The statements of theory/31_averaging.md in numbers; the rules are test_theory's."""
import math
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from scipy.special import eval_genlaguerre
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prodigy import SGD
from prodigy.lab import problems, textbook
from prodigy.lab.textbook import averages

CURVES = (0.05, 0.7, 1.0, 1.6)  # q = gamma lambda
GAMMA, S2 = 0.3, 2.0


def holds(measured, bound):
    return bool((measured <= bound + 1e-9 * bound.abs() + 1e-13).all())


def square(rows):
    return (rows**2).sum(-1)


# ------------------------------------------------------------------ 2. convex functions
def lipschitz_problems():
    A, x_star = problems.gaussian((12, 4), seed=1), problems.gaussian(4, seed=2)
    zero = torch.zeros(4)
    return (problems.absolute_value(x0=3.0, G=2.0), problems.max_affine(A, x_star, zero),
            problems.least_absolute(A, x_star, zero))


def regret(problem, z, g, w):
    """sum_{i<=t} w_i <g_i, z_i - x_star> / W_t for every t."""
    return (w * (g * (z - problem.x_star)).sum(1)).cumsum(0) / w.cumsum(0)


def bregman(problem, u, v):
    return problem.value(u) - problem.value(v) - problem.grad(v) @ (u - v)


def differences(problem, z, x, w):
    """Theorem 1's differences at the last step: for Polyak's gradients and for primal ones."""
    star, W = problem.x_star, w.cumsum(0)
    polyak = sum(w[t] * (bregman(problem, star, z[t]) + bregman(problem, z[t], x[-1]))
                 for t in range(len(z)))
    steps = sum(W[t - 1] * bregman(problem, x[t - 1], x[t]) for t in range(1, len(z)))
    return polyak, sum(w[t] * bregman(problem, star, x[t]) for t in range(len(z))), steps


def test_online_to_batch_at_the_average():
    smooth = (problems.quadratic([0.1, 1.0, 3.0], seed=1),
              problems.least_squares(problems.gaussian((8, 3), 3), problems.gaussian(8, 4)))
    for seed, problem in enumerate((*lipschitz_problems(), *smooth)):
        p = len(problem.x0)
        z = problem.x_star + problems.gaussian((60, p), seed)  # any points
        w = problems.gaussian(60, seed + 50).square() + 1e-3
        x = averages(z, w)
        slack = []
        for points in (z, x):
            g = torch.stack([problem.grad(point) for point in points])
            bound = regret(problem, z, g, w)
            assert holds(problem.gap(x), bound)
            slack.append((bound - problem.gap(x))[-1])
        if problem in smooth:
            polyak, primal, steps = differences(problem, z, x, w)
            assert torch.allclose(w.sum() * slack[0], polyak)
            assert torch.allclose(w.sum() * slack[1], primal + steps)
            assert not torch.allclose(w.sum() * slack[1], primal, rtol=1e-2)


def methods(problem, T, gamma):
    """The trace of T points for Polyak and for primal averaging."""
    return [box(problem.grad, problem.x0, T - 1, lr=gamma)
            for box in (textbook.polyak_averaging, textbook.primal_averaging)]


def test_averaged_regret_is_attained():
    for problem in lipschitz_problems():
        D, G = problem.D, problem.G
        for T in (2, 5, 30, 200):
            for c in (0.3, 1.0, 3.0):
                gamma = c * D / (G * T**0.5)
                for t in methods(problem, T, gamma):
                    bound = (D**2 + gamma**2 * square(t.g).sum()) / (2 * gamma * T)
                    assert holds(problem.gap(t.x[-1]), bound)
                    assert bound <= (1 / c + c) / 2 * D * G / T**0.5 * (1 + 1e-12)
    for T in (2, 4, 50):
        problem = problems.resisting(T, D=2.0, G=3.0)
        bound = problem.D * problem.G / T**0.5
        for t in methods(problem, T, problem.D / (problem.G * T**0.5)):
            assert problem.gap(t.x[-1]) == pytest.approx(bound)  # attained
            assert not problem.gap(t.x[-1]) <= bound / 2
        for gamma in (0.1, 10.0):  # and no step and no point does better
            for t in methods(problem, T, gamma):
                assert min(problem.gap(t.x[-1]), problem.gap(t.z[-1])) >= bound * (1 - 1e-12)
    line = problems.absolute_value()  # straight to the minimiser, for any T
    for t in methods(line, 10, 0.1)[:1]:
        assert line.gap(t.x[-1]) == pytest.approx((1 + 0.1**2 * 10) / (2 * 0.1 * 10))
    # with noise: in the mean over all sequences, not in each
    T, gamma, pathwise = 7, 0.4, 0
    for box in (textbook.polyak_averaging, textbook.primal_averaging):
        rows = []
        for signs in product((-1.5, 1.5), repeat=T):
            noise = iter(signs)
            t = box(lambda x: line.grad(x) + next(noise), line.x0, T - 1, lr=gamma)
            bound = (line.D**2 + gamma**2 * square(t.g).sum()) / (2 * gamma * T)
            rows.append(torch.stack([line.gap(t.x[-1]), bound]))
        gap, bound = torch.stack(rows, 1)
        assert holds(gap.mean(), bound.mean())
        pathwise += not holds(gap, bound)
    assert pathwise > 0


# ------------------------------------------------------------------ 3. the noisy quadratic
def stationary(q):
    return GAMMA * S2 / (q / GAMMA * (2 - q))


def responses(q, T):
    """What e_t is made of: column 0 of row t is the factor of e_1, column i that of xi_i."""
    lam = q / GAMMA
    xi = torch.cat([torch.zeros(T, 1), torch.eye(T)], 1).double()
    rows = iter(range(T))

    def grad(e):
        return lam * e + xi[next(rows)]

    start = torch.zeros(T + 1, dtype=torch.float64)
    start[0] = 1
    return grad, start


@cache
def run(q, T, box="polyak_averaging", **options):
    """Trace of z and x over T points; moments of a row: its column 0 and S2 times the rest's."""
    grad, start = responses(q, T)
    return getattr(textbook, box)(grad, start, T - 1, lr=GAMMA, **options)


def mean(row):
    return row[..., 0].numpy()


def variance(row):
    return S2 * square(row[..., 1:]).numpy()


def test_last_iterate_stays_noisy():
    for q in CURVES:
        z, t, a = run(q, 300).z, np.arange(1, 301), 1 - q
        assert np.allclose(mean(z), a ** (t - 1))
        limit = stationary(q)
        assert np.allclose(variance(z), limit * (1 - a ** (2.0 * (t - 1))))
        assert not np.allclose(variance(z)[-1], limit * (2 - q) / 2, rtol=0.02)
        if abs(a) < 0.9:  # stationary by then
            for j in (1, 3):
                together = S2 * (z[-1, 1:] * z[-1 - j, 1:]).sum()
                assert together / limit == pytest.approx(a**j, abs=1e-9)


def test_polyak_average_forgets_the_step_size():
    for q in CURVES:
        lam, a, T = q / GAMMA, 1 - q, np.arange(1, 301)
        x = run(q, 300).x
        assert np.allclose(mean(x), (1 - a**T) / (q * T))
        powers = np.concatenate([[0], ((1 - a ** T[:-1]) ** 2).cumsum()])
        assert np.allclose(variance(x), S2 / (lam * T) ** 2 * powers)
        bound = S2 / (lam**2 * T)
        if q <= 1:
            assert (variance(x) <= bound).all() and not (variance(x) <= bound / 2).all()
        assert variance(x)[-1] == pytest.approx(bound[-1], rel=0.12)
    far = [(S2 / (q / GAMMA * T) ** 2 * ((1 - (1 - q) ** np.arange(1, T)) ** 2).sum()) /
           (S2 / (q / GAMMA) ** 2 / T) for q in CURVES for T in (10**5,)]
    assert np.allclose(far, 1, atol=1e-3)


def tail(q, N, c):
    A = (1 - q) ** c
    return stationary(q) / N * ((1 + A) / (1 - A) - 2 * A * (1 - A**N) / (N * (1 - A) ** 2))


def test_tail_averages():
    for q in (0.7, 1.0, 1.6, 0.2):
        z = run(q, 400).z
        for N, c in ((1, 1), (20, 1), (5, 4), (8, 10)):
            measured = variance(z[-1 - c * np.arange(N)].mean(0))
            assert measured == pytest.approx(tail(q, N, c), rel=1e-6)
        assert tail(q, 1, 1) == pytest.approx(stationary(q))
        independent = pytest.approx(stationary(q) / 20, rel=0.2)
        assert (tail(q, 20, 1) == independent) == (q == 1)
        n = 10**6
        assert tail(q, n, 1) / stationary(q) * n * q / (2 - q) == pytest.approx(1, rel=1e-4)
    for q in (0.01, 0.1, 0.6):
        u = -math.log(1 - q)
        for c in (2, 10, 50):
            factor = c * math.tanh(u / 2) / math.tanh(c * u / 2)
            assert tail(q, 10**6 // c, c) / tail(q, 10**6, 1) == pytest.approx(factor, rel=1e-3)
            assert factor <= 1 + (c * u) ** 2 / 12
    for q, c, least in ((1.2, 2, 3.2), (1.5, 2, 10.0), (1.9, 2, 360.0)):  # neighbours cancel
        assert tail(q, 10**6 // c, c) / tail(q, 10**6, 1) >= least * (1 - 1e-3) > c
    u = -math.log(0.99)
    assert 50 * math.tanh(u / 2) / math.tanh(50 * u / 2) > 1 + (50 * u) ** 2 / 25  # 12 is needed


def ema(z, beta):
    """The EMA of the rows, by torch's AveragedModel."""
    model = torch.nn.ParameterList([torch.nn.Parameter(z[0].clone())])
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(beta), use_buffers=True)
    rows = []
    for row in z:
        model[0].data.copy_(row)
        averaged.update_parameters(model)
        rows.append(averaged.module[0].detach().clone())
    return torch.stack(rows)


def ema_variance(q, eta):
    """Theorem 6 for s^2 / lambda^2 = 1."""
    v = q + eta - q * eta
    return q * eta * (2 - v) / ((2 - q) * (2 - eta) * v)


def test_ema_of_weights_and_step_size_are_symmetric():
    t = np.arange(1, 301)
    for q in (0.7, 1.0, 1.6, 0.25):
        for beta in (0.5, 0.9):
            a, eta, lam = 1 - q, 1 - beta, q / GAMMA
            x = ema(run(q, 300).z, beta)
            assert np.allclose(mean(x), (eta * a**t - q * beta**t) / (a - beta))
            limit = stationary(q) * eta / (1 + beta) * (1 + beta * a) / (1 - beta * a)
            assert limit == pytest.approx(S2 / lam**2 * ema_variance(q, eta))
            assert variance(x)[-1] == pytest.approx(limit, rel=1e-9)
            uncorrelated = pytest.approx(stationary(q) * eta / (1 + beta), rel=0.01)
            assert (variance(x)[-1] == uncorrelated) == (q == 1)
            assert ema_variance(q, eta) == pytest.approx(ema_variance(eta, q))
    for q, eta in ((1e-4, 1e-4), (1e-3, 1e-5), (1e-5, 1e-4)):
        small = 1 / (1 / q + 1 / eta)
        assert ema_variance(q, eta) == pytest.approx(small / (2 - small), rel=2e-3)
        assert min(q, eta) / 2 <= small <= min(q, eta)


def test_lookahead_variance():
    for q in CURVES:
        for alpha, k in ((0.5, 5), (0.8, 10), (0.5, 1), (1.0, 4)):
            T = 601 if q > 0.5 else 1201
            x = run(q, T, "lookahead", alpha=alpha, k=k).x[::k]
            ak = (1 - q) ** k
            factor = alpha * (1 + ak) / (2 - alpha * (1 - ak))
            shrink = 1 - alpha * (1 - ak)
            assert np.allclose(mean(x), shrink ** np.arange(len(x)), atol=1e-12)
            rest = 1 - shrink ** (2 * (len(x) - 1))
            assert variance(x)[-1] == pytest.approx(stationary(q) * factor * rest, rel=1e-9)
            assert factor <= alpha * (1 + 1e-12)
            assert q > 1 or not factor <= alpha / 2
            if alpha < 1 and abs(ak) > 1e-4:  # the limit for k to infinity is another number
                assert abs(factor * (2 - alpha) / alpha - 1) > 1e-4
            if k == 1:  # plain SGD with the step alpha gamma
                aq = alpha * q
                assert factor * stationary(q) == pytest.approx(alpha * GAMMA * S2 / (
                    q / GAMMA * (2 - aq)))


# ------------------------------------------------------------------ 4. primal averaging
def momentum_form(grad, x1, gamma, shares):
    """x_1, x_2, ... by Proposition 8 with c_1, c_2, ... = shares."""
    x, last, rows = x1, x1, []
    for c, new in zip(shares, shares[1:]):
        rows.append(x)
        x, last = x + new * ((1 - c) / c * (x - last) - gamma * grad(x)), x
    return torch.stack(rows)


def test_primal_averaging_is_momentum():
    problem = problems.quadratic([0.1, 0.5, 1.0, 2.0], x0=[1.0, -2.0, 0.5, 1.5], seed=3)
    shares = [1 / t for t in range(1, 61)]
    primal = textbook.primal_averaging(problem.grad, problem.x0, 58, lr=0.4).x
    assert torch.allclose(momentum_form(problem.grad, problem.x0, 0.4, shares), primal, rtol=1e-10)
    step = primal.diff(dim=0)
    g = torch.stack([problem.grad(x) for x in primal])
    n = torch.arange(2.0, len(step) + 1, dtype=torch.float64)[:, None]
    later = (n - 1) / (n + 1) * step[:-1] - 0.4 / (n + 1) * g[1:-1]
    assert torch.allclose(later, step[1:], rtol=1e-9, atol=1e-14)
    assert not torch.allclose(n / (n + 1) * step[:-1] - 0.4 / (n + 1) * g[1:-1], step[1:],
                              rtol=1e-3)
    beta, gamma = 0.8, 0.4
    heavy = problem.x0.clone().requires_grad_()
    optimizer, rows = SGD([heavy], lr=(1 - beta) * gamma, momentum=beta), []
    for _ in range(59):
        rows.append(heavy.detach().clone())
        heavy.grad = problem.grad(heavy.detach())
        optimizer.step()
    shares = [1.0] + [1 - beta] * 59
    form = momentum_form(problem.grad, problem.x0, gamma, shares)
    assert torch.allclose(form, torch.stack(rows), rtol=1e-10)
    weights = [1.0] + [(1 - beta) / beta**i for i in range(1, 60)]  # c_t = w_t / W_t = 1 - beta
    box = textbook.primal_averaging(problem.grad, problem.x0, 58, lr=gamma,
                                    weights=lambda i: weights[i - 1])
    assert torch.allclose(box.x, form, rtol=1e-9)


def test_primal_averaging_is_a_laguerre_polynomial():
    t = np.arange(1, 401)
    for q in (0.05, 1.0, 1.9, 4.0, 12.0):
        measured = mean(run(q, 400, "primal_averaging").x)
        exact = eval_genlaguerre(t - 1, 1, q) / t
        assert np.allclose(measured, exact, atol=1e-12)
        assert not np.allclose(measured, eval_genlaguerre(t - 1, 0, q) / t, atol=1e-3)
        assert (abs(measured) <= math.exp(q / 2) * (1 + 1e-12)).all()
    assert abs(mean(run(12.0, 400, "primal_averaging").x)).max() > 5  # grows before it falls
    far = np.arange(10**5, 10**5 + 400)
    for q in (0.05, 1.0, 12.0):
        size = math.exp(q / 2) / math.pi**0.5 * (q * far) ** -0.75
        wave = size * np.cos(2 * (q * far) ** 0.5 - 0.75 * math.pi)
        assert (abs(eval_genlaguerre(far - 1, 1, q) / far - wave) < 0.05 * size).all()


def moments(q, n):
    """A_t, B_t, C_t for t = 1, ..., n + 1 from x_1 = z_1 = 1 and gamma^2 s^2 = 1."""
    A = B = C = 1.0
    rows = []
    for t in range(1, n + 2):
        rows.append((A, B, C))
        C = C - 2 * q * B + q * q * A + 1
        B, A = (t * (B - q * A) + C) / (t + 1), (t * t * A + 2 * t * (B - q * A) + C) / (t + 1)**2
    return np.array(rows).T


def test_primal_averaging_keeps_its_noise():
    trace = run(0.7, 300, "primal_averaging")
    A, B, C = moments(0.7, 299)  # the same second moments, from the box
    unit = GAMMA**2 * S2
    assert np.allclose(A - mean(trace.x) ** 2, variance(trace.x) / unit)
    assert np.allclose(C - mean(trace.z) ** 2, variance(trace.z) / unit)
    for q in (0.02, 0.3, 1.0):
        n = 20000
        A, B, C = moments(q, n)
        t = np.arange(1, n + 1)
        virial = (C[1:] - q * t * A[:-1]).cumsum()
        assert np.allclose(virial, (t + 1) * B[1:] - B[0])
        two = (t + 1) * A[:-1] - np.concatenate([[0], (t[1:] - 1) * A[:-2]])
        r = 2 * B[:-1] - two
        energy = C[1:] + q * t * A[:-1] + q * (1 - q) * A[:-1].cumsum() + q * r.cumsum()
        assert np.allclose(energy, C[0] + t) and (r > -1e-9).all()
        assert not np.allclose(energy - q * r.cumsum(), C[0] + t, rtol=1e-3)
        average = A[:-1].cumsum() / t
        assert average[-1] * 3 * q == pytest.approx(1, abs=3 * (q * n) ** -0.5)
        assert A[-1] * 3 * q == pytest.approx(1, abs=2e-3)
        assert abs(A[-1] * 2 * q - 1) > 0.3
    for q in (1.9, 6.0):  # measured only
        assert moments(q, 20000)[0][-1] * 3 * q == pytest.approx(1, abs=2e-3)
