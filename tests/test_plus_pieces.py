"""What the papers behind ProdigyPlusScheduleFree's options claim, on small problems in float64."""

import math

import pytest
import torch

from prodigy import ProdigyPlusScheduleFree, pieces
from prodigy.plus import GROWTH, SPEED, progress_
from prodigy.vec import Vec

PLAIN = dict(factored=False, use_stableadamw=False, d0=0.1, eps=1e-30)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rms(u):
    return u.square().mean().sqrt()


def moves(gradients, start=None, **options):
    """How far z (without Schedule-Free: x) goes in every step with the given gradients."""
    start = normal(len(gradients[0]), seed=9) if start is None else start
    p = torch.nn.Parameter(start.clone())
    optimizer = ProdigyPlusScheduleFree([p], **{**PLAIN, "d_coef": 1e-9, **options})
    rows, before = [], p.detach().clone()
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        now = optimizer.state[p].get("z", p).detach().clone()
        rows.append(now - before)
        before = now
    return rows, optimizer


# Adam-atan2 (2407.05872) -----------------------------------------------------------------------


def test_atan2_does_not_see_the_scale_of_the_loss_and_needs_no_eps():
    a, b = normal(50), normal(50, seed=1).abs()
    for scale in (2.0**-400, 2.0**30, 2.0**400):
        assert torch.equal(pieces.atan2(a * scale, b * scale), pieces.atan2(a, b))
    assert torch.equal(pieces.atan2(torch.zeros(3), torch.zeros(3)), torch.zeros(3))


def test_atan2_is_bounded_and_one_where_a_is_b():
    u = pieces.atan2(normal(1000), torch.zeros(1000, dtype=torch.float64))
    torch.testing.assert_close(u.abs(), torch.full_like(u, 2.0))
    a = normal(1000).abs()
    torch.testing.assert_close(pieces.atan2(a, a), torch.ones_like(a))
    small = pieces.atan2(1e-6 * a, a)
    torch.testing.assert_close(small, torch.full_like(a, 4e-6 / math.pi))


def test_a_scaled_loss_takes_the_same_steps_with_atan2_and_not_with_eps():
    gradients = [normal(6, seed=i) for i in range(5)]
    for eps, same in ((None, True), (1.0, False)):
        ends = [moves([c * g for g in gradients], eps=eps)[0][-1] for c in (1.0, 2.0**20)]
        assert torch.equal(*ends) == same


# the clip of the root mean square --------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-3, 0.5, 1.0, 4.0, 1e6])
def test_the_clip_keeps_small_updates_and_takes_the_root_of_large_ones(size):
    u = normal(30, 4)
    u *= size / rms(u)
    clipped = pieces.rms_clip_(u.clone())
    assert float(rms(clipped)) == pytest.approx(size if size <= 1 else size**0.5)
    assert float(rms(clipped)) <= max(1, size) ** 0.5 * (1 + 1e-12)
    cosine = (u * clipped).sum() / (u.norm() * clipped.norm())
    assert float(cosine) == pytest.approx(1)


# C-Optim (2411.16085) and Grams (2412.17107) ----------------------------------------------------


def test_cautious_drops_what_disagrees_and_scales_up_the_rest():
    u, g = normal(40), normal(40, seed=1)
    masked = pieces.cautious(u, g)
    agrees = u * g > 0
    assert 0 < agrees.sum() < 40
    assert (masked[~agrees] == 0).all()
    torch.testing.assert_close(masked[agrees], u[agrees] * 40 / agrees.sum())


@pytest.mark.parametrize("seed", range(20))
def test_the_mask_never_slows_the_descent(seed):
    """<mask(u), g> >= max(<u, g>, 0): the claim behind C-Optim; Grams' is as large as can be."""
    u, g = normal(10, seed=seed), normal(10, seed=100 + seed)
    plain = float((u * g).sum())
    assert float((pieces.cautious(u, g) * g).sum()) >= max(plain, 0.0)
    torch.testing.assert_close((pieces.grams(u, g) * g).sum(), (u.abs() * g.abs()).sum())
    assert float((pieces.grams(u, g) * g).sum()) >= abs(plain)


