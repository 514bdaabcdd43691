"""Every numbered statement of theory/*.md, checked in numbers.

A function `name(...)` returns (measured, bound), tensors of one shape with measured <= bound
claimed; `test_name` asserts the claim over runs of several problems, then breaks something: a
tight bound is halved and must fail, a loose one has an identity of its proof broken and prints
measured over bound. The last tests hold the pages to their promise: no statement without a test.
"""
import ast
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from prodigy.lab import problems, textbook
from prodigy.lab.textbook import averages, norm

ROOT = Path(__file__).resolve().parents[1]
STARTS = (1e-6, 1e-2, 0.3)


def lipschitz_problems():
    """Convex, Lipschitz, with known minimiser: one-dimensional, max-affine and l1."""
    A, x_star = problems.gaussian((12, 4), seed=1), problems.gaussian(4, seed=2)
    zero = torch.zeros(4)
    return (problems.absolute_value(), problems.absolute_value(x0=3.0, G=2.0),
            problems.max_affine(A, x_star, zero), problems.least_absolute(A, x_star, zero))


@cache
def runs(box, steps=300, guarded=False, **parameters):
    """(problem, trace) for every problem and start d_0 (all below D); guarded hands G over."""
    found = []
    for problem in lipschitz_problems():
        given = parameters | ({"G": problem.G} if guarded else {})
        run = getattr(textbook, box)
        found += [(problem, run(problem.grad, problem.x0, steps, d0=d0, **given))
                  for d0 in STARTS]
    return found


def dual_averaging_runs():
    """All runs of Algorithm 1: both options, both normalisers."""
    return [run for option in (1, 2) for guarded in (False, True)
            for run in runs("dadapt_dual_averaging", option=option, guarded=guarded)]


def before(rows):
    """Sums over k <= n for n = 0, 1, ...: the left-hand sides, without the last row's gradient."""
    return rows[:-1].cumsum(0)


def square(rows):
    return (rows**2).sum(-1)


def E(t):
    """E_n = sum_{k<=n} gamma_k lambda_k^2 |g_k|^2."""
    return before(t.gamma * t.lam**2 * square(t.g))


def log2plus(ratio):
    return torch.log2(ratio).clamp(min=1.0)


def together(pairs):
    """Concatenate (measured, bound) pairs of several runs."""
    measured, bound = zip(*pairs, strict=True)
    return torch.cat(measured), torch.cat(bound)


def holds(measured, bound):
    """measured <= bound everywhere, up to rounding relative to the bound."""
    return bool((measured <= bound + 1e-9 * bound.abs() + 1e-13).all())


def equal(left, right):
    """left = right up to rounding relative to the largest entry."""
    return bool(((left - right).abs() <= 1e-9 * right.abs().max()).all())


def report(name, measured, bound):
    print(f"{name}: measured over bound at most {(measured / bound).max():.3f}")


# ------------------------------------------------------------------ 2. the lower bound
def inner_product_identity(t):
    """Both sides of Lemma 1 for every n, and the right side without its last sum."""
    left = before(t.gamma * t.lam * (t.g * t.s).sum(-1))
    change = ((t.gamma[1:] - t.gamma[:-1]) * square(t.s[1:])).cumsum(0)
    kept = t.gamma[1:] / 2 * square(t.s[1:]) - E(t) / 2
    return left, kept - change / 2, kept


def test_inner_product_identity():
    for _, t in dual_averaging_runs():
        left, right, without_change = inner_product_identity(t)
        assert equal(left, right)
        assert holds(without_change, right)
        assert not equal(left, without_change)


def key_bound(problem, t):
    """Lemma 2: the weighted gaps, and its two right-hand sides."""
    gaps = before(t.lam * problem.gap(t.x))
    length = problem.D * square(t.s[1:]).sqrt()
    product = before(t.gamma * t.lam * (t.g * t.s).sum(-1))
    return gaps, length - product, length + E(t) / 2 - t.gamma[1:] / 2 * square(t.s[1:])


