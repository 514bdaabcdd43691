"""The statements of theory/22_prodigy.md in numbers; the rules and helpers are test_theory's."""
import math
from functools import cache

import pytest
import torch
from scipy.optimize import brentq
from test_theory import before, equal, holds, lipschitz_problems, log2plus, report, runs
from test_theory import square, together

from prodigy import DoG, DoWG, Prodigy
from prodigy.lab import problems, textbook
from prodigy.lab.textbook import averages

ADAM = (0.9, 0.999)
G_GRADIENT = 3.0  # on constant gradients everything scales


def gd_runs():
    """Prodigy GD with the weights 1 and sqrt(k + 1)."""
    return runs("prodigy_gd", guarded=True) + runs("prodigy_gd", guarded=True, weights=growing)


def growing(k):
    return (k + 1) ** 0.5


def da_runs():
    return runs("prodigy_dual_averaging", guarded=True)


def inner(t):
    """N_n = sum_{k<=n} lambda_k <g_k, x_0 - x_k>."""
    return before(t.lam * (t.g * (t.x[0] - t.x)).sum(-1))


def travelled(t):
    """|x_{n+1} - x_0|."""
    return square(t.x[1:] - t.x[0]).sqrt()


def weights(t, problem):
    """Prodigy GD's lambda_k, recovered from the run: all 1, or sqrt(k + 1)."""
    first = t.d**2 / torch.sqrt(t.d**2 * problem.G**2 + (t.d**2 * square(t.g)).cumsum(0))
    if torch.allclose(first, t.lam, rtol=1e-12):
        return torch.ones_like(t.d)
    return torch.arange(1.0, len(t.d) + 1, dtype=torch.float64).sqrt()


# ------------------------------------------------------------------ 2. the lower bound
def any_points(problem, x, w, order):
    """Proposition 1: sum w_k <g_k, x_0 - x_k>, and the distance times the length of s."""
    g = torch.stack([problem.grad(row) for row in x])
    s = (w[:, None] * g).cumsum(0)
    dual = {2: 2, torch.inf: 1}[order]
    product = (w * (g * (problem.x0 - x)).sum(1)).cumsum(0)
    return product, problem.distance(order) * torch.linalg.vector_norm(s, dual, dim=1)


def test_lower_bound_for_any_points():
    for seed, problem in enumerate(lipschitz_problems()):
        walk = problems.gaussian((300, len(problem.x0)), seed=seed).cumsum(0) / 10
        x = torch.cat([problem.x0[None], problem.x0 + walk])
        w = problems.gaussian(301, seed=seed + 9)**2
        for order in (2, torch.inf):
            assert holds(*any_points(problem, x, w, order))
    line = problems.absolute_value()
    x, w = torch.tensor([[1.0], [1e-9]]).double(), torch.tensor([0.0, 1.0]).double()
    product, bound = any_points(line, x, w, 2)  # attained: no weight on the start
    assert equal(product, bound) and not holds(product, bound / 2)


def weighed(signs, k):
    return 1.0 + signs * (k % 7 == 3)


def test_prodigy_d_stays_below_D():
    tight = 0
    for problem, t in gd_runs() + da_runs():
        assert (t.d.diff() >= 0).all()
        assert holds(t.d, torch.full_like(t.d, problem.D))
        tight += not holds(t.d, torch.full_like(t.d, problem.D / 2))
    assert tight > 0
    largest = []
    for problem in lipschitz_problems():
        top = problem.distance(torch.inf)
        for betas in (ADAM, (0.0, 0.5), (0.5, 0.9)):
            for gamma in (1.0, lambda k: min(1.0, (k + 1) / 50), lambda k: weighed(4.0, k)):
                t = textbook.prodigy_adam(problem.grad, problem.x0, 150, d0=1e-6, gamma=gamma,
                                          betas=betas)
                assert holds(t.dhat[1:], torch.full_like(t.dhat[1:], top))
                largest.append((t.dhat[1:].max() / top).item())
    assert max(largest) > 0.5  # half of D_inf is no bound
    for options in (dict(beta3=0.5, eps=1.0), dict(beta3=0.999, eps=10.0), dict(beta3=0.0)):
        for problem in lipschitz_problems():
            _, d = class_run(problem.grad, problem.x0, 150, **options)
            assert holds(d, torch.full_like(d, problem.distance(torch.inf))) and d[-1] > 10 * d[0]
    line = problems.absolute_value()
    for d_coef in (0.5, 3.0):
        _, d = class_run(line.grad, line.x0, 100, d_coef=d_coef)
        assert d[-1] <= d_coef
    assert d[-1] > 1  # so d_coef = 3 does pass D

