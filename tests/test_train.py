"""Batched runs: every run of a sweep is the run that ordinary code would have made alone."""

import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

import prodigy
from prodigy.lab import train
from prodigy.lab.data import load
from prodigy.lab.train import Trace, mean_and_error, steps_at, sweep

IRIS = load("iris")
SPLIT = replace(IRIS, X=IRIS.X[::2], y=IRIS.y[::2], X_test=IRIS.X[1::2], y_test=IRIS.y[1::2])
DROPS = steps_at(0.5, 0.75)


def method(name, **options):
    return lambda params, lr, **modes: getattr(prodigy, name)(params, lr=lr, **options, **modes)


def wrapped(params, lr, **modes):
    return prodigy.ScheduleFreeWrapper(prodigy.RMSprop(params, lr=lr, **modes))


CASES = {
    "SGD": (method("SGD", momentum=0.9), [0.1, 0.01], train.constant),
    "Adam": (method("Adam"), [0.1, 0.001], train.linear_decay),
    "DAdaptSGD": (method("DAdaptSGD", d0=1e-3), [1.0, 0.3], train.linear_decay),
    "DAdaptAdam": (method("DAdaptAdam", d0=1e-3), [1.0, 3.0], DROPS),
    "Prodigy": (method("Prodigy"), [1.0, 0.5], train.constant),
    "ProdigyPlusScheduleFree": (method("ProdigyPlusScheduleFree"), [1.0, 0.5], train.constant),
    "AdamWScheduleFree": (method("AdamWScheduleFree"), [0.1, 0.01], train.constant),
    "ScheduleFreeWrapper": (wrapped, [0.1, 0.01], train.constant),
    "ScheduleFreePlus": (method("ScheduleFreePlus"), [1.0, 0.5], train.constant),
}


def making(name):
    return lambda params, lr: CASES[name][0](params, lr, capturable=True)


def alone(name, data, lr, seed, hidden=(), epochs=3, batch=16):
    """One run by autograd, without vmap and with a float for lr: (accuracy, loss, d, test)."""
    make, _, schedule = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    sizes = [data.X.shape[1], *hidden, data.classes]
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        W = torch.rand(inputs + 1, outputs, generator=generator, dtype=torch.float64)
        layers.append(torch.nn.Parameter((2 * W - 1) / inputs**0.5))
    orders = [torch.randperm(len(data.y), generator=generator) for _ in range(epochs)]
    optimizer = make(layers, 1.0)
    steps = len(data.y) // batch

    def scores(X):
        for W in layers[:-1]:
            X = torch.tanh(X @ W[:-1] + W[-1])
        return X @ layers[-1][:-1] + layers[-1][-1]

    def accuracy(X, y):
        return 100 * (scores(torch.tensor(X)).argmax(1) == torch.tensor(y)).double().mean().item()

    rows = []
    for epoch, order in enumerate(orders):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule((epoch * steps + step) / (epochs * steps))
            i = order[step * batch : (step + 1) * batch].numpy()
            optimizer.zero_grad()
            X, y = torch.tensor(data.X[i]), torch.tensor(data.y[i])
            loss = torch.nn.functional.cross_entropy(scores(X), y)
            loss.backward()
            optimizer.step(lambda: loss)
        X, y = data.X[: steps * batch], data.y[: steps * batch]
        with optimizer.averaged() if hasattr(optimizer, "averaged") else nullcontext():
            entropy = torch.nn.functional.cross_entropy(scores(torch.tensor(X)), torch.tensor(y))
            test = accuracy(data.X_test, data.y_test) if data.X_test is not None else np.nan
            d = float(optimizer.param_groups[0].get("d", np.nan))
            rows.append((accuracy(X, y), entropy.item(), d, test))
    return np.array(rows).T


