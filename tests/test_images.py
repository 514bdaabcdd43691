"""Image runs: the example's network, the point of evaluation, and runs that survive a stop."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

import prodigy
from prodigy.lab import images

DATA = images.first(images.stand_in(), 100)  # 100 training and 100 test images


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def normed():
    conv = nn.Conv2d(1, 4, 5, 4)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))


def sgd(params):
    return torch.optim.SGD(params, lr=0.02)


OPTIONS = dict(network=linear, batch=32)


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
