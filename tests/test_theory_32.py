"""The statements of theory/32_schedule_free.md in numbers; the rules are test_theory's."""
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from scipy.special import eval_genlaguerre, gammaln

from prodigy.lab import problems, textbook, worst_cases
from prodigy.lab.problems import Problem, gaussian

BETAS = (0.0, 0.3, 0.9, 1.0)


def double(values):
    return torch.as_tensor(values, dtype=torch.float64)


def holds(measured, bound):
    return bool((measured <= bound + 1e-9 * bound.abs() + 1e-13).all())


def equal(left, right, tolerance=1e-9):
    return bool(((left - right).abs() <= tolerance * right.abs().max()).all())


def report(name, measured, bound):
    print(f"{name}: measured over bound at most {(measured / bound).max():.3f}")


def lipschitz_problems():
    A, x_star, zero = gaussian((12, 4), seed=1), gaussian(4, seed=2), torch.zeros(4)
    return (problems.absolute_value(), problems.absolute_value(x0=3.0, G=2.0),
            problems.max_affine(A, x_star, zero), problems.least_absolute(A, x_star, zero))


def smooth_problems():
    return (problems.quadratic([1.0, 0.1, 0.001]), problems.quadratic([2.0], x0=[3.0]),
            problems.least_squares(gaussian((12, 4), seed=3), gaussian(12, seed=4)))


def grads(problem, points):
    return torch.stack([problem.grad(row) for row in points])


def inner(left, right):
    return (left * right).sum(1)


def steps_of(schedule, T):
    """The values of a function of t, or of a number, at t = 1, ..., T."""
    return double([float(textbook.at(schedule, t)) for t in range(1, T + 1)])


def any_points(problem, T, beta, seed):
    """Any z_1, ..., z_T and weights, their averages x_t, and y_t for numbers or T values beta."""
    z = problem.x0 + gaussian((T, len(problem.x0)), seed).cumsum(0)
    w = gaussian(T, seed + 1).square() + 1e-2
    x = textbook.averages(z, w)
    beta = double(beta).expand(T)[:, None]
    return z, w, x, (1 - beta) * z + beta * x, beta


# ------------------------------------------------------------------ 2. from online to batch
def one_step(problem, z, w, x, y, beta):
    """Lemma 1 for t = 1, ..., T: left side, middle, right side."""
    gaps, total = problem.gap(x), w.cumsum(0)
    before = torch.cat([torch.zeros(1), (total * gaps)[:-1]])
    h, g = grads(problem, x), grads(problem, y)
    h = torch.where(beta == 1, g, h)
    right = w * inner(g, z - problem.x_star)
    return total * gaps - before, right - w * inner(beta * (h - g), x - z), right


def test_one_step_of_online_to_batch():
    halved = mismatched = 0
    for seed, problem in enumerate(lipschitz_problems() + smooth_problems()):
        for beta in (*BETAS, gaussian(80, seed).abs().clamp(max=1.0)):
            z, w, x, y, beta = any_points(problem, 80, beta, seed)
            left, middle, right = one_step(problem, z, w, x, y, beta)
            assert holds(left, middle)
            assert holds(middle, right)
            halved += not holds(left, right / 2)
            uniform = textbook.averages(z, torch.ones_like(w))  # not the weights of the regret
            mismatched += not holds(one_step(problem, z, w, uniform, y, beta)[0], right)
    assert halved > 0 and mismatched > 0


def online_to_batch(parts, problem, T, beta, weights):
    """Theorem 2 over all sequences of parts: the two sides, one entry for each sequence.

    Weights that are random are a function of the numbers of the parts drawn so far; both sides are
    then multiplied by their sum.
    """
    rows = []
    for numbers in product(range(len(parts)), repeat=T):
        draws = iter([*numbers, numbers[0]])
        past = isinstance(weights, dict)  # w_t by what was drawn last
        mine = (lambda t: weights[numbers[t - 2] if t > 1 else None]) if past else weights
        t = textbook.schedule_free_sgd(lambda x: parts[next(draws)].grad(x), problem.x0, T, lr=0.4,
                                       beta=beta, weights=mine)
        w = steps_of(mine, T)
        scale = 1.0 if past else w.sum()
        regret = (w * inner(t.g[:T], t.z[:T] - problem.x_star)).sum() / scale
        gap = problem.gap(t.x[T - 1]) * (w.sum() if past else 1.0)
        rows.append(torch.stack([gap, regret]))
    return torch.stack(rows, 1)