def class_run(grad, x0, steps, lr=lambda k: 1.0, after=None, dtype=torch.float64, **options):
    """(x, d) before each step and after the last, of the importable Prodigy on one tensor."""
    p = torch.as_tensor(x0, dtype=dtype).clone().requires_grad_()
    optimizer = Prodigy([p], **options)
    rows = [(p.detach().clone(), optimizer.get_d())]
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = lr(k)
        p.grad = grad(p.detach())
        optimizer.step()
        if after is not None:
            after(optimizer, p)
        rows.append((p.detach().clone(), optimizer.get_d()))
    x, d = zip(*rows, strict=True)
    return torch.stack(x), torch.tensor(d, dtype=torch.float64)


# ------------------------------------------------------------------ 3. the error term
def errors(t):
    """E_n = sum_{k<=n} eta_k^2 |g_k|^2 of Prodigy GD."""
    return before(t.lam**2 * square(t.g))


def test_distance_travelled():
    tight = 0
    for problem, t in gd_runs():
        r, E, N, d = travelled(t), errors(t), inner(t), t.d[1:]
        assert equal(r**2, E + 2 * N)
        assert not equal(r**2, 2 * N)
        root = d + torch.sqrt(d**2 + E)
        assert holds(r, root)
        tight += not holds(r, root / 2)
        grown = t.d[1:] == t.dhat[1:]
        assert equal(r[grown], root[grown])
        gaps = before(t.lam * problem.gap(t.x))
        assert holds(gaps, problem.D * r - N)
        assert holds(problem.D * r - N, problem.D * (2 * d + E / d))
    assert tight > 0


def error_potential(problem, t):
    """Lemma 4: E_n, the bound with d_n, and the bound with the number of steps."""
    w = weights(t, problem)
    P = before((t.d * w)**2 * square(t.g)) / problem.G**2
    d = t.d[:-1]
    return errors(t), d**2 * torch.log(1 + P / d**2), d**2 * torch.log(1 + before(w**2))


def test_error_potential():
    E, first, second = (torch.cat(side) for side in
                        zip(*[error_potential(*run) for run in gd_runs()], strict=True))
    assert holds(E, first)
    assert holds(first, second)
    assert not holds(E, first / 2) and not holds(E, second / 2)
    for problem, t in gd_runs():  # each step of the potential pays for its own term
        _, potential, _ = error_potential(problem, t)
        assert holds((t.lam**2 * square(t.g))[1:-1], potential.diff())
        assert not holds((t.lam**2 * square(t.g))[1:-1], potential.diff() / 2)


def prodigy_gd_rate(problem, t):
    """Theorem 5 for every n: the gap at the average, and its bound."""
    w, d = weights(t, problem), t.d
    total = before(w * d**2)
    gap = problem.gap(averages(t.x, t.lam)[:-1])
    logarithm = 2 + torch.log(1 + before(w**2))
    top = (2 * w[:-1]).sqrt() * problem.D * problem.G * d[1:] * logarithm
    return gap, top / total.sqrt()


