"""The statements of theory/13_adagrad_rmsprop.md in numbers; the rules are test_theory's."""
import math

import pytest
import torch

from prodigy import Adagrad, RMSprop
from prodigy.lab import problems


def holds(measured, bound):
    return bool((measured <= bound + 1e-9 * bound.abs() + 1e-13).all())


def equal(left, right):
    return bool(((left - right).abs() <= 1e-9 * right.abs().max()).all())


def rounds(make, grad, x1, T, low=-math.inf, high=math.inf):
    """x of shape (T + 1, p), g of shape (T, p): grad(t, x) for t = 1, ..., T, then the clamp."""
    p = torch.as_tensor(x1, dtype=torch.float64).clone().requires_grad_()
    optimizer = make([p])
    xs, gs = [p.detach().clone()], []
    for t in range(1, T + 1):
        p.grad = torch.as_tensor(grad(t, p.detach()), dtype=torch.float64)
        gs.append(p.grad.clone())
        optimizer.step()
        p.data.clamp_(low, high)
        xs.append(p.detach().clone())
    return torch.stack(xs), torch.stack(gs)


def adagrad(lr):
    return lambda params: Adagrad(params, lr=lr, eps=0)


def rmsprop(lr, alpha):
    return lambda params: RMSprop(params, lr=lr, alpha=alpha, eps=0)


def dense_problems():
    A, x_star = problems.gaussian((12, 4), seed=1), problems.gaussian(4, seed=2)
    return (problems.quadratic([100.0, 1.0, 0.01]),
            problems.least_absolute(A, x_star, torch.zeros(4)),
            problems.softmax_regression(A, [0, 1, 1] * 4))


def games(gamma):
    """(x, g, u): runs of AdaGrad on convex problems, unbounded and in a box, and on signs."""
    found = []
    for problem in dense_problems():
        u = problem.x0 + 0.3 if problem.x_star is None else problem.x_star
        for low, high in ((-math.inf, math.inf), (u.min().item() - 0.2, u.max().item() + 0.2)):
            x, g = rounds(adagrad(gamma), lambda t, x: problem.grad(x),
                          problem.x0.clamp(low, high), 300, low, high)
            found.append((x, g, u))
    signs = torch.sign(problems.gaussian((300, 3), seed=5))
    x, g = rounds(adagrad(gamma), lambda t, x: signs[t - 1], torch.zeros(3), 300, -1, 1)
    return [*found, (x, g, -torch.sign(signs.sum(0)))]


# ------------------------------------------------------------------ 2. the regret
def account(x, g, u, gamma):
    """Lemma 1 per coordinate, for every T: both sides."""
    size = gamma / (g**2).cumsum(0).sqrt()
    squares = (x - u)**2
    left = (g * (x[:-1] - u)).cumsum(0)
    return left, ((squares[:-1] - squares[1:]) / (2 * size) + size * g**2 / 2).cumsum(0)


def test_account_of_one_coordinate():
    projected = 0
    for gamma in (0.1, 1.0):
        for x, g, u in games(gamma):
            left, right = account(x, g, u, gamma)
            assert holds(left, right)
            free = x[:-1] - gamma * g / (g**2).cumsum(0).sqrt()
            if torch.allclose(free, x[1:], rtol=0, atol=1e-14):
                assert equal(left, right)
                assert not equal(left, account(x, g, u, 1.1 * gamma)[1])
            else:
                projected += 1
                assert not equal(left, right)
    assert projected >= 2


def sums_of_roots(g):
    total = (g**2).cumsum(0)
    return (g**2 / total.sqrt()).cumsum(0), total.sqrt()


def test_sums_of_roots():
    g = torch.stack([torch.ones(5000), problems.gaussian(5000, 0), torch.arange(1.0, 5001.0)], 1)
    late = torch.cat([torch.full((1,), 1e-3, dtype=torch.float64), torch.ones(4999)])
    middle, root = sums_of_roots(torch.cat([g.double(), late[:, None]], 1))
    assert holds(root, middle)
    assert holds(middle, 2 * root)
    assert not holds(2 * root, middle)
    assert not holds(middle, 1.98 * root)


def regret_bound(x, g, u, gamma):
    """Theorem 3 for every T: the regret, the bound, and its parts summed over coordinates."""
    D = (x[:-1] - u).abs().cummax(0).values
    roots = (g**2).cumsum(0).sqrt()
    return (g * (x[:-1] - u)).sum(1).cumsum(0), ((D**2 / (2 * gamma) + gamma) * roots).sum(1)


def adversary(gamma, D, pairs):
    """Proposition 5's gradients against AdaGrad in [0, D], and the path."""
    g, v = [-1.0], 1.0
    for _ in range(pairs):
        g += [1.0, -math.sqrt(1 + 1 / v)]
        v += 2 + 1 / v
    g += [1.0] * math.ceil((D / gamma + 1)**2 + 2 * D / gamma * math.sqrt(v))
    x, gs = rounds(adagrad(gamma), lambda t, x: g[t - 1:t], [D], len(g), 0.0, D)
    return x, gs, torch.zeros(1, dtype=torch.float64)