def test_key_bound():
    attained = 0
    for problem, t in dual_averaging_runs():
        gaps, first, second = key_bound(problem, t)
        assert holds(gaps, first)
        assert holds(first, second)
        attained += not holds(gaps, second / 2)
    assert attained > 0
    t = textbook.dadapt_dual_averaging(torch.sign, [1.0], 1, d0=0.1)
    gaps, first, second = key_bound(problems.absolute_value(), t)
    assert equal(gaps[:1], second[:1]) and equal(first[:1], second[:1])


def options(t):
    """Options I and II of Definition 2 from one and the same run; 0 where s_{n+1} = 0."""
    length = square(t.s[1:]).sqrt()
    one = (t.gamma[1:] * length**2 - E(t)) / (2 * length)
    two = before(t.gamma * t.lam * (t.g * t.s).sum(-1)) / length
    return one.nan_to_num(0.0), two.nan_to_num(0.0)


def lower_bound_on_D(problem, t):
    one, two = options(t)
    return one, two, torch.full_like(two, problem.D)


def test_lower_bound_on_D():
    violations = 0
    for problem, t in dual_averaging_runs():
        one, two, D = lower_bound_on_D(problem, t)
        assert holds(one, two)
        assert holds(two, D)
        violations += not holds(two, D / 2)
    assert violations > 0
    for _, t in runs("dadapt_dual_averaging", option=1):
        assert equal(t.dhat[1:], options(t)[0])
    for _, t in runs("dadapt_dual_averaging", option=2):
        assert equal(t.dhat[1:], options(t)[1])


def test_d_stays_below_D():
    for problem, t in dual_averaging_runs() + runs("dadapt_gd", guarded=True):
        assert (t.d.diff() >= 0).all()
        assert holds(t.d, torch.full_like(t.d, problem.D))
    assert any(not holds(t.d, torch.full_like(t.d, problem.D / 2))
               for problem, t in dual_averaging_runs())
    for problem in lipschitz_problems():
        start = dict(d0=1.5 * problem.D)
        guards = ({}, dict(G=problem.G))
        both = [dict(option=option, **guard) for option in (1, 2) for guard in guards]
        beyond = [textbook.dadapt_dual_averaging(problem.grad, problem.x0, 300, **start, **given)
                  for given in both]
        beyond.append(textbook.dadapt_gd(problem.grad, problem.x0, 300, **start, G=problem.G))
        assert all((t.d == start["d0"]).all() for t in beyond)


# ------------------------------------------------------------------ 3. from the estimate to a rate
def size_of_s(t):
    """|s_{n+1}|, the larger root, and the paper's form (Lemma 5)."""
    d, gamma = t.d[1:], t.gamma[1:]
    root = (d + torch.sqrt(d**2 + gamma * E(t))) / gamma
    return square(t.s[1:]).sqrt(), root, 2 * d / gamma + E(t) / (2 * d)


def test_size_of_s():
    violations = 0
    for _, t in dual_averaging_runs():
        length, root, printed = size_of_s(t)
        assert holds(length, root)
        assert holds(root, printed)
        violations += not holds(length, printed / 2)
    assert violations > 0
    for _, t in runs("dadapt_dual_averaging", option=1):
        length, root, _ = size_of_s(t)
        grown = t.d[1:] == t.dhat[1:]
        assert equal(length[grown], root[grown])


def normalised_sums(g, G):
    """The left and right sides of Lemma 6 (i), (ii), (iii) for every n; g holds |g_k|."""
    total = (g**2).cumsum(0)
    earlier = total - g**2
    n = torch.arange(len(g), dtype=torch.float64)
    first = (g**2 / torch.sqrt(G**2 + earlier)).cumsum(0), 2 * total.sqrt()
    second = (g**2 / (G**2 + total)).cumsum(0), torch.log(n + 2)
    terms = torch.cat([g[:1], g[1:]**2 / earlier[1:].sqrt()])
    third = terms.cumsum(0), 2 * total.sqrt() + G**2 / g[0] - g[0]
    return first, second, third