@pytest.mark.parametrize("hidden", [(), (5,), (4, 3)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_run_of_a_sweep_is_the_run_made_alone(name, hidden):
    _, lrs, schedule = CASES[name]
    seeds = [3, 8]
    trace = sweep(making(name), SPLIT, lrs, seeds, hidden=hidden, epochs=3, schedule=schedule)
    for i, lr in enumerate(lrs):
        for j, seed in enumerate(seeds):
            got = [a[i, j] for a in (trace.accuracy, trace.loss, trace.d, trace.test)]
            expected = alone(name, SPLIT, lr, seed, hidden)
            np.testing.assert_allclose(np.array(got), expected, rtol=1e-10, atol=0)


def test_runs_differ_by_seed_and_rate_and_do_not_see_one_another():
    lrs, seeds = [0.1, 0.01], [0, 1, 2]
    trace = sweep(making("Adam"), IRIS, lrs, seeds, epochs=2)
    assert trace.loss.shape == (2, 3, 2)
    assert len(np.unique(trace.loss)) == trace.loss.size
    part = sweep(making("Adam"), IRIS, lrs[1:], seeds[2:], epochs=2)
    np.testing.assert_allclose(part.loss[0, 0], trace.loss[1, 2], rtol=1e-12)


def test_what_does_not_apply_is_nan():
    trace = sweep(making("Adam"), IRIS, [0.1], [0], epochs=1)
    assert np.isnan(trace.d).all() and np.isnan(trace.test).all()
    assert not np.isnan(sweep(making("Prodigy"), SPLIT, [1.0], [0], epochs=1).test).any()


def test_incomplete_batches_are_dropped():
    few = replace(IRIS, X=IRIS.X[:20], y=IRIS.y[:20])
    accuracy = sweep(making("Adam"), few, [0.1], [0], epochs=4, batch=8).accuracy
    np.testing.assert_allclose(accuracy * 16 / 100, np.round(accuracy * 16 / 100), atol=1e-12)
    one = replace(IRIS, X=IRIS.X[:16], y=IRIS.y[:16])
    assert sweep(making("Adam"), one, [0.1], [0], epochs=1, batch=16).loss.shape == (1, 1, 1)


def test_a_batch_larger_than_the_table_is_refused():
    with pytest.raises(ValueError, match="batch must be at most the number of rows, 150, got 151"):
        sweep(making("Adam"), IRIS, [0.1], [0], batch=151)


def test_schedules():
    progress = np.arange(100) / 100
    assert {train.constant(p) for p in progress} == {1.0}
    assert train.linear_decay(0.0) == 1.0 and train.linear_decay(0.75) == 0.25
    factors = [steps_at(0.6, 0.8, 0.95)(p) for p in progress]
    np.testing.assert_allclose(factors, np.repeat([1, 0.1, 0.01, 0.001], [60, 20, 15, 5]))
    assert steps_at(0.5, factor=0.25)(0.5) == 0.25


def trace_of(accuracy, loss):
    accuracy, loss = np.array(accuracy, float), np.array(loss, float)
    empty = np.full_like(accuracy, np.nan)
    return Trace(np.arange(len(accuracy)), accuracy, loss, empty, empty)


def test_best_takes_the_mean_final_accuracy_then_the_loss():
    final = trace_of([[[99, 50], [99, 60]], [[0, 70], [0, 50]]], np.ones((2, 2, 2)))
    assert final.best() == 1
    assert final.best(tail=2) == 0
    tie = trace_of(np.full((3, 1, 1), 90.0), [[[0.3]], [[0.1]], [[0.2]]])
    assert tie.best() == 1


def test_best_counts_nan_as_nothing():
    nan = float("nan")
    assert trace_of([[[nan], [100]], [[60], [60]]], np.ones((2, 2, 1))).best() == 1
    assert trace_of(np.full((2, 1, 1), 90.0), [[[nan]], [[5.0]]]).best() == 1


def test_mean_and_error():
    values = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0]])
    mean, se = mean_and_error(values)
    np.testing.assert_allclose(mean, [2.5, 5.0])
    np.testing.assert_allclose(se, [np.sqrt(5 / 3) / 2, 0.0])
    mean, se = mean_and_error(values, axis=0)
    np.testing.assert_allclose(mean, [3.0, 3.5, 4.0, 4.5])
    np.testing.assert_allclose(se, np.array([4.0, 3.0, 2.0, 1.0]) / 2)
    assert np.isnan(mean_and_error(values[:, :1])[1]).all()


def test_one_after_the_other_gives_the_same_numbers():
    make, lrs, _ = CASES["ProdigyPlusScheduleFree"]
    asked = dict(lrs=lrs, seeds=range(2), hidden=(8,), epochs=3)
    together = sweep(making("ProdigyPlusScheduleFree"), SPLIT, **asked)
    apart = sweep(make, SPLIT, batched=False, **asked)
    for name in ("loss", "d", "accuracy", "test"):
        np.testing.assert_allclose(getattr(apart, name), getattr(together, name), rtol=1e-9)


