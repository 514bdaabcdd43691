"""Image classification: whole training runs, one for each method and seed, kept as they finish.

    table = run(methods, seeds, data, epochs=14, path="runs.csv")

A method is a pair (factory, scheduler): ``factory(params)`` gives the optimizer and
``scheduler(optimizer, steps, epochs)`` a scheduler of torch.optim.lr_scheduler that is stepped
after every batch, or None is written in its place. A third entry, an ``avg_fn`` of
torch.optim.swa_utils.AveragedModel, asks for an average of the iterates beside the last one. A
seed fixes the initial weights, the order of the images in every epoch, their augmentation and the
dropout, so that all methods see the same of the first three.

Grey images, MNIST's, are normalised once. Colour images stay on the device as bytes, and the
networks for them begin with `Normalise`.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from .data import Dataset, load
from .runs import collect, compile_anew, holding, step_size
from .train import QUIET

MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels on the scale 0 to 1, as in its example
# of CIFAR-10's training pixels, by channel: mean and standard deviation on the scale 0 to 1
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
COLUMNS = ["step", "epoch", "test_loss", "test_accuracy", "d"]
MORE = ["train_loss", "step_size", "averaged_accuracy"]
REFRESH = 50  # batches from which BatchNorm's statistics are taken anew


def convnet(channels=1, classes=10):
    """The network of the MNIST example, for images of 28 x 28: 1,199,882 weights, as scores.

    The example has ReLU before the pooling. The two commute, and after it there is less to do.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3), nn.ReLU(),
        nn.Conv2d(32, 64, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.25), nn.Flatten(),
        nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, classes),
    )


