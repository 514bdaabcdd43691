"""One idea per function; every argument ``x, g, m, ...`` is a Tensor or a ``Vec``.

Scalars are Python floats or 0-d tensors on the device, whichever the step runs with: nothing here
asks a tensor for its value, but `finite` and `as_float` one on a CPU, where nobody waits for it.
"""

import functools
import math

import torch
from torch import Tensor

from .shards import local, part_of, total
from .vec import Vec

# scalars ----------------------------------------------------------------------------------------


def where(condition, a, b):
    """``a if condition else b`` that also works when the condition lives on the device."""
    if isinstance(condition, Tensor):
        if not (isinstance(a, Tensor) or isinstance(b, Tensor)):
            return b + (a - b) * condition.double()  # torch.where would round to float32
        return torch.where(condition, a, b)
    return a if condition else b


def larger(a, b):
    """max(a, b)."""
    return where(a > b, a, b)


def smaller(a, b):
    """min(a, b)."""
    return where(a < b, a, b)


def ratio(a, b):
    """a / b, and 0 where b is 0."""
    return where(b != 0, a / where(b != 0, b, 1.0), 0.0)


def root(a):
    """Square root."""
    return a.sqrt() if isinstance(a, Tensor) else a**0.5


def rectify(beta2, t):
    """RAdam's step factor (Liu et al. 2019, 1908.03265, Alg. 2), and whether rho_t > 4.

    rho_inf = 2/(1 - beta2) - 1,   rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t),
    factor  = sqrt((rho_t - 4)(rho_t - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho_t)).
    """
    rho_inf = 2 / (1 - beta2) - 1
    if rho_inf <= 4:  # beta2 <= 0.6: rho_t < rho_inf stays below
        return 1.0, t < 0
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    applies = rho > 4
    safe = where(applies, rho, 5.0)
    square = (safe - 4) * (safe - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * safe)
    return root(square), applies


# vectors ---------------------------------------------------------------------------------------


def inner(a, b):
    """<a, b> over all entries, a 0-d tensor."""
    flat = not isinstance(a, Vec) and a.dim() == 1 and not torch.compiler.is_compiling()
    return a.dot(b) if flat else (a * b).sum()


def one_norm(a):
    """The sum of |entries|, a 0-d tensor."""
    return a.norm(1) if isinstance(a, Vec) else tail(a.abs()).sum()


def tail(a):
    """a, of which a compiled sum is taken in the loop that computes it, not in one before.

    Inductor (torch 2.13) takes one sum along in a loop that writes, if what it adds up was given
    a place in memory, as ``as_strided`` does; nothing is then written to that place.
    """
    return a.as_strided((a.numel(),), (1,)) if torch.compiler.is_compiling() else a


def placed(a):
    """a, which a compiled step computes once and keeps, not anew for every entry that needs it."""
    return tail(a.contiguous()).view(a.shape) if torch.compiler.is_compiling() else a


def as_float(a):
    """The number that a 0-d tensor on a CPU holds, where nobody waits for it; else a itself."""
    here = type(a) is Tensor and a.is_cpu and not torch.compiler.is_compiling()
    return a.item() if here else a


def ema_(m, value, beta):
    """m <- beta m + (1 - beta) value, in place."""
    if torch.compiler.is_compiling():  # lerp's choice between two formulas costs 6 % of a step
        return m.mul_(beta).add_(value * (1 - beta))
    return m.lerp_(value, 1 - beta)


def toward_(y, z, c):
    """y <- y + c (z - y), in place; an entry where z = y stays as it is."""
    return y.add_((z - y) * c) if torch.compiler.is_compiling() else y.lerp_(z, c)


def add_scaled_(x, u, a):
    """x <- x + a u, in place."""
    if not isinstance(a, Tensor):
        return x.add_(u, alpha=a)
    if isinstance(x, Vec):
        return x.add_(u * a)
    return x.addcmul_(u, a)


def sub_ratio_(x, u, b, a):
    """x <- x - a u / b, in place."""
    if isinstance(a, Tensor):
        return x.addcdiv_(u * a, b, value=-1)
    return x.addcdiv_(u, b, value=-a)


