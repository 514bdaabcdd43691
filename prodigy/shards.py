"""Parameters that lie in pieces on several processes (DTensor: FSDP2, tensor parallelism).

A rank steps its own piece, a plain tensor. What runs over all entries is summed over the process
groups of those mesh dimensions along which the parameter is cut, so that replicas count once. A
plain parameter (DDP) is whole on every rank, with one gradient for all: nothing is sent.
"""

import functools
import math

import torch


PLAIN = (torch.Tensor, torch.nn.Parameter)


def sharded(t):
    """Is t a DTensor?"""
    return type(t) not in PLAIN and hasattr(t, "to_local")  # a missing name is slow to look for


def local(t):
    """This rank's piece of a DTensor, to be written in place; anything else as it is."""
    return t.to_local() if sharded(t) else t


def part_of(p):
    """The ``Part`` of a DTensor that this rank holds; None for anything else."""
    return _part(p.device_mesh, p.placements, p.shape) if sharded(p) else None


class Part:
    """A box within a tensor of the given shape: its size and offset along every axis.

    axes: {mesh dimension: the axis that is cut along it}; first: is it the first of the pieces?
    """

    def __init__(self, mesh, placements, shape):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as place

        self.mesh, self.placements, self.shape = mesh, placements, shape
        self.size, self.offset = place(shape, mesh, placements)
        self.axes = {i: q.dim for i, q in enumerate(placements) if hasattr(q, "dim")}
        self.ranks = (mesh, *self.axes) if self.axes else ()  # over whom sums run, as a key
        self.groups = [(mesh.get_group(i), axis) for i, axis in self.axes.items()]
        self.known = {}
        self.first = all(mesh.get_local_rank(i) == 0 for i in self.axes)

    def every(self, p, device):
        """Index, in the flattened piece, of those entries that are p-th ones of the whole."""
        if (p, device) not in self.known:  # from before the step: nothing for torch.compile
            self.known[p, device] = self._every(p, device)
        return self.known[p, device]

    def _every(self, p, device):
        if self.size[1:] == self.shape[1:]:  # cut along the first axis: one run of entries
            return slice(-sum(self.offset[:1]) * math.prod(self.shape[1:]) % p, None, p)
        at = torch.zeros((), dtype=torch.int64, device=device)
        for n, start, size in zip(self.shape, self.offset, self.size):
            at = at.unsqueeze(-1) * n + torch.arange(start, start + size, device=device)
        return (at.flatten() % p == 0).nonzero().flatten()

    def wrap(self, t, axis=None):
        """A local t as a DTensor laid out like the parameter, but with one entry along axis."""
        from torch.distributed.tensor import DTensor, Replicate

        kept = [Replicate() if axis is not None and self.axes.get(i) == axis else q
                for i, q in enumerate(self.placements)]
        shape = torch.Size(1 if i == axis else n for i, n in enumerate(self.shape))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(t, self.mesh, kept, run_check=False, shape=shape, stride=stride)

    def cut(self, whole):
        """This rank's piece of a whole tensor, of which an axis of one entry stays."""
        box = zip(whole.shape, self.shape, self.offset, self.size)
        return whole[tuple(slice(o, o + n) if a == b else slice(None) for a, b, o, n in box)]

    def distribute(self, whole, p):
        """What every rank has whole (or flat, every p-th entry alone) as a DTensor."""
        if p > 1 and whole.shape != self.shape:
            full = whole.new_zeros(math.prod(self.shape))
            full[::p] = whole
            whole = full.view(self.shape)
        axes = [i for i, (n, m) in enumerate(zip(whole.shape, self.shape)) if n != m]
        return self.wrap(self.cut(whole).contiguous(), *axes)

    def spread(self, samples, p):
        """The entries at ``every(p)`` as a DTensor of the parameter's shape, 0 in between."""
        piece = samples.new_zeros(math.prod(self.size))
        piece[self.every(p, piece.device)] = samples
        return self.wrap(piece.view(self.size))


_part = functools.lru_cache(maxsize=4096)(Part)


def reduced(a, mesh, groups, op="SUM"):
    """a (overwritten), reduced over each of the groups on the mesh's kind of device."""
    there = a.to(mesh.device_type)
    for group in groups:
        torch.distributed.all_reduce(there, getattr(torch.distributed.ReduceOp, op), group)
    return there.to(a.device)


def total(a, part, axis=None):
    """a (overwritten), summed over all pieces of the tensor, or over those along one axis."""
    if part is None:
        return a
    groups = [group for group, cut in part.groups if axis is None or axis == cut]
    return reduced(a, part.mesh, groups)


def everywhere(rows):
    """[(part, [0-d tensors])] -> the lists, summed over each part's ranks by one all_reduce."""
    sums = [row for _, row in rows]
    for ranks in dict.fromkeys(part.ranks for part, _ in rows if part):
        mine = [i for i, (part, _) in enumerate(rows) if part and part.ranks == ranks]
        flat = [a for i in mine for a in sums[i]]
        if ranks and flat:
            wide = functools.reduce(torch.promote_types, [a.dtype for a in flat])
            vector = torch.stack([a.to(flat[0].device, wide) for a in flat])
            new = iter(total(vector, rows[mine[0]][0]))
            for i in mine:
                sums[i] = [next(new).to(a) for a in sums[i]]
    return sums


def present(params, taken=()):
    """Those that have a gradient on some rank, without those taken already.

    One small all_reduce for each mesh, whose result only a rank that lacks a gradient reads.
    """
    have = {p: p in taken or p.grad is not None for p in params if sharded(p)}
    if not have and not taken:
        return [p for p in params if p.grad is not None]
    for mesh in dict.fromkeys(p.device_mesh for p in have):
        mine = [p for p in have if p.device_mesh == mesh]
        flags = torch.ones(len(mine), dtype=torch.int32, device=mesh.device_type)
        if lacking := not all(have[p] for p in mine):
            flags.copy_(torch.tensor([have[p] for p in mine]))
        flags = reduced(flags, mesh, mesh.get_all_groups(), "MAX")
        if lacking:
            have.update(zip(mine, map(bool, flags.tolist())))
    return [p for p in params if have.get(p, p.grad is not None) and p not in taken]


def gradient(p):
    """The gradient of this rank's piece; zero where only other ranks have one."""
    if p.grad is None:
        return torch.zeros_like(local(p))
    if sharded(p) and p.grad.placements != p.placements:
        return local(p.grad.redistribute(placements=p.placements))
    return local(p.grad)


def row_of(p, s, keys, part):
    """(p, its gradient, its buffers {key: tensor}, part): of a DTensor, this rank's pieces."""
    if part is None:
        g = torch.zeros_like(p) if p.grad is None else p.grad
        return p, g, {key: s[key] for key in keys}, None
    return local(p), gradient(p), {key: local(s[key]) for key in keys}, part


def average(a, params):
    """a (overwritten), its mean over all ranks of the first mesh among the parameters."""
    for part in [part_of(p) for p in params if part_of(p)][:1]:
        return reduced(a, part.mesh, part.mesh.get_all_groups()) / part.mesh.size()
    return a
