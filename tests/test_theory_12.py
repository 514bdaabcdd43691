"""The statements of theory/12_momentum.md in numbers; the rules are test_theory's."""
import cmath
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from scipy.special import eval_chebyt

import prodigy
from prodigy.lab import problems, textbook

BETAS = (0.0, 0.3, 0.9, 0.99)
KAPPAS = (1.5, 10.0, 400.0)


def polynomial(method, h, beta):
    """(t, c) of the roots' equation r^2 - t r + c = 0."""
    if method == "heavy ball":
        return 1 + beta - h, beta
    return (1 - h) * (1 + beta), beta * (1 - h)


def rho(method, h, beta):
    t, c = polynomial(method, h, beta)
    root = cmath.sqrt(t * t - 4 * c)
    return max(abs(t + root), abs(t - root)) / 2


def smooth_problems():
    A, b = problems.gaussian((12, 4), seed=1), problems.gaussian(12, seed=2)
    return (problems.quadratic([1.0, 3.0, 10.0], seed=3), problems.least_squares(A, b),
            problems.softmax_regression(A, (b > 0).long(), decay=0.1), problems.cycling())


def run_torch(grad, x0, steps, rates, **options):
    """The points of torch.optim.SGD and of prodigy.SGD, which must agree."""
    rows = []
    for SGD in (torch.optim.SGD, prodigy.SGD):
        p = x0.clone().requires_grad_()
        optimizer, seen = SGD([p], lr=rates(0), **options), [x0]
        for k in range(steps):
            optimizer.param_groups[0]["lr"] = rates(k)
            p.grad = grad(p.detach())
            optimizer.step()
            seen.append(p.detach().clone())
        rows.append(torch.stack(seen))
    assert torch.allclose(*rows, rtol=1e-12, atol=1e-13)
    return rows[0]


# ------------------------------------------------------------------ 1. forms
def test_forms_of_momentum():
    def close(a, b):
        return torch.allclose(a, b, rtol=1e-10, atol=1e-12)

    for problem in smooth_problems():
        f, x0, lr, beta = problem.grad, problem.x0, 0.3 / problem.L, 0.8
        ball = textbook.heavy_ball(f, x0, 40, lr=lr, beta=beta)
        ahead = textbook.nesterov(f, x0, 40, lr=lr, beta=beta)
        assert close(run_torch(f, x0, 40, lambda k: lr, momentum=beta), ball.x)
        nesterov = run_torch(f, x0, 40, lambda k: lr, momentum=beta, nesterov=True)
        assert close(nesterov, ahead.y) and not close(nesterov, ahead.x)

        def rates(k):
            return lr if k < 10 else lr / 10

        cut = run_torch(f, x0, 20, rates, momentum=beta)
        x = [x0, x0]
        for k in range(20):
            share = beta * rates(k) / rates(k - 1)
            x.append(x[-1] - rates(k) * f(x[-1]) + share * (x[-1] - x[-2]))
        assert close(cut, torch.stack(x[1:]))
        polyak = textbook.heavy_ball(f, x0, 20, lr=rates, beta=beta).x
        assert close(cut[:11], polyak[:11]) and not close(cut[11], polyak[11])
        damped = run_torch(f, x0, 20, lambda k: lr, momentum=beta, dampening=beta)
        g = torch.stack([f(p) for p in damped])
        weights = (1 - beta) * beta**torch.arange(19, -1, -1, dtype=torch.float64)
        plain = weights @ g[:20]
        weights[0] /= 1 - beta
        assert close((damped[-2] - damped[-1]) / lr, weights @ g[:20])
        assert not close((damped[-2] - damped[-1]) / lr, plain)

    def late(k):  # a step 0 moves nothing and is remembered: no momentum of the ball does that
        return 0.1 * min(k, 1)

    line = problems.quadratic([1.0], x0=[1.0])
    torchs = run_torch(line.grad, line.x0, 2, late, momentum=0.9)
    assert torchs[:, 0].tolist() == pytest.approx([1, 1, 0.81])
    for beta in (*BETAS, 0.9):
        ball = textbook.heavy_ball(line.grad, line.x0, 2, lr=late, beta=beta).x
        assert ball[:, 0].tolist() == pytest.approx([1, 1, 0.9])


