"""Language models on characters: whole training runs, one for each method and seed.

    table = run(methods, seeds, shakespeare(), steps=5000, path="runs.csv")

A method is a pair (factory, scheduler): ``factory(params)`` gives the optimizer and
``scheduler(optimizer, steps)`` a scheduler of torch.optim.lr_scheduler that is stepped after
every batch, or None is written in its place. A third entry, an ``avg_fn`` of
torch.optim.swa_utils.AveragedModel, asks for an average of the iterates beside the last one. A
seed fixes the initial weights, the windows of every batch and the dropout, so that all methods see
the same of the first two.
"""

import string
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from .data import load
from .images import marks
from .runs import collect, compile_anew, holding, step_size
from .train import QUIET

COLUMNS = ["step", "validation_loss", "train_loss", "averaged_loss", "d", "step_size"]


# the text ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Text:
    """Characters as their places in `alphabet`, uint8 (n,), in a training and a last part."""

    name: str
    alphabet: str
    train: torch.Tensor
    validation: torch.Tensor


def encode(name, text, held=0.1):
    """A `Text`; its last part, the share `held` of the characters, is for validation."""
    alphabet = sorted(set(text))
    place = {letter: i for i, letter in enumerate(alphabet)}
    codes = torch.tensor([place[letter] for letter in text], dtype=torch.uint8)
    cut = round((1 - held) * len(codes))
    return Text(name, "".join(alphabet), codes[:cut], codes[cut:])


def shakespeare():
    """tinyshakespeare: 65 letters and signs, 1,003,855 for training, 111,539 for validation."""
    return encode("tinyshakespeare", load("tinyshakespeare"))


def stand_in(length=200_000):
    """Lines of words drawn from a small lexicon, common ones more often; 27 characters.

    For trying things out where tinyshakespeare cannot be had; no loss on it is a loss of its.
    """
    draw = np.random.default_rng(0)
    letters = np.array(list(string.ascii_lowercase[:25]))
    lexicon = ["".join(draw.choice(letters, draw.integers(2, 9))) for _ in range(200)]
    often = 1 / np.arange(1, 201)
    words = draw.choice(lexicon, length // 3, p=often / often.sum())
    ends = np.where(np.arange(1, len(words) + 1) % 8, " ", "\n")
    return encode("made-up words", "".join(np.char.add(words, ends))[:length])


# the network -------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); a position sees itself and those before."""

    def __init__(self, heads, width, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def attention(self, x):
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))

    def forward(self, x):
        drop = partial(F.dropout, p=self.dropout, training=self.training)
        x = x + drop(self.attention(self.norm1(x)))
        return x + drop(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """A decoder as GPT-2's (Radford et al. 2019), without biases: indices (n, t) to scores.

    The scores (n, t, letters) are for the letter after each; t is at most `block`. The matrix of
    the scores is that of the letters. Weights are normal with deviation 0.02; in those that write
    to the residual stream it is divided by sqrt(2 layers), so that the sum keeps its size.

    Args:
        letters: size of the alphabet. layers: number of blocks.
        heads: of attention in each block; divides width. width: of the residual stream.
        block: longest window, in letters. dropout: of embeddings, attention and both branches.

    Raises:
        ValueError: if heads does not divide width.
    """

    def __init__(self, letters, layers=6, heads=6, width=384, block=256, dropout=0.2):
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads = {heads}, got {width}")
        self.letters, self.places = nn.Embedding(letters, width), nn.Embedding(block, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(heads, width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * layers if writes else 1) ** 0.5)

    def forward(self, i):
        x = self.drop(self.letters(i) + self.places.weight[:i.shape[1]])
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.letters.weight)


# runs --------------------------------------------------------------------------------------------