def test_normalised_sums():
    n = 3000
    generator = torch.Generator().manual_seed(0)
    late = torch.cat([torch.full((1,), 1e-2), torch.ones(n - 1)])
    sequences = [torch.ones(n), torch.rand(n, generator=generator), 1 / torch.arange(1.0, n), late]
    for i in range(3):
        pairs = [normalised_sums(g.double(), 1.0)[i] for g in sequences]
        measured, bound = together(pairs)
        assert holds(measured, bound)
        assert not holds(measured, bound / 2)


def regret(problem, t):
    """sum lambda_k <g_k, x_k - x_star>, and the same by Lemmas 1 and 2 before any inequality."""
    left = before(t.lam * (t.g * (t.x - problem.x_star)).sum(-1))
    change = ((t.gamma[1:] - t.gamma[:-1]) * square(t.s[1:])).cumsum(0) / 2
    inner = (t.s[1:] * (problem.x0 - problem.x_star)).sum(-1)
    return left, inner + E(t) / 2 - t.gamma[1:] / 2 * square(t.s[1:]) + change, change


def proof_identity_breaks(problem, t):
    """The identity behind the rates is exact, and is not without its last sum."""
    left, right, change = regret(problem, t)
    assert equal(left, right)
    return not equal(left, right - change)


def weighted_gaps(problem, t):
    """Lemma 7."""
    bound = 2 / t.gamma[1:] + before(t.gamma * square(t.g))
    return before(t.lam * problem.gap(t.x)), problem.D * t.d[1:] * bound


def test_weighted_gaps():
    chosen = dual_averaging_runs()
    measured, bound = together([weighted_gaps(*run) for run in chosen])
    assert holds(measured, bound)
    assert not holds(measured, bound / 2)
    report("Lemma 7", measured, bound)
    assert all(proof_identity_breaks(*run) for run in chosen)


def nondecreasing_sequences(d):
    """Lemma 8 for the sequence d_0, ..., d_{N+1}; None where N + 1 < 2 log2(d_{N+1} / d_0)."""
    N = len(d) - 2
    ratio = d[-1] / d[0]
    if N + 1 < 2 * torch.log2(ratio):
        return None
    return (d[1:] / d[:-1].cumsum(0)).min(), 2 * log2plus(ratio) / (N + 1)


def test_nondecreasing_sequences():
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.tensor([1.0] * (N + 1) + [2**0.5]) for N in range(20)]
    sequences += [2 ** (torch.arange(N + 2) * rate) for N in range(40) for rate in (0.1, 0.4, 0.5)]
    for _ in range(500):
        jumps = torch.rand(60, generator=generator) ** 40 * 12
        sequences.append(torch.exp2(jumps.cumsum(0)))
    pairs = [pair for d in sequences if (pair := nondecreasing_sequences(d.double()))]
    assert len(pairs) > 200
    measured, bound = (torch.stack(side) for side in zip(*pairs, strict=True))
    assert holds(measured, bound)
    assert not holds(measured, bound / 2)


def flat(d):
    """Where sum_{k<=n} d_k >= (n + 1) d_{n+1} / 4, and n + 1 = 1, 2, ..."""
    steps = torch.arange(1.0, len(d), dtype=torch.float64)
    return before(d) >= steps * d[1:] / 4, steps


def asymptotic_rate(problem, t):
    """Theorem 9 for the n at which sum d_k >= (n + 1) d_{n+1} / 4."""
    there, steps = flat(t.d)
    gap = problem.gap(averages(t.x, t.d)[:-1])
    bound = (16 * problem.D * problem.G / torch.sqrt(steps)
             + 4 * problem.D * problem.G**2 / (steps * norm(t.g[0])))
    return gap[there], bound[there]