def test_online_to_batch():
    A, x_star, zero = gaussian((3, 2), seed=5), gaussian(2, seed=6), torch.zeros(2)
    whole = problems.least_absolute(A, x_star, zero)
    parts = [problems.least_absolute(A[i:i + 1], x_star, zero) for i in range(3)]
    pathwise = 0
    for beta in (*BETAS, lambda t: t / 4):
        for weights in (1.0, lambda t: t, {None: 1.0, 0: 5.0, 1: 0.1, 2: 1.0}):
            gap, regret = online_to_batch(parts, whole, 4, beta, weights)
            assert holds(gap.mean(), regret.mean())
            pathwise += not holds(gap, regret)  # it is a statement about the mean
    assert pathwise > 0
    line = problems.absolute_value()
    gap, regret = online_to_batch([line], line, 1, 0.9, 1.0)
    assert equal(gap, regret) and not holds(gap, regret / 2)


def bregman(problem, u, v):
    values = torch.stack([problem.value(a) - problem.value(b) for a, b in zip(u, v, strict=True)])
    return values - inner(grads(problem, v), u - v)


def what_is_dropped(problem, u, z, w, x, y, beta):
    """Proposition 3 with any u for x_star: left side, right side, and the terms w R_t."""
    g, h, total = grads(problem, y), grads(problem, x), w.cumsum(0)
    R = inner(beta * (h - g), x - z)
    u = u.expand_as(y)
    right = w * (inner(g, z - u) - bregman(problem, y, x) - bregman(problem, u, y) - R)
    right[1:] -= total[:-1] * bregman(problem, x[:-1], x[1:])
    gap = problem.value(x[-1]) - problem.value(u[0])
    return total[-1] * gap, right.sum(), R


def test_what_online_to_batch_drops():
    counted = 0
    classifier = problems.softmax_regression(gaussian((20, 3), 7), torch.arange(20) % 3)
    for seed, problem in enumerate((*smooth_problems(), classifier)):
        u = gaussian(len(problem.x0), seed + 20)
        for beta in (*BETAS, gaussian(30, seed).abs().clamp(max=1.0)):
            points = any_points(problem, 30, beta, seed)
            left, right, R = what_is_dropped(problem, u, *points)
            assert torch.allclose(left, right, rtol=1e-8)
            assert holds(-R, torch.zeros_like(R))
            _, w, x, y, share = points
            if R.max() > 1e-3:
                assert not torch.allclose(left, right + (w * R).sum(), rtol=1e-4)
                counted += 1
            if (share < 1).all():
                both = bregman(problem, x, y) + bregman(problem, y, x)
                assert equal(R, (share / (1 - share))[:, 0] * both, 1e-8)
    assert counted >= 8


# ------------------------------------------------------------------ 3. worst cases
def constant_step(problem, T, beta, theta):
    """Theorem 4: the gap at x_T and its bound; and the two sides of the proof's first equality."""
    lr = theta * problem.D / (problem.G * T**0.5)
    t = textbook.schedule_free_sgd(problem.grad, problem.x0, T, lr=lr, beta=beta)
    regret = inner(t.g[:T], t.z[:T] - problem.x_star).sum()
    squares = lr / 2 * inner(t.g[:T], t.g[:T]).sum()
    end = ((t.z[T] - problem.x_star)**2).sum()
    bound = (theta + 1 / theta) / 2 * problem.D * problem.G / T**0.5
    return torch.stack([problem.gap(t.x[T - 1]), double(bound), regret,
                        (problem.D**2 - end) / (2 * lr) + squares, squares])