def test_damped_units():
    for problem in smooth_problems():
        for beta in BETAS:
            eta, n = 0.2 / problem.L, 30
            t = textbook.heavy_ball(problem.grad, problem.x0, n, lr=eta * (1 - beta), beta=beta)
            z = problem.x0 - eta * t.g.cumsum(0)
            averaged = [problem.x0]
            for row in z[:-1]:
                averaged.append(beta * averaged[-1] + (1 - beta) * row)
            assert torch.allclose(torch.stack(averaged), t.x, rtol=1e-11)
            m, _ = textbook.exponential_average(t.g, beta)
            assert torch.allclose(t.x[:-1] - eta * m[:-1], t.x[1:], rtol=1e-11)
            age = n - torch.arange(n, dtype=torch.float64)
            moved = eta * (1 - beta**age) @ t.g[:n]
            assert torch.allclose(problem.x0 - moved, t.x[n], rtol=1e-11)
            late = eta * (1 - beta**(age + 1)) @ t.g[:n]
            assert torch.allclose(late, moved, rtol=1e-4) == (beta == 0)


# ------------------------------------------------------------------ 2. two roots
def test_momentum_stability():
    limits = {"heavy ball": lambda b: 2 * (1 + b), "nesterov": lambda b: 2 * (1 + b) / (1 + 2 * b)}
    for method, limit in limits.items():
        for beta in BETAS:
            edge = limit(beta)
            inside = [rho(method, edge * u, beta) for u in (1e-6, 0.01, 0.5, 0.9, 1 - 1e-6)]
            outside = [rho(method, edge * u, beta) for u in (1 + 1e-6, 1.1, 3.0)]
            assert max(inside) < 1 < min(outside)
    line = problems.quadratic([1.0])
    for box, limit in ((textbook.heavy_ball, 3.8), (textbook.nesterov, 3.8 / 2.8)):
        sizes = [box(line.grad, line.x0, 400, lr=limit * u, beta=0.9).x[-1].abs().item()
                 for u in (0.99, 1.01)]
        assert sizes[0] < 0.1 and sizes[1] > 10


def critical(method, h):
    """(the bound, the beta that attains it) of Proposition 4."""
    root = math.sqrt(h)
    return (abs(1 - root), (1 - root)**2) if method == "heavy ball" else (
        1 - root, (1 - root) / (1 + root))


def test_critical_damping():
    for method, steps in (("heavy ball", (0.01, 0.3, 0.99, 1.0, 2.0, 3.9, 5.0)),
                          ("nesterov", (0.01, 0.3, 0.99))):
        for h in steps:
            bound, best = critical(method, h)
            betas = np.linspace(-0.5 if method == "heavy ball" else 0.0, 2.0, 2001)
            seen = np.array([rho(method, h, beta) for beta in betas])
            assert (seen >= bound - 1e-7).all()
            assert (seen[abs(betas - best) > 1e-3] > bound).all()
            t, c = polynomial(method, h, best)
            assert t**2 - 4 * c == pytest.approx(0, abs=1e-12)
            assert c == pytest.approx(bound**2, abs=1e-12)
            assert seen.min() < bound + 0.05  # a larger bound fails
    for beta in BETAS[1:]:
        for u in np.linspace(0, 1, 20):
            h = (1 - beta**0.5)**2 * (1 - u) + (1 + beta**0.5)**2 * u
            assert rho("heavy ball", h, beta) == pytest.approx(beta**0.5, abs=1e-6)
        assert rho("heavy ball", 0.9 * (1 - beta**0.5)**2, beta) > beta**0.5 + 1e-4


# ------------------------------------------------------------------ 3. narrow valleys
def worst(method, alpha, beta, kappa):
    """Over the spectrum {1, kappa}."""
    return max(rho(method, alpha, beta), rho(method, alpha * kappa, beta))


