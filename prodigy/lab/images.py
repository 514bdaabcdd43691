"""Image classification: whole training runs, one for each method and seed, kept as they finish.

    table = run(methods, seeds, data, epochs=14, path="runs.csv")

A method is a pair (factory, scheduler): ``factory(params)`` gives the optimizer and
``scheduler(optimizer, steps, epochs)`` a scheduler of torch.optim.lr_scheduler that is stepped
after every batch, or None is written in its place. A seed fixes the initial weights, the order of
the images in every epoch and the dropout, so that all methods see the same of the first two.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from .data import Dataset, load
from .runs import collect
from .train import QUIET

MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels on the scale 0 to 1, as in its example
COLUMNS = ["step", "epoch", "test_loss", "test_accuracy", "d"]


def convnet(channels=1, classes=10):
    """The network of the MNIST example, for images of 28 x 28: 1,199,882 weights, as scores.

    The example has ReLU before the pooling. The two commute, and after it there is less to do.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3), nn.ReLU(),
        nn.Conv2d(32, 64, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.25), nn.Flatten(),
        nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, classes),
    )


def stand_in():
    """scikit-learn's 1797 digits of 8 x 8 pixels as images of MNIST's format; the last 297 test.

    For trying things out where MNIST cannot be had; no number on it is a number of MNIST.
    """
    digits = load("digits", scaled=False)
    X = np.kron(digits.X.reshape(-1, 8, 8) * (255 / 16), np.ones((3, 3)))
    X = np.pad(X, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    return Dataset("enlarged digits", X[:1500], digits.y[:1500], 10, X[1500:], digits.y[1500:])


def first(data, rows):
    """The first `rows` training images of a set, and at most as many test images; 0 means all."""
    if rows == 0:
        return data
    return replace(data, X=data.X[:rows], y=data.y[:rows],
                   X_test=data.X_test[:rows], y_test=data.y_test[:rows])


def tensors(X, y, device):
    """Grey images uint8 (n, h, w) and labels as tensors: (n, 1, h, w) normalised, and (n,)."""
    X = torch.as_tensor(X, device=device)[:, None].float() / 255
    return (X - MEAN) / STD, torch.as_tensor(y, device=device)


@torch.no_grad()
def evaluate(net, X, y, batch=500):
    """(mean cross-entropy, accuracy in per cent) of net in evaluation mode, with its weights."""
    net.eval()
    loss, right = 0.0, 0
    for i in range(0, len(y), batch):
        scores, wanted = net(X[i:i + batch]), y[i:i + batch]
        loss += float(nn.functional.cross_entropy(scores, wanted, reduction="sum"))
        right += int((scores.argmax(1) == wanted).sum())
    net.train()
    return loss / len(y), 100 * right / len(y)


def evaluate_at_x(net, optimizer, X, y, seen):
    """`evaluate` at the point the method is meant to be used at; training goes on as before.

    Schedule-Free methods are evaluated at the average x. BatchNorm's statistics belong to the
    point of the gradients, y, so they are taken anew at x from the batches `seen`, for the test.
    """
    if not hasattr(optimizer, "averaged"):
        return evaluate(net, X, y)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [{name: t.clone() for name, t in m.state_dict().items()} for m in norms]
    with optimizer.averaged():
        if norms:
            optimizer.update_bn(seen, net)
        result = evaluate(net, X, y)
    for m, state in zip(norms, kept):
        m.load_state_dict(state)
    return result


def marks(steps, per_epoch):
    """The steps after which a row is written: powers of the root of two, and ends of epochs."""
    powers = {round(2 ** (k / 2)) for k in range(1 + int(2 * np.log2(steps)))}
    return powers | set(range(per_epoch, steps + 1, per_epoch))


def train(method, data, seed, epochs, *, network=convnet, batch=64, device="cpu", label=None):
    """One run as a list of rows with step, epoch, test_loss, test_accuracy and d.

    epoch counts passes over the images and is fractional within them; there the test is left out
    (nan). d is the method's estimate, nan where it has none. The last batch of an epoch is what
    is left over. Sets torch's seed.
    """
    factory, scheduler = method
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    net = network().to(device, memory_format=torch.channels_last)
    optimizer = factory(net.parameters())
    X, y = tensors(data.X, data.y, device)
    tested = tensors(data.X_test, data.y_test, device)
    per_epoch = -(-len(y) // batch)
    steps = epochs * per_epoch
    schedule = scheduler and scheduler(optimizer, steps, epochs)
    rows, step, written = [], 0, marks(steps, per_epoch)
    bar = tqdm(total=steps, desc=label, leave=False, disable=QUIET)
    for _ in range(epochs):
        batches = torch.randperm(len(y), generator=order).to(device).split(batch)
        for i in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(X[i]), y[i]).backward()
            optimizer.step()
            if schedule:
                schedule.step()
            step += 1
            bar.update()
            if step in written:
                d = optimizer.get_d() if hasattr(optimizer, "get_d") else np.nan
                rows.append([step, step / per_epoch, np.nan, np.nan, d])
        rows[-1][2:4] = evaluate_at_x(net, optimizer, *tested, (X[i] for i in batches))
    bar.close()
    return rows


def run(methods, seeds, data, epochs, path=None, *, device="cpu", **options):
    """Every method with every seed, as one table (see `collect`).

    Args:
        methods: {name: (factory, scheduler or None)}.
        seeds: integers. data: Dataset of grey images with a test part. epochs: passes over it.
        path: a CSV file, for `collect`; a run is known by method, seed, epochs and number of rows.
        options: network, batch, as in `train`.

    Returns:
        DataFrame with the columns method, seed, epochs, rows, those of `train`, device and torch.
    """
    def one(key):
        method, label = methods[key["method"]], "{method}, seed {seed}".format(**key)
        rows = train(method, data, key["seed"], epochs, device=device, label=label, **options)
        return pd.DataFrame(rows, columns=COLUMNS)

    keys = [dict(method=method, seed=seed, epochs=epochs, rows=len(data.y))
            for method in methods for seed in seeds]
    return collect(one, keys, path, device)
