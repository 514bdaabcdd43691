"""The statements of theory/34_prodigy_schedule_free.md in numbers; the rules are test_theory's."""
import math

import pytest
import torch
from scipy.optimize import brentq

from prodigy import ProdigyPlusScheduleFree
from prodigy.lab import problems

GROWTH = 2**0.25


def holds(measured, bound):
    return bool((measured <= bound + 1e-9 * bound.abs() + 1e-13).all())


class Fed(ProdigyPlusScheduleFree):
    """The method with y or x in the place of z in r."""

    fed = "z"

    def observe(self, x, g, s, h):
        average = (x - (1 - h.beta) * s["z"]) / h.beta
        return super().observe(x, g, {**s, "z": dict(z=s["z"], y=x, x=average)[self.fed]}, h)


def walk(grad, x0, steps, fed="z", **options):
    """(y, z, d) after 0, 1, ... steps, as float64 tensors with one row a step."""
    p = torch.as_tensor(x0, dtype=torch.float64).clone().requires_grad_()
    optimizer = Fed([p], **options)
    optimizer.fed = fed
    rows = [(p.detach().clone(), p.detach().clone(), optimizer.get_d())]
    for _ in range(steps):
        p.grad = grad(p.detach())
        optimizer.step()
        rows.append((p.detach().clone(), optimizer.state[p]["z"].clone(), optimizer.get_d()))
    y, z, d = zip(*rows)
    return torch.stack(y), torch.stack(z), torch.tensor(d, dtype=torch.float64)


def averages(z, weights):
    """x_0 = z_0, then the averages of z_1, ..., z_k with the weights w_1, ..., w_k."""
    w = weights[1:, None]
    return torch.cat([z[:1], (w * z[1:]).cumsum(0) / w.cumsum(0)])


# ------------------------------------------------------------------ 1. the method
@pytest.mark.parametrize("C", [0, 20])
def test_two_tensors_are_enough(C):
    A, beta = problems.gaussian((12, 6), seed=3), 0.8
    problem = problems.least_squares(A, problems.gaussian(12, seed=4))
    y, z, d = walk(problem.grad, problem.x0, 60, betas=(beta, 0.99), schedulefree_c=C)
    assert d[-1] > 1e3 * d[0]

    def three_sequences(weights):
        x, total, out = z[0], 0.0, []
        for weight, new in zip(weights, z[1:]):
            total = total + weight
            c = min(1.0, (1 - beta) * C * weight / total) if C else weight / total
            x = (1 - c) * x + c * new
            out.append((1 - beta) * new + beta * x)
        return torch.stack(out)

    assert torch.allclose(three_sequences(d[:-1]**2), y[1:], rtol=1e-9, atol=1e-13)
    assert not torch.allclose(three_sequences(d[:-1]), y[1:], rtol=1e-3, atol=1e-13)


# ------------------------------------------------------------------ 2. which sequence feeds d
def fed_bounds(problem, z, w, beta):
    """Proposition 2's sums fed by z, y and x for every n, and D |s|."""
    x = averages(z, w)
    y = (1 - beta) * z + beta * x
    g = torch.stack([problem.grad(row) for row in y])
    length = (w[:, None] * g).cumsum(0).norm(dim=1)
    sums = [(w * (g * (problem.x0 - point)).sum(1)).cumsum(0) for point in (z, y, x)]
    return *sums, problem.D * length


def test_lower_bounds_on_D_from_z_y_x():
    A, x_star = problems.gaussian((12, 4), seed=1), problems.gaussian(4, seed=2)
    cases = (problems.absolute_value(), problems.max_affine(A, x_star, torch.zeros(4)),
             problems.least_absolute(A, x_star, torch.zeros(4)))
    for seed, problem in enumerate(cases):
        for beta in (0.0, 0.5, 0.9, 1.0):
            steps = problems.gaussian((200, len(problem.x0)), seed=seed).cumsum(0) / 10
            z = torch.cat([problem.x0[None], problem.x0 + steps])  # any points
            w = problems.gaussian(201, seed=seed + 9).square() + 1e-3  # any weights
            from_z, from_y, _, bound = fed_bounds(problem, z, w, beta)
            assert holds(from_z, bound)
            assert holds(from_y, bound)
    line = problems.absolute_value()
    # attained: straight to the minimiser, with no weight on the start
    near, w = torch.tensor([[1.0], [1e-9]], dtype=torch.float64), torch.tensor([0.0, 1.0])
    from_z, _, _, bound = fed_bounds(line, near, w.double(), 0.5)
    assert from_z[-1] == pytest.approx(bound[-1].item(), rel=1e-8)
    # fed by x: beyond D, while z and y on the same run are not
    z = torch.tensor([1.0] + [-1.0] * 50 + [1e-3] * 300, dtype=torch.float64)[:, None]
    w = torch.ones(351, dtype=torch.float64)
    from_z, from_y, from_x, bound = fed_bounds(line, z, w, 0.0)
    assert holds(from_z, bound) and holds(from_y, bound)
    assert from_x[-1] > bound[-1]
    for n, beyond in ((10, False), (11, True)):  # with m = 2 n + 1
        z = torch.tensor([1.0] + [-1.0] * n + [1e-6] * (2 * n + 1), dtype=torch.float64)[:, None]
        *_, from_x, bound = fed_bounds(line, z, torch.ones(len(z), dtype=torch.float64), 0.0)
        assert (from_x[-1] > bound[-1]).item() == beyond


