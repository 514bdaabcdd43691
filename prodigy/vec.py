"""A list of tensors that answers the Tensor methods the algorithms use, one foreach call each.

A body written for one tensor (``m.lerp_(g, 1 - beta)``) runs unchanged on a ``Vec`` of all tensors
of a parameter group and then costs one kernel launch per line instead of one per line and tensor.
Numbers that live on the device (0-d tensors) must never be read back by the host: several
``torch._foreach_*`` functions do so silently, and this file is the one place that knows which.
"""

import torch
from torch import Tensor

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

    def finite(self):
        """Non-finite entries set to zero, and how many there were: one flat copy, then views."""
        flat = torch.cat([t.flatten() for t in self.parts])
        bad = flat.isfinite().logical_not_().sum()
        pieces = flat.nan_to_num_(0.0, 0.0, 0.0).split([t.numel() for t in self.parts])
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

    def neg_(self):
        torch._foreach_neg_(self.parts)
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
        """Signed sum: foreach has only norms, so positive and negative entries apart."""
        positive = Vec(torch._foreach_clamp_min(self.parts, 0.0))
        negative = Vec(torch._foreach_clamp_max(self.parts, 0.0))
        return positive.norm(1) - negative.norm(1)


def _bare(other):
    return other.parts if isinstance(other, Vec) else other