def test_compiled_runs_give_the_same_numbers():
    asked = dict(lrs=[1.0, 0.5], seeds=range(3), epochs=3, schedule=DROPS)
    graph, fast = (sweep(making("Prodigy"), SPLIT, **asked, compile=on) for on in (False, True))
    for field in ("loss", "d", "accuracy", "test"):
        np.testing.assert_allclose(getattr(fast, field), getattr(graph, field), rtol=1e-9)


def test_without_a_compiler_the_graph_runs_and_says_so(monkeypatch):
    def broken(graph, **options):
        def run(*tensors):
            raise RuntimeError("no compiler")
        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="torch.compile failed.*no compiler"):
        trace = sweep(making("Adam"), IRIS, [0.1], [0], epochs=1, compile=True)
    expected = sweep(making("Adam"), IRIS, [0.1], [0], epochs=1)
    np.testing.assert_array_equal(trace.loss, expected.loss)


def test_make_may_choose_where_to_begin():
    def at_zero(params, lr):
        for W in params:
            W.zero_()
        return prodigy.Adam(params, lr=lr, capturable=True)

    asked = at_zero, IRIS, [0.1], [0]
    one, many = (sweep(*asked, epochs=2, batched=batched) for batched in (False, True))
    np.testing.assert_allclose(many.loss, one.loss, rtol=1e-9)
    assert many.loss[0, 0, -1] < 0.9 * np.log(3)  # it has left zero


def test_what_is_the_same_for_all_runs_is_kept_once():
    out = torch.func.vmap(lambda x: {"own": x + 1, "same": torch.arange(3.0)})(torch.zeros(4))
    tensors, dims = train.apart(out)
    assert dims == {"own": 0, "same": None}
    assert tensors["own"].shape == (4,) and torch.equal(tensors["same"], torch.arange(3.0))


def test_runs_measured_in_shares_give_the_same_numbers(monkeypatch):
    assert train.share_of(130, 10, most=700) == 65 and train.share_of(7, 10, most=60) == 1
    assert train.share_of(7, 10, most=70) == 7
    asked = dict(lrs=[0.1, 0.01], seeds=range(3), epochs=2)
    whole = sweep(making("AdamWScheduleFree"), SPLIT, **asked)
    monkeypatch.setattr(train, "share_of", lambda runs, numbers: 2)
    shared = sweep(making("AdamWScheduleFree"), SPLIT, **asked)
    for field in ("loss", "accuracy", "test"):
        np.testing.assert_allclose(getattr(shared, field), getattr(whole, field), rtol=1e-12)


def test_a_method_that_counts_on_the_host_is_refused_side_by_side():
    class Counting(prodigy.SGD):
        def scalars(self, group, t):
            group["calls"] = group.get("calls", 0) + 1
            return super().scalars(group, t)

    def make(params, lr):
        return Counting(params, lr=lr, capturable=True)

    with pytest.raises(ValueError, match="Counting counts on the host: pass batched=False"):
        sweep(make, IRIS, [0.1], [0], epochs=1)
    assert np.isfinite(sweep(make, IRIS, [0.1], [0], epochs=1, batched=False).loss).all()


def test_side_by_side_is_faster():
    """Of 130 runs on Iris; one run alone is measured and multiplied, a loose bound on a ratio."""
    asked = dict(data=IRIS, schedule=DROPS, label=None)

    def seconds(epochs, **more):
        start = time.perf_counter()
        sweep(method("DAdaptAdam"), seeds=[0], lrs=[1.0], epochs=epochs, batched=False, **asked)
        middle = time.perf_counter()
        sweep(making("DAdaptAdam"), seeds=range(10), lrs=np.ones(13), epochs=epochs, **asked)
        return 130 * (middle - start), time.perf_counter() - middle

    seconds(1)
    apart, together = seconds(20)
    print(f"{apart / together:.1f} times faster")
    assert apart / together > 4