def definition(grad, x0, steps, d0, beta=0.9, beta2=0.99):
    """d after Definition 1 to the letter, without the limiter, in one dimension."""
    x = y = z = x0
    v = r = s = total = 0.0
    d, beta3 = d0, beta2**0.5
    for _ in range(steps):
        g, step = grad(y), d
        v = beta2 * v + (1 - beta2) * (d * g)**2
        r, s = beta3 * r + d**2 * g * (x0 - z), beta3 * s + d**2 * g
        z, total = z - step * d * g / (v**0.5 + d * 1e-8), total + step**2
        x = (1 - step**2 / total) * x + step**2 / total * z
        y = (1 - beta) * z + beta * x
        d = max(d, r / abs(s))
    return d


def test_negative_terms_while_d_is_d0():
    line, options = problems.absolute_value(), dict(use_stableadamw=False, d_limiter=False)
    ends = {}
    for d0 in (1e-6, 0.8):
        _, _, d = walk(line.grad, line.x0, 300, d0=d0, **options)
        ends[d0] = d[-1].item(), definition(lambda y: math.copysign(1, y), 1.0, 300, d0)
    assert ends[1e-6] == pytest.approx(ends[1e-6][::-1], rel=1e-9)  # left at once: the same
    assert ends[0.8] == pytest.approx((1.1566, 0.8), abs=5e-5)


# ------------------------------------------------------------------ 3. how fast d grows
def growth_law(fed, clip, beta=0.9, beta2=0.99):
    """The root q of Proposition 3's equation."""
    beta3 = beta2**0.5

    def equation(q):
        late = q * (q + 1) / (q * q + q + 1)
        phi = dict(z=1.0, x=late, y=1 - beta + beta * late)[fed]
        a = ((1 - beta2 / q**2) / (1 - beta2))**0.5
        return (q - 1) * (q**3 - beta3) - (a**0.5 if clip else a) * phi * (q**2 - beta3)

    return brentq(equation, 1.05, 50.0)


def test_growth_without_the_limiter():
    def upwards(x):
        return -torch.ones_like(x)

    seen = {}
    for clip in (False, True):
        for fed in "zyx":
            _, _, d = walk(upwards, [0.0], 40, fed=fed, d_limiter=False, use_stableadamw=clip,
                           eps=1e-30, d0=1e-12)
            seen[fed, clip] = (d[-1] / d[-2]).item()
            assert seen[fed, clip] == pytest.approx(growth_law(fed, clip), rel=1e-4)
        assert abs(seen["z", clip] / growth_law("y", clip) - 1) > 0.02
    rounded = [round(seen[fed, clip], 2) for clip in (False, True) for fed in "zyx"]
    assert rounded == [3.55, 3.46, 3.45, 2.19, 2.08, 2.07]
    for fed in "zyx":
        _, _, d = walk(upwards, [0.0], 40, fed=fed)
        assert torch.allclose(d[2:] / d[1:-1], torch.tensor(GROWTH, dtype=torch.float64))


def test_d_coef_under_the_limiter():
    line = problems.absolute_value()

    def final(d_coef, **options):
        return walk(line.grad, line.x0, 200, d_coef=d_coef, **options)[2]

    for d_coef in (0.1, 0.5, 0.84):
        assert (final(d_coef) == 1e-6).all()
        assert final(d_coef, d_limiter=False)[-1] > 1e-3
    for d_coef in (0.85, 1.0, 2.0):
        d = final(d_coef)
        bound = GROWTH * d_coef * d[:-1]
        assert holds(d[1:], bound)
        assert not holds(d[1:], torch.maximum(d[:-1], bound * 0.9))


