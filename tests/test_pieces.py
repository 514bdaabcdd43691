"""Vec against Tensor, low-precision storage bit for bit, rectify, and the messages of check()."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from prodigy import pieces
from prodigy.optimizer import INTEGERS, OPTIONAL, RANGES, check
from prodigy.vec import Vec

SHAPES = [(3, 2), (), (0,), (4,), (2, 0, 3)]


def random(seed, positive=False):
    """One flat tensor and the same numbers as a Vec of mixed shapes, empty ones among them."""
    sizes = [math.prod(shape) for shape in SHAPES]
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(sum(sizes), generator=generator, dtype=torch.float64)
    flat = flat.abs() + 0.1 if positive else flat
    return flat, Vec(t.reshape(s).clone() for t, s in zip(flat.split(sizes), SHAPES))


def flat(vec):
    return torch.cat([t.flatten() for t in vec.parts])


# Vec -------------------------------------------------------------------------------------------

D = torch.tensor(0.7, dtype=torch.float64)  # a number that lives on the device

# every method of Vec, called the same way on a Tensor; x, y any numbers, p, q positive
METHODS = {
    "mul a Vec": lambda x, y, p, q: x * y,
    "mul a float": lambda x, y, p, q: x * 0.3,
    "mul a 0-d tensor": lambda x, y, p, q: x * D,
    "div by a Vec": lambda x, y, p, q: x / p,
    "div by a float": lambda x, y, p, q: x / 0.3,
    "div by a 0-d tensor": lambda x, y, p, q: x / D,
    "add a Vec": lambda x, y, p, q: x + y,
    "add a float": lambda x, y, p, q: x + 0.3,
    "add a 0-d tensor": lambda x, y, p, q: x + D,
    "sub a Vec": lambda x, y, p, q: x - y,
    "sub a float": lambda x, y, p, q: x - 0.3,
    "sub a 0-d tensor": lambda x, y, p, q: x - D,
    "abs": lambda x, y, p, q: x.abs(),
    "neg": lambda x, y, p, q: -x,
    "clone": lambda x, y, p, q: x.clone(),
    "sqrt": lambda x, y, p, q: p.sqrt(),
    "square": lambda x, y, p, q: x.square(),
    "lerp a float": lambda x, y, p, q: x.lerp(y, 0.3),
    "lerp a 0-d tensor": lambda x, y, p, q: x.lerp(y, D),
    "to": lambda x, y, p, q: x.to(torch.float32).to(torch.float64),
}
IN_PLACE = {
    "mul_ a Vec": lambda x, y, p, q: x.mul_(y),
    "mul_ a float": lambda x, y, p, q: x.mul_(0.3),
    "mul_ a 0-d tensor": lambda x, y, p, q: x.mul_(D),
    "div_ a Vec": lambda x, y, p, q: x.div_(p),
    "div_ a float": lambda x, y, p, q: x.div_(0.3),
    "div_ a 0-d tensor": lambda x, y, p, q: x.div_(D),
    "add_ a Vec": lambda x, y, p, q: x.add_(y),
    "add_ alpha": lambda x, y, p, q: x.add_(y, alpha=-0.3),
    "add_ a float": lambda x, y, p, q: x.add_(0.3),
    "add_ a 0-d tensor": lambda x, y, p, q: x.add_(D),
    "sub_": lambda x, y, p, q: x.sub_(y),
    "sqrt_": lambda x, y, p, q: p.sqrt_(),
    "copy_": lambda x, y, p, q: x.copy_(y),
    "lerp_ a float": lambda x, y, p, q: x.lerp_(y, 0.3),
    "lerp_ a 0-d tensor": lambda x, y, p, q: x.lerp_(y, D),
    "addcdiv_": lambda x, y, p, q: x.addcdiv_(y, p, value=-0.3),
}
NUMBERS = {
    "norm 1": lambda x, y, p, q: x.norm(1),
    "norm 2": lambda x, y, p, q: x.norm(2),
    "sum": lambda x, y, p, q: x.sum(),
}


def both(function):
    """The function's result on tensors and on Vecs of the same numbers, and what it left."""
    pairs = [random(seed, positive) for seed, positive in enumerate((False, False, True, True))]
    ends = []
    for args in zip(*pairs):
        result = function(*args)
        ends.append((result, args))
    return ends


