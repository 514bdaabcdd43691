"""The statements of theory/51_scale.md in numbers; the rules are test_theory's."""
import math
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import prodigy
from prodigy.lab import problems

PAGE = (Path(__file__).parents[1] / "theory" / "51_scale.md").read_text(encoding="utf-8")
SHAPE, P = (66, 44), 11  # the entries are a multiple of P
PHI = (66 + 44) / (66 * 44)


# ------------------------------------------------------------------ 2. memory
class Touched(TorchDispatchMode):
    """Notes which of the given tensors operations read, and which they write."""

    def __init__(self, tensors):
        super().__init__()
        self.names = {t.untyped_storage().data_ptr(): name for name, t in tensors.items()}
        self.read, self.written = set(), set()

    def note(self, value, where):
        tensors = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
        where |= {self.names.get(t.untyped_storage().data_ptr()) for t in tensors} - {None}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for i, argument in enumerate(function._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            alias = argument.alias_info
            if alias is not None and alias.is_write:
                self.note(value, self.written)
            overwritten = function.overloadpacket == torch.ops.aten.copy_
            if alias is None or (alias.is_write and not overwritten):  # else it is a view
                self.note(value, self.read)
        return function(*args, **kwargs)


def counted(name, **options):
    """(words, numbers of state a weight) of a method's third step."""
    p = torch.nn.Parameter(problems.gaussian(SHAPE, seed=1).float())
    optimizer = getattr(prodigy, name)([p], **options)
    for seed in (2, 3, 4):
        p.grad = problems.gaussian(SHAPE, seed=seed).float()
        kept = {key: t for key, t in optimizer.state[p].items() if t.dim()}
        tensors = {"x": p.data, "g": p.grad, **kept}
        with Touched(tensors) as touched:
            optimizer.step()
    moved = [*touched.read, *touched.written]
    state = sum(t.nbytes for t in kept.values())
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors.values())
    return sum(tensors[key].nbytes for key in moved) / p.nbytes, state / p.nbytes


METHODS = {
    "AdamW": ("AdamW", {}, 7, 2),
    "Prodigy": ("Prodigy", {}, 10, 4),
    "slices": ("Prodigy", dict(slice_p=P), 7 + 3 / P, 2 + 2 / P),
    "slices, no m": ("Prodigy", dict(slice_p=P, betas=(0.0, 0.999)), 5 + 3 / P, 1 + 2 / P),
    "DAdaptAdam": ("DAdaptAdam", {}, 9, 3),
    "Schedule-Free": ("AdamWScheduleFree", {}, 7, 2),
    "both, whole": ("ProdigyPlusScheduleFree", dict(factored=False), 7 + 3 / P, 2 + 2 / P),
    "both": ("ProdigyPlusScheduleFree", {}, 5 + 3 / P + 2 * PHI, 1 + 2 / P + PHI),
}


@pytest.mark.parametrize("case", METHODS)
def test_words_and_state(case):
    name, options, words, state = METHODS[case]
    assert counted(name, **options) == pytest.approx((words, state), rel=1e-12)
    for other in (dict(amsgrad=True),) if name == "AdamW" else ():  # one more average is seen
        assert counted(name, **other) == pytest.approx((words + 2, state + 1), rel=1e-12)


def test_what_slices_and_factors_save():
    words, state = counted("Prodigy")
    for p, share in ((1, 1), (2, 1 / 2), (11, 1 / 11), (66 * 44, 1 / (66 * 44))):
        less_words, less_state = counted("Prodigy", slice_p=p)
        assert words - less_words == pytest.approx(3 * (1 - share), abs=1e-9)
        assert state - less_state == pytest.approx(2 * (1 - share), abs=1e-9)
    whole, factored = (counted("ProdigyPlusScheduleFree", factored=on) for on in (False, True))
    assert whole[0] - factored[0] == pytest.approx(2 * (1 - PHI), abs=1e-9)
    assert whole[1] - factored[1] == pytest.approx(1 - PHI, abs=1e-9)


# ------------------------------------------------------------------ 3. what is sent
def scatter(blocks):
    """Reduce-scatter of blocks[process][k] on a ring: ({process: its block}, bytes each sent)."""
    S = len(blocks)
    blocks, sent = [[block.clone() for block in row] for row in blocks], [0] * S
    for j in range(S - 1):
        going = [(i, (i - j) % S, blocks[i][(i - j) % S].clone()) for i in range(S)]
        for i, k, block in going:
            blocks[(i + 1) % S][k] += block
            sent[i] += block.nbytes
    return {i: ((i + 1) % S, blocks[i][(i + 1) % S]) for i in range(S)}, sent


def gather(own):
    """All-gather of {process: (place, block)} on a ring: (what each has, bytes each sent)."""
    S = len(own)
    have, sent = [dict([own[i]]) for i in range(S)], [0] * S
    last = [own[i] for i in range(S)]
    for _ in range(S - 1):
        last = [last[(i - 1) % S] for i in range(S)]
        for i, (place, block) in enumerate(last):
            have[i][place] = block
            sent[(i - 1) % S] += block.nbytes
    return have, sent


