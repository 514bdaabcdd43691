"""What a step costs beside torch's fused AdamW: time as a ratio, words moved, bytes kept.

    cost(shapes("resnet18"), {"Prodigy": prodigy.Prodigy}, rounds=10)

Absolute times belong to one machine on one day, so only ratios are reported: a method and AdamW
take turns within one process, and the median is over the rounds.
"""

import gc
import time
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .images import NETWORKS
from .train import QUIET

ADAMW = partial(torch.optim.AdamW, fused=True)


def shapes(model):
    """The shapes of a model's parameters, without the model's arithmetic.

    "resnet18": of 11.2 million entries in 62 tensors; "gpt": of 15.6 million in 76, six blocks of
    width 384 with biases, 12,288 tokens, 512 places; "gpt-2": two such blocks and 512 tokens, 3.9
    million in 28. Raises ValueError for another name.
    """
    if model == "resnet18":
        return [p.shape for p in NETWORKS[model]().parameters()]
    blocks, tokens = {"gpt": (6, 12_288), "gpt-2": (2, 512)}.get(model, (0, 0))
    if not blocks:
        raise ValueError(f"model must be resnet18, gpt or gpt-2, not {model!r}")
    w, layers = 384, [(3, 1), (1, 1), (4, 1), (1, 4)]
    block = [(w,), (w,), *[s for a, b in layers for s in ((a * w, b * w), (a * w,))], (w,), (w,)]
    return [torch.Size(s) for s in [(tokens, w), (512, w), *block * blocks, (w,), (w,)]]


def parameters(sizes, device, dtype=torch.float32):
    """Random parameters of these shapes with random gradients of a thousandth of their size."""
    params = [torch.nn.Parameter(torch.randn(s, device=device, dtype=dtype)) for s in sizes]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    return params


def seconds(optimizer, device):
    """The time of one step, whose closure returns a loss at no cost."""
    loss = torch.ones((), device=device)
    start = time.perf_counter()
    optimizer.step(lambda: loss)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def words(optimizer, params):
    """(moved, kept) for each entry of the parameters: the floor of a step, and the state.

    In a step that reads every tensor once and writes every changed tensor once, the gradient
    counts 1, the parameter 2, a tensor of the state 2 if the step changes it, else 1 (Prodigy's
    x_0); a tensor of every 11th entry counts an 11th of that. In words of the parameters' size.
    """
    before = [{name: t.clone() for name, t in tensors(optimizer, p).items()} for p in params]
    seconds(optimizer, params[0].device)
    total = sum(p.numel() for p in params)
    moved = kept = 0.0
    for p, old in zip(params, before):
        moved += 3 * p.numel()
        for name, t in tensors(optimizer, p).items():
            share = t.numel() * t.element_size() / p.element_size()
            moved += share * (1 if name in old and torch.equal(old[name], t) else 2)
            kept += share
    return moved / total, kept / total


def tensors(optimizer, p):
    """The tensors kept beside a parameter, counts left out."""
    owners = [optimizer, getattr(optimizer, "base", None)]
    states = [owner.state.get(p, {}) for owner in owners if owner is not None]
    return {(i, name): t for i, s in enumerate(states) for name, t in s.items()
            if isinstance(t, Tensor) and name != "step"}


def ready(make, sizes, device):
    """(optimizer, its parameters) after three steps, in training mode."""
    params = parameters(sizes, device)
    optimizer = make(params)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(3):
        seconds(optimizer, device)
    return optimizer, params


def cost(sizes, methods, rounds=10, device="cpu", baseline=ADAMW, seed=0):
    """Each method beside the baseline, in turn, as a table.

    Args:
        sizes: shapes of the parameters.
        methods: {name: params -> optimizer}.
        rounds: in each, one step of the baseline and one of the method.
        device: where to step. baseline: params -> optimizer, the unit of time.

    Returns:
        DataFrame with the columns method, ratio (median over the rounds), low, high (quartiles),
        floor (words moved at least, over the baseline's), words (moved at least for each entry of
        the parameters) and bytes (kept for each entry).
    """
    device, rows = torch.device(device), []
    torch.manual_seed(seed)
    unit, own = ready(baseline, sizes, device)
    least, _ = words(unit, own)
    for name in tqdm(methods, desc="methods", leave=False, disable=QUIET):
        optimizer, params = ready(methods[name], sizes, device)
        moved, kept = words(optimizer, params)
        pairs = np.array([[seconds(o, device) for o in (unit, optimizer)] for _ in range(rounds)])
        low, ratio, high = np.quantile(pairs[:, 1] / pairs[:, 0], [0.25, 0.5, 0.75])
        size = params[0].element_size()
        rows.append((name, ratio, low, high, moved / least, moved, kept * size))
        del optimizer, params
        gc.collect()
    columns = ["method", "ratio", "low", "high", "floor", "words", "bytes"]
    return pd.DataFrame(rows, columns=columns)
