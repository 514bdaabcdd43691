"""Text runs: the network sees no later letter, the point of evaluation, clipping, survival."""

import math
import os
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

import prodigy
from prodigy.lab import published, runs, text
from prodigy.rivals import polynomial_average

WORDS = text.stand_in(3000)
SMALL = partial(text.GPT, layers=1, heads=2, width=16, dropout=0.0)
OPTIONS = dict(network=SMALL, block=8, batch=4, every=5, windows=10)


def sgd(params, lr=0.3):
    return torch.optim.SGD(params, lr=lr)


def network(seed=0, **options):
    torch.manual_seed(seed)
    return SMALL(len(WORDS.alphabet), **{"block": 8, **options})


def held(count=10):
    return text.fixed_windows(WORDS.validation, 8, count)


# the text


def test_encode_keeps_every_character_and_cuts_off_the_end():
    data = text.encode("hello", "hello world", held=0.2)
    assert data.alphabet == " dehlorw" and len(data.train) == 9
    codes = torch.cat([data.train, data.validation])
    assert "".join(data.alphabet[i] for i in codes) == "hello world"


@pytest.mark.skipif("PRODIGY_DATA" not in os.environ, reason="PRODIGY_DATA is not set")
def test_shakespeare_has_65_letters():
    data = text.shakespeare()
    assert len(data.alphabet) == 65
    assert (len(data.train), len(data.validation)) == (1_003_855, 111_539)


def test_the_stand_in_is_the_same_text_every_time_and_has_another_name():
    assert len(WORDS.train) + len(WORDS.validation) == 3000 and len(WORDS.alphabet) == 27
    assert WORDS.name != "tinyshakespeare"
    assert torch.equal(text.stand_in(3000).train, WORDS.train)


def test_fixed_windows_read_every_letter_once():
    windows = text.fixed_windows(torch.arange(30), 4)
    assert torch.equal(windows[:, 1:].flatten(), torch.arange(1, 29))
    assert torch.equal(windows[1:, 0], windows[:-1, -1])
    fewer = text.fixed_windows(torch.arange(30), 4, 3)
    assert fewer[:, 0].tolist() == [0, 12, 24]
    assert len(text.fixed_windows(torch.arange(30), 4, 100)) == 7
    with pytest.raises(ValueError, match="block must be below the length of the text, 30, got 30"):
        text.fixed_windows(torch.arange(30), 30)


# the network


def test_the_full_network_has_10_745_088_weights_and_starts_at_chance():
    torch.manual_seed(0)
    net = text.GPT(65)
    assert sum(p.numel() for p in net.parameters()) == 10_745_088
    windows = torch.randint(65, (2, 257), dtype=torch.uint8)
    spread = 384 * 0.02**2  # variance of a score
    chance = math.log(65) + spread / 2
    assert float(text.evaluate(net, windows)) == pytest.approx(chance, abs=0.06)


@torch.no_grad()
def test_a_later_letter_changes_no_earlier_score():
    net = network(layers=2).eval()
    for p in net.parameters():
        p.mul_(5)  # attention far from uniform
    letters = torch.randint(27, (3, 8))
    for place in range(1, 8):
        changed = letters.clone()
        changed[:, place] = (changed[:, place] + 1) % 27
        before, after = net(letters), net(changed)
        torch.testing.assert_close(after[:, :place], before[:, :place])
        moved = (after - before).abs().amax(2)[:, place:]
        assert (moved > 1e-4).all()  # and all that come after see it


@torch.no_grad()
def test_attention_is_its_formula():
    block = text.Block(heads=2, width=6, dropout=0.0)
    x = torch.randn(1, 4, 6)
    q, k, v = (block.qkv(x)[0].split(6, 1)[i].view(4, 2, 3) for i in range(3))
    mixed = torch.zeros(4, 2, 3)
    for t in range(4):
        for h in range(2):
            weights = torch.softmax(k[:t + 1, h] @ q[t, h] / 3**0.5, 0)
            mixed[t, h] = weights @ v[:t + 1, h]
    torch.testing.assert_close(block.attention(x)[0], block.out(mixed.view(4, 6)))


def test_dropout_is_for_training_and_sits_in_all_four_places():
    letters = torch.zeros(2, 8, dtype=torch.long)
    net = network(dropout=0.5)
    assert not torch.equal(net(letters), net(letters))
    net.eval()
    assert torch.equal(net(letters), net(letters))
    block = text.Block(heads=2, width=16, dropout=0.5)
    x = torch.randn(2, 8, 16)
    assert not torch.equal(block.attention(x), block.attention(x))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width must be a multiple of heads = 3, got 16"):
        text.GPT(27, heads=3, width=16)


# the pieces of a run