class Normalise(nn.Module):
    """Bytes (n, 3, h, w) to floats with mean 0 and variance 1 over CIFAR-10, by channel."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(CIFAR_MEAN).reshape(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(CIFAR_STD).reshape(3, 1, 1) * 255)

    def forward(self, x):
        return (x - self.mean) / self.std


def conv(inside, outside, size=3, stride=1, bias=False):
    """A convolution that keeps the image's size (but for the stride) and BatchNorm, as a list."""
    return [nn.Conv2d(inside, outside, size, stride, size // 2, bias=bias),
            nn.BatchNorm2d(outside)]


def head(width, classes):
    """From an image of features to scores, as a list."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def small(classes=10):
    """Three convolutions that halve the image, as scores: 94,762 weights, for a processor."""
    layers = [Normalise()]
    for inside, outside in pairwise((3, 32, 64, 128)):
        layers += [*conv(inside, outside, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, *head(128, classes))


def vgg11(classes=10):
    """VGG11 (Simonyan and Zisserman 2014, 1409.1556, column A) for images of 32 x 32, as scores.

    As is usual for CIFAR-10 it has BatchNorm, and one linear layer for three: 9,231,114 weights.
    The pooling stands before ReLU, where the two commute.
    """
    layers = [Normalise()]
    for k, shape in enumerate(pairwise((3, 64, 128, 256, 256, 512, 512, 512, 512))):
        layers += conv(*shape, bias=True)
        layers += [nn.MaxPool2d(2)] * (k in (0, 1, 3, 5, 7)) + [nn.ReLU()]
    return nn.Sequential(*layers, *head(512, classes))


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)); body is a stack of (in, out, size, stride), ReLU between."""

    def __init__(self, *stack):
        super().__init__()
        layers = [layer for shape in stack for layer in (*conv(*shape), nn.ReLU())]
        self.body = nn.Sequential(*layers[:-1])
        inside, outside = stack[0][0], stack[-1][1]
        stride = max(shape[3] for shape in stack)
        same = inside == outside and stride == 1
        self.shortcut = nn.Sequential(*([] if same else conv(inside, outside, 1, stride)))

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(blocks, bottleneck=False, classes=10):
    """ResNet (He et al. 2015, 1512.03385) for images of 32 x 32, as scores.

    The first convolution is 3 x 3 without stride or pooling. blocks = (2, 2, 2, 2) is ResNet-18,
    11,173,962 weights; (3, 4, 6, 3) with bottleneck is ResNet-50, 23,520,842.
    """
    layers, inside = [Normalise(), *conv(3, 64), nn.ReLU()], 64
    for stage, count in enumerate(blocks):
        width, stride = 64 * 2**stage, 2 if stage else 1
        outside = 4 * width if bottleneck else width
        for _ in range(count):
            if bottleneck:
                stack = (inside, width, 1, 1), (width, width, 3, stride), (width, outside, 1, 1)
            else:
                stack = (inside, width, 3, stride), (width, width, 3, 1)
            layers.append(Residual(*stack))
            inside, stride = outside, 1
    return nn.Sequential(*layers, *head(inside, classes))


NETWORKS = {
    "small": small,
    "vgg11": vgg11,
    "resnet18": partial(resnet, (2, 2, 2, 2)),
    "resnet50": partial(resnet, (3, 4, 6, 3), bottleneck=True),
}


def stand_in(colour=False):
    """scikit-learn's 1797 digits of 8 x 8 pixels as images of MNIST's format; the last 297 test.

    With colour they have CIFAR-10's format. For trying things out where the sets cannot be had;
    no number on it is a number of theirs.
    """
    digits = load("digits", scaled=False)
    scale, pad = (4, 0) if colour else (3, 2)
    X = np.kron(digits.X.reshape(-1, 8, 8) * (255 / 16), np.ones((scale, scale)))
    X = np.pad(X, ((0, 0), (pad, pad), (pad, pad))).astype(np.uint8)
    if colour:
        X = np.stack([X, 255 - X, X // 2], axis=1)
    return Dataset("enlarged digits", X[:1500], digits.y[:1500], 10, X[1500:], digits.y[1500:])


def first(data, rows):
    """The first `rows` training images of a set, and at most as many test images; 0 means all."""
    if rows == 0:
        return data
    return replace(data, X=data.X[:rows], y=data.y[:rows],
                   X_test=data.X_test[:rows], y_test=data.y_test[:rows])


def tensors(X, y, device):
    """Images uint8 and labels as tensors on the device.

    Grey images (n, h, w) become (n, 1, h, w) and normalised; colour images (n, 3, h, w) stay
    bytes, with the channels last in memory.
    """
    X, y = torch.as_tensor(X, device=device), torch.as_tensor(y, device=device)
    if X.ndim == 4:
        return X.to(memory_format=torch.channels_last), y
    return (X[:, None].float() / 255 - MEAN) / STD, y


def crop_and_flip(X, generator, pad=4):
    """The usual augmentation: a function of indices i that gives X[i], moved and mirrored.

    Each image is moved by -pad to pad pixels along both axes, reflected at its border, and
    mirrored left to right with probability 1/2. All is one lookup on the device of X.

    Args:
        X: (n, c, h, w). generator: torch.Generator on the same device. pad: below h and w.
    """
    pixels, device = X.permute(0, 2, 3, 1), X.device

    def places(count, size):
        start = torch.randint(-pad, pad + 1, (count, 1), generator=generator, device=device)
        place = (start + torch.arange(size, device=device)).abs()
        return size - 1 - (size - 1 - place).abs()

    def batch(i):
        rows, columns = (places(len(i), size) for size in X.shape[2:])
        mirror = torch.rand(len(i), 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirror, columns.flip(1), columns)
        return pixels[i[:, None, None], rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)

    return batch


@torch.no_grad()
def evaluate(net, X, y, batch=500):
    """(mean cross-entropy, accuracy in per cent) of net in evaluation mode, with its weights."""
    net.eval()
    loss, right = torch.zeros(2, dtype=torch.float64, device=y.device)
    for scores, wanted in ((net(x), w) for x, w in zip(X.split(batch), y.split(batch))):
        loss += nn.functional.cross_entropy(scores, wanted, reduction="sum")
        right += (scores.argmax(1) == wanted).sum()
    net.train()
    return float(loss) / len(y), 100 * float(right) / len(y)


def evaluate_at_x(net, optimizer, X, y, seen, batch=500):
    """`evaluate` at the point the method is meant to be used at; training goes on as before.

    Schedule-Free methods are evaluated at the average x. BatchNorm's statistics belong to the
    point of the gradients, y, so they are taken anew at x from the batches `seen`, for the test.
    """
    if not hasattr(optimizer, "averaged"):
        return evaluate(net, X, y, batch)
    return evaluate_in(optimizer.averaged(), net, X, y, seen, batch)


def evaluate_in(point, net, X, y, seen, batch=500):
    """`evaluate` within the context `point`, with BatchNorm's statistics taken there."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [{name: t.clone() for name, t in m.state_dict().items()} for m in norms]
    with point:
        torch.optim.swa_utils.update_bn(seen, net)
        result = evaluate(net, X, y, batch)
    for m, state in zip(norms, kept):
        m.load_state_dict(state)
    return result


def marks(steps, per_epoch):
    """The steps after which a row is written: powers of the root of two, and ends of epochs."""
    powers = {round(2 ** (k / 2)) for k in range(1 + int(2 * np.log2(steps)))}
    return powers | set(range(per_epoch, steps + 1, per_epoch))


def train(method, data, seed, epochs, *, network=convnet, batch=64, device="cpu", label=None,
          augment=None, autocast=False, compiled=False, test_batch=500):
    """One run as a list of rows with the columns COLUMNS and MORE.

    epoch counts passes over the images and is fractional within them; there the tests and the
    training loss are left out (nan). d is the method's estimate, nan where it has none;
    train_loss is the mean over the epoch of what was stepped on; step_size is that of the step
    just made. Where an average is kept, test_loss and test_accuracy are those of it or of the
    last iterate, whichever is more accurate, and averaged_accuracy is its own.

    The last batch of an epoch is what is left over. Between two rows nothing is read from the
    device. Sets torch's seed.

    Args:
        augment: (X, generator) -> function of indices, such as `crop_and_flip`, or None.
        autocast: compute scores in bfloat16; weights, gradients and steps stay float32.
        compiled: train with torch.compile(net), which takes its time at the first batch.
        test_batch: images at a time in tests.
    """
    factory, scheduler, average = (*method, None)[:3]
    device = torch.device(device)
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    net = network().to(device, memory_format=torch.channels_last)
    optimizer = factory(net.parameters())
    X, y = tensors(data.X, data.y, device)
    tested = tensors(data.X_test, data.y_test, device)
    moved = torch.Generator(device).manual_seed(seed)
    images = augment(X, moved) if augment else X.__getitem__
    forward = compile_anew(net) if compiled else net
    precision = partial(torch.autocast, device.type, torch.bfloat16, enabled=autocast)
    mean = list(net.parameters()) if average else []
    per_epoch = -(-len(y) // batch)
    steps = epochs * per_epoch
    schedule = scheduler and scheduler(optimizer, steps, epochs)
    rows, step, written = [], 0, marks(steps, per_epoch)
    bar = tqdm(total=steps, desc=label, leave=False, disable=QUIET)
    for _ in range(epochs):
        batches = torch.randperm(len(y), generator=order).to(device).split(batch)
        total = torch.zeros((), device=device)
        for i in batches:
            optimizer.zero_grad()
            with precision():
                scores = (forward if len(i) == batch else net)(images(i))
                loss = nn.functional.cross_entropy(scores, y[i])
            loss.backward()
            optimizer.step()
            total += len(i) * loss.detach()
            with torch.no_grad():
                mean = [average(m, p, step) for m, p in zip(mean, net.parameters())]
            step += 1
            bar.update()
            if step in written:
                d = optimizer.get_d() if hasattr(optimizer, "get_d") else np.nan
                row = [step, step / per_epoch, np.nan, np.nan, d]
                rows.append([*row, np.nan, step_size(optimizer), np.nan])
            if schedule:
                schedule.step()
        seen = (X[i] for i in batches[:REFRESH])
        with precision():
            result = evaluate_at_x(net, optimizer, *tested, seen, test_batch)
            if average:
                other = evaluate_in(holding(net, mean), net, *tested, seen, test_batch)
                rows[-1][7], result = other[1], max(result, other, key=lambda pair: pair[1])
        rows[-1][2:4], rows[-1][5] = result, float(total) / len(y)
    bar.close()
    return rows


def run(methods, seeds, data, epochs, path=None, *, device="cpu", about=None, **options):
    """Every method with every seed, as one table (see `collect`).

    Args:
        methods: {name: (factory, scheduler or None)}, or with an average as a third entry.
        seeds: integers. data: Dataset of images with a test part. epochs: passes over it.
        path: a CSV file, for `collect`; a run is known by method, seed, epochs and number of rows.
        about: {name: value} that it is known by too, such as the network; where it is given, all
            columns of `train` are kept, else COLUMNS.
        options: network, batch and more, as in `train`.

    Returns:
        DataFrame with the columns method, seed, epochs, rows, those of about, those of `train`,
        device and torch.
    """
    kept = COLUMNS if about is None else [*COLUMNS, *MORE]

    def one(key):
        method, label = methods[key["method"]], "{method}, seed {seed}".format(**key)
        rows = train(method, data, key["seed"], epochs, device=device, label=label, **options)
        return pd.DataFrame(rows, columns=[*COLUMNS, *MORE])[kept]

    keys = [dict(method=method, seed=seed, epochs=epochs, rows=len(data.y), **(about or {}))
            for method in methods for seed in seeds]
    return collect(one, keys, path, device)