@pytest.mark.parametrize("S", [2, 3, 8])
def test_bytes_of_a_ring(S):
    whole = [problems.gaussian(5 * S, seed=i) for i in range(S)]
    V = whole[0].nbytes
    own, sent = scatter([list(v.split(5)) for v in whole])
    assert sent == [V * (S - 1) // S] * S
    have, more = gather(own)
    assert [a + b for a, b in zip(sent, more)] == [2 * V * (S - 1) // S] * S
    for row in have:
        total = torch.cat([row[k] for k in range(S)])
        assert torch.allclose(total, sum(whole), rtol=1e-12, atol=1e-12)


def sent_in_a_step(N, S, R=1, wire=2):
    return 3 * (S - 1) / S * wire * N + 2 * (R - 1) / R * wire * N / S


def test_the_sums_are_nothing_beside_the_gradients():
    """The sums that the optimizers hand to adapt() are m numbers of at most 8 bytes."""
    numbers = {}
    for size in (10, 1000):
        for name in ("Prodigy", "DAdaptAdam", "DAdaptAdaGrad", "ProdigyPlusScheduleFree"):
            p = torch.nn.Parameter(torch.ones(size, dtype=torch.float64))
            optimizer, seen = getattr(prodigy, name)([p]), []
            totals = optimizer._totals

            def noting(rows):
                groups, sums = totals(rows)
                seen.extend(t for row in sums for t in row)
                return groups, sums

            optimizer._totals = noting
            p.grad = torch.ones_like(p)
            optimizer.step()
            assert all(t.dim() == 0 and t.element_size() <= 8 for t in seen)
            numbers.setdefault(name, set()).add(len(seen))
    assert numbers["Prodigy"] == {3} and all(len(m) == 1 for m in numbers.values())
    W = sent_in_a_step(10**9, 8)
    assert round(W / 1e9, 2) == 5.25 and 2 * 8 * 3 == 48
    assert sent_in_a_step(10**9, 8, R=4) > W


class Waiting:
    """The method whose sums arrive `late` steps after they were taken (0: as it is)."""

    late, post = 0, ()

    def update(self):
        while len(self.post) > max(self.late - 1, 0):
            (groups, totals), self.post = self.post[0], self.post[1:]
            super().adapt(groups, totals)
        super().update()

    def adapt(self, groups, totals):
        if self.late:
            self.post = (*self.post, (groups, totals))
        else:
            super().adapt(groups, totals)


def walk(name, late, steps=60):
    problem = problems.least_absolute(problems.gaussian((30, 12), seed=1),
                                      problems.gaussian(12, seed=2), torch.zeros(12))
    kind = type(name, (Waiting, getattr(prodigy, name)), {"late": late})
    x = torch.nn.Parameter(problem.x0.clone())
    optimizer, rows = kind([x]), []
    for _ in range(steps):
        x.grad = problem.grad(x.detach())
        optimizer.step()
        rows.append(x.detach().clone())
    return torch.stack(rows)


class Shard(prodigy.Prodigy):
    """One process: keeps its sums until the others' are there."""

    def adapt(self, groups, totals):
        self.mine = groups, totals


@pytest.mark.parametrize("S", [2, 3, 5])
def test_sums_over_pieces_give_the_d_of_the_whole(S):
    problem = problems.least_squares(problems.gaussian((20, 13), seed=1),
                                     problems.gaussian(20, seed=2))
    whole = torch.nn.Parameter(problem.x0.clone())
    alone = prodigy.Prodigy([whole])
    pieces = [torch.nn.Parameter(t.clone()) for t in problem.x0.split(-(-13 // S))]
    ranks, wrong = [Shard([piece]) for piece in pieces], 0.0
    for _ in range(50):
        whole.grad = problem.grad(whole.detach())
        alone.step()
        gradient = problem.grad(torch.cat([piece.detach() for piece in pieces]))
        for rank, piece, part in zip(ranks, pieces, gradient.split(-(-13 // S))):
            piece.grad = part.clone()
            rank.step()
        sums = [torch.stack(parts).sum(0) for parts in zip(*(r.mine[1][0] for r in ranks))]
        own = ranks[0].mine[1][0][0] / ranks[0].mine[1][0][1]  # without the others
        wrong = max(wrong, abs(own / (sums[0] / sums[1]) - 1))
        for rank in ranks:
            prodigy.Prodigy.adapt(rank, rank.mine[0], [list(sums)])
    assert alone.get_d() > 1e3 * 1e-6 and wrong > 0.01
    assert {rank.get_d() for rank in ranks} == {ranks[0].get_d()}
    assert ranks[0].get_d() == pytest.approx(alone.get_d(), rel=1e-8)
    r, s = torch.tensor([3.0, 5.0]), torch.tensor([2.0, 7.0])
    copies = torch.tensor([2.0, 1.0])  # of two tensors only one is replicated
    assert (copies * r).sum() / (copies * s).sum() != r.sum() / s.sum()


# ------------------------------------------------------------------ 4. where it hides
@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam", "DAdaptAdaGrad"])
def test_sums_may_arrive_just_before_the_next_step(name):
    now, next_step, too_late = (walk(name, late) for late in (0, 1, 2))
    assert torch.equal(now, next_step)
    assert not torch.allclose(now, too_late, rtol=1e-3, atol=1e-6)
    assert getattr(prodigy, name).look is None and prodigy.DoG.look is not None


def tree(S, alpha, B, m=3):
    return 2 * math.ceil(math.log2(S)) * (alpha + 8 * m / B)


def hidden_from(S, alpha, B, m=3):
    """Bytes of weights from which on the links are busy for longer than the sums need."""
    return 2 * S / (3 * (S - 1)) * math.ceil(math.log2(S)) * (alpha * B + 8 * m)


def test_from_which_size_on_the_sums_are_hidden():
    for S in (2, 8, 500, 4096):
        for alpha, B in ((1e-6, 1e9), (2e-5, 5e10), (1e-3, 1e11)):
            least = hidden_from(S, alpha, B)
            busy = sent_in_a_step(least / 2, S) / B
            assert tree(S, alpha, B) == pytest.approx(busy, rel=1e-12)  # tight where R = 1
            assert tree(S, alpha, B) > sent_in_a_step(0.49 * least, S) / B
            assert tree(S, alpha, B) < sent_in_a_step(least / 2, S, R=3) / B
            levels = 0
            while 2**levels < S:  # processes that one can have heard of
                levels += 1
            assert tree(S, alpha, B) == 2 * levels * (alpha + 24 / B)


def test_factors_of_pieces():
    a, b, S = 66, 44, 3
    gg = problems.gaussian((a, b), seed=5).square()
    pieces = gg.split(a // S)
    assert torch.allclose(sum(t.mean(0) for t in pieces) / S, gg.mean(0), rtol=1e-12)  # b numbers
    assert torch.allclose(torch.cat([t.mean(1) for t in pieces]), gg.mean(1), rtol=1e-12)
    assert not torch.allclose(pieces[0].mean(0), gg.mean(0), rtol=1e-2)
    p = torch.nn.Parameter(problems.gaussian((a, b), seed=6))
    optimizer = prodigy.ProdigyPlusScheduleFree([p], betas=(0.9, 0.0))  # v is this step's alone
    for scale in (1.0, 3.0):
        p.grad = scale * gg.sqrt()
        optimizer.step()
    row, col = (optimizer.state[p][f"exp_avg_sq_{name}"] for name in ("row", "col"))
    assert row.numel() + col.numel() == a + b
    shape = (gg.mean(0, keepdim=True) * gg.mean(1, keepdim=True)) / gg.mean()
    ours = row * col
    assert torch.allclose(ours / ours.mean(), shape / shape.mean(), rtol=1e-6)
    reduce, scattered = 2 * (S - 1) / S * 4 * (b + 1), (S - 1) / S * 4 * a * b
    assert reduce / scattered == pytest.approx(2 * (b + 1) / (a * b))


# ------------------------------------------------------------------ 5. the example
def kept(words_of_state, N, S):
    """GB on each process for weights, gradients and state in float32."""
    return 4 * (2 + words_of_state) * N / S / 1e9


def test_the_example_and_the_table():
    phi = 2 * 4096 / 4096**2
    columns = [2, 4, 2 + 2 / 11, 1 + 2 / 11, 1 + 2 / 11 + phi]
    rows = re.findall(r"^\| \$10\^\{(\d+)\}\$ \| (\d+) \| (.*) \|$", PAGE, re.MULTILINE)
    assert [int(power) for power, _, _ in rows] == [9, 10, 11, 12]
    for power, S, cells in rows:
        expected = [f"{kept(n, 10 ** int(power), int(S)):.2f}" for n in columns]
        assert cells.split(" | ") == expected
    N, S, alpha, B, M = 1e11, 512, 20e-6, 50e9, 2e12
    step = sent_in_a_step(N, S) / B
    adamw, prod, sliced = (4 * w * N / S / M for w in (7, 10, 7 + 3 / 11))
    said = [f"{step:.2f}$ s", f"{1e3 * tree(S, alpha, B):.2f}$ ms", f"{1e3 * adamw:.2f} ms",
            f"{1e3 * prod:.2f} ms", f"{1e3 * (sliced - adamw):.2f} ms"]
    example = PAGE.partition("## 5.")[2]
    assert all(text in example for text in said), said
    assert f"{tree(S, alpha, B) / step:.0e}" == "3e-05"
    assert f"{(prod - adamw) / step:.0e}" == "1e-04"
    assert f"{hidden_from(S, alpha, B):.1e}" == "6.0e+06"