def test_worst_case_at_every_beta():
    chosen = [(problem, T, beta, theta) for T in (1, 5, 40) for theta in (0.5, 1.0, 2.0)
              for problem in (*lipschitz_problems(), problems.resisting(T, D=2.0, G=3.0))
              for beta in (*BETAS, lambda t, T=T: t / T)]
    gap, bound, regret, right, squares = torch.stack([constant_step(*c) for c in chosen], 1)
    assert holds(gap, bound)
    assert not holds(gap, bound / 2)
    assert equal(regret, right) and not equal(regret, right - squares)
    for theta in (0.5, 1.0, 2.0):
        for beta in BETAS:
            worst = worst_cases.schedule_free(4, beta=beta, D=2.0, G=3.0, lr=theta / 3)
            assert worst == pytest.approx((theta + 1 / theta) / 2 * 3, rel=1e-5)
    lr = 0.5 / 3**0.5  # theta^2 T < 1: less than the bound, DG - gamma G^2 (T - 1) / 2
    assert worst_cases.schedule_free(3, lr=lr) == pytest.approx(1 - lr, rel=1e-5)
    assert 0.98 < (1 - lr) / (1.25 / 3**0.5) < 0.99


def test_nothing_does_better():
    attained = 0
    for T in (1, 2, 7, 30):
        problem = problems.resisting(T, D=2.0, G=3.0)
        bound = double(6 / T**0.5)
        assert problem.D == pytest.approx(2.0)
        assert problem.value(problem.x_star).item() == pytest.approx(problem.f_star)
        for seed in range(20):  # any method in the span of its subgradients
            h, seen = gaussian((T, T), seed) / 2, [problem.x0]
            for t in range(1, T):
                point = sum(h[t, s] * seen[s] for s in range(t))
                seen.append(problem.grad(point))
                assert torch.linalg.vector_norm(seen[-1]) <= 3 + 1e-12
            last = sum(h[0, s] * seen[s] for s in range(T))
            assert holds(bound, problem.gap(last))
        for beta in (*BETAS, lambda t, T=T: t / T):
            gap = constant_step(problem, T, beta, 1.0)[0]
            assert equal(gap, bound)
            attained += not holds(2 * bound, gap)
        # one subgradient more, and the method can get below the bound
        t = textbook.schedule_free_sgd(problem.grad, problem.x0, T, lr=2 / (3 * T**0.5), beta=0.0)
        assert problem.gap(t.z[T]) < 1e-9
    assert attained > 0


def huber(h):
    """h |x| - h^2 / 2, and x^2 / 2 for |x| < h: L = 1, from x_1 = 1."""
    def value(x):
        return torch.where(x.abs() < h, x**2 / 2, h * x.abs() - h**2 / 2).sum()

    return Problem("huber", value, lambda x: x.clamp(-h, h), x0=double([1.0]),
                   x_star=double([0.0]), f_star=0.0, L=1.0)


def smooth_step(problem, T, beta, gamma):
    """Proposition 6: gap and bound for the step gamma / L."""
    lr = gamma / problem.L
    t = textbook.schedule_free_sgd(problem.grad, problem.x0, T, lr=lr, beta=beta)
    return problem.gap(t.x[T - 1]), double(problem.D**2 / (2 * lr * T))


def test_smooth_constant_step():
    for beta in (*BETAS, lambda t: t / 20):
        for gamma in (0.1, 0.5, 1.0):
            for problem in smooth_problems():
                for T in (1, 5, 20):
                    assert holds(*smooth_step(problem, T, beta, gamma))
        for gamma in (0.3, 1.0, 1.5):
            h = 1 / (1 + gamma * 19)
            gap, bound = smooth_step(huber(h), 20, beta, gamma)
            assert gap.item() == pytest.approx(h / 2, rel=1e-12)
            assert not holds(gap, bound / 2)
            assert holds(gap, bound) == (gamma <= 1)
        assert equal(*smooth_step(huber(1 / 20), 20, beta, 1.0))


# ------------------------------------------------------------------ 4. other clothes
def wild_run(T, lr=lambda t: 0.3 / t**0.5, beta=lambda t: 0.5 + 0.4 * np.sin(t),
             weights=lambda t: 1 + t % 3, problem=None):
    problem = problem or smooth_problems()[2]
    t = textbook.schedule_free_sgd(problem.grad, problem.x0, T, lr=lr, beta=beta, weights=weights)
    w = steps_of(weights, T + 1)
    c = w / w.cumsum(0)
    return t, steps_of(lr, T + 1)[:, None], steps_of(beta, T + 1)[:, None], c[:, None], w