def test_cautious_where_nothing_agrees_does_not_divide_by_zero():
    u = normal(5)
    assert torch.equal(pieces.cautious(u, -u), torch.zeros_like(u))


def test_grams_takes_the_signs_of_one_and_the_sizes_of_the_other():
    u, g = normal(40), normal(40, seed=1)
    out = pieces.grams(u, g)
    assert torch.equal(out.abs(), u.abs()) and torch.equal(out.sign(), g.sign())


# OrthoGrad (2501.04697) ------------------------------------------------------------------------


def test_orthogonal_has_no_part_along_x_and_the_old_length():
    u, x = normal(6, 5), normal(6, 5, seed=1)
    out = pieces.orthogonal(u, x)
    assert abs(float((out * x).sum())) < 1e-12
    torch.testing.assert_close(out.norm(), u.norm())
    plane = torch.stack([u.flatten(), x.flatten(), out.flatten()])
    assert torch.linalg.matrix_rank(plane) == 2  # nothing but u and x is in it


def test_orthogonal_at_its_limits():
    u, x = normal(5), normal(5, seed=1)
    assert torch.equal(pieces.orthogonal(u, torch.zeros(5, dtype=torch.float64)), u)
    assert torch.equal(pieces.orthogonal(3 * x, x), torch.zeros_like(x))
    assert torch.equal(pieces.orthogonal(u[:1], x[:1]), torch.zeros_like(u[:1]))


def test_the_length_of_the_weights_only_grows_to_second_order():
    """An orthogonal step leaves ||x||^2 + ||step||^2: no component scales the weights down."""
    gradients = [normal(8, seed=i) for i in range(1)]
    start = normal(8, seed=9)
    for orthograd in (False, True):
        (step,), _ = moves(gradients, start, use_orthograd=orthograd)
        excess = (start + step).square().sum() - start.square().sum() - step.square().sum()
        assert (abs(float(excess)) < 1e-12) == orthograd


# Muon --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 3, 2, 2)])
def test_orthogonalised_moves_the_singular_values_to_one(shape):
    """Those that are not tiny; the singular vectors stay, whatever the scale."""
    g = 100 * normal(*shape)
    out = pieces.orthogonalised(g)
    assert out.shape == shape
    U, _, V = torch.linalg.svd(g.flatten(1), full_matrices=False)
    turned = U.mT @ out.flatten(1) @ V.mT
    sizes = turned.diagonal()
    assert 0.65 < sizes.min() and sizes.max() < 1.25
    assert (turned - sizes.diag()).abs().max() < 1e-9
    torch.testing.assert_close(pieces.orthogonalised(1000 * g), out)


def test_orthogonalised_falls_with_a_small_gradient():
    """<g, O> is below 1 near a minimum: there the update is proportional to g's size."""
    g = normal(5, 4) / 50
    falls = pieces.orthogonalised(2 * g) / pieces.orthogonalised(g)
    torch.testing.assert_close(falls, torch.full_like(g, 2.0), rtol=1e-3, atol=0)
    assert not pieces.orthogonalised(torch.zeros(3, 3)).any()


# FOCUS (2501.12243) ----------------------------------------------------------------------------


def test_focus_is_a_sign_step_towards_the_gradient_and_the_average():
    m = torch.tensor([2.0, -3.0, 0.0, 1.0, -1.0])
    x = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.5])
    average = torch.tensor([0.5, 2.0, 0.5, -1.0, 0.25])
    expected = torch.tensor([1.1, -1.1, 0.1, 1.0, -0.9])
    torch.testing.assert_close(pieces.focus(m, x, average), expected)


def test_focus_averages_the_weights_in_the_place_of_squares():
    """Bias corrected: (1 - beta2) / (1 - beta2^t) times the sum of beta2^(t-i) z_i."""
    options = dict(use_focus=True, betas=(0.9, 0.5))
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    steps, optimizer = moves([torch.ones(2, dtype=torch.float64)] * 3, start, **options)
    points = start + torch.cat([torch.zeros(1, 2), torch.stack(steps).cumsum(0)[:-1]])
    weights = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    average = weights @ points / weights.sum()
    (s,) = optimizer.state.values()
    torch.testing.assert_close(s["exp_avg_sq"], average)
    torch.testing.assert_close(steps[0], torch.full_like(start, -0.1))  # sign(x - x) = 0
    torch.testing.assert_close(steps[2], -0.1 * (1 + 0.1 * (points[2] - average).sign()))