def test_asymptotic_rate():
    chosen = [run for option in (1, 2) for run in runs("dadapt_dual_averaging", option=option)]
    pairs = [asymptotic_rate(*run) for run in chosen]
    assert sum(len(gap) > 100 for gap, _ in pairs) >= len(pairs) / 2
    measured, bound = together(pairs)
    assert holds(measured, bound)
    report("Theorem 9", measured, bound)
    assert all(proof_identity_breaks(*run) for run in chosen)


def best_index(t, n):
    """t = argmin_{k <= n} d_{k+1} / sum_{i<=k} d_i."""
    return int((t.d[1:n + 2] / t.d[:n + 1].cumsum(0)).argmin())


def horizons(problem, t):
    """Some n with n + 1 >= 2 log2(D / d_0)."""
    first = 2 * math.log2(problem.D / t.d[0])
    return [n for n in (3, 10, 30, 100, 299) if n + 1 >= first]


def non_asymptotic_rate(problem, t):
    """Theorem 10: the gap, its two bounds, and the first of them without G^2 under the root."""
    rows = []
    for n in horizons(problem, t):
        best = best_index(t, n)
        gap = problem.gap(averages(t.x, t.d)[best])
        seen = square(t.g[:best + 1]).sum()
        first = 8 * log2plus(t.d[n + 1] / t.d[0]) / (n + 1) * problem.D
        last = 8 * problem.D * problem.G * log2plus(problem.D / t.d[0]) * (n + 2)**0.5 / (n + 1)
        rows.append(torch.stack([gap, first * torch.sqrt(problem.G**2 + seen), last,
                                 first * seen.sqrt()]))
    return torch.stack(rows, 1)


def test_non_asymptotic_rate():
    chosen = [run for option in (1, 2)
              for run in runs("dadapt_dual_averaging", option=option, guarded=True)]
    gap, first, last, _ = torch.cat([non_asymptotic_rate(*run) for run in chosen], 1)
    assert holds(gap, first)
    assert holds(first, last)
    report("Theorem 10", gap, first)
    assert all(proof_identity_breaks(*run) for run in chosen)
    # A bound G that is 1000 times too large: without G^2 under the root the claim is false.
    loose = problems.absolute_value(G=1.0)
    t = textbook.dadapt_dual_averaging(loose.grad, loose.x0, 300, d0=0.5, G=1000.0)
    loose = replace(loose, G=1000.0)
    gap, first, _, without = non_asymptotic_rate(loose, t)
    assert holds(gap, first)
    assert not holds(gap, without)


def gradient_descent_rate(problem, t):
    """Theorem 11 at n = t, with the paper's own bound beside it."""
    rows = []
    for n in horizons(problem, t):
        gap = problem.gap(averages(t.x, t.lam)[best_index(t, n)])
        log = log2plus(problem.D / t.d[0])
        bound = 2 * problem.D * problem.G * (2 + math.log(n + 2)) * log * (n + 2)**0.5 / (n + 1)
        printed = 12 * problem.D * problem.G * math.log(n + 2) * log / (n + 1)**0.5
        rows.append(torch.stack([gap, bound, printed]))
    return torch.stack(rows, 1)


def gradient_descent_asymptotics(problem, t):
    """Theorem 11 for the n at which the sum of d_k is large, with the paper's bound beside it."""
    there, steps = flat(t.d)
    gap, DG = problem.gap(averages(t.x, t.lam)[:-1]), problem.D * problem.G
    bound = 4 * DG * (2 + torch.log(steps + 1)) * torch.sqrt(steps + 1) / steps
    printed = 16 * DG * torch.log(steps + 1) / torch.sqrt(steps + 1)
    return gap[there], bound[there], (printed - bound)[2:]