def test_momentum_form():
    for options in ({}, {"weights": 1.0, "beta": 0.9, "lr": 0.2}, {"beta": lambda t: t / 60}):
        t, lr, beta, c, _ = wild_run(60, **options)
        m = t.x[:-1] - t.z[1:]
        earlier = torch.cat([torch.zeros_like(m[:1]), m[:-1]])
        assert equal(m, (1 - c[:-1]) * earlier + lr[:-1] * t.g[:-1])
        change = (beta[1:] - beta[:-1]) * (1 - c[1:]) * m
        plain = (1 - beta[:-1]) * lr[:-1] * t.g[:-1] + beta[:-1] * c[1:] * m
        assert equal(t.y[1:], t.y[:-1] - plain + change)
        assert equal(t.y[1:], t.y[:-1] - plain) == (options.get("beta") == 0.9)


def test_linear_decay_is_schedule_free():
    T, lr = 40, 0.7
    for problem in (*lipschitz_problems(), *smooth_problems()):
        for weights in (1.0, lambda t: t):
            w = steps_of(weights, T).cumsum(0)
            for delta in (0.0, 0.5 / w[-1].item(), 1 / w[-1].item()):
                share = [delta * total.item() for total in w]
                free = textbook.schedule_free_sgd(
                    problem.grad, problem.x0, T - 1, lr=lr, weights=weights,
                    beta=lambda t, share=share: share[t - 1])
                plain = textbook.polyak_averaging(
                    problem.grad, problem.x0, T - 1,
                    lr=lambda t, share=share: lr * (1 - share[t - 1]))
                assert equal(free.y[:20], plain.z[:20], 1e-7)
            first = textbook.schedule_free_sgd(  # another beta_1: y_1 = x_1, nothing changes
                problem.grad, problem.x0, T - 1, lr=lr, weights=weights,
                beta=lambda t, share=share: 0.9 if t == 1 else share[t - 1])
            assert equal(first.y, free.y)
            if problem.L:
                assert equal(free.y, plain.z, 1e-7) and equal(free.y[-1], free.x[-1])
                other = textbook.schedule_free_sgd(problem.grad, problem.x0, T - 1, lr=lr,
                                                   weights=weights, beta=lambda t: t / (T + 1))
                assert not equal(other.y, plain.z, 1e-4)
    for T in (2, 5):
        last = worst_cases.subgradient(T, lr=worst_cases.linear_decay(T))
        assert last == pytest.approx(T**-0.5, rel=1e-5)


def unit_vectors(T):
    """The oracle whose t-th answer is e_t: what a point is made of can be read off it."""
    rows = iter(torch.eye(T + 1, dtype=torch.float64))
    return lambda x: next(rows)


def test_weights_of_the_gradients():
    T = 30
    for beta in (*BETAS, lambda t: t / T, lambda t: 0.5 + 0.5 * np.cos(t)):
        for weights in (1.0, lambda t: t, lambda t: 1 + t % 3):
            t = textbook.schedule_free_sgd(unit_vectors(T), torch.zeros(T + 1), T, lr=0.5,
                                           beta=beta, weights=weights)
            total = steps_of(weights, T + 1).cumsum(0)
            past = torch.ones(T + 1, T + 1).tril(-1).double()
            share = past * total[None, :] / total[:, None]
            b = steps_of(beta, T + 1)[:, None]
            assert equal(-t.z, 0.5 * past) and equal(-t.x, 0.5 * (past - share))
            assert equal(-t.y, 0.5 * (past - b * share))
            late = past * (total[None, :] - total[0]) / total[:, None]
            assert not equal(-t.x, 0.5 * (past - late), 1e-3)


def test_average_of_the_gradient_points():
    T = 50
    for beta in (0.0, 0.3, 0.5, 0.9):
        C = 1 / (1 - beta)
        t = wild_run(T - 1, weights=1.0, beta=beta)[0]
        index = torch.arange(1, T + 1).double()
        for exponent in (C, C + 1):
            a = torch.lgamma(index - 1 + exponent) - torch.lgamma(index)
            a = torch.softmax(a, 0)
            mean = (a * index).sum().item()
            assert equal((a[:, None] * t.y).sum(0), t.x[-1], 1e-8) == (exponent == C)
            assert (mean == pytest.approx((C * T + 1) / (C + 1))) == (exponent == C)


