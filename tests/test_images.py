"""Image runs: the networks, augmentation, the point of evaluation, runs that survive a stop."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils._python_dispatch import TorchDispatchMode

import prodigy
from prodigy.lab import images
from prodigy.lab.data import load
from prodigy.rivals import polynomial_average

DATA = images.first(images.stand_in(), 100)  # 100 training and 100 test images
COLOUR = images.first(images.stand_in(colour=True), 64)
CIFAR = Path(os.environ.get("PRODIGY_DATA", "")) / "cifar-10-batches-py"


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def normed():
    conv = nn.Conv2d(1, 4, 5, 4)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))


def sgd(params):
    return torch.optim.SGD(params, lr=0.02)


def coloured():
    conv = nn.Conv2d(3, 4, 5, 4)
    norm = [nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(196, 10)]
    return nn.Sequential(images.Normalise(), conv, *norm)


OPTIONS = dict(network=linear, batch=32)
AUGMENTED = dict(network=coloured, batch=16, augment=images.crop_and_flip)


def test_the_network_is_the_one_of_the_example():
    torch.manual_seed(0)
    net = images.convnet().eval()
    assert sum(p.numel() for p in net.parameters()) == 1_199_882
    first, second, third, last = [m for m in net if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [m.p for m in net if isinstance(m, nn.Dropout)] == [0.25, 0.5]
    X, _ = images.tensors(DATA.X[:8], DATA.y[:8], "cpu")

    def example(x):
        x = F.max_pool2d(F.relu(second(F.relu(first(x)))), 2)
        return last(F.relu(third(torch.flatten(x, 1))))

    torch.testing.assert_close(net(X), example(X), rtol=0, atol=0)
    ours = torch.autograd.grad(net(X).logsumexp(1).sum(), list(net.parameters()))
    theirs = torch.autograd.grad(example(X).logsumexp(1).sum(), list(net.parameters()))
    torch.testing.assert_close(ours, theirs)


def test_the_stand_in_has_mnists_format_and_another_name():
    data = images.stand_in()
    assert data.name == "enlarged digits"
    assert data.X.shape == (1500, 28, 28) and data.X_test.shape == (297, 28, 28)
    assert data.X.dtype == np.uint8 and data.X.max() == 255
    assert (data.X[:, [0, 1, 26, 27]] == 0).all()
    assert (data.X[0, 2:5, 8:11] == data.X[0, 2, 8]).all()


def test_in_colour_it_has_cifars_format():
    data = images.stand_in(colour=True)
    assert data.X.shape == (1500, 3, 32, 32) and data.X_test.shape == (297, 3, 32, 32)
    assert data.X.dtype == np.uint8 and (data.X[0, 0] == 255 - data.X[0, 1]).all()


def test_first_cuts_both_parts_and_zero_keeps_all():
    data = images.stand_in()
    assert images.first(data, 0) is data
    assert (len(DATA.y), len(DATA.y_test)) == (100, 100)
    assert (len(images.first(data, 900).y), len(images.first(data, 900).y_test)) == (900, 297)


def test_tensors_are_normalised_as_in_the_example():
    X, y = images.tensors(np.full((2, 28, 28), 51, np.uint8), np.array([3, 4]), "cpu")
    assert X.shape == (2, 1, 28, 28) and y.tolist() == [3, 4]
    assert X[0, 0, 0, 0].item() == pytest.approx((0.2 - 0.1307) / 0.3081)


def test_evaluate_counts_every_image_once_in_evaluation_mode():
    X, y = images.tensors(DATA.X_test, DATA.y_test, "cpu")
    net = nn.Sequential(nn.Dropout(0.5), linear())
    loss, accuracy = images.evaluate(net, X, y, batch=30)
    scores = net[1](X)
    assert loss == pytest.approx(F.cross_entropy(scores, y).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (scores.argmax(1) == y).double().mean().item())
    assert net.training


def test_schedule_free_is_tested_at_x_with_batch_norm_taken_there():
    torch.manual_seed(1)
    net = normed()
    optimizer = prodigy.SGDScheduleFree(net.parameters(), lr=0.05)
    X, y = images.tensors(DATA.X, DATA.y, "cpu")
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(net(X), y).backward()
        optimizer.step()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    result = images.evaluate_at_x(net, optimizer, X, y, [X[:50], X[50:]])
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    at_y = images.evaluate(net, X, y)
    optimizer.eval()
    stale = images.evaluate(net, X, y)
    torch.optim.swa_utils.update_bn([X[:50], X[50:]], net)
    assert result == images.evaluate(net, X, y)
    assert result[0] not in (at_y[0], stale[0])


def test_a_method_without_an_average_is_tested_where_it_stands():
    net = linear()
    X, y = images.tensors(DATA.X, DATA.y, "cpu")
    assert images.evaluate_at_x(net, sgd(net.parameters()), X, y, []) == images.evaluate(net, X, y)


def test_marks_are_powers_and_ends_of_epochs():
    assert sorted(images.marks(20, 10)) == [1, 2, 3, 4, 6, 8, 10, 11, 16, 20]


def test_a_run_is_the_ordinary_loop():
    rows = images.train((sgd, lambda o, steps, epochs: StepLR(o, steps // epochs, 0.5)),
                        DATA, 3, 2, **OPTIONS)
    torch.manual_seed(3)
    order, net = torch.Generator().manual_seed(3), linear()
    X, y = images.tensors(DATA.X, DATA.y, "cpu")
    for epoch in range(2):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02 * 0.5**epoch)
        for i in torch.randperm(100, generator=order).split(32):
            optimizer.zero_grad()
            F.cross_entropy(net(X[i]), y[i]).backward()
            optimizer.step()
        loss, accuracy = images.evaluate(net, *images.tensors(DATA.X_test, DATA.y_test, "cpu"))
        row = next(row for row in rows if row[1] == epoch + 1)
        assert row[:2] == [4 * (epoch + 1), epoch + 1]
        assert row[2] == pytest.approx(loss, rel=1e-6) and row[3] == accuracy
    assert [row[0] for row in rows] == [1, 2, 3, 4, 6, 8]
    assert all(np.isnan(row[2]) for row in rows if row[1] not in (1, 2))
    assert all(np.isnan(row[4]) for row in rows)


def test_d_is_recorded_where_there_is_one():
    rows = images.train((prodigy.Prodigy, None), DATA, 0, 2, **OPTIONS)
    d = [row[4] for row in rows]
    assert d == sorted(d) and d[-1] > 1e-6


def test_all_methods_start_from_the_same_weights_of_a_seed():
    methods = {name: (lambda p: torch.optim.SGD(p, lr=0.0), None) for name in "ab"}
    table = images.run(methods, [0, 1], DATA, 1, **OPTIONS)
    ends = table.dropna(subset="test_loss").set_index(["method", "seed"]).test_loss
    assert ends["a", 0] == ends["b", 0] and ends["a", 0] != ends["a", 1]


def test_finished_runs_survive_a_stop_and_are_not_redone(tmp_path):
    path, begun = tmp_path / "runs.csv", []

    def counted(params):
        begun.append(len(begun))
        if len(begun) == 3:
            raise KeyboardInterrupt
        return prodigy.Prodigy(params)

    methods = {"plain": (sgd, None), "Prodigy": (counted, None)}
    with pytest.raises(KeyboardInterrupt):
        images.run(methods, range(4), DATA, 1, path, **OPTIONS)
    kept = pd.read_csv(path)
    assert kept.groupby(["method", "seed"]).ngroups == 6
    table = images.run(methods, range(4), DATA, 1, path, **OPTIONS)
    assert len(begun) == 5
    assert [path] == list(tmp_path.iterdir())
    begun += [0] * 9
    whole = images.run(methods, range(4), DATA, 1, **OPTIONS)
    pd.testing.assert_frame_equal(table, whole, rtol=1e-11)
    again = images.run(methods, [2], DATA, 1, path, **OPTIONS)
    pd.testing.assert_frame_equal(again, whole[whole.seed == 2].reset_index(drop=True), rtol=1e-11)


def test_another_number_of_epochs_or_images_is_another_run(tmp_path):
    path, method = tmp_path / "runs.csv", {"plain": (sgd, None)}
    short = images.run(method, [0], DATA, 1, path, **OPTIONS)
    longer = images.run(method, [0], DATA, 2, path, **OPTIONS)
    fewer = images.run(method, [0], images.first(DATA, 64), 1, path, **OPTIONS)
    assert len(pd.read_csv(path)) == len(short) + len(longer) + len(fewer)
    assert set(longer.epochs) == {2} and set(fewer.rows) == {64}
    assert list(short.columns) == ["method", "seed", "epochs", "rows", *images.COLUMNS,
                                   "device", "torch"]


# ------------------------------------------------------------------ colour images
FULL = {"vgg11": (9_231_114, 512, 1), "resnet18": (11_173_962, 512, 4),
        "resnet50": (23_520_842, 2048, 4)}


@pytest.mark.parametrize("name", FULL)
def test_the_full_networks_have_their_size_and_take_two_steps(name):
    weights, width, side = FULL[name]
    net = images.NETWORKS[name]()
    assert sum(p.numel() for p in net.parameters()) == weights
    features = net[:-3].eval()(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert features.shape == (2, width, side, side)
    rows = images.train((prodigy.Prodigy, None), images.first(COLOUR, 4), 0, 1, batch=2,
                        network=images.NETWORKS[name], augment=images.crop_and_flip)
    assert [row[0] for row in rows] == [1, 2]
    test_loss, train_loss = rows[-1][2], rows[-1][5]
    assert 1 < train_loss < 10 and np.isfinite(test_loss)


def test_the_small_network_has_its_size():
    assert sum(p.numel() for p in images.small().parameters()) == 94_762


@pytest.mark.parametrize("inside, stride, convolutions", [(6, 1, 2), (4, 1, 3), (6, 2, 3)])
def test_a_residual_block_adds_its_input(inside, stride, convolutions):
    block = images.Residual((inside, 5, 3, stride), (5, 6, 3, 1)).eval()
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(convs) == len(norms) == convolutions
    for norm in norms:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2, inside, 8, 8)
    inner = F.relu(norms[0](convs[0](x)))
    beside = norms[2](convs[2](x)) if convolutions == 3 else x
    torch.testing.assert_close(block(x), F.relu(norms[1](convs[1](inner)) + beside))


def test_normalise_takes_bytes():
    x = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    wanted = [(0.2 - m) / s for m, s in zip(images.CIFAR_MEAN, images.CIFAR_STD)]
    torch.testing.assert_close(images.Normalise()(x)[0, :, 0, 0], torch.tensor(wanted))


@pytest.mark.skipif(not CIFAR.is_dir(), reason="PRODIGY_DATA holds no CIFAR-10")
def test_cifar_comes_out_with_mean_0_and_variance_1():
    X, levels = load("cifar10").X, np.arange(256) / 255
    for channel, mean, std in zip(range(3), images.CIFAR_MEAN, images.CIFAR_STD):
        counts = np.bincount(X[:, channel].ravel())
        middle = np.average(levels, weights=counts)
        assert middle == pytest.approx(mean, abs=1e-4)
        variance = np.average((levels - middle) ** 2, weights=counts)
        assert variance**0.5 == pytest.approx(std, abs=1e-4)


def test_colour_images_stay_bytes_with_the_channels_last():
    X, y = images.tensors(COLOUR.X, COLOUR.y, "cpu")
    assert X.dtype == torch.uint8 and X.is_contiguous(memory_format=torch.channels_last)
    assert (X.numpy() == COLOUR.X).all() and (y.numpy() == COLOUR.y).all()


def test_crops_are_moved_by_up_to_four_reflected_and_mirrored():
    X = torch.randint(256, (40, 3, 13, 12), dtype=torch.uint8)
    before = torch.get_rng_state()
    batch = images.crop_and_flip(X, torch.Generator().manual_seed(1))
    i = torch.randperm(40, generator=torch.Generator().manual_seed(2)).repeat(20)
    got = batch(i)
    assert torch.equal(torch.get_rng_state(), before)
    assert got.dtype == torch.uint8 and got.is_contiguous(memory_format=torch.channels_last)
    padded = F.pad(X[i].float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)
    seen = []
    for down in range(9):
        for right in range(9):
            crop = padded[:, :, down:down + 13, right:right + 12]
            for mirrored, image in enumerate((crop, crop.flip(3))):
                seen.append((got == image).all(3).all(2).all(1))
    counts = torch.stack(seen)
    assert (counts.sum(0) == 1).all()  # each is one of the 162, and only one
    times = counts.reshape(9, 9, 2, -1).sum(3)
    assert times.sum((1, 2)).min() > 50 and times.sum((0, 2)).min() > 50
    assert abs(times.sum((0, 1))[0] - 400) < 60  # three standard deviations are 42
    same = images.crop_and_flip(X, torch.Generator().manual_seed(1))
    assert torch.equal(same(i), got) and not torch.equal(same(i), got)


def by_hand(factory, epochs, average=None):
    """(net, its averages, losses) after training as `images.train` says it does, seed 3."""
    torch.manual_seed(3)
    order, moved = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    net = coloured()
    mean = average and AveragedModel(net, avg_fn=average)
    X, y = images.tensors(COLOUR.X, COLOUR.y, "cpu")
    optimizer, losses = factory(net.parameters()), []
    augmented = images.crop_and_flip(X, moved)
    for _ in range(epochs):
        batches = torch.randperm(64, generator=order).split(16)
        for i in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(augmented(i)), y[i])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if average:
                mean.update_parameters(net)
    if average:
        update_bn((X[i] for i in batches), mean)
    return net, mean, losses


def test_an_augmented_run_is_the_ordinary_loop():
    halved = sgd, lambda o, steps, epochs: StepLR(o, 2, 0.5)
    rows = images.train(halved, COLOUR, 3, 1, **AUGMENTED)
    sizes = [row[6] for row in rows]
    assert sizes == [0.02, 0.02, 0.01, 0.01]  # of the step just made
    rows = images.train((sgd, None), COLOUR, 3, 2, **AUGMENTED)
    net, _, losses = by_hand(sgd, 2)
    tested = images.tensors(COLOUR.X_test, COLOUR.y_test, "cpu")
    assert rows[-1][2:4] == pytest.approx(images.evaluate(net, *tested), rel=1e-6)
    assert rows[-1][5] == pytest.approx(np.mean(losses[4:]), rel=1e-6)
    assert rows[3][5] == pytest.approx(np.mean(losses[:4]), rel=1e-6)
    assert all(np.isnan(row[5]) for row in rows if row[1] not in (1, 2))


def test_the_average_is_measured_beside_the_last_iterate(monkeypatch):
    average, method = polynomial_average(), partial(prodigy.DoG, reps_rel=1e-2)
    evaluate_in, measured = images.evaluate_in, []
    monkeypatch.setattr(images, "evaluate_in",
                        lambda *a: measured.append(evaluate_in(*a)) or measured[-1])
    rows = images.train((method, None, average), COLOUR, 3, 3, **AUGMENTED)
    net, mean, losses = by_hand(method, 3, average)
    tested = images.tensors(COLOUR.X_test, COLOUR.y_test, "cpu")
    last, averaged = images.evaluate(net, *tested), images.evaluate(mean.module, *tested)
    assert measured[-1] == pytest.approx(averaged, rel=1e-5)
    assert rows[-1][7] == averaged[1] != last[1]
    assert rows[-1][2:4] == pytest.approx(max(last, averaged, key=lambda r: r[1]), rel=1e-5)
    assert rows[-1][5] == pytest.approx(np.mean(losses[-4:]), rel=1e-5)  # training is as without
    plain = images.train((method, None), COLOUR, 3, 3, **AUGMENTED)
    assert plain[-1][5] == rows[-1][5] and np.isnan(plain[-1][7])
    assert plain[-1][3] == pytest.approx(last[1])
    for other in ((0.5, 100.0), (0.5, 0.0)):
        monkeypatch.setattr(images, "evaluate_in", lambda *a, other=other: other)
        got = images.train((method, None, average), COLOUR, 3, 3, **AUGMENTED)[-1]
        assert got[7] == other[1] and (tuple(got[2:4]) == other) == (other[1] == 100)


def test_the_step_size_of_every_kind_of_method():
    net = coloured()
    X, y = images.tensors(COLOUR.X, COLOUR.y, "cpu")
    layered, whole = prodigy.LDoG(net.parameters(), lr=2.0), prodigy.DoG(net.parameters())
    for optimizer in (layered, whole):
        F.cross_entropy(net(X), y).backward()
        optimizer.step()
    sizes = sorted(float(s["rbar"] / s["G"].sqrt()) for s in layered.state.values())
    assert len(sizes) == 6 and images.step_size(layered) == pytest.approx(2 * sizes[2])
    assert images.step_size(whole) == whole.effective_lr()
    assert images.step_size(sgd(net.parameters())) == 0.02


class Reads(TorchDispatchMode):
    """Counts how often a number is taken from a tensor, which on a GPU waits for it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [
    (prodigy.Prodigy, None), (prodigy.DAdaptAdam, None),
    (prodigy.DoG, None, polynomial_average()), (prodigy.LDoG, None, polynomial_average()),
    (prodigy.SGDScheduleFree, None),
], ids=["Prodigy", "D-Adapt Adam", "DoG", "L-DoG", "Schedule-Free"])
def test_nothing_is_read_from_the_device_between_rows(method, monkeypatch):
    """On a CPU a method whose count of steps is a tensor of the host, as Adam's, reads that."""
    finite = prodigy.pieces.finite  # on a CPU, and only there, it looks at a gradient's sum
    monkeypatch.setattr(prodigy.optimizer, "finite", lambda *given: finite(*given[:3]))
    monkeypatch.setattr(prodigy.optimizer, "as_float", lambda a: a)  # and this one at d
    monkeypatch.setattr(images, "marks", lambda steps, per_epoch: {per_epoch, 2 * per_epoch})
    monkeypatch.setattr(images, "REFRESH", 1)
    counts = []
    for rows in (32, 64):  # two and four batches
        with Reads() as reads:
            images.train(method, images.first(COLOUR, rows), 0, 2, **AUGMENTED)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_whole_batches_go_through_the_compiled_network(monkeypatch):
    plain = images.train((sgd, None), images.first(COLOUR, 40), 3, 2, **AUGMENTED)
    sizes, compiled = [], torch.compile

    def noted(net, **options):
        run = compiled(net, backend="eager", **options)
        return lambda x: sizes.append(len(x)) or run(x)

    monkeypatch.setattr(torch, "compile", noted)
    rows = images.train((sgd, None), images.first(COLOUR, 40), 3, 2, compiled=True, **AUGMENTED)
    np.testing.assert_allclose(rows, plain, rtol=1e-6)
    assert sizes == [16] * 4  # of 16, 16 and 8, twice