def test_adagrad_regret():
    ratios = []
    for gamma in (0.1, 1.0):
        for run in games(gamma):
            regret, bound = regret_bound(*run, gamma)
            assert holds(regret, bound)
            ratios.append((regret / bound).max())
    best = 2**-0.5
    regret, bound = regret_bound(*adversary(best, 1.0, 800), best)
    assert holds(regret, bound)
    assert equal(bound[-1:], 2**0.5 * torch.sqrt((adversary(best, 1.0, 800)[1]**2).sum(0)))
    assert not holds(regret, bound / 2)
    print(f"Theorem 3: measured over bound at most {max(ratios):.3f}, "
          f"the adversary {(regret / bound).max():.3f}")


def average_gap(problem, x, g, D):
    """Corollary 4: the gap at the mean of x_1, ..., x_T, and the bound."""
    T = torch.arange(1, len(g) + 1, dtype=torch.float64)
    gap = problem.gap(x[:-1].cumsum(0) / T[:, None])
    return gap, 2**0.5 * D * (g**2).cumsum(0).sqrt().sum(1) / T


def test_adagrad_average():
    tight = 0
    A, x_star = problems.gaussian((12, 4), seed=1), problems.gaussian(4, seed=2)
    cases = [problems.absolute_value(), problems.quadratic([100.0, 1.0, 0.01]),
             problems.least_absolute(A, x_star, torch.zeros(4)),
             problems.max_affine(A, x_star, torch.zeros(4))]
    for problem in cases:
        half = problem.distance(torch.inf)
        low, high = problem.x_star - half, problem.x_star + half
        x, g = rounds(adagrad(half / 2**0.5), lambda t, x: problem.grad(x),
                      problem.x0, 300, low, high)
        gap, bound = average_gap(problem, x, g, half)
        assert holds(gap, bound)
        tight += not holds(gap, bound / 2)
    assert tight > 0


@pytest.mark.parametrize("gamma", [0.35, 2**-0.5, 1.4])
def test_constant_is_attained(gamma):
    last = 0.0
    limit = gamma + 1 / (2 * gamma)
    for pairs in (30, 300, 3000):
        x, g, u = adversary(gamma, 1.0, pairs)
        regret, bound = regret_bound(x, g, u, gamma)
        assert holds(regret, bound)
        assert torch.allclose(x[1:2 * pairs + 2:2], torch.ones(1, dtype=torch.float64))
        best = (regret / (g**2).cumsum(0).sqrt()[:, 0]).max().item()
        assert last < best <= limit
        last = best
    assert last > 0.95 * limit
    assert limit >= 2**0.5 - 1e-12