def nesterov_potential(problem, T, scale=1.0):
    """w_{1:t} (F(x_t) - F_star) + scale L |z_t - x_star|^2 for t = 1, ..., T, and the trace."""
    t = textbook.nesterov_acsa(problem.grad, problem.x0, T - 1, L=problem.L)
    k = torch.arange(1, T + 1).double()
    far = ((t.z - problem.x_star)**2).sum(1)
    return k * (k + 1) / 2 * problem.gap(t.x) + scale * problem.L * far, t, k


def test_nesterov_is_schedule_free():
    rises = 0
    for problem in smooth_problems():
        potential, t, k = nesterov_potential(problem, 60)
        free = textbook.schedule_free_sgd(
            problem.grad, problem.x0, 59, weights=lambda t: t, beta=lambda t: t / (t + 2),
            lr=lambda t, L=problem.L: (t + 1) / (2 * L))
        for name in "xyz":
            assert equal(getattr(t, name), getattr(free, name))
        assert holds(potential[1:], potential[:-1])
        halved = nesterov_potential(problem, 60, 0.5)[0]
        rises += not holds(halved[1:], halved[:-1])
        bound = 3 * problem.L * problem.D**2 / (k * (k + 1))
        assert holds(problem.gap(t.x), bound)
    assert rises > 0
    for T in (2, 5, 8):
        k = np.arange(1, T + 1)
        worst = worst_cases.schedule_free(T, L=1.0, lr=(k + 1) / 2, weights=k, beta=k / (k + 2))
        assert worst < 3 / (T * (T + 1))
        print(f"Proposition 11, T = {T}: worst case over bound {worst * T * (T + 1) / 3:.3f}")


# ------------------------------------------------------------------ 5. quadratics
def on_the_line(beta, step, T):
    """x_1, ..., x_{T+1} on x^2 / 2 from x_1 = 1 for the step gamma lambda; beta, step (p,)."""
    beta, step = double(beta), double(step)
    return textbook.schedule_free_sgd(lambda x: x, torch.ones_like(step), T, beta=beta,
                                      lr=lambda t: step)


def series(beta, step, T, shift=0):
    """Coefficients 1, ..., T of Theorem 12's function, exactly; its exponent is C - 1 + shift."""
    beta, step = Fraction(str(beta)), Fraction(str(step))
    r, e = 1 - step * (1 - beta), beta / (1 - beta) + shift
    a, b = [Fraction(1)], [Fraction(1)]
    for n in range(1, T + 1):
        a.append(a[-1] * (n - 1 - e) / n)
        b.append(b[-1] * r * (n - 1 + e) / n)
    products = [sum(a[i] * b[n - i] for i in range(n + 1)) for n in range(1, T + 1)]
    return double([float(-total / (step * beta)) for total in products])


def test_generating_function():
    T, one = 40, torch.ones(1, dtype=torch.float64)
    for beta in (0.2, 0.5, 0.6, 0.9):
        for step in (0.3, 1.0, 2.5):
            x = on_the_line(beta * one, step * one, T - 1).x[:, 0]
            assert torch.allclose(x, series(beta, step, T), rtol=1e-8, atol=1e-10)
            assert not torch.allclose(x, series(beta, step, T, shift=1), rtol=1e-2, atol=1e-3)
    k = torch.arange(1, T + 1).double()
    for step in (0.3, 1.0, 2.5):
        r = 1 - step
        zero, half, full = (on_the_line(b * one, step * one, T - 1).x[:, 0] for b in (0, 0.5, 1))
        assert equal(zero, (1 - r**k) / (step * k))
        assert equal(half, (1 - step / 2)**(k - 1))
        assert equal(full, double(eval_genlaguerre(k.numpy() - 1, 1, step)) / k)
    x = on_the_line([0.9, 0.75], [10.0, 4.0], 20).x
    assert x[9:, 0].abs().max() < 1e-9 < x[8, 0].abs() and x[3:, 1].abs().max() < 1e-9