def test_autocast_computes_scores_in_bfloat16_and_steps_in_float32():
    dtypes = []

    def watched():
        net = coloured()
        net.register_forward_hook(lambda net, x, scores: dtypes.append(scores.dtype))
        return net

    options = AUGMENTED | dict(network=watched)
    rows = images.train((prodigy.Prodigy, None), COLOUR, 3, 2, autocast=True, **options)
    assert set(dtypes) == {torch.bfloat16}
    plain = images.train((prodigy.Prodigy, None), COLOUR, 3, 2, **options)
    assert set(dtypes) == {torch.bfloat16, torch.float32}
    assert rows[-1][5] == pytest.approx(plain[-1][5], rel=0.05) and rows[-1][5] != plain[-1][5]


def test_another_network_is_another_run_with_all_columns(tmp_path):
    path, method = tmp_path / "runs.csv", {"DoG": (prodigy.DoG, None, polynomial_average())}
    one = images.run(method, [0], COLOUR, 1, path, about={"model": "one"}, **AUGMENTED)
    images.run(method, [0], COLOUR, 1, path, about={"model": "two"}, **AUGMENTED)
    again = images.run(method, [0], COLOUR, 1, path, about={"model": "one"}, **AUGMENTED)
    assert pd.read_csv(path).groupby("model").size().tolist() == [len(one)] * 2
    pd.testing.assert_frame_equal(one, again, rtol=1e-11)
    assert list(one.columns) == ["method", "seed", "epochs", "rows", "model", *images.COLUMNS,
                                 *images.MORE, "device", "torch"]
