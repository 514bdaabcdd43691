"""What the processes of test_distributed.py do: each job runs on every rank and returns results.

    launch(world, job, **arguments)   start gloo processes; [what each rank returned]
"""

import functools
import os
import tempfile
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing
import zoo
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

STEPS = 50
SHAPES = [*zoo.SHAPES, (33, 4), (5, 40)]  # with matrices worth factoring


def launch(world, job, **arguments):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_start, (world, folder, job, arguments), nprocs=world)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def _start(rank, world, folder, job, arguments):
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.save(globals()[job](**arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def tried(function, *arguments, **options):
    """What it returns, or the traceback as a string."""
    try:
        return function(*arguments, **options)
    except Exception:
        return traceback.format_exc()


# placements ------------------------------------------------------------------------------------


@functools.cache
def layout(kind):
    """(mesh, placements by number of axes) of a kind of sharding, over all processes."""
    world = dist.get_world_size()
    if kind in ("rows", "columns"):
        mesh = init_device_mesh("cpu", (world,))
        return mesh, lambda dim: [Shard(1 if kind == "columns" and dim > 1 else 0)]
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
    if kind == "replicas":  # HSDP
        return mesh, lambda dim: [Replicate(), Shard(0)]
    return mesh, lambda dim: [Shard(0), Shard(min(1, dim - 1))]  # tensors cut twice


def sharded(t, kind):
    """t as a DTensor (a plain tensor where there is no axis to cut)."""
    if not t.dim():
        return t
    mesh, placements = layout(kind)
    return distribute_tensor(t, mesh, placements(t.dim()), src_data_rank=None)


def whole(t):
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()


class Sharded(zoo.LeastSquares):
    """The zoo's problem in pieces; gradients are computed whole and cut."""

    def __init__(self, kind, holes=False, dtype=torch.float64, lone=False, **options):
        super().__init__(dtype, "cpu", 0, SHAPES, holes, 1.0)
        self.kind, self.lone, self.plain = kind, lone, self.params
        self.params = [torch.nn.Parameter(sharded(p.detach(), kind)) for p in self.params]

    @torch.no_grad()
    def fill(self, step):
        mine = self.params
        for p, q in zip(self.plain, mine):
            p.copy_(whole(q))
        self.params = self.plain
        super().fill(step)
        self.params = mine
        for p, q in zip(self.plain, mine):
            q.grad = None if p.grad is None else sharded(p.grad, self.kind)


def final(problem):
    return torch.cat([whole(p).double().flatten() for p in problem.params])


def run(case, kind, **extra):
    torch.manual_seed(0)
    result = zoo.run(case, STEPS, problem=Sharded(kind, case.holes), **extra)
    books = [{k: float(v) for k, v in g.items() if k in result.optimizer.estimates
              or k in ("nonfinite", "k")} for g in result.optimizer.param_groups]
    return dict(d=result.d, final=final(result.problem), books=books)


def least_squares(names, kinds, cases):
    cases = {case.name: case for case in cases}
    return {(name, kind): tried(run, cases[name], kind) for name in names for kind in kinds}


def cases_job(names, kinds):
    return least_squares(names, kinds, zoo.CASES)