def around(alpha, beta):
    """Pairs near and far from (alpha, beta)."""
    rng = np.random.default_rng(0)
    near = [(alpha * u, beta * v) for u in (0.97, 1, 1.03) for v in (0.97, 1, 1.03) if u * v != 1]
    far = rng.uniform(0, 1, (400, 2)) * [3 * alpha, 1.0]
    return near + [(a + 1e-9, b) for a, b in far]


def test_best_heavy_ball():
    for kappa in KAPPAS:
        q = (kappa**0.5 - 1) / (kappa**0.5 + 1)
        alpha = 4 / (kappa**0.5 + 1)**2
        for other in around(alpha, q**2):
            assert worst("heavy ball", *other, kappa) > q
        spectrum = np.r_[np.linspace(1, kappa, 30), np.geomspace(1, kappa, 9)]
        for h in alpha * spectrum:
            assert rho("heavy ball", h, q**2) == pytest.approx(q, abs=1e-5)
        k = torch.arange(121, dtype=torch.float64)
        for x0 in (torch.eye(39)[0], torch.eye(39)[-1], problems.gaussian(39, seed=1)):
            problem = problems.quadratic(spectrum, x0=x0)
            x = textbook.heavy_ball(problem.grad, problem.x0, 120, lr=alpha, beta=q**2).x
            measured, bound = x.norm(dim=1) / x[0].norm(), q**k * (1 + k * (1 + q))
            low = q**k * (1 + k * (1 - q))
            assert (measured <= bound * (1 + 1e-6) + 1e-14).all()
            if x0[-1] == 1:
                assert torch.allclose(measured, bound, rtol=1e-5, atol=1e-14)
                assert (measured[1:30] > q**k[1:30] * (1 + k[1:30])).all()  # without q: violated
            if x0[0] == 1:
                assert torch.allclose(measured, low, rtol=1e-5, atol=1e-14)


def test_nesterov_rates():
    for kappa in KAPPAS:
        q, u = (kappa**0.5 - 1) / (kappa**0.5 + 1), (3 * kappa + 1)**0.5
        spectrum = np.linspace(1, kappa, 200)
        for alpha, beta, rate in ((1 / kappa, q, 1 - kappa**-0.5),
                                  (4 / (3 * kappa + 1), (u - 2) / (u + 2), 1 - 2 / u)):
            seen = [rho("nesterov", alpha * value, beta) for value in spectrum]
            assert max(seen) == pytest.approx(rate, abs=1e-7)
        for other in around(alpha, beta):
            assert worst("nesterov", *other, kappa) > 1 - 2 / u
        for h in np.linspace(1 / kappa, 1, 20)[1:-1]:  # complex from the critical value up to 1
            low = (1 - kappa**-0.5) / (1 + kappa**-0.5)
            for other in np.linspace(low, 1, 9)[:-1]:
                assert rho("nesterov", h, other) == pytest.approx((other * (1 - h))**0.5)
        for other in np.linspace(0, 1, 300):
            assert rho("nesterov", 1 / kappa, other) > 1 - kappa**-0.5 - 1e-12
        assert 1 - kappa**-0.5 > 1 - 2 / u > q
        assert rho("nesterov", 0.5, 10.0) > 1.2 * 5**0.5  # and not complex for every beta above 1

        s, grid = 1 - 2 / u, np.linspace(0, (u - 2) / (u + 2), 100)  # F of the proof
        F = ((1 + s) * (s + grid) * (s - grid * (1 - s))
             / ((1 - s) * (s - grid) * (s + grid * (1 + s))))
        assert (np.diff(F) > 0).all() and F[-1] == pytest.approx(kappa)
        problem = problems.quadratic([1.0, kappa])
        x = textbook.nesterov(problem.grad, problem.x0, 100, lr=1 / kappa, beta=q).x
        k = torch.arange(101, dtype=torch.float64)  # a double root: k (1 + sqrt h) in all
        exact = (1 - kappa**-0.5)**k * (1 + k * kappa**-0.5)
        assert torch.allclose(x[:, 0], exact, rtol=1e-6, atol=1e-14)


