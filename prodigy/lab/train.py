"""Training runs side by side: every seed and every learning rate of a sweep in one computation.

    trace = sweep(lambda params, lr: Prodigy(params, lr=lr, capturable=True), load("iris"),
                  lrs=[1.0], seeds=range(10))
    trace.accuracy[lr, seed, epoch]

The optimizers are the importable ones. One step of one run, a function of weights and state_dict,
is traced once under ``torch.func.vmap`` into a graph of tensor operations for all runs: each has
its own weights, state, learning rate and d, and no run sees another. ``capturable=True`` tells a
method that its counts and its learning rate live on the device, here one number per run.
``sweeps`` takes many sweeps, one for each data set and method, and shares them out over the cores.
"""

import itertools
import os
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from tqdm.auto import trange

from .grid import grid

# tqdm's notebook bar does not look at the variable that its other bars obey
QUIET = os.environ.get("TQDM_DISABLE", "") not in ("", "0")


@dataclass(frozen=True)
class Trace:
    """What a sweep measured; every array has shape (learning rates, seeds, epochs).

    accuracy: training accuracy in per cent, after each epoch, on the rows of whole batches.
    loss: mean cross-entropy on the same rows.
    d: the method's estimate of D, nan where it has none.
    test: accuracy in per cent on the data's test rows, nan where there are none.
    """

    lrs: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray
    d: np.ndarray
    test: np.ndarray

    def best(self, tail=1):
        """Index of the lr with the best mean final accuracy; the lowest loss decides ties.

        The mean runs over seeds and the last `tail` epochs; runs that ended at nan count as 0.
        """
        accuracy = np.nan_to_num(self.accuracy[:, :, -tail:]).mean((1, 2))
        loss = np.nan_to_num(self.loss[:, :, -tail:], nan=np.inf).mean((1, 2))
        return int(np.lexsort((loss, -accuracy))[0])


def constant(progress):
    """The schedule 1."""
    return 1.0


def linear_decay(progress):
    """1 - progress: from 1 at the first step towards 0 after the last."""
    return 1.0 - progress


def steps_at(*milestones, factor=0.1):
    """The schedule that is multiplied by `factor` at each milestone, a share of the whole run."""
    return lambda progress: factor ** sum(progress >= m - 1e-12 for m in milestones)


def mean_and_error(values, axis=-1):
    """Mean and standard error of the mean along an axis of independent runs."""
    mean, n = values.mean(axis), values.shape[axis]
    return mean, values.std(axis, ddof=1) / np.sqrt(n) if n > 1 else np.full_like(mean, np.nan)