@pytest.mark.parametrize("name", METHODS)
def test_vec_answers_as_a_tensor_does(name):
    (expected, _), (got, args) = both(METHODS[name])
    torch.testing.assert_close(flat(got), expected, rtol=1e-15, atol=1e-15)
    assert [t.shape for t in got.parts] == [torch.Size(s) for s in SHAPES]
    for seed, (arg, positive) in enumerate(zip(args, (False, False, True, True))):
        assert torch.equal(flat(arg), random(seed, positive)[0])  # out of place


@pytest.mark.parametrize("name", IN_PLACE)
def test_vec_changes_in_place_as_a_tensor_does(name):
    (expected, tensors), (got, vecs) = both(IN_PLACE[name])
    torch.testing.assert_close(flat(got), expected, rtol=1e-15, atol=1e-15)
    assert any(got is arg for arg in vecs)  # chains
    for vec, tensor in zip(vecs, tensors):
        torch.testing.assert_close(flat(vec), tensor, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("name", NUMBERS)
def test_vec_sums_as_a_tensor_does(name):
    (expected, _), (got, _) = both(NUMBERS[name])
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


def test_vec_of_empty_tensors_sums_to_zero():
    empty = Vec([torch.ones(0), torch.ones(2, 0)])
    assert empty.norm(1) == empty.norm(2) == empty.sum() == 0


def test_clamp_min_is_the_larger_entry():
    x, y = random(0), random(1)
    assert torch.equal(flat(x[1].clamp_min_(y[1])), torch.maximum(x[0], y[0]))


def test_every_method_of_vec_is_tested():
    words = {name: f"__{name}__" for name in ("mul", "add", "sub", "neg")} | {"div": "__truediv__"}
    tested = {words.get(key.split()[0], key.split()[0]) for key in (*METHODS, *IN_PLACE, *NUMBERS)}
    tested |= {"clamp_min_", "each", "finite", "dtype"}
    public = {name for name, value in vars(Vec).items() if callable(value) or name == "dtype"}
    assert public - {"__init__"} == tested


def test_each_applies_a_function_part_by_part():
    (a, x), (b, y) = random(0), random(1)
    assert torch.equal(flat(x.each(torch.maximum, y)), torch.maximum(a, b))
    assert x.dtype == torch.float64
    assert x.to(torch.float64) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_cleans_a_copy_and_counts(dtype):
    whole, vec = random(0)
    whole, vec = whole.to(dtype), vec.to(dtype)
    for value, (part, index) in zip(
        (math.nan, math.inf, -math.inf), ((0, (1, 1)), (1, ()), (3, (2,)))
    ):
        vec.parts[part][index] = value
    spoiled = flat(vec)
    clean, bad = pieces.finite(vec)
    expected = torch.where(spoiled.isfinite(), spoiled, torch.zeros_like(spoiled))
    assert torch.equal(flat(clean), expected)
    assert bad == 3
    assert bad.dtype == torch.int64
    assert torch.equal(flat(vec).isfinite(), spoiled.isfinite())  # the original is as it was
    single, count = pieces.finite(spoiled)
    assert torch.equal(single, expected)
    assert count == 3


def test_a_sum_that_is_finite_says_that_there_are_no_holes():
    g = torch.randn(3, 4)
    x = torch.zeros(())
    for clean in (g, g.T, torch.tensor(2.0), torch.empty(0)):
        same, bad = pieces.finite(clean, x=x)
        assert same is clean and bad == 0 and isinstance(bad, int)
    for spoiled in (torch.tensor([1.0, math.nan]), torch.tensor([math.inf, -math.inf, 2.0]),
                    torch.where(g.T > 0, math.inf, g.T)):
        clean, bad = pieces.finite(spoiled, x=x)
        assert bad == (~spoiled.isfinite()).sum() and clean.isfinite().all()
    huge = torch.full((4,), 3e38)  # whose sums overflow
    clean, bad = pieces.finite(huge, x=x)
    assert torch.equal(clean, huge) and clean is not huge and bad == 0
    away = torch.empty(3, device="meta")  # in the place of a GPU: nothing may be read
    assert pieces.finite(away, x=x)[0] is not away
    assert pieces.finite(g, x=g)[0] is not g  # x's own memory, which moves


def test_a_sum_over_many_tensors_says_that_none_has_holes():
    g = Vec([torch.randn(3, 4), torch.randn(4, 3).T, torch.tensor(2.0)])
    x = g.clone()
    same, bad = pieces.finite(g, x=x)
    assert same is g and bad == 0 and isinstance(bad, int)
    g.parts[1][1, 2] = math.nan
    clean, bad = pieces.finite(g, x=x)
    assert bad == 1 and clean.parts[1][1, 2] == 0 and g.parts[1][1, 2].isnan()
    assert [t.stride() for t in clean.parts] == [t.stride() for t in g.parts]
    x.parts[0] = g.parts[0]  # memory that moves in this step
    g.parts[1][1, 2] = 1.0
    clean, bad = pieces.finite(g, x=x)
    assert bad == 0 and torch.equal(clean.parts[0], g.parts[0])
    assert clean.parts[0].data_ptr() != g.parts[0].data_ptr()
    away = Vec([torch.empty(3, device="meta")])
    assert pieces.finite(away, x=away.clone())[0] is not away


# scalars and vectors ---------------------------------------------------------------------------


@pytest.mark.parametrize("on_device", [False, True])
def test_scalar_pieces_are_the_same_on_host_and_device(on_device):
    def number(value):
        return torch.tensor(value, dtype=torch.float64) if on_device else value

    a, b = number(2.0), number(3.0)
    assert pieces.larger(a, b) == pieces.larger(b, a) == 3
    assert pieces.smaller(a, b) == pieces.smaller(b, a) == 2
    assert pieces.ratio(a, b) == 2 / 3
    assert pieces.ratio(a, number(0.0)) == 0
    assert pieces.root(b) == 3**0.5
    assert float(pieces.where(a < b, 0.1, 0.7)) == pytest.approx(0.1, rel=1e-15)  # not float32's
    assert float(pieces.where(a > b, 0.1, 0.7)) == pytest.approx(0.7, rel=1e-15)


def test_only_a_number_on_a_cpu_is_read():
    assert pieces.as_float(D) == float(D) and isinstance(pieces.as_float(D), float)
    away = torch.empty((), device="meta")  # in the place of a GPU
    with FakeTensorMode():
        unknown = torch.empty(())
    for kept in (away, unknown, 0.5, None, True):
        assert pieces.as_float(kept) is kept


def test_vector_pieces():
    (a, x), (b, y) = random(0), random(1)
    torch.testing.assert_close(pieces.inner(x, y), a @ b)
    assert torch.allclose(flat(pieces.ema_(x.clone(), y, 0.9)), 0.9 * a + 0.1 * b)
    for factor in (0.3, D):
        assert torch.allclose(flat(pieces.add_scaled_(x.clone(), y, factor)), a + factor * b)
        assert torch.allclose(pieces.add_scaled_(a.clone(), b, factor), a + factor * b)
        moved, root = a - factor * b / (b * b + 1), y * y + y / y
        assert torch.allclose(flat(pieces.sub_ratio_(x.clone(), y, root, factor)), moved)
        assert torch.allclose(pieces.sub_ratio_(a.clone(), b, flat(root), factor), moved)
    t = torch.arange(24.0).view(2, 3, 4)
    assert pieces.every(t, 1) is t
    assert torch.equal(pieces.every(t, 5), torch.arange(0.0, 24, 5))
    strided = t.permute(2, 0, 1)  # in the order of its own indices, not of memory
    assert torch.equal(pieces.every(strided, 5), strided.reshape(-1)[::5])
    assert torch.equal(pieces.every(torch.tensor(7.0), 5), torch.tensor([7.0]))
    third = pieces.every(Vec([t, t[0]]), 5)
    assert torch.equal(flat(third), torch.tensor([0.0, 5, 10, 15, 20, 0, 5, 10]))


@pytest.mark.parametrize("beta2", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("on_device", [False, True])
def test_rectify_is_the_formula_of_the_paper(beta2, on_device):
    """Liu et al. 2019, Alg. 2. rho_t is the window of a plain mean with the same mean lag as the
    running average: 2 lag + 1, from the weights directly."""
    rho_inf = 2 * beta2 / (1 - beta2) + 1
    first = None
    for t in range(1, 200):
        weights = [beta2**lag for lag in range(t)]
        rho = 2 * sum(lag * w for lag, w in enumerate(weights)) / sum(weights) + 1
        step = torch.tensor(float(t), dtype=torch.float64) if on_device else t
        factor, applies = pieces.rectify(beta2, step)
        assert bool(applies) == (rho > 4)
        if rho > 4:
            first = first or t
            top = (rho - 4) * (rho - 2) * rho_inf
            bottom = (rho_inf - 4) * (rho_inf - 2) * rho
            assert float(factor) == pytest.approx(math.sqrt(top / bottom), rel=1e-8)
            assert 0 < factor < 1
    assert first == 5


# low precision ---------------------------------------------------------------------------------


def every_bfloat16():
    """All finite bfloat16 numbers, both zeros and all subnormals among them."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    p = bits.view(torch.bfloat16)
    return p[p.float().isfinite()]


def test_join_and_store_are_exact_for_every_bfloat16_number_and_every_residual_bit():
    """x = p + residual is x again after a round trip; p is x rounded to nearest."""
    p = every_bfloat16()
    for offset in (0, 1, -1, 37, -12345, 2**15 - 1, -(2**15)):
        low = torch.full_like(p, offset, dtype=torch.int16)
        low[p == 0] = max(offset, 0)  # nothing that rounds to 0 leaves less
        x = pieces.join(p, low)
        keep = x.isfinite()
        q, new = torch.zeros_like(p), pieces.residual(p)
        assert new.dtype == torch.int16
        pieces.store_(q, x, new)
        back = pieces.join(q, new)
        assert torch.equal(back.view(torch.int32)[keep], x.view(torch.int32)[keep])
        if abs(offset) < 2**15:  # not a tie: the same pair
            assert torch.equal(q.view(torch.int16)[keep], p.view(torch.int16)[keep])
            assert torch.equal(new[keep], low[keep])


def test_store_rounds_to_the_nearest_bfloat16():
    """As torch rounds, but for ties, which go away from zero (their residual says so)."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=generator, dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    x = x[x.isfinite() & (x.abs() < 3e38)]
    p, low = torch.zeros_like(x, dtype=torch.bfloat16), torch.zeros_like(x, dtype=torch.int16)
    pieces.store_(p, x, low)
    ties = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(p[~ties].view(torch.int16), x.bfloat16()[~ties].view(torch.int16))
    assert torch.equal(pieces.join(p, low).view(torch.int32), x.view(torch.int32))
    tie = torch.tensor([1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8])
    p, low = tie.bfloat16(), torch.zeros(3, dtype=torch.int16)
    pieces.store_(p, tie, low)
    assert torch.equal(p.float(), torch.tensor([1 + 2**-7, -1 - 2**-7, 1 + 2**-6]))
    assert (low == -(2**15)).all()
    assert torch.equal(pieces.join(p, low), tie)


def test_writing_to_the_parameter_moves_the_number_along():
    x = torch.linspace(-3, 3, 100)
    p, low = x.bfloat16(), torch.zeros(100, dtype=torch.int16)
    pieces.store_(p, x, low)
    p.mul_(2)
    torch.testing.assert_close(pieces.join(p, low), 2 * x, rtol=2**-7, atol=0)


def test_join_and_store_are_exact_for_float16():
    """Beside float16 the residual is float32: exact wherever x is in float16's range."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    p = bits.view(torch.float16)
    p = p[p.isfinite()]
    generator = torch.Generator().manual_seed(0)
    spacing = torch.maximum(p.float().abs() * 2**-12, torch.tensor(2.0**-26))
    x = p.float() + spacing * torch.randn(p.shape, generator=generator)
    x = torch.cat([x[x.abs() < 65504], torch.tensor([0.0, 2.0**-25, -(2.0**-25), 1 + 2**-11])])
    q, low = torch.zeros_like(x, dtype=torch.float16), torch.zeros_like(x)
    assert pieces.residual(q).dtype == torch.float32
    pieces.store_(q, x, low)
    assert torch.equal(q, x.half())
    assert torch.equal(pieces.join(q, low), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_join_and_store_of_a_vec(dtype):
    whole, vec = random(0)
    vec, whole = vec.to(torch.float32), whole.float()
    p, low = vec.to(dtype), Vec(pieces.residual(t.to(dtype)) for t in vec.parts)
    pieces.store_(p, vec, low)
    assert p.dtype == dtype
    assert torch.equal(flat(pieces.join(p, low)), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_numbers_are_their_own_working_copy(dtype):
    p = torch.ones(3, dtype=dtype)
    assert pieces.working_dtype(dtype) == dtype
    assert pieces.join(p, None) is p
    pieces.store_(p, p, None)


# check -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANGES)
def test_numbers_outside_their_range_are_named_with_it(name):
    interval = RANGES[name]
    low, high = (float(end) for end in interval[1:-1].split(","))
    whole = name in INTEGERS
    outside = []
    if math.isfinite(low):
        outside.append(int(low) - 1 if whole else low - 0.5)
        outside += [low] * (interval[0] == "(")
    if math.isfinite(high):
        outside.append(high + 0.5)
    outside += [high] * (interval[-1] == ")" and not whole)
    for value in [*outside, *([] if whole else [math.nan])]:
        with pytest.raises(ValueError) as error:
            check(name, value)
        assert f"{name} must lie in {interval}, got {value!r}" == str(error.value)
    start = 0.0 if low == -math.inf else low
    inside = [int(start) + 1 if whole else (start + min(high, start + 1)) / 2]
    inside += [int(low) if whole else low] * (interval[0] == "[")
    inside += [high] * (interval[-1] == "]")
    for value in inside:
        check(name, value)


@pytest.mark.parametrize("name", RANGES)
def test_wrong_types_are_named(name):
    wrong = ["1", True, [1], None, torch.ones(2)]
    wrong += [1.5] * (name in INTEGERS)
    for value in wrong:
        if value is None and name in OPTIONAL:
            check(name, value)
            continue
        with pytest.raises(TypeError, match="must be") as error:
            check(name, value)
        assert name in str(error.value) and RANGES[name] in str(error.value)


def test_pairs_and_tensors():
    check("betas", (0.9, 0.999))
    check("lr", torch.tensor(0.1))
    for value in (0.9, (0.9,), (0.9, 0.99, 0.999), "ab"):
        with pytest.raises(TypeError, match="betas"):
            check("betas", value)
    with pytest.raises(ValueError, match=r"betas\[1\] must lie in \[0, 1\), got 1.0"):
        check("betas", (0.9, 1.0))
    with pytest.raises(TypeError, match="weight_decay"):
        check("weight_decay", torch.tensor(0.1))
    check("betas", (1.0, 0.9), {"betas[0]": "[0, 1]"})


def test_a_bfloat16_weight_that_was_set_to_zero_is_zero_or_next_to_it():
    """Whatever the residual was: masks, clamp_ and zero_ write to p alone."""
    low = torch.tensor([5, 0, -5, -(2**15), 2**15 - 1], dtype=torch.int16)
    for zero in (torch.zeros(5), -torch.zeros(5)):
        x = pieces.join(zero.bfloat16(), low)
        assert x.isfinite().all() and x.abs().max() < 1e-38
    tiny = torch.tensor([1e-41, -1e-41, 3e-45])  # what rounds to 0 comes back as it was
    p, low = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int16)
    pieces.store_(p, tiny, low)
    assert torch.equal(pieces.join(p, low), tiny) and not p.any()
