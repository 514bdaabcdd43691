"""Fused backward: ``step_param`` from gradient hooks gives the numbers of ``step()``."""

import pytest
import torch
import zoo

import prodigy
from prodigy.lab.cost import Peak


def takes(case):
    """One gradient is enough: it is no wrapper and does not look at all of them first."""
    return isinstance(case.cls, type) and case.cls.look is None


TAKE = [case for case in zoo.METHODS if takes(case)]
REFUSE = [case for case in zoo.METHODS if not takes(case)]
every_method = pytest.mark.parametrize("case", TAKE, ids=str)
OPTIONS = [case for case in zoo.CASES if takes(case) and not case.schedule]


class Net(torch.nn.Module):
    """Two layers that share a weight, one frozen, one never used, a scale without dimensions."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return torch.nn.Parameter((0.5 * values).to(dtype))

        self.tied, self.last, self.scale = weight(6, 6), weight(6, 40), weight()
        self.unused, self.frozen = weight(5), weight(6).requires_grad_(False)
        self.data = torch.randn(30, 6, generator=generator, dtype=torch.float64).to(dtype)

    def forward(self, x):
        x = torch.tanh(x @ self.tied + self.frozen)
        x = torch.tanh(x @ self.tied)
        return x @ self.last * self.scale

    def loss(self, step):
        x = self.data[3 * (step % 10) : 3 * (step % 10) + 3]
        return (self(x) - x.sum(1, keepdim=True)).square().mean()

    def groups(self):
        first = [self.tied, self.frozen]
        return [dict(params=first), dict(params=[self.last, self.scale, self.unused])]

    def values(self):
        return [p.detach().clone() for p in self.parameters()]


def hook(optimizer, frees=True, wanted=lambda: True):
    """The recipe of Family.step_param, freeing each gradient (in every wanted pass)."""

    def fused(p, group):
        if wanted():
            optimizer.step_param(p, group)
            if frees:
                p.grad = None

    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p, group=group: fused(p, group))


def train(case, fused, steps=12, several=True, **extra):
    """(net, optimizer, every d) after a run in either way."""
    net = Net()
    params = net.groups() if several else net.parameters()
    optimizer = case.cls(params, **{**case.kwargs, "foreach": False, **extra})
    if fused:
        hook(optimizer)
    d = []
    for step in range(steps):
        net.loss(step).backward()
        if fused:
            assert all(p.grad is None for p in net.parameters())
        optimizer.step()
        optimizer.zero_grad()
        d.append([float(group.get("d", 0.0)) for group in optimizer.param_groups])
    return net, optimizer, d


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


# the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True], ids=["one", "groups"])
@pytest.mark.parametrize("case", TAKE + OPTIONS, ids=str)
def test_fused_backward_gives_the_numbers_of_step(case, several):
    runs = [train(case, fused, several=several) for fused in (True, False)]
    (net, optimizer, d), (twin, other, e) = runs
    assert_same(net, twin)
    torch.testing.assert_close(torch.tensor(d), torch.tensor(e), rtol=1e-12, atol=0)
    counts = [[group["k"] for group in o.param_groups] for o in (optimizer, other)]
    assert counts[0] == counts[1] == [12] * len(counts[0])
    assert not torch.equal(net.tied, Net().tied)
    for name in ("unused", "frozen"):
        assert torch.equal(getattr(net, name), getattr(Net(), name))
    if hasattr(optimizer, "eval"):
        optimizer.eval()
        other.eval()
        assert_same(net, twin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@every_method
def test_fused_backward_in_low_precision(case, dtype):
    exact = dict(stochastic_rounding=False) if "Plus" in case.name else {}
    ends = []
    for fused in (True, False):
        net = Net(dtype)
        optimizer = case.cls(net.groups(), **case.kwargs, **exact, foreach=False)
        if fused:
            hook(optimizer)
        for step in range(6):
            net.loss(step).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(net.values())
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b)


@every_method
def test_gradient_accumulation_steps_in_the_last_pass_only(case):
    ends = []
    for fused in (True, False):
        net = Net()
        optimizer = case.cls(net.groups(), **case.kwargs, foreach=False)
        last = [False]
        if fused:
            hook(optimizer, wanted=lambda: last[0])
        for step in range(4):
            for part in range(3):
                last[0] = part == 2
                net.loss(3 * step + part).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(group["k"] == 4 for group in optimizer.param_groups)
        ends.append(net)
    assert_same(*ends)


@every_method
def test_parameters_without_hooks_are_stepped_by_step(case):
    ends = []
    for hooked in (("tied",), ()):
        net = Net()
        optimizer = case.cls(net.groups(), **case.kwargs, foreach=False)
        for name in hooked:
            p, group = getattr(net, name), optimizer.param_groups[0]
            p.register_post_accumulate_grad_hook(
                lambda p, group=group: optimizer.step_param(p, group))
        for step in range(6):
            net.loss(step).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(net)
    assert_same(*ends)


@every_method
def test_a_parameter_without_a_gradient_stays(case):
    net = Net()
    optimizer = case.cls(net.groups(), **case.kwargs)
    before = net.values()
    optimizer.step_param(net.unused, optimizer.param_groups[1])
    optimizer.step()
    for p, q in zip(net.parameters(), before):
        assert torch.equal(p, q)


@every_method
def test_a_frozen_group_stays(case):
    net, optimizer, _ = train(case, True, steps=3)
    tied = net.tied.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    for step in range(3):
        net.loss(step).backward()
        optimizer.step()
    assert torch.equal(net.tied, tied)
    assert not torch.equal(net.last, Net().last)


# d once per pass -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in TAKE if c.estimates_d], ids=str)
def test_d_moves_once_at_the_end_of_the_pass(case):
    """Every parameter is stepped with the old d; a second step() without gradients is none."""
    net, optimizer, _ = train(case, True, steps=8, d0=1e-2)
    groups = optimizer.param_groups

    def size():
        return [float(group[name]) for group in groups for name in ("d", "d_hat")]

    before = size()
    net.loss(8).backward()
    assert size() == before
    assert [group["k"] for group in groups] == [8, 8]
    optimizer.step()
    after = size()
    assert after != before and [group["k"] for group in groups] == [9, 9]
    values = net.values()
    optimizer.step()
    assert size() == after
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), values))
    assert [group["k"] for group in groups] == [9, 9]


# memory ----------------------------------------------------------------------------------------


def peak(fused, layers=8, width=160):
    """Peak memory of one backward pass and step over equal layers, in weights of one layer.

    They are larger than those of which a step takes many at a time.
    """
    net = [torch.nn.Linear(width, width, bias=False) for _ in range(layers)]
    model = torch.nn.Sequential(*net)
    optimizer = prodigy.ProdigyPlusScheduleFree(model.parameters())
    if fused:
        hook(optimizer)
    for _ in range(2):  # the first one makes the state
        with Peak() as memory:
            model(torch.ones(1, width)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return memory.most / (4 * width**2)


def test_peak_memory_falls_by_all_gradients_but_one():
    """Eight gradients of one size: never two of them at the same time."""
    assert peak(False) - peak(True) == pytest.approx(7, abs=0.1)


# refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REFUSE, ids=str)
def test_methods_that_need_more_than_one_gradient_refuse_in_words(case):
    net = Net()
    net.loss(0).backward()
    before = net.values()
    optimizer = zoo.make(case, net.parameters())
    name = type(optimizer).__name__
    with pytest.raises(RuntimeError, match=rf"{name} (needs|steps) .*: call step\("):
        optimizer.step_param(net.tied, optimizer.param_groups[0])
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before))
    assert {"DAdaptSGD", "ScheduleFreeWrapper"} <= {case.name.split("-")[0] for case in REFUSE}


@pytest.mark.parametrize("case", [c for c in TAKE if c.schedule_free], ids=str)
def test_schedule_free_methods_refuse_at_x(case):
    net, optimizer, _ = train(case, True, steps=2)
    optimizer.eval()
    before = net.values()
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\) before step_param\(\)"):
        net.loss(2).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\) before step\(\)"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before))
    net = Net()
    optimizer = case.cls(net.groups(), closure_form=True)
    hook(optimizer)
    with pytest.raises(RuntimeError, match=r"closure_form=True has no step_param"):
        net.loss(0).backward()


@every_method
def test_a_second_step_of_one_parameter_is_refused(case):
    net = Net()
    optimizer = case.cls(net.groups(), **case.kwargs)
    hook(optimizer, frees=False)
    net.loss(0).backward()
    values = net.values()
    with pytest.raises(RuntimeError, match="stepped already: call step"):
        net.loss(1).backward()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), values))
    optimizer.step()
    optimizer.zero_grad()
    net.loss(1).backward()
    optimizer.step()
    assert [group["k"] for group in optimizer.param_groups] == [2, 2]


@every_method
def test_a_pass_that_fails_half_way_is_reported_and_finished_by_step(case):
    """The stepped part keeps its step; the next pass says what to do; step() finishes."""
    net = Net()
    optimizer = case.cls(net.groups(), **case.kwargs)
    hook(optimizer)
    handle = net.tied.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net.loss(0).backward()
    handle.remove()
    net.tied.grad = None
    assert torch.equal(net.tied, Net().tied)
    with pytest.raises(RuntimeError, match="one that failed too"):
        net.loss(1).backward()
    optimizer.step()
    optimizer.zero_grad()
    net.loss(1).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())
    assert [group["k"] for group in optimizer.param_groups] == [1, 2]


@every_method
def test_a_wrong_gradient_is_refused_before_its_parameter_is_written(case):
    net = Net()
    optimizer = case.cls(net.groups(), **case.kwargs)
    before = net.values()
    net.tied.grad = torch.ones_like(net.tied).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        optimizer.step_param(net.tied, optimizer.param_groups[0])
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before))
    assert not optimizer.state[net.tied]


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree",
                                  "ProdigyPlusScheduleFree"])
def test_a_beta_that_changes_is_followed_as_in_step(name):
    ends = []
    for fused in (True, False):
        net = Net()
        optimizer = getattr(prodigy, name)(net.groups(), lr=0.05, foreach=False)
        if fused:
            hook(optimizer)
        for step in range(9):
            for group in optimizer.param_groups:
                beta = 0.9 - 0.05 * step
                if "momentum" in group:
                    group["momentum"] = beta
                else:
                    group["betas"] = (beta, 0.99)
            net.loss(step).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.eval()
        ends.append(net)
    for p, q in zip(ends[0].parameters(), ends[1].parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_a_hook_outlives_load_state_dict():
    """torch.optim replaces the groups there; the hook was given one of the old ones."""
    ends = []
    for load in (False, True):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = prodigy.Prodigy([p], d0=1e-3)
        for group in optimizer.param_groups:
            p.register_post_accumulate_grad_hook(lambda q, g=group: optimizer.step_param(q, g))
        if load:
            optimizer.load_state_dict(optimizer.state_dict())
        for _ in range(30):
            optimizer.zero_grad()
            (p - 1.5).square().sum().backward()
            optimizer.step()
        ends.append((p.tolist(), optimizer.get_d(), optimizer.param_groups[0]["k"]))
    assert ends[0] == ends[1] and ends[1][2] == 30