def test_focus_draws_to_the_average_of_the_weights_not_to_zero():
    """Without a gradient the weights are their own average, and stay; also a tensor's first is."""
    zeros = [torch.zeros(2, dtype=torch.float64)] * 20
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    steps, _ = moves(zeros, start, use_focus=True)
    assert not torch.stack(steps).any()
    early, late = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = ProdigyPlusScheduleFree([early, late], use_focus=True, factored=False, d0=0.1)
    for step in range(40):
        early.grad = torch.ones(2, dtype=torch.float64)
        late.grad = None if step < 30 else torch.zeros(2, dtype=torch.float64)
        optimizer.step()
    assert torch.equal(late, start) and not torch.equal(early, start)


# Adafactor (1804.04235) ------------------------------------------------------------------------

SHAPES = [(20, 64), (64, 20), (48, 48), (33, 2), (2, 33), (8, 40, 3, 3), (40, 8, 3), (3, 4, 50)]


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_exact_where_the_second_moment_has_rank_one(shape):
    """gg = a b over the two largest axes: two vectors hold all of it, wide or tall."""
    dc, dr = pieces.factored_axes(shape)
    assert {shape[dc], shape[dr]} == set(sorted(shape)[-2:]) and shape[dr] == max(shape)
    a, b = normal(shape[dr]).square(), normal(shape[dc], seed=1).square()
    line = [1] * len(shape)
    rows, cols = line.copy(), line.copy()
    rows[dr], cols[dc] = shape[dr], shape[dc]
    gg = (a.view(rows) * b.view(cols)).expand(shape)
    row = torch.zeros([1 if i == dr else n for i, n in enumerate(shape)], dtype=torch.float64)
    col = torch.zeros([1 if i == dc else n for i, n in enumerate(shape)], dtype=torch.float64)
    for weight in (1.0, 3.0, 0.5):
        pieces.factor_(row, col, weight * gg, 0.9)
    exact = 0.1 * (1.0 * 0.81 + 3.0 * 0.9 + 0.5) * gg
    product = pieces.unfactored_root(row, col, gg).square()
    torch.testing.assert_close(product, exact, rtol=1e-12, atol=0)
    assert row.numel() + col.numel() < gg.numel()


@pytest.mark.parametrize("shape", [(20, 64), (64, 20)])
def test_factors_keep_the_mean_of_every_row_and_column(shape):
    gg = normal(*shape).square()
    dc, dr = pieces.factored_axes(shape)
    row, col = gg.new_zeros(gg.mean(dr, True).shape), gg.new_zeros(gg.mean(dc, True).shape)
    pieces.factor_(row, col, gg, 0.0)
    product = pieces.unfactored_root(row, col, gg).square()
    for axis in (0, 1):
        torch.testing.assert_close(product.mean(axis), gg.mean(axis), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(20, 64, 3, 3), (64, 16, 5), (32, 48, 2, 3)], ids=str)
def test_factors_of_filters_sixteen_abreast(shape):
    gg = normal(*shape).square()
    axes = pieces.factored_axes(shape)
    col, row = (gg.mean(axis, keepdim=True) for axis in axes)
    expected = pieces.unfactored_root(row, col, gg)
    wide = gg.view(pieces.abreast(shape))
    assert torch.equal(pieces.unfactored_root(row, col, wide), expected.view_as(wide))
    ends = [(row.clone(), col.clone()) for _ in range(2)]
    for averages, squares in zip(ends, (gg, wide)):
        pieces.factor_(*averages, squares, 0.9)
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("shape", [
    (), (64,), (64, 64), (64, 3, 3, 3), (64, 40, 3, 3), (64, 64, 1, 1), (64, 64, 4, 4),
    (16, 16, 3, 3), (4, 64, 7, 9), (64, 64, 8, 9)], ids=str)