def test_warm_up_and_cosine():
    optimizer = sgd([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = text.warm_up_and_cosine(optimizer, 20, warmup=4, floor=0.1)
    rates = []
    for _ in range(21):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[12] == pytest.approx(2 * 0.55) and rates[20] == pytest.approx(0.2)
    short = text.warm_up_and_cosine(sgd([torch.nn.Parameter(torch.zeros(1))]), 10)
    assert short.lr_lambdas[0](4) == 1.0 and short.lr_lambdas[0](10) == 0.0


def test_evaluate_is_the_mean_over_letters_in_evaluation_mode():
    net, windows = network(dropout=0.5), held()
    value = float(text.evaluate(net, windows, batch=3))
    assert net.training
    scores = net.eval()(windows[:, :-1].long())
    losses = -scores.log_softmax(2).gather(2, windows[:, 1:, None].long())
    assert value == pytest.approx(losses.mean().item(), rel=1e-6)


def test_the_step_size_of_every_kind_of_method():
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    for p in params:
        p.grad = torch.ones_like(p)
    assert runs.step_size(sgd(params)) == 0.3
    made = prodigy.Prodigy(params, lr=0.5)
    assert runs.step_size(made) == pytest.approx(0.5e-6)
    layered = prodigy.LDoG(params, lr=2.0)
    layered.step()
    sizes = [1e-6 * (1 + n**0.5) / n**0.5 for n in (2, 3)]
    assert runs.step_size(layered) == pytest.approx(2 * min(sizes), rel=1e-5)  # lower median


def test_holding_gives_the_weights_back():
    net = network()
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError), runs.holding(net, [p * 2 for p in before]):
        assert torch.equal(net.norm.weight, 2 * before[-1])
        raise RuntimeError
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before))


# a run


def by_hand(make, steps, clip=1.0, seed=3, each=lambda net, step: None):
    """The loop as a textbook has it; the network and the optimizer at its end, and the losses."""
    net = network(seed)
    draw = torch.Generator().manual_seed(seed)
    optimizer, losses, starts = make(net.parameters()), [], []
    for step in range(steps):
        if step % OPTIONS["every"] == 0:
            count = min(OPTIONS["every"], steps - step)
            starts = torch.randint(len(WORDS.train) - 8, (count, 4, 1), generator=draw)
        rows = [WORDS.train[int(s):int(s) + 9].long() for s in starts[step % OPTIONS["every"]]]
        windows = torch.stack(rows)
        optimizer.zero_grad()
        scores = net(windows[:, :-1])
        loss = F.cross_entropy(scores.transpose(1, 2), windows[:, 1:])
        loss.backward()
        if clip:
            size = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
            for p in net.parameters():
                p.grad.mul_(min(1.0, clip / (float(size) + 1e-6)))
        optimizer.step()
        losses.append(loss.item())
        each(net, step)
    return net, optimizer, losses


def measured(rows):
    """{step: row as a dictionary} of the rows with losses."""
    rows = [dict(zip(text.COLUMNS, row)) for row in rows]
    return {row["step"]: row for row in rows if not np.isnan(row["validation_loss"])}


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_run_is_the_ordinary_loop(clip):
    ends = measured(text.train((sgd, None), WORDS, 3, 12, clip=clip, **OPTIONS))
    assert list(ends) == [5, 10, 12]
    net, _, losses = by_hand(sgd, 12, clip)
    last = float(text.evaluate(net, held()))
    assert ends[12]["validation_loss"] == pytest.approx(last, rel=1e-5)
    for step, part in ((5, losses[:5]), (10, losses[5:10]), (12, losses[10:])):
        assert ends[step]["train_loss"] == pytest.approx(np.mean(part), rel=1e-5)
    assert ends[12]["step_size"] == 0.3 and np.isnan(ends[12]["d"])
    assert np.isnan(ends[12]["averaged_loss"])


def test_the_gradient_is_clipped_to_the_norm_asked_for():
    moves = {}

    class Probe(torch.optim.SGD):
        def step(self):
            before = [p.detach().clone() for p in self.param_groups[0]["params"]]
            super().step()
            after = self.param_groups[0]["params"]
            way = [(a - b).flatten() for a, b in zip(after, before)]
            moves.setdefault(clip, []).append(torch.cat(way).norm().item())

    for clip in (None, 0.1):
        text.train((lambda params: Probe(params, lr=1.0), None), WORDS, 0, 5, clip=clip, **OPTIONS)
    assert moves[0.1] == pytest.approx([0.1] * 5, rel=1e-3)
    assert min(moves[None]) > 0.2


def test_the_schedule_is_stepped_after_every_batch():
    rows = text.train((sgd, partial(text.warm_up_and_cosine, warmup=4)), WORDS, 0, 10, **OPTIONS)
    sizes = {row[0]: row[5] for row in rows}
    assert sizes[1] == pytest.approx(0.3 / 4) and sizes[4] == 0.3
    assert sizes[10] == pytest.approx(0.15 * (1 + math.cos(math.pi * 5 / 6)))


def test_schedule_free_is_measured_at_x_and_goes_on_at_y():
    make = partial(prodigy.AdamWScheduleFree, lr=0.02)
    ends = measured(text.train((make, None), WORDS, 3, 10, **OPTIONS))
    net, optimizer, _ = by_hand(make, 10)
    at_y = float(text.evaluate(net, held()))
    optimizer.eval()
    at_x = float(text.evaluate(net, held()))
    assert ends[10]["validation_loss"] == pytest.approx(at_x, rel=1e-5)
    assert abs(at_x - at_y) > 1e-3