def test_chebyshev_limit():
    def scaled(points, kappa):
        return (kappa + 1 - 2 * points) / (kappa - 1)

    for kappa in KAPPAS:
        q = (kappa**0.5 - 1) / (kappa**0.5 + 1)
        problem = problems.quadratic(torch.linspace(1, kappa, 400))
        lr = 4 / (kappa**0.5 + 1)**2
        ball = textbook.heavy_ball(problem.grad, problem.x0, 60, lr=lr, beta=q**2)
        descent = textbook.heavy_ball(problem.grad, problem.x0, 60, lr=2 / (kappa + 1), beta=0)
        ahead = textbook.nesterov(problem.grad, problem.x0, 60, lr=1 / kappa, beta=q)
        points = np.linspace(1, kappa, 400)
        for k in (1, 2, 5, 20):
            bound = 2 * q**k / (1 + q**(2 * k))
            best = eval_chebyt(k, scaled(points, kappa)) / eval_chebyt(k, scaled(0, kappa))
            assert abs(best).max() == pytest.approx(bound, rel=1e-9)
            for t in (ball, descent, ahead):
                assert t.x[k].abs().max() >= bound * (1 - 1e-9)
            loss = (1 + k * (1 + q)) * (1 + q**(2 * k)) / 2
            assert ball.x[k].abs().max() <= bound * loss * (1 + 1e-6)
        assert descent.x[1].abs().max() == pytest.approx((kappa - 1) / (kappa + 1))  # attained
        assert ball.x[20].abs().max() < bound * 40 and descent.x[60].abs().max() >= bound**3


def test_heavy_ball_cycles():
    def slope(x):
        return 25 * x if x < 1 else (x + 24 if x < 2 else 25 * x - 24)

    def around(denominator):
        return [Fraction(n, denominator) for n in (792, -2208, 2592)]

    def closes(points, beta=Fraction(4, 9)):
        return all(b - slope(b) / 9 + beta * (b - a) == c
                   for a, b, c in zip(points[2:] + points[:2], points, points[1:] + points[:1]))

    cycle = around(1225)
    assert closes(cycle) and not closes(cycle, Fraction(1, 2)) and not closes(around(1226))
    assert min(abs(x - kink) for x in cycle for kink in (1, 2)) > Fraction(1, 10)
    for start, circles in ((3.3, True), (3.1, True), (2.5, False)):
        problem = problems.cycling(start)
        x = textbook.heavy_ball(problem.grad, problem.x0, 300, lr=1 / 9, beta=4 / 9).x[-3:, 0]
        target = torch.tensor([float(value) for value in cycle], dtype=torch.float64)
        assert torch.allclose(x.sort().values, target.sort().values, atol=1e-12) == circles
        assert circles or x.abs().max() < 1e-12
        ahead = textbook.nesterov(problem.grad, problem.x0, 300, lr=1 / 25, beta=2 / 3)
        assert ahead.x[-1].abs() < 1e-12


# ------------------------------------------------------------------ 4. noise
def floor(eta, beta, value, variance):
    return eta * variance / (2 * value) / (1 - eta * value / 2 * (1 - beta) / (1 + beta))