def test_prodigy_gd_rate():
    measured, bound = together([prodigy_gd_rate(*run) for run in gd_runs()])
    assert holds(measured, bound)
    report("Theorem 5", measured, bound)
    for problem, t in gd_runs():
        left = before(t.lam * (t.g * (t.x - problem.x_star)).sum(-1))
        out = ((t.x[0] - t.x[1:]) * (t.x[0] - problem.x_star)).sum(-1)
        assert equal(left, out + errors(t) / 2 - travelled(t)**2 / 2)
        assert not equal(left, out - travelled(t)**2 / 2)
        w = weights(t, problem)
        least = before(w * t.d**2).sqrt() / (problem.G * (2 * w[:-1]).sqrt())
        assert holds(least, before(t.lam))
        assert not holds(least, before(t.lam) / 2)


def best(t, n):
    """argmin_{k <= n} d_{k+1}^2 / sum_{i<=k} d_i^2, and the minimum."""
    ratio = t.d[1:n + 2]**2 / (t.d[:n + 1]**2).cumsum(0)
    return int(ratio.argmin()), ratio.min()


def horizons(problem, t):
    """Some n with n + 1 >= 4 log2plus(D / d_0)."""
    first = 4 * log2plus(problem.D / t.d[0])
    return [n for n in (3, 10, 30, 90, 150, 299) if n + 1 >= first]


def at_the_best(problem, t, bound):
    """Rows (gap at the average taken at t, bound(ell, n)) and (ratio, 4 ell / (n + 1))."""
    rates, ratios = [], []
    for n in horizons(problem, t):
        k, ratio = best(t, n)
        ell = log2plus(problem.D / t.d[0])
        gap = problem.gap(averages(t.x, t.lam)[k])
        scale = problem.D * problem.G * torch.sqrt(ell / (n + 1))
        rates.append(torch.stack([gap, bound(n) * scale]))
        ratios.append(torch.stack([ratio, 4 * ell / (n + 1)]))
    return torch.stack(rates, 1), torch.stack(ratios, 1)


def test_square_root_of_the_logarithm():
    chosen = runs("prodigy_gd", guarded=True)
    both = [at_the_best(*run, lambda n: 8**0.5 * (2 + math.log(n + 2))) for run in chosen]
    gap, bound = torch.cat([rates for rates, _ in both], 1)
    assert holds(gap, bound)
    report("Corollary 6", gap, bound)
    ratio, limit = torch.cat([ratios for _, ratios in both], 1)
    assert holds(ratio, limit)
    # the ratio behind it is tight: d = 2^(k/4) until one step remains
    d = torch.exp2(torch.arange(42.0, dtype=torch.float64) / 4)
    worst = (d[1:]**2 / (d[:-1]**2).cumsum(0)).min()
    limit = 4 * log2plus(d[-1] / d[0]) / 41
    assert worst <= limit and worst > limit / 2.5


# ------------------------------------------------------------------ 4. dual averaging
def dual_averaging_error(t):
    """E_n = sum gamma_k d_k^4 |g_k|^2, 2 d_n^2 sqrt(sum d_k^2 |g_k|^2), 2 d_{n+1}^2 / gamma."""
    E = before(t.gamma * t.lam**2 * square(t.g))
    root = before(t.lam * square(t.g)).sqrt()
    return E, 2 * t.d[:-1]**2 * root, 2 * t.d[1:]**2 / t.gamma[1:]


