"""What the processes of test_distributed.py do: a job takes one row of its list on every rank.

    launch(world, jobs, folder)   start gloo processes; for each rank {job: [result of each row]}
"""

import functools
import os
import tempfile
import traceback
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
import zoo
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_optimizer_state_dict,
                                                     set_model_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import prodigy

STEPS = 50  # of a network
FEW = 24  # of least squares
SHAPES = [*zoo.SHAPES, (33, 4), (5, 40)]  # with matrices worth factoring

# the zoo's cases leave these out
MORE = [
    zoo.Case("Prodigy-slices", prodigy.Prodigy, dict(slice_p=11, d0=1e-3)),
    zoo.Case("Prodigy-split", prodigy.Prodigy, dict(split_groups=True, slice_p=3, d0=1e-3),
             groups=({}, {"weight_decay": 0.1}), holes=True),
    zoo.plus_case("muon-shared", use_muon_pp=True, split_groups=False, groups=({}, {}), d0=1e-3),
    zoo.plus_case("speed-holes", use_speed=True, holes=True, groups=({}, {}), d0=1e-3),
]
DEFAULTS = [replace(case, name=f"default-{case.name}") for case in zoo.METHODS]
KNOWN = {case.name: case for case in (*DEFAULTS, *zoo.CASES, *MORE)}


def launch(world, jobs, folder):
    with tempfile.TemporaryDirectory() as own:
        torch.multiprocessing.spawn(_start, (world, own, jobs, folder), nprocs=world)
        return [torch.load(f"{own}/{rank}.pt", weights_only=False) for rank in range(world)]