def test_what_does_not_lie_abreast(shape):
    """Vectors, matrices, other numbers of channels, kernels of 16 entries or many, unfactored."""
    assert pieces.abreast(shape) is None


def test_what_is_not_factored():
    assert pieces.factored_axes((1000,)) is None
    assert pieces.factored_axes(()) is None
    assert pieces.factored_axes((31, 31)) is None
    assert pieces.factored_axes((31, 32)) == (0, 1)


# ADOPT (2411.02853) ----------------------------------------------------------------------------


def test_adopt_divides_by_the_gradients_before_this_one():
    """Its first step moves nothing; then z moves by d g_2/|g_1|: linear in the current gradient,
    which Adam's denominator would cap."""
    g1, g2 = normal(6), normal(6, seed=1)
    (first, second), _ = moves([g1, g2], use_adopt=True)
    assert torch.equal(first, torch.zeros_like(first))
    torch.testing.assert_close(second, -0.1 * g2 / g1.abs())
    larger = moves([g1, 5 * g2], use_adopt=True)[0][1]
    torch.testing.assert_close(larger, 5 * second)
    adam = moves([g1, 1e6 * g2])[0][1]
    assert (adam.abs() <= 0.1 / 0.01**0.5).all()  # d / sqrt(1 - beta2)


def test_adopt_without_schedule_free_clips_at_the_fourth_root_of_k():
    options = dict(use_adopt=True, use_schedulefree=False, betas=(0.0, 0.99))
    g = torch.tensor([1.0, 1.0], dtype=torch.float64)
    spike = torch.tensor([1e4, -1e4], dtype=torch.float64)
    (_, second), _ = moves([g, spike], **options)
    torch.testing.assert_close(second.abs(), torch.full_like(g, 0.1 * 2**0.25))


# bias correction: RAdam (1908.03265) and Adam ---------------------------------------------------


def test_rectified_steps_wait_for_four_and_grow_to_one():
    factors = [pieces.rectify(0.99, t) for t in range(1, 3000)]
    assert [applies for _, applies in factors[:6]] == [False] * 4 + [True] * 2
    values = [factor for factor, applies in factors if applies]
    assert values == sorted(values) and 0 < values[0] < 0.2 and 0.999 < values[-1] <= 1


def test_the_first_rectified_steps_do_not_move():
    gradients = [normal(4, seed=i) for i in range(6)]
    rows, _ = moves(gradients, use_bias_correction=True)
    still = [bool((row == 0).all()) for row in rows]
    assert still == [True] * 4 + [False] * 2


def test_the_corrected_second_moment_is_the_weighted_mean_of_the_squares():
    """v_t = sum beta2^(t-i) g_i^2 / sum beta2^(t-i): Adam's v / (1 - beta2^t), times d^2."""
    gradients = [normal(4, seed=i) for i in range(7)]
    _, optimizer = moves(gradients, use_bias_correction=True)
    (s,) = optimizer.state.values()
    weights = [0.99 ** (7 - i) for i in range(1, 8)]
    mean = sum(w * g.square() for w, g in zip(weights, gradients)) / sum(weights)
    torch.testing.assert_close(s["exp_avg_sq"], 0.1**2 * mean)


# refined Schedule-Free (2507.09846) ------------------------------------------------------------


@pytest.mark.parametrize("c", [5.0, 20.0])
def test_the_refined_average_weighs_the_newest_point_c_times_as_much(c):
    """c_t = min(1, (1 - beta) C / t) where the step size is constant."""
    gradients = [normal(4, seed=i) for i in range(8)]
    p = torch.nn.Parameter(normal(4, seed=9))
    optimizer = ProdigyPlusScheduleFree([p], schedulefree_c=c, **{**PLAIN, "d_coef": 1e-9})
    x = p.detach().clone()
    for t, g in enumerate(gradients, 1):
        p.grad = g
        optimizer.step()
        x.lerp_(optimizer.state[p]["z"], min(1.0, 0.1 * c / t))
    optimizer.eval()
    torch.testing.assert_close(p.detach(), x)


# the size --------------------------------------------------------------------------------------


