"""Train a small network whose parameters are sharded over all processes, with Prodigy.

    torchrun --standalone --nproc-per-node 2 notebooks/51_train.py --csv build/two.csv

Every step takes the same rows of the digits whatever the number of processes: each takes its share
of them. FSDP2 keeps a piece of every parameter, gradient and state tensor on each process; the
optimizer is made and called as on one. With --checkpoint, a run that was interrupted goes on from
its last checkpoint, also with another number of processes.
"""

import argparse
import csv
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import prodigy

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--csv", required=True, help="file for step, d and loss")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch", type=int, default=64, help="rows a step, over all processes")
parser.add_argument("--slice", type=int, default=1, help="Prodigy's slice_p")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cpu", help="cpu (gloo) or cuda (NCCL)")
parser.add_argument("--dtype", default="float64", help="float64, float32 or bfloat16")
parser.add_argument("--checkpoint", default="", help="folder for checkpoints; empty: none")
parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
options = parser.parse_args()


def model_and_optimizer(device, dtype):
    torch.manual_seed(options.seed)
    layers = [torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)]
    model = torch.nn.Sequential(*layers).to(device, dtype)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in (layers[0], layers[2], model):
        fully_shard(layer, mesh=mesh)
    return model, prodigy.Prodigy(model.parameters(), slice_p=options.slice)


def train(model, optimizer, images, labels):
    """A row (step, d, loss over the whole batch) for every step taken."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows, first = [], 0
    kept = Path(options.checkpoint).glob("*/.metadata") if options.checkpoint else ()
    if saved := [int(path.parent.name) for path in kept]:
        first = max(saved)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)), rows=rows)
        dcp.load(state, checkpoint_id=f"{options.checkpoint}/{first}")
        set_state_dict(model, optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])
        rows = state["rows"]
    for step in range(first, options.steps):
        generator = torch.Generator().manual_seed(options.seed + 1000 * step)
        chosen = torch.randint(len(images), (options.batch,), generator=generator)
        mine = chosen.chunk(world)[rank].to(images.device)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[mine]), labels[mine])
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        rows.append((step + 1, optimizer.get_d(), float(loss) / world))
        if options.checkpoint and (step + 1) % options.every == 0:
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)), rows=rows)
            dcp.save(state, checkpoint_id=f"{options.checkpoint}/{step + 1}")
    return rows


def main():
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    if options.batch % dist.get_world_size():
        parser.error(f"--batch {options.batch} must be a multiple of the number of processes")
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dtype = getattr(torch, options.dtype)
    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    images, labels = (images / 16).to(device, dtype), labels.to(device)
    rows = train(*model_and_optimizer(device, dtype), images, labels)
    if dist.get_rank() == 0:
        with open(options.csv, "w", newline="") as file:
            csv.writer(file).writerows([("step", "d", "loss"), *rows])
    dist.destroy_process_group()


main()