def _start(rank, world, own, jobs, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{own}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world,
                            timeout=timedelta(seconds=120))
    results = {name: [tried(globals()[name], row, folder) for row in rows]
               for name, rows in jobs.items()}
    torch.save(results, f"{own}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def tried(job, row, folder):
    """What it returns, or the traceback as a string."""
    try:
        return job(row, folder)
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
    """The zoo's problem in pieces: every rank writes the gradient of its own entries."""

    def __init__(self, kind, holes=False, dtype=torch.float64):
        super().__init__(dtype, "cpu", 0, SHAPES, holes, 1.0)
        self.params = [torch.nn.Parameter(sharded(p.detach(), kind)) for p in self.params]
        self.kind = kind

    @torch.no_grad()
    def fill(self, step):
        generator = torch.Generator().manual_seed(1000 * self.seed + step + 1)
        for i, (p, a, b) in enumerate(zip(self.params, self.curvatures, self.targets)):
            noise = 0.1 * torch.randn(a.shape, generator=generator, dtype=torch.float64)
            if self.holes and (i + step) % 4 == 0:
                p.grad = None
                continue
            a, b, noise = (piece(sharded(t, self.kind)) for t in (a, b, noise))
            g = ((piece(p) - b) * a + noise).to(p.dtype)
            p.grad = like(g, p)


def piece(t):
    return t.to_local() if isinstance(t, DTensor) else t


def like(g, p):
    if not isinstance(p, DTensor):
        return g
    return DTensor.from_local(g, p.device_mesh, p.placements, run_check=False, shape=p.shape,
                              stride=p.stride())


def final(problem):
    return torch.cat([whole(p).double().flatten() for p in problem.params])


def books(optimizer):
    """Every number of the groups that moves."""
    names = (*getattr(optimizer, "estimates", ()), *optimizer.counters)
    groups = [group.get("mechanic", group.get("schedule_free", group))
              for group in optimizer.param_groups]
    return [{n: float(g[n]) for n in (*names, "nonfinite") if n in g} for g in groups]


def run(case, kind, **options):
    problem = Sharded(kind, case.holes) if isinstance(kind, str) else kind
    result = zoo.run(case, FEW, problem=problem, **options)
    return dict(d=result.d, final=final(problem), books=books(result.optimizer))


def least_squares(row, _):
    name, kind, options = row
    return run(KNOWN[name], kind, **options)


# gradients that one rank alone lacks -----------------------------------------------------------


class Lacking(Sharded):
    """On two of three steps the last rank has no gradients, or none at all exist."""

    def fill(self, step):
        super().fill(step)
        for p in self.params:
            nobody = step % 3 == 2 and p.dim() > 1
            alone = step % 3 == 1 and dist.get_rank() == dist.get_world_size() - 1
            if nobody or alone and isinstance(p, DTensor):
                p.grad = None


class Halved(zoo.LeastSquares):
    """What Lacking is on one process: the last rank's rows of the gradient are zero."""

    def __init__(self, world):
        super().__init__(torch.float64, "cpu", 0, SHAPES, False, 1.0)
        self.world = world

    def fill(self, step):
        super().fill(step)
        for p in self.params:
            if step % 3 == 2 and p.dim() > 1:
                p.grad = None
            elif step % 3 == 1 and p.dim():
                rows = p.grad.chunk(self.world)
                if len(rows) == self.world:
                    rows[-1].zero_()


def lacking(name, _):
    return run(KNOWN[name], Lacking("rows"))


# networks --------------------------------------------------------------------------------------


def network(dtype=torch.float64):
    torch.manual_seed(1)
    layers = [torch.nn.Linear(6, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5)]
    return torch.nn.Sequential(*layers, torch.nn.BatchNorm1d(5)).to(dtype)


def batches(steps, dtype=torch.float64, size=8):
    """(inputs, targets) of each step; a rank takes its share of the rows, in order."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(steps, size, 6, generator=generator, dtype=torch.float64)
    y = x[..., :5].roll(1, -1) + 0.1 * torch.randn(steps, size, 5, generator=generator,
                                                  dtype=torch.float64)
    return list(zip(x.to(dtype), y.to(dtype)))


def share(t, how="fsdp"):
    """This rank's rows."""
    if how == "plain":
        return t
    return t.chunk(dist.get_world_size())[dist.get_rank()]


def mean(t, how):
    """Over ranks, where there are any."""
    t = t.detach().clone()
    if how == "plain":
        return t
    dist.all_reduce(t)
    return t / dist.get_world_size()


def on_ranks(model, how, policy=None):
    if how == "plain":
        return model
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    mesh, _ = layout("replicas" if how == "hsdp" else "rows")
    options = dict(mesh=mesh, **({"mp_policy": policy} if policy else {}))
    fully_shard(model[0], **options)
    return fully_shard(model, **options)


def steps(model, optimizer, data, how, closure=True):
    """Train; d, the loss of the whole batch, and the parameters at the end."""
    ds, losses = [], []
    model.eval()  # BatchNorm's statistics of a rank's rows are not those of the batch
    for x, y in data:

        def evaluate():
            optimizer.zero_grad()
            loss = (model(share(x, how)) - share(y, how)).square().mean()
            loss.backward()
            losses.append(mean(loss, how))
            return losses[-1] if how == "ddp" else loss.detach()

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        ds.append(float(optimizer.param_groups[0].get("d", 0.0)))
    end = torch.cat([whole(p).double().flatten() for p in model.parameters()])
    return dict(d=torch.tensor(ds, dtype=torch.float64), loss=torch.tensor(losses), final=end,
                books=books(optimizer))


def train(name, how, count=STEPS, skip=0):
    """The last steps, after so many others, of a run."""
    model, data = on_ranks(network(), how), batches(count)
    optimizer = zoo.make(KNOWN[name], model.parameters())
    steps(model, optimizer, data[:skip], how)
    return steps(model, optimizer, data[skip:], how)


def networks(row, _):
    name, how, options = row
    return train(name, how)


# policies, fused backward, modes ---------------------------------------------------------------


def fused(name, _):
    """Without, and with each shard stepped as soon as its gradient is reduced."""
    runs = []
    for hooked in (False, True):
        model = on_ranks(network(), "fsdp")
        optimizer = zoo.make(KNOWN[name], model.parameters())

        def hook(p, group):
            optimizer.step_param(p, group)
            p.grad = None

        for group in optimizer.param_groups if hooked else ():
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(functools.partial(hook, group=group))
        runs.append(steps(model, optimizer, batches(FEW), "fsdp", closure=False))
    return runs


def mixed(name, _):
    """bfloat16 compute, float32 shards; the same gradients replayed on one process."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = on_ranks(network(torch.float32)[:3], "fsdp", policy)
    optimizer = zoo.make(KNOWN[name], model.parameters())
    twin = [torch.nn.Parameter(whole(p).clone()) for p in model.parameters()]
    replay = zoo.make(KNOWN[name], twin)
    ds, dtypes = [], set()
    for x, y in batches(FEW, torch.float32):
        optimizer.zero_grad()
        (model(share(x)) - share(y)).square().mean().backward()
        for p, q in zip(model.parameters(), twin):
            q.grad = whole(p.grad).clone()
            dtypes |= {p.dtype, p.grad.dtype}
        optimizer.step()
        replay.step()
        ds.append([float(o.param_groups[0].get("d", 0.0)) for o in (optimizer, replay)])
    dtypes |= {t.dtype for s in optimizer.state.values() for t in s.values()}
    ends = [torch.cat([whole(p).flatten() for p in ps]) for ps in (model.parameters(), twin)]
    return dict(d=torch.tensor(ds), ends=ends, dtypes=dtypes)


def modes(name, folder, how="fsdp"):
    """Training with a look at x after every third step, in each way there is."""
    model = on_ranks(network(), how)
    optimizer = zoo.make(KNOWN[name], model.parameters())
    seen = []
    for i, batch in enumerate(batches(12)):
        steps(model, optimizer, [batch], how, closure=False)
        if i % 3 == 2:
            with optimizer.averaged():
                seen.append(torch.cat([whole(p).flatten() for p in model.parameters()]))
                seen.append(outputs(model, batch[0]))
            seen.append(outputs(model, batch[0]))
            optimizer.eval()
            seen.append(outputs(model, batch[0]))
            optimizer.train()
            seen.append(outputs(model, batch[0]))
    optimizer.update_bn(batches(4), model)  # the same rows on every rank
    state = optimizer.averaged_state_dict(model)
    seen += [whole(state[key]).flatten() for key in sorted(state) if "num" not in key]
    return torch.cat(seen)


@torch.no_grad()
def outputs(model, x):
    model.eval()
    out = model(x).flatten()
    if hasattr(model, "reshard"):
        model.reshard()
    return out


# checkpoints -----------------------------------------------------------------------------------


def state_of(model, optimizer, **options):
    options = StateDictOptions(**options)
    return {"model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}


def give(state, model, optimizer):
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def save(name, folder):
    """A checkpoint after 8 of 16 steps, whole and in shards; the other 8."""
    model, data = on_ranks(network(), "fsdp"), batches(16)
    optimizer = zoo.make(KNOWN[name], model.parameters())
    steps(model, optimizer, data[:8], "fsdp")
    dcp.save(state_of(model, optimizer), checkpoint_id=f"{folder}/{name}")
    unsharded_state = state_of(model, optimizer, full_state_dict=True, cpu_offload=True)
    if dist.get_rank() == 0:
        torch.save(unsharded_state, f"{folder}/{name}.pt")
    return steps(model, optimizer, data[8:], "fsdp")


def resume(name, folder):
    """The other 8 steps, from the shards."""
    model = on_ranks(network(), "fsdp")
    optimizer = zoo.make(KNOWN[name], model.parameters())
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=f"{folder}/{name}")
    give(state, model, optimizer)
    return steps(model, optimizer, batches(16)[8:], "fsdp")


def unsharded(name, file):
    """The same from the whole state, on one process without any sharding."""
    model = network()
    optimizer = zoo.make(KNOWN[name], model.parameters())
    give(torch.load(file, weights_only=True), model, optimizer)
    return steps(model, optimizer, batches(16)[8:], "plain")


def fold(name, _):
    """8 steps on one process, whose state dict an optimizer over shards takes for the other 8."""
    single, data = network(), batches(16)
    optimizer = zoo.make(KNOWN[name], single.parameters())
    steps(single, optimizer, data[:8], "plain")
    model = on_ranks(network(), "fsdp")
    full = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, single.state_dict(), options=full)
    other = zoo.make(KNOWN[name], model.parameters())
    other.load_state_dict(optimizer.state_dict())
    return steps(model, other, data[8:], "fsdp")


# one step --------------------------------------------------------------------------------------


def facts(base, _):
    """Of a step with a hole in the last row's gradient, on a matrix of 44 x 100."""
    p = torch.nn.Parameter(sharded(torch.ones(44, 100), "rows"))
    optimizer = prodigy.Prodigy([p], slice_p=11, fsdp_in_use=True)
    optimizer = optimizer if base == "Prodigy" else getattr(prodigy, base)(optimizer)
    g = torch.ones(44, 100)
    g[-1, 0] = torch.nan
    p.grad = sharded(g, "rows")
    optimizer.step()
    saved = optimizer.state_dict()["state"][0]
    return dict(holes=optimizer.nonfinite(), bytes=optimizer.state_bytes(),
                types={type(t) for t in saved.values()}, gradient=whole(p.grad),
                sampled=optimizer.state_dict()["state"][0]["p0"].shape)