def test_threshold_on_quadratics():
    spectra = 10 ** gaussian((10, 20), seed=0).clamp(-2, 0)
    top = spectra.max(1).values
    for beta in (0.0, 0.5, 0.9):
        for factor in (0.99, 1.01):
            lr = factor * 2 / ((1 - beta) * top)
            t = on_the_line(torch.full_like(spectra, beta).flatten(),
                            (lr[:, None] * spectra).flatten(), 5000)
            size = t.x.reshape(-1, 10, 20).norm(dim=2)
            assert ((size[-1] < 0.1) if factor < 1 else (size[-1] > 1e10)).all()
    # the rate t^-C, with its constant, and a geometric one for whole C
    for beta, step in ((0.6, 3.0), (0.3, 0.5), (0.7, 1.0)):
        C, n = 1 / (1 - beta), 3000
        x = on_the_line([beta], [step], n - 1).x[-1, 0].abs().item()
        size = np.exp(gammaln(n + 1 - C) - gammaln(1 - C) - gammaln(n + 1))
        law = size * (step / C)**(1 - C) / (step * beta)
        assert x == pytest.approx(law, rel=0.02)
        assert x != pytest.approx(law * n**0.1, rel=0.02)
    assert on_the_line([0.9], [5.0], 300).x[-1].abs() < 1e-12


def test_transient_on_quadratics():
    beta, step = torch.meshgrid(double([0.1, 0.3, 0.5, 0.75, 0.9, 0.95]),
                                double(np.linspace(0.02, 0.95, 12)), indexing="ij")
    beta, q = beta.flatten(), 2 * step.flatten()
    C = 1 / (1 - beta)
    x = on_the_line(beta, q * C, 1500).x.abs().max(0).values
    bound = (1 - q / 2)**(1 - C) / (q * (C - 1))
    assert holds(x, bound)
    report("Corollary 14", x, bound)
    assert not holds(x, (1 - q / 2)**(2 - C) / (q * (C - 1)))
    p = double([0.5, 2.0, 8.0, 20.0, 50.0])
    x = on_the_line(torch.ones(5), p, 1500).x.abs().max(0).values
    assert holds(x, torch.exp(p / 2) / p)
    report("Corollary 14, beta = 1", x, torch.exp(p / 2) / p)
    assert not holds(x, torch.exp(p / 4) / p)
    assert on_the_line([1.0], [8.0], 20000).x[-1].abs() < 0.02


# ------------------------------------------------------------------ 6. large steps
def large_step(g, z1, u):
    """Theorem 15: condition Q, regret over D sqrt Sigma, and the two identities of its proof."""
    D, G = (z1 - u).norm(), g.norm(dim=1).max()
    lr, root = D / G, g.norm()
    z = torch.cat([z1[None], z1 - lr * g.cumsum(0)])
    S = z1 - z[-1]
    moved, regret = inner(g, z[:-1] - z1).sum(), inner(g, z[:-1] - u).sum()
    identity = (lr * root / (2 * D)) * (1 - S.norm()**2 / (lr * root)**2)
    return torch.stack([moved / (D * root), regret / (D * root), identity,
                        S @ (z1 - u) + lr * moved, lr * regret])


def test_large_steps():
    rows = []
    for seed in range(400):  # any vectors, more or less turned one way
        g = gaussian((seed % 30 + 1, 3), seed) + seed % 7 * gaussian(3, seed + 1)
        rows.append(large_step(g, gaussian(3, seed + 2), gaussian(3, seed + 3)))
    for problem in lipschitz_problems() + smooth_problems():
        for beta in BETAS:
            T, lr = 200, problem.D / (problem.G or problem.grad(problem.x0).norm().item())
            t = textbook.schedule_free_sgd(problem.grad, problem.x0, T, lr=min(lr, 1e3), beta=beta)
            if torch.isfinite(t.g).all():
                rows.append(large_step(t.g, problem.x0, problem.x_star))
    Q, regret, identity, left, right = torch.stack(rows, 1)
    there, bound = Q <= 1, torch.full_like(Q, 2 + 2**0.5)
    assert 300 < there.sum() < len(Q)
    assert holds(regret[there], bound[there])
    assert not holds(regret, bound)  # without the condition it is false
    report("Theorem 15", regret[there], bound[there])
    assert torch.allclose(Q, identity, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(Q, 2 * identity, rtol=1e-3)
    assert torch.allclose(left, right, rtol=1e-7, atol=1e-7)
