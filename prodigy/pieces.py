"""One idea per function; every argument ``x, g, m, ...`` is a Tensor or a ``Vec``.

Scalars are Python floats or 0-d tensors on the device, whichever the step runs with: nothing here
asks a tensor for its value.
"""

import torch
from torch import Tensor

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
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    applies = rho > 4
    safe = where(applies, rho, 5.0)
    square = (safe - 4) * (safe - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * safe)
    return root(square), applies


# vectors ---------------------------------------------------------------------------------------


def inner(a, b):
    """<a, b> over all entries, a 0-d tensor."""
    return (a * b).sum()


def ema_(m, value, beta):
    """m <- beta m + (1 - beta) value, in place."""
    return m.lerp_(value, 1 - beta)


def add_scaled_(x, u, a):
    """x <- x + a u, in place."""
    if not isinstance(a, Tensor):
        return x.add_(u, alpha=a)
    if isinstance(x, Vec):
        return x.add_(u * a)
    return x.addcmul_(u, a)


def every(t, p):
    """Every p-th entry, in the order of the flattened tensor (the tensor itself for p = 1)."""
    if p == 1:
        return t
    if isinstance(t, Vec):
        return t.each(lambda part: every(part, p))
    return t.flatten()[::p]


def finite(g):
    """A copy of g with its non-finite entries set to zero, and how many there were (0-d int64)."""
    if isinstance(g, Vec):
        return g.finite()
    clean = g.nan_to_num(0.0, 0.0, 0.0)
    return clean, (clean != g).sum()


# low precision ---------------------------------------------------------------------------------
#
# bfloat16 is the upper half of float32. A parameter p and 16 more bits per entry therefore are a
# float32 number x exactly: x = p + residual. With it an update far below p's spacing (2^-8 |p|) is
# kept, not rounded away, and p stays the model's parameter: whoever writes to p moves x along.


def working_dtype(dtype):
    """The dtype a step computes in: float32 for bfloat16 and float16, else the parameter's own."""
    return torch.promote_types(dtype, torch.float32)


def residual(p):
    """A fresh residual: 2 bytes an entry beside bfloat16, 4 beside float16."""
    return torch.zeros_like(p, dtype=torch.int16 if p.dtype == torch.bfloat16 else torch.float32)


def join(p, low):
    """The float32 number x that p and its residual stand for; p itself where there is none."""
    if low is None:
        return p
    if isinstance(p, Vec):
        return p.each(join, low)
    if p.dtype != torch.bfloat16:
        return p.float() + low
    high = p.view(torch.int16).to(torch.int32) << 16
    return (high + low).view(torch.float32)


def store_(p, x, low):
    """Write x to the parameter, rounded to nearest, and what rounding dropped to the residual."""
    if x is p:
        return
    if isinstance(p, Vec):
        p.each(lambda *row: store_(*row) or row[0], x, low)
    elif p.dtype != torch.bfloat16:
        p.copy_(x)
        low.copy_(x - p)
    else:
        bits = x.view(torch.int32)
        high = (bits + 0x8000) >> 16
        p.copy_(high.to(torch.int16).view(torch.bfloat16))
        low.copy_(bits - (high << 16))