# ------------------------------------------------------------------ 4. what d does to the average
def share(part, whole):
    return (part.square().sum() / whole.square().sum()).item()


def test_forgetting():
    q = GROWTH
    noise = 1 + torch.rand(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = q**torch.arange(81, dtype=torch.float64)
    wild = torch.cat([torch.ones(1), (q * noise).cumprod(0)])
    for d in (exact, wild):
        for j in (1, 4, 8, 12):
            assert share(d[:-j], d) <= q**(-2 * j)
            assert d is wild or share(d[:-j], d) > 0.999 * q**(-2 * j)  # attained: 0.999 fails
        for n in (1, 10, 100):
            plateau = torch.full((n,), d[-1].item(), dtype=torch.float64)
            bound = 1 / (1 + n * (q**2 - 1))
            climb = share(d[:-1], torch.cat([d[:-1], plateau]))
            assert climb <= bound
            assert d is wild or climb > 0.999 * bound
    assert 1 / (q**2 - 1) == pytest.approx(1 + math.sqrt(2))
    assert round(math.log(1e6) / math.log(q)) == 80
    for N, n, m in ((50, 3, 1), (500, 20, 3)):
        low, top = torch.full((N,), 2.0**-m), torch.ones(n)
        bound = N / (N + 4**m * n)
        assert share(low, torch.cat([low, top])) == pytest.approx(bound)
        middle = torch.cat([low * 0.3, low, torch.tensor([0.9]), top])
        assert share(torch.cat([low * 0.3, low]), middle) < 2 * N / (2 * N + 4**m * n)
    # the method itself: one step at 1e-6, then q at every step up to near the top
    line = problems.absolute_value()
    d = walk(line.grad, line.x0, 400)[2][1:-1]
    K = int((d[1:] / d[:-1] < q * (1 - 1e-9)).nonzero()[0])
    assert K > 60
    measured, bound = share(d[:K], d), 1 / (1 + (len(d) - K) * (q**2 - 1))
    assert measured <= bound
    print(f"Proposition 5 (2): measured over bound {measured / bound:.3f}")


def test_what_C_does():
    beta, K = 0.9, 40
    for C in (10, 20, 50):
        kappa = round((1 - beta) * C)
        signs = problems.gaussian((K + 1, 3), seed=C)
        rows = iter(signs)
        # prodigy_steps=1: d never adapts, so the step is constant
        y, z, d = walk(lambda x: next(rows), torch.zeros(3), K, betas=(beta, 0.99), d0=0.1,
                       prodigy_steps=1, schedulefree_c=C)
        assert (d == 0.1).all()
        j = torch.arange(1, K + 1)
        weights = torch.tensor([math.comb(i - 1, kappa - 1) / math.comb(K, kappa)
                                for i in j.tolist()], dtype=torch.float64)
        assert weights.sum() == pytest.approx(1)
        x = (y[-1] - (1 - beta) * z[-1]) / beta
        assert torch.allclose(weights @ z[1:], x, rtol=1e-9)
        assert (weights * j).sum() == pytest.approx(kappa / (kappa + 1) * (K + 1))
        other = torch.full((K,), 1 / K, dtype=torch.float64)
        assert torch.allclose(other @ z[1:], x, rtol=1e-9) == (kappa == 1)


# ------------------------------------------------------------------ 5. several groups
def test_harmonic_mean_of_groups():
    scales, seen = (1.0, 30.0, 0.01), []
    params = [torch.full((3,), s, dtype=torch.float64, requires_grad=True) for s in scales]
    optimizer = ProdigyPlusScheduleFree([{"params": [p]} for p in params], split_groups_mean=True)
    for _ in range(150):
        for p in params:
            p.grad = p.detach().sign()
        optimizer.step()
        ds = [optimizer.get_d(i) for i in range(3)]
        H = optimizer.effective_lr(0)
        assert H == pytest.approx(3 / sum(1 / d for d in ds))
        assert min(ds) * (1 - 1e-12) <= H <= min(max(ds), 3 * min(ds)) * (1 + 1e-12)
        seen.append((H / min(ds), max(ds) / min(ds)))
    H, spread = seen[-1]
    assert spread > 10  # the groups do differ
    assert H > 1.5  # 3 min / 2 would not be a bound