def test_dtype_is_that_of_weights_and_gradients():
    made = []

    def make(params, lr):
        made.append(prodigy.SGDScheduleFree(params, lr=lr))
        return made[-1]

    trace = sweep(make, IRIS, [0.1], [0], epochs=1, batched=False, dtype=torch.bfloat16)
    for p in made[0].param_groups[0]["params"]:
        assert p.dtype == p.grad.dtype == torch.bfloat16
    wide = sweep(make, IRIS, [0.1], [0], epochs=1, batched=False)
    assert 0 < abs(trace.loss.item() - wide.loss.item()) < 0.02 * wide.loss.item()


@pytest.mark.parametrize("name", [*CASES, "Polyak"])
def test_float32_runs_side_by_side_too(name):
    polyak = method("AdamWScheduleFree", betas=(0.0, 0.95), store_x=True)
    make, lrs, schedule = CASES.get(name, (polyak, [1.0, 0.1], train.constant))
    asked = dict(lrs=lrs, seeds=[0], epochs=2, schedule=schedule, dtype=torch.float32)
    together = sweep(lambda params, lr: make(params, lr, capturable=True), SPLIT, **asked)
    apart = sweep(make, SPLIT, **asked, batched=False)
    np.testing.assert_allclose(together.loss, apart.loss, rtol=2e-4)


def test_an_average_of_the_points_is_what_is_measured():
    asked = dict(lrs=[0.1, 0.02], seeds=[4], epochs=3)
    last = sweep(making("SGD"), IRIS, **asked)
    kept = sweep(making("SGD"), IRIS, average=lambda mean, x, before: x, **asked)
    np.testing.assert_array_equal(kept.loss, last.loss)

    def equal(mean, x, before):
        return mean + (x - mean) / (before + 1)

    points = []

    def noting(params, lr):
        optimizer = method("SGD", momentum=0.9)(params, lr)
        optimizer.register_step_post_hook(lambda *_: points.append(params[0].clone()))
        return optimizer

    trace = sweep(noting, IRIS, average=equal, batched=False, **asked)
    W = torch.stack(points[:27]).mean(0)  # three epochs of nine steps at the first rate
    scores = torch.tensor(IRIS.X[:144]) @ W[:-1] + W[-1]
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor(IRIS.y[:144]))
    np.testing.assert_allclose(trace.loss[0, 0, -1], expected, rtol=1e-12)


def test_another_number_may_take_the_place_of_the_rate():
    """d is begun from d0, which the constructor takes as a float only."""
    def begun(params, d0):
        optimizer = prodigy.DAdaptAdam(params, lr=0.5, capturable=True)
        optimizer.param_groups[0].update(d=d0.clone(), d_hat=d0.clone())
        return optimizer

    asked = dict(seeds=[2, 5], epochs=3, schedule=DROPS)
    trace = sweep(begun, IRIS, [1e-6, 1e-3], **asked)
    for i, d0 in enumerate([1e-6, 1e-3]):
        alone = sweep(method("DAdaptAdam", d0=d0), IRIS, [0.5], batched=False, **asked)
        np.testing.assert_allclose(trace.loss[i], alone.loss[0], rtol=1e-9)
        np.testing.assert_allclose(trace.d[i], alone.d[0], rtol=1e-9)


def test_many_sweeps_are_the_sweeps():
    def adam(params, lr):
        return prodigy.Adam(params, lr=lr, capturable=True)

    asked = {
        ("iris", 1): dict(make=adam, data=IRIS, lrs=[0.1], seeds=range(2), epochs=2),
        ("split", 3): dict(make=adam, data=SPLIT, lrs=[0.1, 0.3, 1.0], seeds=[5], epochs=4),
    }
    traces = train.sweeps(asked, jobs=2)
    assert list(traces) == list(asked)
    for key, arguments in asked.items():
        expected = sweep(**arguments)
        for name in ("lrs", "accuracy", "loss", "d", "test"):
            np.testing.assert_array_equal(getattr(traces[key], name), getattr(expected, name))


def test_the_longest_sweep_is_started_first(monkeypatch):
    started = []
    monkeypatch.setattr(train, "sweep", lambda epochs, **others: started.append(epochs))
    asked = {key: dict(data=IRIS, lrs=[1.0], seeds=[0], epochs=key) for key in (1, 9, 3)}
    assert list(train.sweeps(asked, jobs=1)) == [1, 9, 3]
    assert started == [9, 3, 1]