def test_gradient_descent_rate():
    chosen = runs("dadapt_gd", guarded=True)
    gap, bound, printed = torch.cat([gradient_descent_rate(*run) for run in chosen], 1)
    assert holds(gap, bound)
    assert holds(bound, printed)
    report("Theorem 11", gap, bound)
    gap, bound, room = map(torch.cat, zip(*[gradient_descent_asymptotics(*run) for run in chosen]))
    assert len(gap) > 1000 and holds(gap, bound)
    assert (room > 0).all()
    report("Theorem 11, asymptotic", gap, bound)
    for problem, t in chosen:
        left = before(t.lam * (t.g * (t.x - problem.x_star)).sum(-1))
        inner = (t.s[1:] * (problem.x0 - problem.x_star)).sum(-1)
        squares = before(t.lam**2 * square(t.g)) / 2
        assert equal(left, inner + squares - square(t.s[1:]) / 2)
        assert not equal(left, inner - square(t.s[1:]) / 2)
        assert holds(2 * squares, t.d[1:]**2 * torch.log(torch.arange(2.0, len(t.d) + 1)))


def where_d_stops(problem, t):
    """Theorem 12: D <= |x_{n+1} - x_star| + (1 + sqrt 3) d_{n+1}, for every n."""
    left = square(t.x[1:] - problem.x_star).sqrt()
    return torch.full_like(left, problem.D) - left, (1 + 3**0.5) * t.d[1:]


def test_where_d_stops():
    chosen = [run for option in (1, 2)
              for run in runs("dadapt_dual_averaging", option=option, guarded=True)]
    measured, bound = together([where_d_stops(*run) for run in chosen])
    assert holds(measured, bound)
    assert not holds(measured, bound / 2)
    problem = problems.absolute_value()
    t = textbook.dadapt_dual_averaging(problem.grad, problem.x0, 5000, d0=1e-3, G=1.0)
    assert t.x[-1].abs() < 0.02
    assert problem.D / (1 + 3**0.5) < t.d[-1] < problem.D


# ------------------------------------------------------------------ 4. how fast d grows
@cache
def constant_gradient(option, steps):
    """Algorithm 1 on the gradient 1 for ever, from d_0 = 1: the universal sequence d_k / d_0."""
    return textbook.dadapt_dual_averaging(lambda x: -torch.ones_like(x), [0.0], steps, d0=1.0,
                                          option=option)


def test_first_increase():
    for option, first in ((1, 8), (2, 4)):
        t = constant_gradient(option, 100)
        assert (t.d[:first] == 1).all() and t.d[first] > 1
        scaled = textbook.dadapt_dual_averaging(lambda x: torch.full_like(x, -7.0), [0.0], 100,
                                                d0=1e-5, option=option)
        assert torch.allclose(scaled.d / 1e-5, t.d, rtol=1e-12)
    n = torch.arange(1.0, 9.0, dtype=torch.float64)
    roots = torch.cat([torch.zeros(1), n[:-1]**-0.5]).cumsum(0)
    assert equal(constant_gradient(1, 100).dhat[1:9], (n**1.5 - 1 - roots) / (2 * n))
    sums = torch.cat([torch.zeros(1), n[:-1].sqrt()]).cumsum(0)
    assert equal(constant_gradient(2, 100).dhat[1:5], (sums / n)[:4])


def growth_law():
    """Theorem 14 at k = 4, 5, ...: |u_k - 2 sqrt k| and its bound 2; ln(d_k sqrt k) - sqrt k."""
    t = constant_gradient(2, 4000)
    k = torch.arange(len(t.d), dtype=torch.float64)[4:]
    length, d = t.s[4:, 0].abs(), t.d[4:]
    return (length / d - 2 * k.sqrt()).abs(), torch.full_like(k, 2.0), d * length, k, d


