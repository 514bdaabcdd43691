"""Long runs, kept as they finish: an interrupted series goes on where it was. What they share.

    table = collect(train, [dict(method="Prodigy", seed=0), dict(method="Prodigy", seed=1)], path)
"""

import os
from contextlib import contextmanager
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from ..rivals import LDoG
from .train import QUIET


def collect(train, keys, path=None, device="cpu", *, jobs=1):
    """The rows of every run as one table; finished runs are taken from `path`, new ones added.

    Args:
        train: key -> DataFrame of the run's rows.
        keys: one dictionary for each run, what it is known by; all with the same columns.
        path: a CSV file, written whenever a run has finished, or None. A run whose key stands
            there is taken as it is.
        device: torch.device or its name; where `train` computes, for the record.
        jobs: runs side by side, each in a process with its share of the cores, as joblib counts
            them; 1 is one after the other, in this process.

    Returns:
        DataFrame with the columns of the keys, those of `train`, device and torch, in the order
        of the keys.
    """
    path, device = path and Path(path), torch.device(device)
    kinds = {str: str, float: lambda text: float(text or "nan")}  # read_csv rounds floats
    read = {column: kinds[type(a)] for key in keys for column, a in key.items()
            if type(a) in kinds}
    known = path and path.is_file()
    table = pd.read_csv(path, converters=read) if known else pd.DataFrame()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    todo = [key for key in keys if not (len(table) and len(rows_of(table, key)))]
    ended = joblib.Parallel(jobs, return_as="generator")(map(joblib.delayed(train), todo))
    bar = tqdm(ended, total=len(todo), desc="runs", leave=False, disable=QUIET)
    for new, key in zip(bar, todo):
        new = new.assign(device=name, torch=torch.__version__)
        for place, (column, value) in enumerate(key.items()):
            new.insert(place, column, value)
        table = pd.concat([table, new], ignore_index=True)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".part")
            written = table.assign(**{column: table[column].map(exact) for column in key})
            written.to_csv(fresh, index=False, float_format="%.12g", lineterminator="\n")
            os.replace(fresh, path)
    return pd.concat([rows_of(table, key) for key in keys], ignore_index=True)


def rows_of(table, key):
    """The rows of one run."""
    same = [table[column].isna() if a is None else table[column] == a for column, a in key.items()]
    return table[np.logical_and.reduce(same)]


def exact(value):
    """A float as text that reads back as the same float; anything else as it is."""
    short = f"{value:.12g}" if isinstance(value, float) else value
    return repr(value) if isinstance(value, float) and float(short) != value else short


@contextmanager
@torch.no_grad()
def holding(net, weights):
    """Within the block the parameters of net hold these tensors."""
    kept = [p.clone() for p in net.parameters()]
    for p, w in zip(net.parameters(), weights):
        p.copy_(w)
    try:
        yield
    finally:
        for p, w in zip(net.parameters(), kept):
            p.copy_(w)


def step_size(optimizer):
    """The factor on the method's direction, as a float; of L-DoG's, one a tensor, the median."""
    if isinstance(optimizer, LDoG):
        sizes = [s["rbar"] / s["G"].sqrt() for s in optimizer.state.values()]
        return optimizer.effective_lr() * float(torch.stack(sizes).median())
    if hasattr(optimizer, "effective_lr"):
        return optimizer.effective_lr()
    return float(optimizer.param_groups[0]["lr"])


def compile_anew(net):
    """torch.compile(net), so that runs one after the other do not add up to its limit."""
    torch.compiler.reset()
    return torch.compile(net, dynamic=False)