def test_prodigy_da_rate():
    chosen = da_runs()
    for problem, t in chosen:
        E, first, second = dual_averaging_error(t)
        assert holds(E, first)
        assert holds(first, second)
        assert not holds(E, second / 2)
        left = before(t.lam * (t.g * (t.x - problem.x_star)).sum(-1))
        out = (t.s[1:] * (t.x[0] - problem.x_star)).sum(-1)
        assert equal(left, out - inner(t))
        assert not equal(left, out - inner(t) / 2)
        gaps = before(t.lam * problem.gap(t.x))
        bound = (2 + 3**0.5) * problem.D * t.d[1:] / t.gamma[1:]
        assert holds(gaps, bound)
        total = before(t.lam)
        average = problem.gap(averages(t.x, t.lam)[:-1])
        root = (t.d[1:]**2 + total).sqrt()
        first = (2 + 3**0.5) * problem.D * problem.G * t.d[1:] * root / total
        assert holds(average, first)
        report("Theorem 7 (1)", average, first)
    both = [at_the_best(*run, lambda n: 8**0.5 * (2 + 3**0.5)) for run in chosen]
    gap, bound = torch.cat([rates for rates, _ in both], 1)
    assert holds(gap, bound)
    report("Theorem 7 (2)", gap, bound)
    # (3) where d stops
    stops = []
    for problem, t in chosen:
        left = torch.full_like(t.d[1:], problem.D) - square(t.x[1:] - problem.x_star).sqrt()
        stops.append((left, (1 + 3**0.5) * t.d[1:]))
    measured, bound = together(stops)
    assert holds(measured, bound)
    assert not holds(measured, bound / 2)


# ------------------------------------------------------------------ 5. growth
@cache
def universal(box, steps=200, **parameters):
    """A box on a constant gradient from d_0 = 1: the universal sequence d_k / d_0."""
    return getattr(textbook, box)(lambda x: torch.full_like(x, -G_GRADIENT), [0.0], steps, d0=1.0,
                                  **parameters)


def test_prodigy_first_increase():
    n = torch.arange(1.0, 6.0, dtype=torch.float64)
    gd, da = (universal(box, G=G_GRADIENT) for box in ("prodigy_gd", "prodigy_dual_averaging"))
    x = ((n + 1)**-0.5).cumsum(0)
    assert equal(gd.dhat[1:6], (x**2 - (1 / (n + 1)).cumsum(0)) / (2 * x))
    sums = torch.cat([torch.zeros(1), (n / (n + 1).sqrt())[:-1].cumsum(0)])
    assert equal(da.dhat[1:6], sums / n)
    for t, first in ((gd, 5), (da, 5)):
        assert (t.d[:first] == 1).all() and t.d[first] > 1
    for betas, first in ((ADAM, 2), ((0.9, 0.99), None)):
        t = universal("prodigy_adam", steps=60, betas=betas, eps=1e-30)
        early = (1 - betas[0]) / (1 - betas[1])**0.5
        assert t.dhat[2] == pytest.approx(early / (1 + betas[1]**0.5))
        assert (t.d[2] > 1) == (first == 2)


def factor(equation):
    return brentq(equation, 1.01, 20.0)


def adam_factor(betas, gamma=1.0, d_coef=1.0):
    """The root q of Theorem 9's equation (3)."""
    beta1, beta2 = betas
    beta3 = beta2**0.5

    def equation(q):
        a = (1 - beta1) / (1 - beta1 / q) * ((1 - beta2 / q**2) / (1 - beta2))**0.5
        return (q - 1) * (q**3 - beta3) - d_coef * gamma * a * (q**2 - beta3)

    return factor(equation)


def growth(t):
    return (t.d[1:] / t.d[:-1]).numpy()