def test_d_grows_by_a_quarter_power_of_two_at_most():
    for limited in (True, False):
        p = torch.nn.Parameter(torch.full((50,), 3.0, dtype=torch.float64))
        options = dict(d0=1e-6, d_limiter=limited)
        optimizer = ProdigyPlusScheduleFree([p], **options)
        d = [optimizer.get_d()]
        for _ in range(30):
            p.grad = p.detach().clone()
            optimizer.step()
            d.append(optimizer.get_d())
        steepest = max(b / a for a, b in zip(d, d[1:]))
        assert (steepest <= GROWTH * (1 + 1e-12)) == limited
        assert d[-1] > 1e-5


def test_speed_averages_the_progress_and_keeps_the_largest_displacement():
    averages = [torch.tensor(value, dtype=torch.float64) for value in SPEED.values()]
    g = torch.tensor([1.0, 2.0], dtype=torch.float64)
    far = torch.tensor([3.0, -4.0], dtype=torch.float64)
    first = progress_(*averages, g, far, 0.0, 1.0)
    assert float(first) == pytest.approx(-5 / 7 / 36)
    second = progress_(*averages, g, far / 2, 0.75, 1.0)
    assert float(averages[0]) == pytest.approx(0.75 * -5 + 0.25 * -2.5)
    assert (float(averages[1]), float(averages[2])) == (7.0, 5.0)
    assert float(second) == pytest.approx(-4.375 / 7 / 36)


# rounding at random ----------------------------------------------------------------------------


def rounded(x, seed=0):
    p = torch.empty_like(x, dtype=torch.bfloat16)
    pieces.stochastic_(p, x, torch.Generator().manual_seed(seed))
    return p


def test_stochastic_rounding_is_unbiased():
    """The mean of n draws is x up to 5 standard errors; each draw is one of x's neighbours."""
    x = torch.cat([normal(50).float(), normal(50, seed=1).float() * 1e-20])
    n = 4000
    draws = rounded(x.repeat(n, 1)).double()
    low, high = draws.amin(0), draws.amax(0)
    assert ((low <= x) & (x <= high)).all()
    spacing = x.double().abs() * 2.0**-7
    assert ((high - low) <= spacing).all()
    share = (x.double() - low) / (high - low)
    deviation = (high - low) * (share * (1 - share) / n).sqrt()
    assert ((draws.mean(0) - x).abs() <= 5 * deviation).all()
    nearest = (x.bfloat16().double() - x).abs()
    assert (nearest > 20 * deviation).sum() > 20  # what rounding to nearest would be off by


def test_stochastic_rounding_repeats_with_its_generator_and_keeps_what_fits():
    x = normal(100).float()
    assert torch.equal(rounded(x), rounded(x))
    assert not torch.equal(rounded(x), rounded(x, seed=1))
    fits = x.bfloat16().float()
    assert torch.equal(rounded(fits).float(), fits)
    for odd in (0.0, -0.0, math.inf, -math.inf):
        value = torch.tensor([odd])
        assert torch.equal(rounded(value).float(), value)


def test_small_steps_survive_on_average():
    """1000 steps of 1e-5 from 1, where bfloat16's spacing is 2^-7: to nearest none would count."""
    p = torch.ones(2000, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        pieces.stochastic_(p, p.float() + 1e-5, generator)
    assert float(p.double().mean()) == pytest.approx(1.01, abs=1e-3)


# many tensors at once --------------------------------------------------------------------------


def test_pieces_on_several_tensors_are_the_pieces_on_each():
    xs, us = ([normal(40, 3, seed=i), normal(7, seed=i + 1)] for i in (0, 2))
    rows = {
        "atan2": (pieces.atan2, us, xs),
        "rms_clip_": (pieces.rms_clip_, us),
        "cautious": (pieces.cautious, us, xs),
        "grams": (pieces.grams, us, xs),
        "orthogonal": (pieces.orthogonal, us, xs),
        "focus": (pieces.focus, us, xs, [x / 2 for x in xs]),
    }
    for name, (piece, *lists) in rows.items():
        together = piece(*(Vec(t.clone() for t in row) for row in lists)).parts
        apart = [piece(*(t.clone() for t in row)) for row in zip(*lists)]
        for a, b in zip(together, apart):
            assert torch.equal(a, b), name
