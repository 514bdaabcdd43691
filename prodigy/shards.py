"""Parameters that lie in pieces on several processes (DTensor: FSDP2, tensor parallelism).

A rank steps its own piece, a plain tensor. What runs over all entries is summed over the process
groups of those mesh dimensions along which the parameter is sharded, so that replicas count once.
A plain parameter (DDP) is whole on every rank, with one gradient for all: nothing is sent.
"""

import functools
import math

import torch


def local(t):
    """This rank's piece of a DTensor, to be written in place; anything else as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


def part_of(p):
    """The ``Part`` of a DTensor that this rank holds; None for a plain tensor."""
    return _part(p.device_mesh, p.placements, p.shape) if hasattr(p, "to_local") else None


@functools.lru_cache(maxsize=4096)
def _part(mesh, placements, shape):
    return Part(mesh, placements, shape)


class Part:
    """A box of a tensor of the given shape: sizes and offsets by axis, and who holds the rest.

    axes: {mesh dimension: the axis that is cut along it}; first: is this the first of the pieces?
    """

    def __init__(self, mesh, placements, shape):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as place

        self.mesh, self.placements, self.shape = mesh, placements, shape
        self.size, self.offset = place(shape, mesh, placements)
        self.axes = {i: q.dim for i, q in enumerate(placements) if hasattr(q, "dim")}
        self.groups = [(mesh.get_group(i), axis) for i, axis in self.axes.items()]
        self.first = all(mesh.get_local_rank(i) == 0 for i in self.axes)

    @property
    def ranks(self):
        """Over whom sums run, as a key."""
        return (self.mesh, *self.axes) if self.axes else ()

    def cut(self, whole):
        """This rank's piece of the whole tensor (a view); an axis of one entry stays whole."""
        box = zip(whole.shape, self.shape, self.offset, self.size)
        return whole[tuple(slice(o, o + n) if all_ == n_all else slice(None)
                           for all_, n_all, o, n in box)]

    def spread(self, t, p):
        """The local samples ``every(p)`` in a DTensor of the parameter's shape, else 0."""
        piece = t.new_zeros(math.prod(self.size))
        piece[self.every(p, t.device)] = t
        return self.wrap(piece.view(self.size))

    def distribute(self, whole, p):
        """A tensor of the parameter's shape, or with one entry along an axis, or flat and of
        every p-th entry alone, as every rank has it: a DTensor."""
        if p > 1 and whole.numel() != math.prod(self.shape):
            samples, whole = whole, whole.new_zeros(math.prod(self.shape))
            whole[::p] = samples
            whole = whole.view(self.shape)
        axes = [i for i, (n, m) in enumerate(zip(whole.shape, self.shape)) if n != m]
        return self.wrap(self.cut(whole).contiguous(), *axes[:1])

    @functools.cache
    def every(self, p, device):
        """Index, in the flattened piece, of those entries that are p-th ones of the whole."""
        if self.size[1:] == self.shape[1:]:  # cut along the first axis: one run of entries
            return slice(-sum(self.offset[:1]) * math.prod(self.shape[1:]) % p, None, p)
        at = torch.zeros((), dtype=torch.int64, device=device)
        for axis, (start, n) in enumerate(zip(self.offset, self.size)):
            stride = math.prod(self.shape[axis + 1 :])
            at = at.unsqueeze(-1) + torch.arange(start, start + n, device=device) * stride
        return (at.flatten() % p == 0).nonzero().flatten()

    def wrap(self, t, axis=None):
        """A local t as a DTensor laid out like the parameter, which has one entry along axis."""
        from torch.distributed.tensor import DTensor, Replicate

        kept = [Replicate() if self.axes.get(i, -1) == axis else q
                for i, q in enumerate(self.placements)]
        shape = torch.Size(1 if i == axis else n for i, n in enumerate(self.shape))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(t, self.mesh, kept, run_check=False, shape=shape, stride=stride)


def wrap(t, part, axis=None):
    return t if part is None else part.wrap(t, axis)


def total(a, part, axis=None):
    """a, summed in place over all pieces of the tensor, or over those along one axis of it."""
    if part is None:
        return a
    there = a.to(part.mesh.device_type)
    for group, cut in part.groups:
        if axis is None or axis == cut:
            torch.distributed.all_reduce(there, group=group)
    return there.to(a.device)


def count(t, part):
    """The number of entries of the whole tensor."""
    return t.numel() if part is None else math.prod(part.shape)


def everywhere(rows):
    """[(part, [0-d tensors])] -> the lists, summed over each part's ranks by one all_reduce."""
    sums = [row for _, row in rows]
    ranks = [() if part is None else part.ranks for part, _ in rows]
    for key in dict.fromkeys(ranks):
        mine = [i for i, r in enumerate(ranks) if r == key]
        flat = [a for i in mine for a in sums[i]]
        if not key or not flat:
            continue
        wide = functools.reduce(torch.promote_types, [a.dtype for a in flat])
        vector = torch.stack([a.to(flat[0].device, wide) for a in flat])
        new = iter(total(vector, rows[mine[0]][0]))
        for i in mine:
            sums[i] = [next(new).to(a) for a in sums[i]]
    return sums


def present(params, taken=()):
    """Those that have a gradient on some rank, without those taken already.

    One small all_reduce for each mesh, which only a rank that lacks a gradient reads.
    """
    have = {p: p in taken or p.grad is not None for p in params}
    meshes = {p: p.device_mesh for p in params if hasattr(p, "to_local")}
    for mesh in dict.fromkeys(meshes.values()):
        mine = [p for p in meshes if meshes[p] == mesh]
        here = [have[p] for p in mine]
        flags = torch.ones(len(mine), dtype=torch.int32, device=mesh.device_type)
        if not all(here):
            flags.copy_(torch.tensor(here))
        for i in range(mesh.ndim):
            op = torch.distributed.ReduceOp.MAX
            torch.distributed.all_reduce(flags, op, group=mesh.get_group(i))
        if not all(here):
            have.update(zip(mine, map(bool, flags.tolist())))
    return [p for p in params if have[p] and p not in taken]


def gradient(p):
    """The gradient of this rank's piece; zero where only other ranks have one."""
    if p.grad is None:
        return torch.zeros_like(local(p))
    if hasattr(p, "to_local") and p.grad.placements != p.placements:
        return local(p.grad.redistribute(placements=p.placements))
    return local(p.grad)


def averaged(a, params):
    """The mean of a over all ranks of the first mesh among the parameters."""
    for mesh in [p.device_mesh for p in params if hasattr(p, "to_local")][:1]:
        there = a.to(mesh.device_type)
        for i in range(mesh.ndim):
            torch.distributed.all_reduce(there, group=mesh.get_group(i))
        a = there.to(a.device) / mesh.size()
    return a