@contextmanager
def one_thread(small):
    """Compute on one thread if the tensors are small: sharing them out costs more time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if small else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def forward(X, weights):
    """(inputs of every layer, scores (rows, classes)) of a network with tanh between its layers.

    Every input ends with a column of ones, so the last row of each weight matrix is its bias.
    """
    inputs = [X]
    for W in weights[:-1]:
        H = torch.tanh(inputs[-1] @ W)
        inputs.append(torch.cat([H, torch.ones_like(H[:, :1])], 1))
    return inputs, inputs[-1] @ weights[-1]


def cross_entropy(scores, target):
    """Mean over the rows of -sum target log softmax(scores); the rows of target sum to 1."""
    return (torch.logsumexp(scores, 1) - (target * scores).sum(1)).mean()


def gradients(X, target, weights):
    """Gradients of the mean cross-entropy in the weights."""
    return backward(*forward(X, weights), target, weights)


def backward(inputs, scores, target, weights):
    """The gradients, by back-propagation from what `forward` returned."""
    slope = torch.softmax(scores, 1) - target
    grads = []
    for k in reversed(range(len(weights))):
        grads.append(inputs[k].T @ slope / len(scores))
        if k:
            slope = (slope @ weights[k].T * (1 - inputs[k] ** 2))[:, :-1]
    return grads[::-1]


class Batchable(TorchFunctionMode):
    """Within it, what torch.func.vmap has no rule for is written with what it has one for."""

    in_place = {torch.Tensor.lerp_: torch.lerp, torch.Tensor.addcmul_: torch.addcmul,
                torch.Tensor.addcdiv_: torch.addcdiv, torch.Tensor.ne_: torch.ne}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.__deepcopy__:  # of a state_dict's groups, when it is loaded
            return args[0].clone()
        if function in self.in_place:  # a 0-d weight of another dtype is no 0-d tensor any more
            args = [a.to(args[0].dtype) if isinstance(a, Tensor) else a for a in args]
            return args[0].copy_(self.in_place[function](*args, **kwargs))
        return function(*args, **kwargs)


def tensors_of(optimizer):
    """The tensors of its state_dict, and all the rest of it."""
    leaves, form = tree_flatten(optimizer.state_dict())
    rest = [... if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], (form, rest)


def put_back(optimizer, tensors, rest):
    """Load what ``tensors_of`` took apart."""
    (form, leaves), tensors = rest, iter(tensors)
    optimizer.load_state_dict(
        tree_unflatten([next(tensors) if leaf is ... else leaf for leaf in leaves], form))


def apart(out):
    """(tensors as vmap returned them, their in_dims): what is the same for all runs, once."""
    dims = tree_map(lambda t: 0 if t.stride(0) else None, out)  # vmap expands it
    return tree_map(lambda t, dim: t[0] if dim is None else t, out, dims), dims


def captured(function, compile, *examples):
    """A function of tensors as a graph of what it does to them, without the Python around it."""
    with Batchable():
        graph = make_fx(function)(*examples)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    if compile:
        fast = torch.compile(graph, dynamic=False)
        try:
            fast(*examples)
            return fast
        except RuntimeError as error:
            warnings.warn(f"torch.compile failed, so this sweep takes longer: {error}")
    return graph


def sweep(
    make,
    data,
    lrs,
    seeds,
    *,
    hidden=(),
    epochs=100,
    batch=16,
    schedule=constant,
    device="cpu",
    dtype=torch.float64,
    batched=True,
    compile=None,
    average=None,
    label="",
):
    """Softmax regression with bias, or a tanh network, for every pair of learning rate and seed.

    A seed fixes the initial weights (uniform in +-1/sqrt(inputs), as torch.nn.Linear) and the
    order of the rows in every epoch, so that all learning rates and methods see the same of both.
    Incomplete batches are dropped, in training and in its accuracy, as in the papers' figures.
    Every step is given a closure that returns the batch's loss, for methods that need it.

    Args:
        make: (params, lr) -> optimizer, called a few times; lr is a 0-d tensor, so pass
            capturable=True on. What make does with it is its own matter: it may be another number
            that differs from run to run.
        data: prodigy.lab.data.Dataset with X (n, p), y (n,) and, if it has them, X_test, y_test.
        lrs: learning rates. seeds: integers.
        hidden: widths of the hidden layers; none is softmax regression.
        epochs, batch: whole numbers; batch at most n.
        schedule: progress in [0, 1) -> factor on lr, taken at the start of each step.
        device: where to compute.
        dtype: of weights, inputs and gradients; what is measured is computed in float64.
        batched: False takes the runs one after the other, for what cannot run side by side (host
            counts of steps, random numbers); capturable=True is then not needed.
        compile: whether the graph of a batched step goes through torch.compile, which costs
            seconds once and saves most of every step; None does so from 20,000 steps on.
        average: avg_fn(mean, x, points before) of torch.optim.swa_utils.AveragedModel; where it
            is given, this average of the points after each step is measured.
        label: what the progress bar says; None shows no bar.

    Returns:
        Trace

    Raises:
        ValueError: if batch exceeds the number of rows, or a batched method counts on the host.
    """
    n, p = data.X.shape
    steps = n // batch
    if steps == 0:
        raise ValueError(f"batch must be at most the number of rows, {n}, got {batch}")
    lrs, seeds, quiet = np.asarray(lrs, float), list(seeds), QUIET or label is None

    def with_ones(X):
        X = torch.as_tensor(X, dtype=torch.float64)
        return torch.cat([X, torch.ones(len(X), 1, dtype=torch.float64)], 1).to(device)

    X, y = with_ones(data.X), torch.as_tensor(data.y, device=device)
    target = torch.nn.functional.one_hot(y, data.classes).to(X)
    inputs, wanted = X.to(dtype), target.to(dtype)
    rows = slice(0, steps * batch)
    tested = data.X_test is not None
    if tested:
        X_test, y_test = with_ones(data.X_test), torch.as_tensor(data.y_test, device=device)

    def right(scores, y):
        return 100 * (scores.argmax(1) == y).double().mean()

    def begin(weights, lr):
        optimizer = make(weights, lr)
        return optimizer, [group["lr"] for group in optimizer.param_groups]

    def advance(optimizer, peaks, weights, mean, i, factor, before):
        """One step of one run on the rows i; the point to measure."""
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        layers, scores = forward(inputs[i], weights)
        for W, g in zip(weights, backward(layers, scores, wanted[i], weights)):
            W.grad = g
        optimizer.step(partial(cross_entropy, scores, wanted[i]))
        return [average(m, W, before) for m, W in zip(mean, weights)] if average else weights

    def measure(optimizer, mean):
        """(accuracy, loss, d, test accuracy) of one run."""
        with optimizer.averaged() if hasattr(optimizer, "averaged") else nullcontext():
            measured = [W.double() for W in mean]
            scores = forward(X[rows], measured)[1]
            fit = cross_entropy(scores, target[rows])
            nan = X.new_full((), float("nan"))
            test = right(forward(X_test, measured)[1], y_test) if tested else nan
        d = torch.as_tensor(optimizer.param_groups[0].get("d", nan)).double()
        return torch.stack([right(scores, y[rows]), fit, d, test])

    def alone(lr, weights, orders):
        """One run, (epochs, 4)."""
        weights = [W.clone() for W in weights]
        (optimizer, peaks), mean, trace = begin(weights, lr), weights, []
        for epoch in trange(epochs, desc=label, leave=False, disable=quiet):
            for k in range(epoch * steps, (epoch + 1) * steps):
                i = orders[epoch, k % steps * batch :][:batch]
                mean = advance(optimizer, peaks, weights, mean, i, factors[k], k)
            trace.append(measure(optimizer, mean))
        return torch.stack(trace)

    known = []  # what is no tensor in the runs' state_dict after their first step

    def first(weights, lr, i, factor, before):
        weights = [W.clone() for W in weights]
        optimizer, peaks = begin(weights, lr)
        mean = advance(optimizer, peaks, weights, weights, i, factor, before)
        tensors, rest = tensors_of(optimizer)
        known.append(rest)
        return weights, mean, tensors

    def resumed(state, lr):
        now, mean, tensors = state
        weights = [W.clone() for W in now]
        optimizer, peaks = begin(weights, lr)
        for W, value in zip(weights, now):  # make may choose where to begin
            W.copy_(value)
        put_back(optimizer, tensors, known[0])
        return optimizer, peaks, weights, mean if average else weights

    def later(state, lr, i, factor, before):
        optimizer, peaks, weights, mean = resumed(state, lr)
        mean = advance(optimizer, peaks, weights, mean, i, factor, before)
        tensors, rest = tensors_of(optimizer)
        if rest != known[0]:
            raise ValueError(f"{type(optimizer).__name__} counts on the host: pass batched=False")
        return weights, mean, tensors

    def seen(state, lr):
        optimizer, _, _, mean = resumed(state, lr)
        return measure(optimizer, mean)

    def together(lr, state, orders):
        """All runs, (runs, epochs, 4)."""
        runs, turns = len(lr), len(lr) // len(orders)
        share = share_of(runs, max(len(X), len(y_test) if tested else 0) * data.classes)
        rest, trace = (0, 0, None, None), []
        pace = torch.tensor(factors, dtype=torch.float64, device=device)
        counts = torch.arange(len(pace), device=device)
        for epoch in trange(epochs, desc=label, leave=False, disable=quiet):
            for k in range(epoch * steps, (epoch + 1) * steps):
                i = orders[:, epoch, k % steps * batch :][:, :batch].repeat(turns, 1)
                now = lr, i, pace[k], counts[k]
                if k < 2:
                    with Batchable():
                        begun = vmap(later, (dims, *rest)) if k else vmap(first, (0, *rest))
                        state, dims = apart(begun(state, *now))
                    continue
                if k == 2:
                    step = captured(vmap(later, (dims, *rest), dims), compile, state, *now)
                state = step(state, *now)
            parts = [(tree_map(lambda t, dim: t if dim is None else t[a : a + share], state, dims),
                      lr[a : a + share]) for a in range(0, runs, share)]
            if epoch == 0:
                look = captured(vmap(seen, (dims, 0)), compile, *parts[0])
            trace.append(torch.cat([look(*part) for part in parts]))
        return torch.stack(trace, 1)

    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    weights = []
    for fan_in, fan_out in itertools.pairwise([p, *hidden, data.classes]):
        W = [torch.rand(fan_in + 1, fan_out, generator=g, dtype=torch.float64) for g in generators]
        weights.append(((2 * torch.stack(W) - 1) / fan_in**0.5).to(device, dtype))
    orders = torch.stack(
        [torch.stack([torch.randperm(n, generator=g) for _ in range(epochs)]) for g in generators]
    ).to(device)
    rates = torch.as_tensor(np.repeat(lrs, len(seeds)), device=device)
    weights = [W.repeat(len(lrs), 1, 1) for W in weights]
    factors = [schedule(k / (epochs * steps)) for k in range(epochs * steps)]
    if compile is None:
        compile = epochs * steps >= 20_000
    with torch.no_grad(), one_thread(max(W.numel() for W in weights) < 2**17):
        if batched:
            trace = together(rates, weights, orders)
        else:
            starts = [[W[j] for W in weights] for j in range(len(rates))]
            runs = zip(rates, starts, itertools.cycle(orders))
            trace = torch.stack([alone(*run) for run in runs])
    trace = trace.reshape(len(lrs), len(seeds), epochs, 4).cpu().numpy()
    return Trace(lrs, *np.moveaxis(trace, -1, 0))


def share_of(runs, numbers, most=2**22):
    """The largest equal share of the runs that holds at most `most` numbers, or one run."""
    return next(n for n in range(runs, 0, -1) if runs % n == 0 and (n * numbers <= most or n == 1))


def sweeps(runs, jobs=-1, label="", cache="", scheduler=""):
    """Many sweeps side by side: {key: Trace}.

        sweeps({"iris": dict(make=make, data=load("iris"), lrs=[1.0], seeds=range(10))})

    The longest are started first. ``prodigy.lab.grid`` says where they run, what is kept of them
    and what happens to those that fail.

    Args:
        runs: {key: arguments of `sweep`}.
        jobs, label, cache, scheduler: as in `grid`.
    """
    tasks = dict(sorted(runs.items(), key=lambda item: -size(**item[1])))
    traces = grid(partial(sweep, label=None), tasks, jobs, cache, scheduler, label, QUIET)
    return {key: traces[key] for key in runs}


def size(data, lrs, seeds, epochs=100, **others):
    """Numbers read in a sweep: what its time grows with."""
    return data.X.size * len(lrs) * len(seeds) * epochs