def every(t, p, part=None):
    """Every p-th entry, in the order of the flattened tensor (the tensor itself for p = 1).

    Of a DTensor, or of its local part, those that are p-th entries of the whole: plain tensors.
    """
    if p == 1:
        return t
    if isinstance(t, Vec):
        return t.each(lambda a, part: every(a, p, part), part or Vec([None] * len(t.parts)))
    part, t = part or part_of(t), local(t)
    return t.flatten()[part.every(p, t.device) if part else slice(None, None, p)]


def finite(g, alone=True, counted=True, x=None):
    """g with its non-finite entries set to zero, a copy, and how many there were (0-d, or 0).

    alone: no other sum over g's entries as they come in is taken, with which to share a loop.
    counted: False leaves out the count of one tensor, which takes longer than the copy.
    x: the point, where a number may be read of a CPU's tensors, which waits for nothing: g, or
        its squares, which is quicker, are added up first. Where the sum is finite, so are all
        entries, and g itself is returned, unless it lies in x's memory and would move along.
    """
    if isinstance(g, Vec):
        return g.finite(x)
    if torch.compiler.is_compiling():  # one comparison in the one loop
        good = g.abs() < math.inf
        bad = (~good).to(torch.int32)
        return torch.where(good, g, 0.0), (tail(bad) if alone else bad).sum(dtype=torch.int32)
    here = x is not None and type(g) is Tensor and g.is_cpu
    if here and g.data_ptr() != x.data_ptr():
        row = g if g.dim() == 1 else g.view(-1) if g.is_contiguous() else None
        if math.isfinite((g.sum() if row is None else row.dot(row)).item()):
            return g, 0
    clean = g.nan_to_num(0.0, 0.0, 0.0)
    if not counted:
        return clean, None
    holes = g - g  # 0, and not a number where g is not finite; as floats, since bools add slowly
    return clean, holes.ne_(holes).sum().long()


# low precision ---------------------------------------------------------------------------------
#
# bfloat16 is the upper half of float32. A parameter p and 16 more bits per entry therefore are a
# float32 number x exactly: x = p + residual. With it an update far below p's spacing (2^-8 |p|) is
# kept, not rounded away, and p stays the model's parameter: whoever writes to p moves x along.


WIDE = {torch.float32, torch.float64}


def working_dtype(dtype):
    """The dtype a step computes in: float32 for bfloat16 and float16, else the parameter's own."""
    return torch.promote_types(dtype, torch.float32)


def residual(p):
    """A fresh residual: 2 bytes an entry beside bfloat16, 4 beside float16."""
    return torch.zeros_like(p, dtype=residual_dtype(p))


def residual_dtype(p):
    return torch.int16 if p.dtype == torch.bfloat16 else torch.float32


def keep_residual(s, name, p):
    """The state s with a residual beside p under the name, or with none (p = None).

    One of another dtype was left there by weights of another.
    """
    if p is None:
        s.pop(name, None)
    elif name not in s or s[name].dtype != residual_dtype(p):
        s[name] = residual(p)


def join(p, low):
    """The float32 number x that p and its residual stand for; p itself where it is wide enough."""
    if low is None:
        return p if p.dtype in WIDE else p.to(working_dtype(p.dtype))
    if isinstance(p, Vec):
        return p.each(join, low)
    if p.dtype != torch.bfloat16:
        return p.float() + low
    low = torch.where(p == 0, low.clamp_min(0), low)  # below 0 is no number: p was set to 0
    high = p.view(torch.int16).to(torch.int32) << 16
    return (high + low).view(torch.float32)


def store_(p, x, low, noise=None):
    """Write x to p and what rounding to nearest drops to the residual; without one, at random."""
    if x is p:
        return
    if isinstance(p, Vec):
        for i, t in enumerate(p.parts):
            store_(t, x.parts[i], low and low.parts[i], noise)
    elif low is None:
        stochastic_(p, x, noise)
    elif p.dtype != torch.bfloat16:
        p.copy_(x)
        low.copy_(x - p)
    else:
        bits = x.view(torch.int32)
        high = (bits + 0x8000) >> 16
        p.copy_(high.to(torch.int16).view(torch.bfloat16))
        low.copy_(bits - (high << 16))