def test_geometric_growth():
    gd, da = (universal(box, G=G_GRADIENT) for box in ("prodigy_gd", "prodigy_dual_averaging"))
    q = factor(lambda q: (q * q - 1)**0.5 - q * (q**3 - 1))
    assert q == pytest.approx(1.1394, abs=5e-5)
    assert growth(gd)[-1] == pytest.approx(1.5**0.5, rel=1e-12)
    assert growth(da)[-1] == pytest.approx(q, rel=1e-12)
    for betas in (ADAM, (0.9, 0.99), (0.0, 0.5)):
        t = universal("prodigy_adam", steps=60, betas=betas, eps=1e-30)
        assert growth(t)[-1] == pytest.approx(adam_factor(betas), rel=1e-9)
        assert abs(growth(t)[-1] / adam_factor((betas[0] / 2, betas[1] / 2)) - 1) > 0.01
    assert adam_factor(ADAM) == pytest.approx(2.5718, abs=5e-5)
    # (4) the fraction of the way that dhat sees
    for t, fraction in ((gd, 1 / (1 + 1.5**0.5)), (da, q * (q * q - 1)**0.5)):
        assert (t.dhat[-1] / t.x[-1, 0]).item() == pytest.approx(fraction, rel=1e-9)
    for rate in (1.1, 1.5, float("inf")):
        seen = []
        x, _ = class_run(lambda x: -torch.ones_like(x), [0.0], 120, growth_rate=rate, d0=1e-20,
                         eps=1e-40, after=estimates_of(seen))
        q, beta3 = min(rate, adam_factor(ADAM)), ADAM[1]**0.5
        assert seen[-1] / x[-1].item() == pytest.approx((q**2 - beta3) / (q**3 - beta3), rel=1e-3)
    # with a constant gamma and d_coef, in the class
    for gamma, d_coef in ((0.1, 1.0), (1.0, 0.3), (0.5, 2.0)):
        _, d = class_run(lambda x: -torch.ones_like(x), [0.0, 0.0], 150, lr=lambda k: gamma,
                         d_coef=d_coef, d0=1e-12, eps=1e-30)
        ratio = (d[1:] / d[:-1])[d[1:] < 1e30][-1].item()
        assert ratio == pytest.approx(adam_factor(ADAM, gamma, d_coef), rel=1e-6)
    # the map of the proof, its fixed point, and its Jacobian by differences
    def step(u, w):
        e = (2 + w)**-0.5
        rho = u * (1 + e) / (u + e)
        return (u + e) / rho, (w + 1) / rho**2, rho

    u, w = 1 + 6**0.5 / 2, 2.0
    assert step(u, w) == pytest.approx((u, w, 1.5**0.5))
    h = 1e-6
    columns = [[(a - b) / (2 * h) for a, b in zip(step(u + h * i, w + h * j)[:2],
                                                  step(u - h * i, w - h * j)[:2])]
               for i, j in ((1, 0), (0, 1))]
    values = torch.linalg.eigvals(torch.tensor(columns, dtype=torch.float64)).real.sort()[0]
    by_hand = [[(2 * 6**0.5 - 3) / 3, (48 - 20 * 6**0.5) / 3],
               [(2 - 6**0.5) / 48, (2 + 6**0.5) / 6]]  # column by column
    assert torch.allclose(torch.tensor(columns), torch.tensor(by_hand), rtol=1e-5)
    root = (334 - 136 * 6**0.5)**0.5
    expected = torch.tensor([5 * 6**0.5 - 4 - root, 5 * 6**0.5 - 4 + root]).double() / 12
    assert torch.allclose(values, expected, atol=1e-6)
    distance = 1.5**0.5 - growth(gd)
    assert distance[61:80] / distance[60:79] == pytest.approx(expected[1].item(), abs=1e-3)


def distances(method, steps):
    """rbar_0, ..., rbar_steps of DoG or DoWG on a constant gradient, from rbar_0 = 1."""
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = method([p], reps_rel=1.0, **({"eps": 1e-300} if method is DoG else {}))
    rbar = []
    for _ in range(steps + 1):
        p.grad = torch.full_like(p, -G_GRADIENT)
        optimizer.step()
        rbar.append(float(optimizer.param_groups[0]["rbar"]))
    return torch.tensor(rbar, dtype=torch.float64)


