"""A list of tensors that answers the Tensor methods the algorithms use, one foreach call each.

A body written for one tensor (``m.lerp_(g, 1 - beta)``) runs unchanged on a ``Vec`` of all tensors
of a parameter group and then costs one kernel launch per line instead of one per line and tensor.
Numbers that live on the device (0-d tensors) must never be read back by the host: several
``torch._foreach_*`` functions do so silently, and this file is the one place that knows which.
"""

import math

import torch
from torch import Tensor

CHUNK = 2**19  # entries of a large tensor that the loop takes at once: 2 MB each, near the cache
SMALL = 2**14  # entries of a tensor up to which calls cost more than work: the loop takes many

_add_tensor = torch.ops.aten._foreach_add.Tensor  # leaves the scalar on the device


class Vec:
    """Tensors of one dtype on one device; arithmetic with a ``Vec``, a float or a 0-d tensor."""

    __slots__ = ("parts",)

    def __init__(self, parts):
        self.parts = list(parts)

    @property
    def dtype(self):
        return self.parts[0].dtype

    def each(self, function, *others):
        """Apply a Tensor function part by part (for what foreach does not offer)."""
        return Vec(function(*row) for row in zip(self.parts, *(other.parts for other in others)))

    def to(self, dtype):
        return self if self.dtype == dtype else self.each(lambda t: t.to(dtype))

    def finite(self, x=None):
        """See `pieces.finite`: one flat copy, whose views are returned if x is not given.

        Of a CPU's tensors, where x is given, the sum of its squares is read, as there.
        """
        flat = torch.cat([t.flatten() for t in self.parts])
        here = x is not None and type(flat) is Tensor and flat.is_cpu
        if here and all(g.data_ptr() != p.data_ptr() for g, p in zip(self.parts, x.parts)):
            if math.isfinite(flat.dot(flat).item()):
                return self, 0
        clean = flat.nan_to_num(0.0, 0.0, 0.0)
        bad = flat.ne_(clean).sum().long()
        if here:  # with the strides of g itself
            return self.each(lambda t: t.nan_to_num(0.0, 0.0, 0.0)), bad
        pieces = clean.split([t.numel() for t in self.parts])
        return Vec(c.view(t.shape) for c, t in zip(pieces, self.parts)), bad

    # out of place -----------------------------------------------------------------------------
    def __mul__(self, other):
        return Vec(torch._foreach_mul(self.parts, _bare(other)))

    def __truediv__(self, other):
        return Vec(torch._foreach_div(self.parts, _bare(other)))

    def __add__(self, other):
        if isinstance(other, Tensor):
            return Vec(_add_tensor(self.parts, other))
        return Vec(torch._foreach_add(self.parts, _bare(other)))

    def __sub__(self, other):
        if isinstance(other, Tensor):
            return self + -other
        return Vec(torch._foreach_sub(self.parts, _bare(other)))

    def __neg__(self):
        return Vec(torch._foreach_neg(self.parts))

    def clone(self):
        return Vec(torch._foreach_clone(self.parts))

    def abs(self):
        return Vec(torch._foreach_abs(self.parts))

    def sqrt(self):
        return Vec(torch._foreach_sqrt(self.parts))

    def square(self):
        return Vec(torch._foreach_mul(self.parts, self.parts))

    def lerp(self, end, weight):
        return self.clone().lerp_(end, weight)

    # in place ---------------------------------------------------------------------------------
    def mul_(self, other):
        torch._foreach_mul_(self.parts, _bare(other))
        return self

    def div_(self, other):
        torch._foreach_div_(self.parts, _bare(other))
        return self

    def add_(self, other, alpha=1):
        if isinstance(other, Tensor):
            torch.ops.aten._foreach_add_.Tensor(self.parts, other)
        elif isinstance(other, Vec):
            torch._foreach_add_(self.parts, other.parts, alpha=alpha)
        else:
            torch._foreach_add_(self.parts, other)
        return self

    def sub_(self, other):
        torch._foreach_sub_(self.parts, other.parts)
        return self

    def sqrt_(self):
        torch._foreach_sqrt_(self.parts)
        return self

    def copy_(self, other):
        torch._foreach_copy_(self.parts, other.parts)
        return self

    def clamp_min_(self, other):
        torch._foreach_maximum_(self.parts, other.parts)
        return self

    def lerp_(self, end, weight):
        if isinstance(weight, Tensor):  # _foreach_lerp_ would read it back
            return self.add_((end - self).mul_(weight))
        torch._foreach_lerp_(self.parts, end.parts, weight)
        return self

    def addcdiv_(self, numerator, denominator, value=1):
        torch._foreach_addcdiv_(self.parts, numerator.parts, denominator.parts, value=value)
        return self

    # over all entries of all tensors ----------------------------------------------------------
    def norm(self, order):
        return torch.stack(torch._foreach_norm(self.parts, order)).norm(order)

    def sum(self):
        """Signed sum: foreach has only norms, so all entries in a row."""
        return torch.cat([t.flatten() for t in self.parts]).sum()


def _bare(other):
    return other.parts if isinstance(other, Vec) else other


# rows (p, g, {name: buffer}, part) of a parameter group -----------------------------------------


def cut(p, g, s, part, stride=1):
    """Views of a large tensor and its buffers in pieces, one row each, or the row as it is.

    Temporaries are then no larger than a piece, and still in the cache when they are read. Buffers
    have p's entries or every stride-th; a piece begins at one of those. (Those of a shard, which
    has a `part`, lie elsewhere: it is cut only where the stride is 1.)
    """
    n = p.numel()
    if n <= CHUNK or (part is not None and stride > 1):
        return [(p, g, s, part)]
    tensors, few = [p, g, *s.values()], -(-n // stride)
    if not all(t.is_contiguous() and t.numel() in (n, few) for t in tensors):
        return [(p, g, s, part)]
    size = max(CHUNK // stride, 1)
    pieces = [t.view(-1).split(size * stride if t.numel() == n else size) for t in tensors]
    return [(p, g, dict(zip(s, rest)), part) for p, g, *rest in zip(*pieces)]


def in_turn(rows, share=8):
    """Lists of rows that foreach takes at once, each with at most 1/share of all entries.

    A body holds up to six temporaries at a time; together they then stay below the size of the
    parameters, unless those are few or one tensor that cannot be cut is most of them.
    """
    limit = max(sum(row[0].numel() for row in rows) / share, CHUNK)
    some, size = [], 0
    for row in rows:
        if some and size + row[0].numel() > limit:
            yield some
            some, size = [], 0
        some.append(row)
        size += row[0].numel()
    yield some


def stack(rows):
    """One row of ``Vec``s."""
    params, grads, states, parts = zip(*rows)
    states = {key: Vec(s[key] for s in states) for key in states[0]}
    return Vec(params), Vec(grads), states, Vec(parts)


def bunched(rows):
    """The rows of large tensors, and those of small ones as ``Vec``s of CHUNK entries at most."""
    small = [row for row in rows if row[0].numel() <= SMALL]
    if len(small) < 2:
        return rows
    large = [row for row in rows if row[0].numel() > SMALL]
    return large + [stack(some) for some in in_turn(small, share=math.inf)]
