"""Long runs, one after the other, kept as they finish: an interrupted series goes on where it was.

    table = collect(train, [dict(method="Prodigy", seed=0), dict(method="Prodigy", seed=1)], path)
"""

import os
from pathlib import Path

import pandas as pd
import torch


def collect(train, keys, path=None, device="cpu"):
    """The rows of every run as one table; finished runs are taken from `path`, new ones added.

    Args:
        train: key -> DataFrame of the run's rows.
        keys: one dictionary for each run, what it is known by; all with the same columns.
        path: a CSV file, written whenever a run has finished, or None. A run whose key stands
            there is taken as it is.
        device: torch.device or its name; where `train` computes, for the record.

    Returns:
        DataFrame with the columns of the keys, those of `train`, device and torch, in the order
        of the keys.
    """
    path, device = path and Path(path), torch.device(device)
    table = pd.read_csv(path) if path and path.is_file() else pd.DataFrame()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for key in keys:
        if len(table) and len(rows_of(table, key)):
            continue
        new = train(key).assign(device=name, torch=torch.__version__)
        for place, (column, value) in enumerate(key.items()):
            new.insert(place, column, value)
        table = pd.concat([table, new], ignore_index=True)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".part")
            table.to_csv(fresh, index=False, float_format="%.12g", lineterminator="\n")
            os.replace(fresh, path)
    return pd.concat([rows_of(table, key) for key in keys], ignore_index=True)


def rows_of(table, key):
    """The rows of one run."""
    return table[(table[list(key)] == pd.Series(key)).all(axis=1)]