def test_dog_growth():
    rbar = distances(DoG, 4000)
    k = torch.arange(1, 4001, dtype=torch.float64)
    product = (1 + k[1:]**-0.5).cumprod(0)
    assert equal(rbar[2:].log(), product.log())
    assert not equal(rbar[2:].log(), (1 + k[:-1]**-0.5).cumprod(0).log())
    constant = torch.log(rbar[1:]) - 2 * k.sqrt() + torch.log(k) / 2
    assert abs(constant[-1] - constant[1000]) < 0.02
    assert math.exp(constant[-1]) == pytest.approx(0.161, abs=0.001)
    dowg = distances(DoWG, 100)
    q = factor(lambda q: q**3 - q**2 - q - 1)
    assert (dowg[-1] / dowg[-2]).item() == pytest.approx(q, rel=1e-12)


# ------------------------------------------------------------------ 6. the options
def sums(grad, x, d, gamma, beta3=ADAM[1]**0.5):
    """For every n the vectors of r's terms, of s with gamma and of s without it, by coordinate."""
    g = torch.stack([grad(row) for row in x])
    n = torch.arange(len(x), dtype=torch.float64)
    w = d**2 * beta3**(-n)
    r = ((gamma * w)[:, None] * g * (x[0] - x)).cumsum(0)
    with_gamma = ((gamma * w)[:, None] * g).cumsum(0)
    return r, with_gamma, (w[:, None] * g).cumsum(0)


def estimates_of(found):
    """A callback for class_run that keeps every d_hat."""
    return lambda optimizer, p: found.append(float(optimizer.param_groups[0]["d_hat"]))


def test_slices_are_a_mean():
    A, x_star = problems.gaussian((30, 24), seed=1), problems.gaussian(24, seed=2)
    for problem in (problems.least_absolute(A, x_star, torch.zeros(24)),
                    problems.quadratic(torch.linspace(0.1, 1.0, 24), seed=3)):
        for p in (1, 2, 5, 24):
            seen = []
            x, d = class_run(problem.grad, problem.x0, 40, slice_p=p, after=estimates_of(seen))
            r, s, _ = sums(problem.grad, x[:-1], d[:-1], torch.ones(40).double())
            seen = torch.tensor(seen, dtype=torch.float64)
            assert torch.allclose(r[:, ::p].sum(1) / s[:, ::p].abs().sum(1), seen, rtol=1e-9)
            parts = torch.stack([r[:, i::p].sum(1) for i in range(p)], 1)
            lengths = torch.stack([s[:, i::p].abs().sum(1) for i in range(p)], 1)
            share = lengths / lengths.sum(1, keepdim=True)
            full = r.sum(1) / s.abs().sum(1)
            assert equal((share * parts / lengths).sum(1), full)
            assert p in (1,) or not equal((parts / lengths).mean(1), full)
            assert ((parts / lengths).amin(1) <= full + 1e-15).all()
            assert (full <= (parts / lengths).amax(1) + 1e-15).all()
    # separable: every slice is a bound for its own entries
    x_star = torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=torch.float64)
    x, d = class_run(lambda x: torch.sign(x - x_star), torch.zeros(4), 200)
    r, s, _ = sums(lambda x: torch.sign(x - x_star), x[:-1], d[:-1], torch.ones(200).double())
    half = []
    for i in range(2):
        bound = s[:, i::2].abs().sum(1) * x_star[i]
        assert holds(r[:, i::2].sum(1), bound)
        half.append(holds(r[:, i::2].sum(1), bound / 2))
    assert not all(half)
    # not separable: beyond D
    A = problems.gaussian((3, 2), seed=48) * torch.tensor([1.0, 10.0])
    problem = problems.least_absolute(A, problems.gaussian(2, seed=148), torch.zeros(2))
    _, d = class_run(problem.grad, problem.x0, 300, slice_p=2)
    assert d[-1] > 4 * problem.distance(torch.inf)