def test_growth_law():
    measured, bound, product, k, d = growth_law()
    assert holds(measured, bound)
    report("Theorem 14 (2)", measured, bound)
    assert equal(product[1:] / product[:-1], 1 + k[:-1]**-0.5)
    assert not equal(product[1:] / product[:-1], 1 + k[1:]**-0.5)
    assert abs(measured[-1] - 0.5) < 0.02
    constant = torch.log(d * k.sqrt()) - k.sqrt()
    assert abs(constant[-1] - constant[1000 - 4]) < 0.01
    assert math.exp(constant[-1]) == pytest.approx(0.352, abs=0.003)
    # Leading order: ln^2(growth) / k -> 1, from below, and slowly.
    leading = torch.log(d)**2 / k
    assert leading[-1] < 1 and leading[-1] > leading[1000 - 4] > leading[100 - 4]


# ------------------------------------------------------------------ 5. AdaGrad
def adagrad_lower_bound(problem, t):
    return t.dhat[1:], torch.full_like(t.dhat[1:], problem.distance(torch.inf))


def adagrad_identity(t):
    """<s, s / a> by its expansion in the norms of A_k^{-1}, and the sum that the proof drops."""
    left = (t.s[1:]**2 / t.a[1:]).sum(-1)
    right = before((t.d[:, None] * t.g * (2 * t.s + t.d[:, None] * t.g) / t.a).sum(-1))
    change = (t.s[1:]**2 * (1 / t.a[1:] - 1 / t.a[:-1])).sum(-1).cumsum(0)
    return left, right, change


@cache
def adagrad_runs(steps=300):
    """Algorithm 3 on every problem; |g| <= G bounds every coordinate too."""
    return [(problem, textbook.dadapt_adagrad(problem.grad, problem.x0, steps, d0=d0,
                                              G_inf=problem.G))
            for problem in lipschitz_problems() for d0 in STARTS]


def test_adagrad_lower_bound():
    for _, t in adagrad_runs():
        left, right, change = adagrad_identity(t)
        assert equal(left, right + change)
        assert not equal(left, right)
        assert holds(left, right)
    measured, bound = together([adagrad_lower_bound(*run) for run in adagrad_runs()])
    assert holds(measured, bound)
    report("Proposition 15", measured, bound)


def adagrad_squares(t):
    """E^A_n of Lemma 16."""
    return before(t.d**2 * (t.g**2 / t.a).sum(-1))


def size_of_s_in_the_1_norm(t):
    """Lemma 16: E^A_n and |s_{n+1}|_1, each with its bound."""
    length, d = t.a[1:].sum(-1), t.d[1:]
    return ((adagrad_squares(t), 2 * d**2 * length),
            (t.s[1:].abs().sum(-1), (1 + 3**0.5) * d * length))


def test_size_of_s_in_the_1_norm():
    for i in range(2):
        measured, bound = together([size_of_s_in_the_1_norm(t)[i] for _, t in adagrad_runs()])
        assert holds(measured, bound)
        assert not holds(measured, bound / 2)


def adagrad_rate(problem, t):
    """Theorem 17: (measured, bound) for the weighted gaps, for large n, and at the best t."""
    D, constant, length = problem.distance(torch.inf), 2 + 3**0.5, t.a[1:].sum(-1)
    p, (there, steps) = len(problem.x0), flat(t.d)
    gap = problem.gap(averages(t.x, t.d)[:-1])
    late = 4 * constant * D * length / steps
    last = 4 * constant * D * p * problem.G * torch.sqrt(steps + 1) / steps
    assert holds(late, last) and holds(last[6:], 16 * D * p * problem.G / steps[6:].sqrt())
    log = log2plus(D / t.d[0])
    some = [n for n in (3, 10, 30, 100, 299) if n + 1 >= 2 * torch.log2(D / t.d[0])]
    found = torch.stack([gap[best_index(t, n)] for n in some])
    return ((before(t.d * problem.gap(t.x)), constant * D * t.d[1:] * length),
            (gap[there], late[there]), (found, log * last[some] / 2))