def warm_up_and_cosine(optimizer, steps, warmup=100, floor=0.0):
    """lr times step/warmup, then a cosine from 1 to `floor`; half the run at most is warm-up."""
    warmup = min(warmup, steps // 2)

    def factor(done):
        if done < warmup:
            return (done + 1) / warmup
        progress = min(1.0, (done - warmup) / (steps - warmup))
        return floor + (1 - floor) * (1 + np.cos(np.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


def loss_of(net, windows):
    """Mean cross-entropy in nats of every letter of the windows (n, t + 1), given those before."""
    windows = windows.long()
    scores = net(windows[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten())


def fixed_windows(codes, block, count=0):
    """Windows (n, block + 1) evenly spread over the codes; count = 0 reads every letter once.

    Raises:
        ValueError: if the codes are shorter than one window.
    """
    most = (len(codes) - 1) // block
    if most == 0:
        raise ValueError(f"block must be below the length of the text, {len(codes)}, got {block}")
    chosen = np.linspace(0, most - 1, min(count or most, most)).round().astype(int)
    return torch.stack([codes[i:i + block + 1] for i in chosen * block])


@torch.no_grad()
def evaluate(net, windows, batch=128):
    """`loss_of` in evaluation mode, as a 0-d tensor of the device."""
    net.eval()
    losses = [len(part) * loss_of(net, part).double() for part in windows.split(batch)]
    net.train()
    return torch.stack(losses).sum() / len(windows)


def train(method, text, seed, steps, *, network=GPT, block=256, batch=64, every=250, windows=0,
          clip=1.0, device="cpu", autocast=False, compiled=False, label=None):
    """One run as a list of rows with the columns COLUMNS.

    The losses are measured after every `every` steps and after the last, and are nan in the other
    rows. validation_loss is taken where the method is meant to be used: at x for Schedule-Free;
    where an average is kept, at it or at the last iterate, whichever is better, and averaged_loss
    is that of the average. train_loss is the mean, since the last measurement, of what was stepped
    on (with dropout; at y for Schedule-Free). d is the method's estimate, nan where it has none;
    step_size is that of the step just made.

    The text is on the device, and the windows of an interval are drawn on the host and moved at
    once; the numbers of a row are all that the host asks of the device. Sets torch's seed.

    Args:
        method: (factory, scheduler or None), or with an avg_fn as a third entry.
        text: Text. seed: integer. steps: of training, one batch each.
        network: letters, block=... -> module from indices to scores.
        block, batch: letters in a window; windows in a batch, at random places.
        every, windows: steps between measurements; validation windows, 0 for the whole part.
        clip: largest norm of the gradient; None leaves it.
        autocast: compute in bfloat16; weights, gradients and steps stay float32.
        compiled: train with torch.compile(net), which takes its time at the first batch.
        label: what the progress bar says; None shows no bar.
    """
    factory, scheduler, average = (*method, None)[:3]
    device = torch.device(device)
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    net = network(len(text.alphabet), block=block).to(device)
    params = list(net.parameters())
    optimizer = factory(params)
    schedule = scheduler and scheduler(optimizer, steps)
    codes, held = (part.to(device) for part in (text.train, text.validation))
    held, ahead = fixed_windows(held, block, windows), torch.arange(block + 1, device=device)
    forward = compile_anew(net) if compiled else net
    precision = partial(torch.autocast, device.type, torch.bfloat16, enabled=autocast)
    mean, written, rows, step = params if average else [], marks(steps, every), [], 0
    bar = tqdm(total=steps, desc=label, leave=False, disable=QUIET or label is None)
    while step < steps:
        length = min(every, steps - step)
        starts = torch.randint(len(codes) - block, (length, batch, 1), generator=draw).to(device)
        total = torch.zeros((), device=device)
        for start in starts:
            optimizer.zero_grad()
            with precision():
                loss = loss_of(forward, codes[start + ahead])
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(params, clip)
            optimizer.step()
            total += loss.detach()
            with torch.no_grad():
                mean = [average(m, p, step) for m, p in zip(mean, params)]
            step += 1
            bar.update()
            if step in written or step == steps:
                d = optimizer.get_d() if hasattr(optimizer, "get_d") else np.nan
                rows.append([step, np.nan, np.nan, np.nan, d, step_size(optimizer)])
            if schedule:
                schedule.step()
        with precision():
            with optimizer.averaged() if hasattr(optimizer, "averaged") else nullcontext():
                loss = float(evaluate(net, held))
            if average:
                with holding(net, mean):
                    rows[-1][3] = float(evaluate(net, held))
                loss = min(loss, rows[-1][3])
        rows[-1][1:3] = loss, float(total) / length
    bar.close()
    return rows


def run(methods, seeds, text, steps, path=None, *, about=None, device="cpu", jobs=1, **options):
    """Every method with every seed, as one table (see `collect`).

    Args:
        methods: {name: (factory, scheduler or None)}, or with an average as a third entry.
        seeds: integers. text: Text. steps: of training.
        path: a CSV file, for `collect`; a run is known by method, seed, the text's name and steps.
        about: {name: value} that it is known by too, such as the size of the network.
        jobs: runs side by side, as in `collect`.
        options: network, batch and more, as in `train`.

    Returns:
        DataFrame with the columns method, seed, text, steps, those of about, COLUMNS, device and
        torch.
    """
    def one(key):
        label = "{method}, seed {seed}".format(**key) if jobs == 1 else None
        rows = train(methods[key["method"]], text, key["seed"], steps, device=device, label=label,
                     **options)
        return pd.DataFrame(rows, columns=COLUMNS)

    keys = [dict(method=method, seed=seed, text=text.name, steps=steps, **(about or {}))
            for method in methods for seed in seeds]
    return collect(one, keys, path, device, jobs=jobs)