def test_safeguard_bound():
    gamma = torch.linspace(0.02, 1.0, 60, dtype=torch.float64)
    for problem in lipschitz_problems():
        seen = []
        x, d = class_run(problem.grad, problem.x0, 60, lr=lambda k: gamma[k].item(),
                         safeguard_warmup=True, after=estimates_of(seen))
        r, s, without = sums(problem.grad, x[:-1], d[:-1], gamma)
        rho = s.abs().sum(1) / without.abs().sum(1)
        seen = torch.tensor(seen, dtype=torch.float64)
        assert torch.allclose(rho * r.sum(1) / s.abs().sum(1), seen, rtol=1e-9, atol=1e-20)
        assert not torch.allclose(r.sum(1) / s.abs().sum(1), seen, rtol=1e-2, atol=1e-20)
        assert holds(seen, rho * problem.distance(torch.inf))
    # gradients that keep their signs
    x, d = class_run(lambda x: -torch.ones_like(x), [0.0], 60, lr=lambda k: gamma[k].item(),
                     safeguard_warmup=True)
    _, s, without = sums(lambda x: -torch.ones_like(x), x[:-1], d[:-1], gamma)
    rho = (s / without)[:, 0]
    assert holds(rho, gamma) and holds(gamma[0].expand(60), rho)
    # no bound on D: f = |x|, x_0 = 1, w = 1, and points on both sides of 0
    x = torch.tensor([1.0] + [-1e-3] * 9 + [1e-3] * 9, dtype=torch.float64)[:, None]
    gamma = torch.tensor([0.1] * 10 + [1.0] * 9, dtype=torch.float64)
    r, s, without = sums(torch.sign, x, torch.ones(19).double(), gamma, beta3=1.0)
    assert r[-1] <= s[-1].abs() and r[-1] > 8 * without[-1].abs()


def forget(optimizer, p):
    """Plain bfloat16: drop what rounding to nearest lost."""
    optimizer.state[p]["residual"].zero_()


def test_bfloat16_start():
    beta1, beta2 = ADAM
    kappa = (1 - beta1) / ((1 - beta2) * (1 - beta1**2 / beta2))**0.5
    assert kappa == pytest.approx(7.27, abs=0.005)
    # |m| <= kappa sqrt v for any gradients, attained by g_j proportional to (beta2 / beta1)^j
    sequences = [problems.gaussian(200, seed=s) for s in range(20)]
    sequences.append((beta2 / beta1)**torch.arange(200.0, dtype=torch.float64))
    worst = []
    for g in sequences:
        m = v = torch.zeros(())
        for entry in g:
            m, v = beta1 * m + (1 - beta1) * entry, beta2 * v + (1 - beta2) * entry**2
            worst.append((m.abs() / v.sqrt()).item())
    assert kappa * 0.999 < max(worst) <= kappa * (1 + 1e-12)
    x0 = torch.tensor([1.0, 1.5, 3.9, 40.0])
    for seed in range(3):
        noise = iter(problems.gaussian((100, 4), seed=seed).float() + 0.5)
        x, d = class_run(lambda x: next(noise).to(x), x0, 100, dtype=torch.bfloat16,
                         d0=0.99 * 2**-9 / kappa, after=forget)
        assert (x == x[0]).all() and (d == d[0]).all()

    def upwards(x):
        return torch.ones_like(x)

    steps = torch.arange(1.0, 40.0, dtype=torch.float64)
    most = ((1 - beta1**steps) / (1 - beta2**steps).sqrt()).max().item()
    for scale, starts in ((0.99, False), (1.01, True)):
        d0 = scale * 2**-9 / most
        x, d = class_run(upwards, torch.ones(1), 60, dtype=torch.bfloat16, d0=d0, after=forget)
        assert (d[-1] > d[0]) == starts
    assert most == pytest.approx(6.57, abs=0.005)
    kept = class_run(upwards, torch.ones(1), 12, dtype=torch.bfloat16, d0=1e-6)
    wide = class_run(upwards, torch.ones(1), 12, dtype=torch.float32, d0=1e-6)
    assert kept[1] == pytest.approx(wide[1], rel=1e-5) and kept[1][-1] > 100 * 1e-6