def test_noise_floor():
    for value, variance in ((1.0, 1.0), (0.2, 3.0)):
        for beta in BETAS:
            for share in (0.01, 0.5, 0.95):
                alpha = share * 2 * (1 + beta) / value
                A = np.array([[1 + beta - alpha * value, -beta], [1, 0]])
                exact = solve_discrete_lyapunov(A, np.diag([alpha**2 * variance, 0.0]))[0, 0]
                measured = alpha * (1 + beta) * variance / (
                    (1 - beta) * value * (2 * (1 + beta) - alpha * value))
                assert measured == pytest.approx(exact, rel=1e-8)
                assert floor(alpha / (1 - beta), beta, value, variance) == pytest.approx(exact)
                if beta:  # the floor of SGD with the step eta is another one
                    other = floor(alpha / (1 - beta), 0.0, value, variance)
                    assert other != pytest.approx(exact, rel=1e-3)
    # the exact recursion of the noisy runs, and the runs themselves
    spectrum, noise = torch.tensor([1.0, 0.3]).double(), torch.tensor([0.5, 2.0]).double()
    f = textbook.noisy_quadratic(spectrum, noise, 2000, lr=0.05, beta=0.9)
    limit = sum(v / 2 * floor(0.5, 0.9, v, s) for v, s in zip(spectrum.tolist(), noise.tolist()))
    assert f[-1].item() == pytest.approx(limit, rel=1e-9)
    quiet = problems.quadratic(spectrum)
    t = textbook.heavy_ball(quiet.grad, quiet.x0, 50, lr=0.05, beta=0.9)
    still = textbook.noisy_quadratic(spectrum, noise * 0, 50, lr=0.05, beta=0.9)
    assert torch.allclose(still, quiet.gap(t.x), rtol=1e-10)
    runs, generator = 20000, torch.Generator().manual_seed(0)
    many = torch.ones(runs, 2, dtype=torch.float64)

    def noisy(x):
        shocks = torch.randn(runs, 2, generator=generator, dtype=torch.float64)
        return (x.view(runs, 2) * spectrum + shocks * noise.sqrt()).reshape(-1)

    x = textbook.heavy_ball(noisy, many.reshape(-1), 30, lr=0.05, beta=0.9).x
    seen = (x.view(31, runs, 2)**2 * spectrum).sum(-1).mean(-1) / 2
    assert torch.allclose(seen, f[:31], rtol=0.05)


def test_slow_directions():
    for beta in BETAS[1:]:
        edge = (1 - beta**0.5)**2
        for share in (1e-3, 0.1, 0.5, 0.9, 1 - 1e-9):
            h = share * edge
            speed, v = 1 - rho("heavy ball", h, beta), h / (1 - beta)
            assert v * (1 - 1e-6) <= speed <= (1 + beta**0.5) * v * (1 + 1e-6)
        assert speed == pytest.approx((1 + beta**0.5) * v, rel=1e-3)
        assert speed > 1.5 * v  # the constant 1 instead of 1 + sqrt(beta) is violated
        v = 1e-4 * edge / (1 - beta)
        assert 1 - rho("heavy ball", 1e-4 * edge, beta) == pytest.approx(v, rel=1e-3)


def test_what_the_batch_decides():
    spectrum, noise = 1 / torch.arange(1, 21).double(), torch.linspace(0.5, 2, 20).double()
    S, L = noise.sum().item(), 1.0

    def f(eta, beta, B):
        pairs = zip(spectrum.tolist(), noise.tolist())
        return sum(v / 2 * floor(eta, beta, v, s / B) for v, s in pairs)

    ratios = []
    for B in (1, 64):
        for eta in (0.01, 0.5, 1.9):
            seen = [f(eta, beta, B) for beta in BETAS]
            assert (np.diff(seen) < 0).all()
            for beta, measured in zip(BETAS, seen):
                low = eta * S / (4 * B)
                ratios.append(measured / low)
                assert low < measured <= low / (1 - eta * L / 2 * (1 - beta) / (1 + beta))
    assert min(ratios) < 1.001  # so no larger constant than 1/4 will do
    longer = textbook.noisy_quadratic(spectrum, noise / 64, 4000, lr=0.05, beta=0.9)[-1]
    assert longer.item() == pytest.approx(f(0.5, 0.9, 64), rel=1e-9)
    for epsilon in (0.1, 3.0):
        B = S / (4 * epsilon * L)
        for share in (0.01, 1.0):
            eta = 2 * share * B * epsilon / S
            assert eta * L < 2 and f(eta, 0.0, share * B) <= 2 / 3 * epsilon
        alone = floor(2 * B * epsilon / S, 0.0, L, S / B) * L / 2  # all noise along L: attained
        assert alone == pytest.approx(2 / 3 * epsilon)