def test_of_an_average_and_the_last_iterate_the_better_counts():
    method = (partial(sgd, lr=1.0), None, polynomial_average())
    ends = measured(text.train(method, WORDS, 3, 10, **OPTIONS))
    mean = []

    def follow(net, step):
        mean[:] = mean or [torch.optim.swa_utils.AveragedModel(net, avg_fn=polynomial_average())]
        mean[0].update_parameters(net)

    net, _, _ = by_hand(method[0], 10, each=follow)
    last, other = (float(text.evaluate(n, held())) for n in (net, mean[0].module))
    assert ends[10]["averaged_loss"] == pytest.approx(other, rel=1e-5)
    assert ends[10]["validation_loss"] == pytest.approx(min(last, other), rel=1e-5)
    assert abs(last - other) > 1e-3


def test_d_is_recorded_where_there_is_one_and_at_powers_of_the_root_of_two():
    rows = text.train((prodigy.Prodigy, None), WORDS, 0, 20, **OPTIONS)
    assert [row[0] for row in rows] == [1, 2, 3, 4, 5, 6, 8, 10, 11, 15, 16, 20]
    d = [row[4] for row in rows]
    assert d == sorted(d) and d[-1] > 1e-6 and d == [row[5] for row in rows]


def test_bfloat16_and_compile_change_little(monkeypatch):
    made = []

    def eagerly(net):
        made.append(torch.compile(net, backend="eager", fullgraph=True, dynamic=False))
        return made[-1]

    monkeypatch.setattr(text, "compile_anew", eagerly)
    plain, compiled, low = (
        measured(text.train((sgd, None), WORDS, 0, 10, **OPTIONS, **more))[10]["validation_loss"]
        for more in ({}, dict(compiled=True), dict(autocast=True)))
    assert compiled == pytest.approx(plain, rel=1e-6) and len(made) == 1
    assert low != plain and low == pytest.approx(plain, abs=0.02)


# tables


def test_a_seed_fixes_weights_and_batches_for_all_methods():
    methods = {name: (partial(sgd, lr=0.0), None) for name in "ab"}
    table = text.run(methods, [0, 1], WORDS, 5, **OPTIONS)
    ends = table.dropna(subset="validation_loss").set_index(["method", "seed"])
    for value in ("validation_loss", "train_loss"):
        assert ends[value]["a", 0] == ends[value]["b", 0] != ends[value]["a", 1]
    assert list(table.columns) == ["method", "seed", "text", "steps", *text.COLUMNS, "device",
                                   "torch"]


def test_finished_runs_survive_a_stop_and_are_not_redone(tmp_path):
    path, begun = tmp_path / "runs.csv", []

    def counted(params):
        begun.append(len(begun))
        if len(begun) == 2:
            raise KeyboardInterrupt
        return prodigy.Prodigy(params)

    methods = {"plain": (sgd, None), "Prodigy": (counted, None)}
    with pytest.raises(KeyboardInterrupt):
        text.run(methods, range(2), WORDS, 6, path, **OPTIONS)
    assert pd.read_csv(path).groupby(["method", "seed"]).ngroups == 3
    table = text.run(methods, range(2), WORDS, 6, path, **OPTIONS)
    assert len(begun) == 3 and [path] == list(tmp_path.iterdir())
    whole = text.run(methods, range(2), WORDS, 6, **OPTIONS)
    pd.testing.assert_frame_equal(table, whole, rtol=1e-11)


def test_runs_side_by_side_give_the_same_table(tmp_path):
    methods = {"plain": (sgd, None), "Schedule-Free": (prodigy.AdamWScheduleFree, None)}
    path = tmp_path / "runs.csv"
    together = text.run(methods, range(2), WORDS, 6, path, jobs=2, **OPTIONS)
    alone = text.run(methods, range(2), WORDS, 6, **OPTIONS)
    pd.testing.assert_frame_equal(together, alone, rtol=1e-4)
    pd.testing.assert_frame_equal(pd.read_csv(path), alone, rtol=1e-4)


def test_another_size_or_number_of_steps_is_another_run(tmp_path):
    path, method = tmp_path / "runs.csv", {"plain": (sgd, None)}
    lengths = [len(text.run(method, [0], WORDS, steps, path, about=dict(width=width), **OPTIONS))
               for steps, width in ((5, 16), (10, 16), (10, 32))]
    assert len(pd.read_csv(path)) == sum(lengths)


def test_the_published_table_is_the_one_of_33():
    """Notebook 33 draws the same table; its vanilla column stands at C = 1/(1 - beta)."""
    table = published.curve("river_table5")
    drawn = pd.read_csv(published.FOLDER.parent / "33_schedule_free_adam_c.csv")
    drawn = drawn[drawn.data == "Table 5"].drop(columns="data").reset_index(drop=True)
    here = table.drop(columns="released").rename(columns={"perplexity": "value"})
    pd.testing.assert_frame_equal(here, drawn, rtol=1e-9)
    released = table[table.released]
    assert np.allclose(released.C, 1 / (1 - released.beta)) and len(released) == 4