# ------------------------------------------------------------------ 3. sparse features
def sparse_features(chance, T, repeats, seed=0):
    """Proposition 6: both means from samples, each with its error and its bound."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.as_tensor(chance, dtype=torch.float64).expand(repeats, -1)
    seen = torch.stack([torch.binomial(torch.full_like(p, T), p, generator=generator)])[0]
    both = ((seen.sqrt().sum(1), (T * p[0]).sqrt().sum()),
            (seen.sum(1).sqrt(), (T * p[0]).sum().sqrt()))
    return [(sums.mean(), sums.std() / repeats**0.5, bound) for sums, bound in both]


def test_sparse_features():
    for p in (10, 100, 1000):
        i = torch.arange(1, p + 1, dtype=torch.float64)
        for power in (0.0, 1.0, 2.0):
            chance = 0.5 * i**-power
            for mean, error, bound in sparse_features(chance, 100_000, 200):
                assert mean - 5 * error <= bound
                assert mean > bound / 2
            ratio = 2**0.5 * chance.sqrt().sum() / (p * chance.sum()).sqrt()
            assert ratio <= 2**0.5 + 1e-12
        ratio = 2**0.5 * i.reciprocal().sum() / (p * (i**-2).sum()).sqrt()
        bound = 2**0.5 * (1 + math.log(p)) / p**0.5
        assert bound / 2 < ratio <= bound
    p, start = 200, torch.zeros(200, dtype=torch.float64)
    start[0] = 1.0  # one coordinate to move, u = 0; the box keeps all as near as this one starts

    def quotient(gradients, low=-1.0, high=1.0):
        x, g = rounds(adagrad(2**-0.5), lambda t, x: gradients[t - 1], start, 50, low, high)
        v = g.square().sum(0)
        return 2**0.5 * x[:-1].abs().max() * v.sqrt().sum() / (start.norm() * v.sum().sqrt())

    signs = torch.sign(problems.gaussian((50, p), 0))
    assert quotient(signs) == pytest.approx((2 * p)**0.5)
    assert quotient(problems.gaussian((50, p), 0)) < (2 * p)**0.5 * (1 - 1e-4)
    assert quotient(signs, -torch.inf, torch.inf) > 1.5 * (2 * p)**0.5  # farther: beyond it


# ------------------------------------------------------------------ 4. why its rate dies
def walk_bound(g):
    """Proposition 7 with gamma = 1: the sum of |g_t| / sqrt(v_t) and its bound, for every T."""
    v = (g**2).cumsum(0)
    T = torch.arange(1, len(g) + 1, dtype=torch.float64)
    return (g.abs() / v.sqrt()).cumsum(0), (T * (1 + torch.log(v / v[0]))).sqrt()


def test_how_far_adagrad_walks():
    ones = torch.ones(5000, dtype=torch.float64)
    growing = torch.exp(torch.arange(5000, dtype=torch.float64) / 200)
    for g in (ones, growing, problems.gaussian(5000, 0)):
        length, bound = walk_bound(g)
        assert holds(length, bound)
        x, _ = rounds(adagrad(0.5), lambda t, x: -g[t - 1:t].abs(), [0.0], 500)
        assert equal(x[1:, 0], 0.5 * length[:500])
    length, bound = walk_bound(growing)
    assert not holds(length, 0.9 * bound)
    T = torch.arange(1.0, 5001.0, dtype=torch.float64)
    length, _ = walk_bound(ones)
    assert holds(2 * (T + 1).sqrt() - 2, length) and holds(length, 2 * T.sqrt() - 1)
    assert not holds(length, 2 * (T + 1).sqrt() - 2) and not holds(length, 1.9 * T.sqrt() - 1)


def recovery(make, N, M, steps):
    """Rounds of gradient 1, after N of size M, until a step has half the length it had without."""
    def lengths(burst):
        x, _ = rounds(make, lambda t, x: [burst if t <= N else 1.0], [0.0], N + steps)
        return x.diff(dim=0)[N:, 0].abs()
    late = (lengths(M) >= lengths(1.0) / 2 * (1 - 1e-12)).nonzero()
    return int(late[0]) + 1


@pytest.mark.parametrize("N, M", [(5, 20.0), (10, 8.0), (1, 30.0)])
def test_memory_of_a_burst(N, M):
    alpha = 0.98
    assert recovery(adagrad(1.0), N, M, 900) == math.ceil(N * (M**2 - 4) / 3)
    assert recovery(adagrad(1.0), N, M, 900) != math.ceil(N * (M**2 - 1) / 3)
    extra = (1 - alpha**N) * (M**2 - 1)  # v_N with the burst, less v_N without
    found = recovery(rmsprop(1.0, alpha), N, M, 900)

    def halved(n):
        return alpha**n * extra <= 3 * (1 - alpha**(N + n))

    assert halved(found) and not halved(found - 1)
    bound = math.log(1 + M**2 / 3) / (1 - alpha)
    assert found <= bound + 1
    print(f"Proposition 8: RMSprop recovers after {found}, bound {bound:.0f}")


# ------------------------------------------------------------------ 5. RMSprop
def test_adagrad_is_rmsprop_with_growing_memory():
    for problem in dense_problems():
        x, _ = rounds(adagrad(0.3), lambda t, x: problem.grad(x), problem.x0 + 0.1, 200)
        for exponent, same in ((0.5, True), (0.4, False)):
            made = []

            def grad(t, point):
                made[0].param_groups[0].update(alpha=1 - 1 / t, lr=0.3 / t**exponent)
                return problem.grad(point)

            def make(params):
                made.append(RMSprop(params, lr=0.3, eps=0))
                return made[0]

            other, _ = rounds(make, grad, problem.x0 + 0.1, 200)
            assert equal(other, x) == same


def test_rmsprop_does_not_settle():
    for alpha in (0.0, 0.9, 0.99):
        for gamma in (0.1, 0.01):
            x, g = rounds(rmsprop(gamma, alpha), lambda t, x: torch.sign(x),
                          [0.77 * math.pi / 3], 1500)
            assert (g != 0).all()
            pair = x[1:].abs() + x[:-1].abs()
            assert holds(torch.full_like(pair, gamma), pair)
            assert not holds(torch.full_like(pair, 1.2 * gamma), pair)
    x, _ = rounds(adagrad(0.1), lambda t, x: torch.sign(x), [0.77 * math.pi / 3], 1500)
    after = int((x <= 0).nonzero()[0, 0])
    t = torch.arange(after, 1501, dtype=torch.float64)
    assert holds(x[after:, 0].abs(), 0.1 / t.sqrt())
    assert not holds(x[after:, 0].abs(), 0.05 / t.sqrt())


def test_moving_target():
    for speed in (0.001 * math.sqrt(5), 0.002 * math.e):
        gamma, T = 0.01, 3000
        t = torch.arange(1.0, T + 2, dtype=torch.float64)
        target = speed * t

        def grad(k, x):
            return torch.sign(x - speed * k)

        x, g = rounds(adagrad(2 * gamma), grad, [-0.5], T)
        behind = (target - x[:, 0])[1:]
        walked = 2 * gamma * (2 * (t[1:] - 1).sqrt() - 1)
        assert holds(speed * t[1:] + 0.5 - walked, behind)
        assert not holds(speed * t[1:] + 0.5 - 0.95 * walked, behind)
        x, g = rounds(rmsprop(gamma, 0.99), grad, [0.0], T)
        late = (x[:, 0] - target)[1000:].abs()
        assert holds(late, torch.full_like(late, gamma + speed))
        assert not holds(late, torch.full_like(late, (gamma + speed) * 0.9))