def test_adagrad_rate():
    for i, part in enumerate(("sum", "asymptotic", "non-asymptotic")):
        measured, bound = together([adagrad_rate(*run)[i] for run in adagrad_runs()])
        assert len(measured) > 30 and holds(measured, bound)
        assert part == "non-asymptotic" or not holds(measured, bound / 2)
        report(f"Theorem 17, {part}", measured, bound)
    for problem, t in adagrad_runs():
        left = before(t.lam * (t.g * (t.x - problem.x_star)).sum(-1))
        inner = (t.s[1:] * (problem.x0 - problem.x_star)).sum(-1)
        squares, _, change = adagrad_identity(t)
        proof = inner + adagrad_squares(t) / 2 - squares / 2
        assert equal(left, proof + change / 2)
        assert not equal(left, proof)
        assert holds(left, proof)


def where_adagrads_d_stops(problem, t):
    """Corollary 18: what the coordinates have come nearer, weighted with a, and (1 + sqrt 3) d."""
    nearer = (problem.x0 - problem.x_star).abs() - (t.x[1:] - problem.x_star).abs()
    return (t.a[1:] * nearer).sum(-1) / t.a[1:].sum(-1), (1 + 3**0.5) * t.d[1:]


def test_where_adagrads_d_stops():
    measured, bound = together([where_adagrads_d_stops(*run) for run in adagrad_runs()])
    assert holds(measured, bound)
    assert not holds(measured, bound / 2)


# ------------------------------------------------------------------ 6. Adam
def growing_sums(t, beta2, old=False):
    """dhat_2, dhat_3, ... of Lemma 19 from the growing sums, without the factor 1 / rho."""
    k = torch.arange(len(t.d), dtype=torch.float64)
    lam = t.lam * beta2**(-k / 2)
    S = torch.cat([torch.zeros_like(t.g[:1]), before(lam[:, None] * t.g)])
    V = (beta2**-k[:, None] * t.g**2).cumsum(0)
    denominator = torch.sqrt((1 - beta2) * (torch.cat([V[:1], V[:-1]]) if old else V))
    terms = lam * (t.g * S / denominator).sum(-1)
    return (before(terms) / S[1:].abs().sum(-1))[1:]


def test_running_averages_are_growing_sums():
    beta2 = 0.99
    rho = beta2**0.5
    cases = [(problem, gamma) for problem in lipschitz_problems()[2:]
             for gamma in (1.0, lambda k: 1 / (1 + 0.01 * k))]
    for problem, gamma in cases:
        t = textbook.dadapt_adam(problem.grad, problem.x0, 200, d0=1e-3, gamma=gamma, eps=0.0,
                                 betas=(0.9, beta2))
        sums = growing_sums(t, beta2)
        assert equal(sums / rho, t.dhat[2:])
        assert not equal(sums, t.dhat[2:])
        # the old denominator, from the trace's own v and s
        terms = t.lam[1:] * (t.g[1:] * t.s[1:] / t.v[1:].sqrt()).sum(-1)
        r, old = torch.zeros(()).double(), []
        for term, s in zip(terms[:-1], t.s[2:]):
            r = rho * r + (1 - rho) * term
            old.append(r / ((1 - rho) * norm(s, 1)))
        assert equal(torch.stack(old), growing_sums(t, beta2, old=True))
    for beta2 in (0.9, 0.999):
        t = textbook.dadapt_adam(torch.ones_like, [0.0], 5, d0=1e-4, eps=0.0, betas=(0.9, beta2))
        leap = ((1 - beta2) * (1 + beta2))**-0.5 / (1 + beta2**0.5)
        assert t.dhat[1] == 0 and t.dhat[2].item() / 1e-4 == pytest.approx(leap, rel=1e-12)
    assert round(leap, 1) == 11.2