def put_(p, x, low):
    """Write x to p, with what rounding drops to the residual where there is one."""
    p.copy_(x) if low is None else store_(p, x, low)


def stochastic_(p, x, generator=None):
    """Write float32 x to a bfloat16 tensor, rounded up or down at random so that E[p] = x."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device,
                          generator=generator)
    p.copy_(((x.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16))


# directions, tensor by tensor --------------------------------------------------------------------


def by_tensor(function):
    """Let a function of tensors and numbers run on Vecs too, one tensor after the other."""

    @functools.wraps(function)
    def run(*arguments):
        vecs = [a for a in arguments if isinstance(a, Vec)]
        if not vecs:
            return function(*arguments)
        n = len(vecs[0].parts)
        columns = [a.parts if isinstance(a, Vec) else [a] * n for a in arguments]
        return Vec(function(*row) for row in zip(*columns))

    return run


@by_tensor
def atan2(a, b):
    """(4/pi) atan2(a, b) in the place of a / (b + eps): no eps, bounded by 2, blind to scale.

    Adam-atan2 (Everett et al. 2024, 2407.05872, App. on eps); 4/pi makes a = b a step of 1.
    """
    return torch.atan2(a, b).mul_(4 / math.pi)


@by_tensor
def rms_clip_(u, part=None):
    """u over the root of its root mean square, where that exceeds 1; in place.

    StableAdamW and Adafactor (Shazeer and Stern 2018, 1804.04235, Sec. 6) divide by the root mean
    square itself; the root of it is the softer form of prodigy-plus-schedule-free.
    """
    n = math.prod(part.shape) if part else u.numel()
    rms = length(u, part) / n**0.5
    return u.mul_(rms.clamp_min(1.0).rsqrt())


@by_tensor
def cautious(u, g, part=None):
    """u without the entries whose sign is not g's, scaled up by what that share leaves.

    C-Optim (Liang et al. 2024, 2411.16085, Alg. 1).
    """
    mask = (u * g > 0).to(u.dtype)
    return u * mask / mean(mask, part).clamp_min(1e-3)


@by_tensor
def grams(u, g):
    """|u| with the sign of g: Grams (Cao, Li, Song 2024, 2412.17107)."""
    return u.abs() * g.sign()


@by_tensor
def orthogonal(u, x, part=None):
    """u without its part along x, at its old length; 0 where nothing else is left.

    OrthoGrad (Prieto et al. 2025, 2501.04697, Sec. 5).
    """
    xx = total((x * x).sum(), part)
    v = u - x * (total((u * x).sum(), part) / xx.clamp_min(1e-30))
    whole, left = length(u, part), length(v, part)
    scaled = v * (whole / left.clamp_min(1e-30))
    known = left > 1e-6 * whole  # below, v is rounding noise (always so for one entry)
    moved = torch.where(known, scaled, torch.zeros_like(u))
    return torch.where(length(x, part) > 1e-30, moved, u)


@by_tensor
def focus(m, x, average):
    """sign(m) + 0.1 sign(x - average): FOCUS (Liu, Liu, Gore 2025, 2501.12243)."""
    return m.sign().add_((x - average).sign_(), alpha=0.1)


@by_tensor
def orthogonalised(g, part=None, steps=6):
    """g, read as a matrix with shape[0] rows, with its singular values moved close to 1.

    Newton-Schulz iteration of odd degree 5 (Jordan et al. 2024, Muon), in g's dtype (Muon's own
    is bfloat16): after six steps all but the smallest singular values lie in [0.7, 1.2]. Times
    <g, result>, at most 1 (adaptive Muon), so that it falls with g near a minimum. A sharded
    matrix is gathered, and every rank keeps its part of the result.
    """
    if part:
        return part.cut(orthogonalised(part.wrap(g).full_tensor(), None, steps))
    a, b, c = 3.4445, -4.7750, 2.0315
    G = g.flatten(1)
    tall = len(G) > G.shape[1]
    X = G.mT if tall else G
    X = X / X.norm().add(1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    X = X.mT if tall else X
    return (X * (G * X).sum().clamp(-1.0, 1.0)).view(g.shape)


@by_tensor
def mean(t, part=None):
    """The mean over the entries of a tensor."""
    return total(t.sum(), part) / math.prod(part.shape) if part else t.mean()


def length(t, part=None):
    """The 2-norm of a tensor, or of every tensor of a ``Vec`` by itself: 0-d tensors."""
    if isinstance(t, Vec):
        n = Vec(torch._foreach_norm(t.parts, 2))
        return n.each(whole_length, part) if part and any(part.parts) else n
    return whole_length(t.norm(2), part)


def whole_length(n, part):
    """The 2-norm of a tensor from those of its pieces."""
    return n if part is None else total(n.square(), part).sqrt()


# factored second moments -------------------------------------------------------------------------


def factored_axes(shape, smallest=32):
    """(second largest, largest) axis of a shape worth factoring, or None.

    Adafactor (Shazeer and Stern 2018, 1804.04235): two vectors instead of a matrix.
    """
    if len(shape) < 2 or max(shape) < smallest:
        return None
    order = sorted(range(len(shape)), key=lambda axis: (shape[axis], axis))
    return order[-2], order[-1]


def abreast(shape):
    """(O, I/16, 16 k) for filters of shape (O, I, *kernel) with k entries each, else None.

    Seen so, the last axis is long enough for a compiled loop to take 16 entries at a time; of a
    filter by itself it takes the 9 or so that there are.
    """
    k = math.prod(shape[2:])
    short = 1 < k < 64 and k % 16 and shape[1] % 16 == 0
    if not short or sorted(factored_axes(shape) or ()) != [0, 1]:
        return None
    return shape[0], shape[1] // 16, 16 * k


@by_tensor
def factor_(row, col, gg, beta, part=None):
    """Running means of gg over the largest axis (row) and the second largest (col), in place."""
    if part is None:
        gg = gg.view(torch.broadcast_shapes(row.shape, col.shape))  # not `abreast`
    dc, dr = factored_axes(part.shape if part else gg.shape)
    for average, axis in ((row, dr), (col, dc)):
        new = ema_(average.to(gg.dtype, copy=True), mean_along(gg, axis, part), beta)
        average.copy_(placed(new))
    return row


def mean_along(t, axis, part):
    if part:
        return total(t.sum(axis, keepdim=True), part, axis) / part.shape[axis]
    n = t.shape[axis]
    if torch.compiler.is_compiling() and 1 < t.stride(axis) < 64 and n % 16 == 0:
        # short rows: sixteen at a time, or Inductor starts its threads anew for every one of them
        some = placed(t.unflatten(axis, (-1, 16)).sum(axis)).unbind(axis)
        return functools.reduce(torch.add, some).unsqueeze(axis) / n
    return t.mean(axis, keepdim=True)


@by_tensor
def unfactored_root(row, col, like, part=None):
    """Root of row col / mean(row), as the product of two roots: no root is taken entry by entry.

    Exact where the second moment has rank one. In like's shape, which may be `abreast`.
    """
    shape = part.shape if part else torch.broadcast_shapes(row.shape, col.shape)
    dc, _ = factored_axes(shape)
    row, col = row.to(like.dtype), col.to(like.dtype)
    row = row / mean_along(row, dc, part).clamp_min(torch.finfo(like.dtype).tiny)
    factors = placed(row.sqrt()), placed(col.sqrt())
    if part is None and like.shape != shape:
        factors = [repeated(f, like.shape[-1]) for f in factors]
    return factors[0] * factors[1]


def repeated(factor, width):
    """A factor of filters, once for each of the sixteen that lie `abreast`."""
    if factor.shape[1] == 1:
        factor = placed(factor.flatten(2).expand(-1, 16, -1))
    return factor.reshape(len(factor), -1, width)