def diagonal_averaging(problem, weights, denominators):
    """Proposition 20 (1) along x_k = x_0 - S_k / a_k: both sides; the left one with a_{k+1}."""
    S, total, later, rows = torch.zeros_like(problem.x0), 0.0, 0.0, []
    for lam, a, following in zip(weights, denominators, denominators[1:]):
        g = problem.grad(problem.x0 - S / a)
        total = total + lam * (g * S / a).sum()
        later = later + lam * (g * S / following).sum()
        S = S + lam * g
        rows.append(torch.stack([total, problem.distance(torch.inf) * norm(S, 1), later]))
    return torch.stack(rows, 1)


def test_what_the_bound_needs():
    generator = torch.Generator().manual_seed(0)
    for problem in lipschitz_problems():
        weights = 1.005**torch.arange(200.0) * torch.rand(200, generator=generator)
        a = weights.sum() * torch.rand(201, len(problem.x0), generator=generator)
        measured, bound, _ = diagonal_averaging(problem, weights.double(), a.double())
        assert holds(measured, bound)
    # Attained in the limit of a large weight near the minimiser; false with the next denominator.
    weights = torch.tensor([1.0, 1e6], dtype=torch.float64)
    a = torch.tensor([[1.0], [1 + 1e-6], [0.5]], dtype=torch.float64)
    measured, bound, later = diagonal_averaging(problems.absolute_value(), weights, a)[:, -1]
    assert 0.999 * bound < measured < bound < later
    problem = problems.absolute_value()
    d = textbook.dadapt_adam(problem.grad, problem.x0, 2000).d
    assert 2.67 < d[-1] / problem.D < 2.69
    without = textbook.dadapt_adam(problem.grad, problem.x0, 2000, betas=(0.0, 0.999)).d
    assert without[-1] < problem.D


# ------------------------------------------------------------------ the pages
KINDS = "Definition|Lemma|Theorem|Proposition|Corollary"
STATEMENT = re.compile(rf"^\*\*(?P<kind>{KINDS}) (?P<n>\d+)\b", re.MULTILINE)


def statements(text):
    """(kind, number, names of tests) for every numbered statement of a page, in order."""
    marks = list(STATEMENT.finditer(text))
    starts = [mark.start() for mark in marks] + [len(text)]
    for mark, end in zip(marks, starts[1:], strict=True):
        block = text[mark.start():end]
        named = re.findall(r"^Checked by `(test_\w+)`", block, re.MULTILINE)
        yield mark["kind"], int(mark["n"]), named


def existing_tests():
    """The names of all test functions of the repository."""
    return {node.name for path in ROOT.glob("tests/test_*.py")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def missing(text, tests):
    """The statements of a page that name no existing test; definitions are exempt."""
    return [f"{kind} {n}" for kind, n, named in statements(text)
            if kind != "Definition" and not (named and set(named) <= tests)]


PAGES = sorted(ROOT.glob("theory/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_statement_names_a_test(page):
    text = page.read_text(encoding="utf-8")
    assert missing(text, existing_tests()) == []
    numbers = {}
    for kind, n, _ in statements(text):
        numbers.setdefault("Definition" if kind == "Definition" else "statement", []).append(n)
    for found in numbers.values():
        assert found == list(range(1, len(found) + 1))


def test_a_statement_without_a_test_is_found():
    page = (ROOT / "theory" / "21_d_adaptation.md").read_text(encoding="utf-8")
    without = page.replace("Checked by `test_key_bound`", "")
    assert missing(without, existing_tests()) == ["Lemma 2"]
    assert missing(page, existing_tests() - {"test_growth_law"}) == ["Theorem 14"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_inline_maths_survives_markdown(page):
    """Markdown takes backslashes before punctuation out of $...$ (not out of a math block)."""
    text = re.sub(r"```math.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert text.count("$") % 2 == 0
    inline = re.findall(r"\$([^$]+)\$", text)
    assert [maths for maths in inline if re.search(r"\\[^A-Za-z]", maths)] == []
