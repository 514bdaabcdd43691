"""ProdigyPlusScheduleFree against prodigy-plus-schedule-free 2.0.1, and where they differ.

2.0.1 computes in float32 whatever comes in, so both run in float32 for 25 steps, and what is
compared is the difference over the distance moved. There p0 and s are bfloat16; in these runs
they are as wide as the weights, as ours are. A second comparison gives its modules float64 where
they say float32, and asks for 1e-8: in float32 a sign (Grams, C-Optim, FOCUS) may fall either way.
"""

import contextlib
import copy
import io
import math
import pickle
import random
import warnings
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import zoo
from golden import make as golden
from prodigyplus import ProdigyPlusScheduleFree as Reference
from prodigyplus import core_optimiser, prodigy_plus_schedulefree

import prodigy
from prodigy import ProdigyPlusScheduleFree, pieces
from prodigy.plus import EARLIER, EXCLUSIONS, SLICE

SHAPES = [(20, 64), (33,), (4,), (8, 40, 3, 3), (5, 7), (48, 48)]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the distance moved


class ReferenceWide(Reference):
    """2.0.1 with p0 and s in the dtype of the weights, and FOCUS's average of the weights."""

    def update_second_moment(self, state, group, grad, beta2, w, return_denom=True,
                             denom_before_update=False):
        if not group["use_focus"]:
            return super().update_second_moment(state, group, grad, beta2, w, return_denom,
                                                denom_before_update)
        beta2 = group["betas"][1]
        beta2 = 1 - (1 - beta2) / (1 - beta2 ** group["k"])
        before = self.get_denom(state, group)
        state["exp_avg_sq"].mul_(beta2).add_(w, alpha=1 - beta2)
        return before if denom_before_update else self.get_denom(state, group)

    def initialise_state_internal(self, p, group):
        state, fresh = super().initialise_state_internal(p, group)
        if fresh:
            state["p0"] = p.detach().ravel()[::SLICE].clone()
            if "s" in state:
                state["s"] = torch.zeros_like(state["p0"])
        return state, fresh


def quietly(build, *args, **kwargs):
    """Without the reference's prints and our warnings."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(*args, **kwargs)


class Pull:
    """Noisy gradients of sum_j a_j (p_j - b_j)^2 / 2, the same for everybody."""

    def __init__(self, shapes=SHAPES, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.params = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
        self.params = [torch.nn.Parameter(p) for p in self.params]
        self.targets = [torch.randn(s, generator=generator) for s in shapes]
        self.start = self.now()

    def now(self):
        return torch.cat([p.detach().double().flatten() for p in self.params])

    @torch.no_grad()
    def fill(self, step):
        generator = torch.Generator().manual_seed(1000 + step)
        for p, target in zip(self.params, self.targets):
            slopes = torch.linspace(0.1, 1, p.numel()).view(p.shape)
            noise = 0.1 * torch.randn(p.shape, generator=generator)
            p.grad = ((p.double() - target) * slopes + noise).to(p.dtype)

    def walk(self, optimizer, steps):
        for step in steps:
            self.fill(step)
            if optimizer.param_groups[0]["fused_back_pass"]:
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        optimizer.step_param(p, group)
            quietly(optimizer.step)
        return self

    def deal(self, groups):
        return zoo.deal(self.params, groups)


def trajectory(build, options, groups=(), steps=25, **problem):
    """(start, y, x, every d) of a run."""
    pull = Pull(**problem)
    optimizer = quietly(build, pull.deal(groups), **{"d0": 1e-3, **options})
    pull.walk(optimizer, range(steps))
    y = pull.now()
    optimizer.eval()
    d = torch.tensor([float(group["d"]) for group in optimizer.param_groups])
    return pull.start, y, pull.now(), d


class Wide:
    """The module torch, where float32 is float64."""

    def __getattr__(self, name):
        return torch.float64 if name == "float32" else getattr(torch, name)


@contextlib.contextmanager
def computing_in(dtype):
    """Within the block 2.0.1 computes in dtype: float32, as it is written, or float64."""
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            for module in (core_optimiser, prodigy_plus_schedulefree):
                patch.setattr(module, "torch", Wide())
        yield


def agree(options, groups=(), dtype=torch.float32, **more):
    """Ours and 2.0.1: y and x over the distance moved, and every d, relatively."""
    with computing_in(dtype):
        start, y, x, d = trajectory(ReferenceWide, options, groups, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:  # its 4/pi has eight digits
        patch.setattr(pieces, "math", SimpleNamespace(**{**vars(math), "pi": 4 / 1.2732395}))
        ours = trajectory(ProdigyPlusScheduleFree, {**options, **more}, groups, dtype=dtype)
    assert (y - start).norm() > 1e-3
    errors = [float((a - b).norm() / (b - start).norm()) for a, b in zip(ours[1:3], (y, x))]
    errors += [float((our_d / their_d - 1).abs()) for our_d, their_d in zip(ours[3], d)]
    assert max(errors) < TOLERANCE[dtype], (options, groups, errors)


# parity ----------------------------------------------------------------------------------------

ALONE = [
    {},
    dict(lr=0.5),
    dict(betas=(0.8, 0.95)),
    dict(beta3=0.9),
    dict(weight_decay=0.1),
    dict(weight_decay=0.01, weight_decay_by_lr=False),
    dict(d0=1e-2),
    dict(d_coef=2.0),
    dict(d_limiter=False),
    dict(prodigy_steps=10),
    dict(schedulefree_c=8.0),
    dict(eps=1e-2),
    dict(eps=None),
    dict(factored=False),
    dict(factored_fp32=False),
    dict(use_bias_correction=True),
    dict(use_stableadamw=False),
    dict(use_schedulefree=False),
    dict(use_speed=True),
    dict(stochastic_rounding=False),
    dict(fused_back_pass=True),
    dict(use_cautious=True),
    dict(use_grams=True),
    dict(use_adopt=True),
    dict(use_orthograd=True),
    dict(use_focus=True),
    dict(use_schedulefree=False, use_grams=True),
    dict(use_schedulefree=False, use_focus=True),
    dict(use_schedulefree=False, eps=None),
]
FLAGS = ["use_bias_correction", "use_speed", "use_cautious", "use_grams", "use_adopt"]
FLAGS += ["use_orthograd", "use_focus", "split_groups_mean"]
VALUES = dict(
    lr=[0.5, 2.0],
    betas=[(0.8, 0.95), (0.95, 0.99)],
    beta3=[0.9],
    weight_decay=[0.01, 0.1],
    d0=[1e-2, 1e-1],
    d_coef=[0.5, 2.0],
    prodigy_steps=[5, 15],
    schedulefree_c=[2.0, 20.0],
    eps=[None, 1e-3],
    weight_decay_by_lr=[False],
    d_limiter=[False],
    split_groups=[False],
    factored=[False],
    use_stableadamw=[False],
    use_schedulefree=[False],
)
TWO = ({}, {})
OWN = ({"weight_decay": 0.1, "betas": (0.8, 0.95)}, {"d_coef": 2.0, "lr": 0.5})


def draw(generator):
    """A set of options that 2.0.1 gets right, and groups for it."""
    options = {name: True for name in FLAGS if generator.random() < 0.25}
    for name, values in VALUES.items():
        if generator.random() < 0.25:
            options[name] = generator.choice(values)
    if options.get("use_schedulefree") is False:
        options.pop("use_cautious", None)
        options.pop("use_adopt", None)
    if options.get("weight_decay_by_lr") is False:
        options["weight_decay"] = 0.01
    return options, generator.choice([(), TWO])


def drawn_sets(seed):
    generator = random.Random(seed)
    return [draw(generator) for _ in range(40)]


OPTION_SETS = drawn_sets(0)
# FOCUS takes signs of differences that are 0 but for rounding: only float64 agrees there
ROUNDED_SETS = [row for row in OPTION_SETS if not row[0].get("use_focus")]


def pytest_generate_tests(metafunc):
    if "drawn" in metafunc.fixturenames:
        seed = metafunc.config.getoption("--plus-seed")
        metafunc.parametrize("drawn", drawn_sets(seed), ids=[f"set{i}" for i in range(40)])


def label(options):
    return "-".join(f"{name}={value}" for name, value in options.items()) or "defaults"


either_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@either_dtype
@pytest.mark.parametrize("options", ALONE, ids=label)
def test_agrees_with_the_reference(options, dtype):
    agree(options, dtype=dtype)


def test_agrees_with_the_reference_on_drawn_options(drawn):
    agree(*drawn, dtype=torch.float64)


@pytest.mark.parametrize("options, groups", ROUNDED_SETS)
def test_agrees_with_the_reference_on_option_sets_in_float32(options, groups):
    agree(options, groups)


SHARED = [dict(split_groups=False), dict(split_groups=False, prodigy_steps=10)]
SHARED += [dict(split_groups=False, use_speed=True)]
SPLIT = [{}, dict(split_groups_mean=True), dict(use_speed=True), dict(use_schedulefree=False)]
SEVERAL = [(options, TWO) for options in SHARED + SPLIT]
SEVERAL += [(options, OWN) for options in SPLIT]


@either_dtype
@pytest.mark.parametrize("options, groups", SEVERAL)
def test_agrees_with_the_reference_on_several_groups(options, groups, dtype):
    agree(options, groups, dtype)


@pytest.mark.parametrize("mode", [{"foreach": True}, {"capturable": True}], ids=label)
@pytest.mark.parametrize("options", [{}, dict(use_speed=True, use_orthograd=True)], ids=label)
def test_agrees_with_the_reference_however_it_runs(options, mode):
    agree(options, dtype=torch.float64, **mode)


def test_every_argument_has_the_references_default():
    """By its own word: the constructor of 2.0.1."""
    theirs = quietly(Reference, Pull().params).defaults
    ours = ProdigyPlusScheduleFree(Pull().params).defaults
    code = Reference.__init__.__code__
    names = code.co_varnames[2 : code.co_argcount]
    assert len(names) == 26
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


# departures ------------------------------------------------------------------------------------


def test_every_departure_from_the_reference_is_listed():
    names = [name for name in globals() if name.startswith("test_departure_plus_")]
    listed = [row.test for row in zoo.DEPARTURES if row.reference == "prodigyplus"]
    assert sorted(names) == sorted(listed)


def one_step(build, g, start=None, steps=1, **options):
    """How far z (or x) moves with the gradient g, and the state."""
    g = torch.as_tensor(g)
    p = torch.nn.Parameter(torch.ones_like(g) if start is None else start.clone())
    optimizer = quietly(build, [p], **{"d0": 0.1, "use_stableadamw": False, **options})
    before = p.detach().clone()
    for _ in range(steps):
        p.grad = g.clone()
        quietly(optimizer.step)
    state = optimizer.state[p]
    return state.get("z", p).detach() - before, state


def test_departure_plus_factored_tall():
    """A rank-one second moment is exact in two vectors; there a tall matrix keeps one of them."""
    a, b = torch.linspace(1, 4, 64), torch.linspace(1, 3, 20)
    for build in (ProdigyPlusScheduleFree, Reference):
        for g in (a[:, None] * b, b[:, None] * a):
            move, _ = one_step(build, g)
            exact = torch.full_like(g, -0.1 / (1 - 0.99) ** 0.5)
            tall = g.shape[0] > g.shape[1]
            same = torch.allclose(move, exact, rtol=1e-4)
            assert same == (build is ProdigyPlusScheduleFree or not tall)


def test_departure_plus_cautious_goes_uphill():
    """Without Schedule-Free: ours masks the average and goes downhill, there the mask is lost."""
    g = torch.tensor([1.0, -1.0, 2.0, -2.0])
    for build in (ProdigyPlusScheduleFree, Reference):
        move, _ = one_step(build, g, use_schedulefree=False, use_cautious=True)
        assert torch.equal(move * g < 0, torch.tensor([True] * 4 if build is not Reference
                                                      else [True, False] * 2))


def test_cautious_without_schedulefree_masks_the_average():
    """m = 0.9 (0.1 g_1) + 0.1 g_2 (times d): entries against g_2 stay, the rest are scaled up."""
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    options = dict(use_schedulefree=False, use_cautious=True, use_stableadamw=False, d_coef=1e-9)
    optimizer = ProdigyPlusScheduleFree([p], d0=0.1, eps=1e-30, **options)
    g1 = torch.tensor([3.0, 3.0, -3.0, -3.0], dtype=torch.float64)
    g2 = torch.tensor([1.0, -1.0, -1.0, -2.0], dtype=torch.float64)
    for g in (g1, g2):
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
    m, v = 0.09 * g1 + 0.1 * g2, 0.01 * (0.99 * g1.square() + g2.square())
    expected = -0.1 * m / v.sqrt() * torch.tensor([1, 0, 1, 1]) * 4 / 3
    torch.testing.assert_close(p.detach() - before, expected)


def test_departure_plus_orthograd_one_entry():
    """One entry has no direction but along x: ours stays, there rounding noise is scaled up."""
    moved = {}
    for build in (ProdigyPlusScheduleFree, Reference):
        rows = [one_step(build, [float(g)], torch.tensor([float(x)]), use_orthograd=True)[0]
                for g in (0.3, 0.7, 1.1, 1.9) for x in (0.3, 0.7, 1.3)]
        moved[build] = max(float(row.abs()) for row in rows)
    assert moved[ProdigyPlusScheduleFree] == 0
    assert moved[Reference] > 0.5


def run_of(build, gradients, groups=1, **options):
    """The optimizer and its parameters, of four zeros, after steps with these gradients."""
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in gradients[0]]
    deal = [{"params": params}] if groups == 1 else [{"params": [p]} for p in params]
    optimizer = quietly(build, deal, **options)
    for row in gradients:
        for p, g in zip(params, row):
            p.grad = None if g is None else torch.full((4,), g)
        quietly(optimizer.step)
    return optimizer, params


def test_departure_plus_adopt_late_entries():
    """A first gradient that is zero or missing, as that of LoRA's A: the next one is no step."""
    for first in (0.0, None):
        for build in (ProdigyPlusScheduleFree, Reference):
            rows = [(0.1, first)] + [(0.1, 0.1)] * 2
            _, (usual, late) = run_of(build, rows[:2], use_adopt=True, d0=1e-3)
            assert 0 < usual.abs().max() < 2e-3
            far = float(late.detach().abs().max())
            assert far == 0 if build is ProdigyPlusScheduleFree else far > 1
        _, (_, late) = run_of(ProdigyPlusScheduleFree, rows, use_adopt=True, d0=1e-3)
        assert 0 < late.abs().max() < 2e-3


def test_departure_plus_focus():
    """Weights that do not move are their own average: nothing draws them anywhere."""
    for build in (ProdigyPlusScheduleFree, Reference):
        p = torch.nn.Parameter(torch.ones(4))
        optimizer = quietly(build, [p], use_focus=True, use_schedulefree=False, d0=1e-3)
        for _ in range(50):
            p.grad = torch.zeros(4)
            quietly(optimizer.step)
        assert torch.equal(p, torch.ones(4)) == (build is ProdigyPlusScheduleFree)


def test_departure_plus_missing_gradient():
    for build in (ProdigyPlusScheduleFree, Reference):
        u, v = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        optimizer = quietly(build, [u, v], d0=1e-3, d_limiter=False)
        for k in range(200):
            u.grad = None if k % 2 else 100 * (u.detach() - 1).sign()
            v.grad = (v.detach() - 1).sign()
            quietly(optimizer.step)
        d = float(optimizer.param_groups[0]["d"])
        assert d < 1 if build is ProdigyPlusScheduleFree else d > 3  # D_inf = 1


@pytest.mark.parametrize("frozen", ["lr", "gradient", "capturable"])
def test_departure_plus_mean_of_what_moves(frozen):
    ends = {}
    for build in (ProdigyPlusScheduleFree, Reference):
        if frozen == "capturable" and build is Reference:
            continue
        more = {}
        if frozen == "capturable":
            more = dict(capturable=True)
        params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
        deal = [{"params": params[:1]}, {"params": params[1:]}]
        if frozen != "gradient":
            deal[1]["lr"] = torch.tensor(0.0) if frozen == "capturable" else 0.0
        optimizer = quietly(build, deal, split_groups_mean=True, **more)
        for _ in range(60):
            for p in params[: 1 if frozen == "gradient" else 2]:
                p.grad = torch.ones(4)
            quietly(optimizer.step)
        ends[build] = float(optimizer.param_groups[0]["shared_d"])
    assert ends[ProdigyPlusScheduleFree] == pytest.approx(1e-6 * 2**(59 / 4), rel=0.5)
    assert ends.get(Reference, 0) < 1e-5


def test_departure_plus_adopt_without_schedulefree():
    """There steps shrink with d^2 and d stays at d0; ours are ADOPT's: m of clipped g/sqrt(v)."""
    options = dict(use_adopt=True, use_schedulefree=False, d0=1e-6)
    for build in (ProdigyPlusScheduleFree, Reference):
        _, _, _, d = trajectory(build, options, steps=60)
        assert (float(d) > 1e-4) == (build is ProdigyPlusScheduleFree)
    fixed = dict(use_adopt=True, use_schedulefree=False, factored=False, d_coef=1e-9, eps=1e-30)
    pull = Pull(dtype=torch.float64)
    optimizer = ProdigyPlusScheduleFree(pull.params, d0=0.1, use_stableadamw=False, **fixed)
    pull.walk(optimizer, range(8))
    ours = pull.now()
    pull = Pull(dtype=torch.float64)
    m = v = None
    for k in range(1, 9):  # ADOPT, Alg. 2 of 2411.02853, with the step size 0.1
        pull.fill(k - 1)
        gs = [p.grad for p in pull.params]
        if k == 1:
            m, v = [0 * g for g in gs], [g.square() for g in gs]
            continue
        for i, (p, g) in enumerate(zip(pull.params, gs)):
            m[i] = 0.9 * m[i] + 0.1 * (g / v[i].sqrt()).clamp(-(k**0.25), k**0.25)
            p.data -= 0.1 * m[i]
            v[i] = 0.99 * v[i] + 0.01 * g.square()
    torch.testing.assert_close(ours, pull.now())


def test_departure_plus_starting_point():
    """p0 in bfloat16 makes x0 - x nonzero before anything moved: noise alone moves d there."""
    grown = {ProdigyPlusScheduleFree: [], Reference: []}
    for build, ds in grown.items():
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            p = torch.nn.Parameter(torch.randn(64, 64, generator=generator))
            optimizer = quietly(build, [p])
            for _ in range(3):
                p.grad = torch.randn(64, 64, generator=generator)
                quietly(optimizer.step)
            ds.append(float(optimizer.param_groups[0]["d"]) > 1.01e-6)
    assert sum(grown[Reference]) >= 2 and sum(grown[ProdigyPlusScheduleFree]) == 0


def test_departure_plus_float64():
    """float64 weights: a step of 1e-12 beside 1 is kept; there they are rounded to float32."""
    for build in (ProdigyPlusScheduleFree, Reference):
        third = torch.full((3,), 1 / 3, dtype=torch.float64)
        p = torch.nn.Parameter(third.clone())
        optimizer = quietly(build, [p], d0=1e-12)
        p.grad = torch.ones_like(p)
        quietly(optimizer.step)
        moved = float((p.detach() - third).abs().max())
        assert (1e-13 < moved < 1e-10) == (build is ProdigyPlusScheduleFree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_departure_plus_resume(dtype):
    """There loading recasts p0 and s (float32 weights) or the factors (bfloat16 weights)."""
    kinds = {}
    for build in (ProdigyPlusScheduleFree, Reference):
        pull = Pull(dtype=dtype)
        optimizer = quietly(build, pull.params)
        pull.walk(optimizer, range(3))
        before = [{k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)}
                  for p in pull.params]
        quietly(optimizer.load_state_dict, copy.deepcopy(optimizer.state_dict()))
        after = [optimizer.state[p] for p in pull.params]
        kinds[build] = all(a[k].dtype == v.dtype and torch.equal(a[k], v)
                           for a, b in zip(after, before) for k, v in b.items())
    assert kinds == {ProdigyPlusScheduleFree: True, Reference: False}


def test_departure_plus_prints(capsys):
    """Exclusions are warnings; there they are printed, as are prodigy_steps and more."""
    for build in (ProdigyPlusScheduleFree, Reference):
        pull = Pull()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = build(pull.params, eps=None, use_focus=True, prodigy_steps=2)
        for step in range(3):
            pull.fill(step)
            optimizer.step()
        assert bool(capsys.readouterr().out) == (build is Reference)


def test_departure_plus_nonfinite():
    for build in (ProdigyPlusScheduleFree, Reference):
        pull = Pull()
        optimizer = quietly(build, pull.params)
        pull.walk(optimizer, range(2))
        pull.fill(2)
        pull.params[0].grad[0, 0] = math.nan
        quietly(optimizer.step)
        pull.walk(optimizer, range(3, 20))
        lives = pull.now().isfinite().all() and float(optimizer.param_groups[0]["d"]) > 2e-6
        assert lives == (build is ProdigyPlusScheduleFree)


def test_departure_plus_groups():
    """Empty groups and groups added later run; there IndexError and KeyError."""
    for build in (ProdigyPlusScheduleFree, Reference):
        ours = build is ProdigyPlusScheduleFree
        pull = Pull()
        with contextlib.nullcontext() if ours else pytest.raises(IndexError):
            optimizer = quietly(build, [dict(params=[]), dict(params=pull.params)])
            pull.walk(optimizer, range(2))
        pull = Pull()
        optimizer = quietly(build, zoo.deal(pull.params[:4], TWO))
        pull.walk(optimizer, range(2))
        with contextlib.nullcontext() if ours else pytest.raises(KeyError):
            optimizer.add_param_group(dict(params=pull.params[4:]))
            pull.walk(optimizer, range(2, 4))


def test_departure_plus_copies():
    """A pickled optimizer goes on as the original; there it cannot step."""
    for build in (ProdigyPlusScheduleFree, Reference):
        ours = build is ProdigyPlusScheduleFree
        pull = Pull()
        optimizer = quietly(build, pull.params)
        pull.walk(optimizer, range(3))
        twin, params = pickle.loads(pickle.dumps((optimizer, pull.params)))
        pull.walk(optimizer, range(3, 6))
        end = pull.now()
        pull.params = params
        with contextlib.nullcontext() if ours else pytest.raises(AttributeError):
            pull.walk(twin, range(3, 6))
            assert torch.equal(pull.now(), end)


def test_departure_plus_beta_change():
    """x does not depend on the beta set just before eval()."""
    for build in (ProdigyPlusScheduleFree, Reference):
        ends = []
        for beta in (0.9, 0.5):
            pull = Pull(dtype=torch.float64)
            optimizer = quietly(build, pull.params, d0=1e-2)
            pull.walk(optimizer, range(10))
            optimizer.param_groups[0]["betas"] = (beta, 0.99)
            optimizer.eval()
            ends.append(pull.now())
        assert (zoo.error(*ends) < 1e-12) == (build is ProdigyPlusScheduleFree)


def test_departure_plus_lr_ratios():
    """Groups that share d: two rates are one problem of one rate after x = rho u."""
    ratio, shapes = 0.25, [(33,), (5, 7)]
    options = dict(split_groups=False, factored=False, use_stableadamw=False, d0=1e-3, eps=1e-30)
    options["d_limiter"] = False
    for build in (ProdigyPlusScheduleFree, ReferenceWide):
        with computing_in(torch.float64 if build is ReferenceWide else torch.float32):
            twin = Pull(shapes, torch.float64)
            us = [torch.nn.Parameter(p.detach() / c) for p, c in zip(twin.params, (1, ratio))]
            single = quietly(build, us, **options)
            other = Pull(shapes, torch.float64)
            shared = quietly(build, other.deal(({}, {"lr": ratio})), **options)
            for step in range(25):
                for u, p, c in zip(us, twin.params, (1, ratio)):
                    p.data.copy_(c * u)
                twin.fill(step)
                for u, p, c in zip(us, twin.params, (1, ratio)):
                    u.grad = c * p.grad
                quietly(single.step)
            other.walk(shared, range(25))
        d, alone = (float(o.param_groups[0]["d"]) for o in (shared, single))
        assert (abs(d / alone - 1) < 1e-8) == (build is ProdigyPlusScheduleFree)


# exclusions and ranges -------------------------------------------------------------------------

EXCLUDED = [
    (dict(use_cautious=True, use_grams=True), "use_grams", r"use_cautious excludes use_grams"),
    (dict(use_focus=True), "factored", r"use_focus excludes factored"),
    (dict(use_focus=True, factored=False, use_muon_pp=True), "use_muon_pp",
     r"use_focus excludes use_muon_pp"),
    (dict(eps=None), "use_stableadamw", r"eps is None excludes use_stableadamw"),
]


@pytest.mark.parametrize("options, off, words", EXCLUDED, ids=[row[1] for row in EXCLUDED])
def test_what_excludes_another_says_so_once_and_turns_it_off(options, off, words):
    with pytest.warns(UserWarning, match=f"^{words}: {off} is off$") as caught:
        optimizer = ProdigyPlusScheduleFree(Pull().params, **options)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert optimizer.param_groups[0][off] is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pull = Pull()
        pull.walk(ProdigyPlusScheduleFree(pull.params, **{**options, off: False}), range(2))
    assert len(EXCLUDED) == len(EXCLUSIONS)
    assert off in {row[2] for row in EXCLUSIONS}


@pytest.mark.parametrize("name, value", [("eps", 0.0), ("eps", -1e-8), ("d0", 0.0)]
                         + [("d_coef", 0.0), ("prodigy_steps", -1), ("schedulefree_c", -1.0)]
                         + [("beta3", 1.0), ("weight_decay", -0.1), ("lr", -1.0)])
def test_numbers_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must lie in "):
        ProdigyPlusScheduleFree(Pull().params, **{name: value})


def test_a_limiter_that_never_lets_go_is_named():
    with pytest.warns(UserWarning, match="keeps d at d0: pass d_limiter=False"):
        ProdigyPlusScheduleFree(Pull().params, d_coef=0.84)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProdigyPlusScheduleFree(Pull().params, d_coef=0.85)
        ProdigyPlusScheduleFree(Pull().params, d_coef=0.5, d_limiter=False)


def test_steps_are_counted_on_the_host():
    for options in (dict(use_adopt=True), dict(prodigy_steps=3)):
        with pytest.raises(ValueError, match="not with capturable=True"):
            ProdigyPlusScheduleFree(Pull().params, capturable=True, **options)
    with pytest.raises(ValueError, match=r"betas\[0\] = 0"):
        ProdigyPlusScheduleFree(Pull().params, betas=(0.0, 0.99))
    ProdigyPlusScheduleFree(Pull().params, betas=(0.0, 0.99), use_schedulefree=False)


def test_the_earlier_defaults_are_a_preset():
    optimizer = ProdigyPlusScheduleFree(Pull().params, **EARLIER)
    assert {name: optimizer.defaults[name] for name in EARLIER} == EARLIER


# memory ----------------------------------------------------------------------------------------


def square(dtype=torch.float32, **options):
    p = torch.nn.Parameter(torch.ones(1024, 1024, dtype=dtype))
    optimizer = quietly(ProdigyPlusScheduleFree, [p], **options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return p, optimizer


def test_memory_for_each_entry_of_a_matrix():
    for options, words in (({}, 1 + 2 / 1024 + 2 / 11), (dict(factored=False), 2 + 2 / 11)):
        assert square(**options)[1].state_bytes() / 4 == pytest.approx(words, rel=1e-5)
    assert square()[1].state_bytes() / 4 <= 1.2
    assert square(use_speed=True)[1].state_bytes() / 4 < 1.1
    narrow = square(torch.bfloat16)[1].state_bytes()
    exact = square(torch.bfloat16, stochastic_rounding=False)[1].state_bytes()
    assert narrow < 2.8  # and with z in float32, the residual, p0 in the place of x0 - z:
    assert exact == pytest.approx(narrow + 4 - 2 / 11, rel=1e-6)


def test_state_bytes_counts_every_method():
    p = torch.nn.Parameter(torch.ones(10_000))
    p.grad = torch.ones(10_000)
    wrapped = prodigy.ScheduleFreeWrapper(torch.optim.SGD([p], lr=0.1, momentum=0.9))
    for optimizer, size in ((prodigy.Prodigy([p]), 16), (prodigy.SGD([p]), 0), (wrapped, 8)):
        assert optimizer.state_bytes() == 0
        optimizer.step()
        assert optimizer.state_bytes() == pytest.approx(size, abs=1e-3)  # and a step count


@pytest.mark.parametrize("options", [{}, dict(use_speed=True), dict(use_schedulefree=False)])
def test_prodigy_steps_frees_p0_and_s_and_d_stays(options):
    pull = Pull()
    optimizer = ProdigyPlusScheduleFree(pull.params, prodigy_steps=8, d0=1e-3, **options)
    pull.walk(optimizer, range(7))
    d = float(optimizer.param_groups[0]["d"])
    assert d > 1e-3 and all("p0" in optimizer.state[p] for p in pull.params)
    before, there = optimizer.state_bytes(), pull.now()
    pull.walk(optimizer, range(7, 20))
    assert float(optimizer.param_groups[0]["d"]) == d
    assert not any({"p0", "s"} & optimizer.state[p].keys() for p in pull.params)
    assert optimizer.state_bytes() < before - 0.3
    assert not torch.equal(pull.now(), there)


# bfloat16 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(use_schedulefree=False)])
def test_a_starting_point_saved_beside_bfloat16_weights_becomes_the_way_from_it(options):
    pull = Pull(dtype=torch.bfloat16)
    optimizer = ProdigyPlusScheduleFree(pull.params, d0=0.01, **options)
    pull.walk(optimizer, range(3))
    saved, p = optimizer.state_dict(), pull.params[0]
    point = optimizer.state[p].get("z", p).clone()
    saved["state"][0].pop("away")
    saved["state"][0]["p0"] = torch.zeros_like(pieces.every(p, SLICE))
    optimizer.load_state_dict(saved)
    p.grad = torch.zeros_like(p)
    group = optimizer.param_groups[0]
    optimizer._ready(group, p, optimizer.buffers(group))
    assert "p0" not in optimizer.state[p]
    assert torch.equal(optimizer.state[p]["away"], -pieces.every(point, SLICE).float())


PRECISIONS = [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)]
PRECISIONS += [(torch.float16, True)]
every_precision = pytest.mark.parametrize("dtype, stochastic", PRECISIONS, ids=str)


@every_precision
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("options", [{}, dict(use_speed=True), dict(use_schedulefree=False)])
def test_runs_repeat_and_resume_bit_for_bit(dtype, stochastic, foreach, options):
    kwargs = dict(stochastic_rounding=stochastic, foreach=foreach, **options)
    ends = []
    for resumes in (False, False, True):
        torch.manual_seed(len(ends))  # the noise is the optimizer's own
        pull = Pull(dtype=dtype)
        optimizer = ProdigyPlusScheduleFree(pull.deal(TWO), **kwargs)
        pull.walk(optimizer, range(6))
        if resumes:
            file = io.BytesIO()
            torch.save([optimizer.state_dict(), [p.detach() for p in pull.params]], file)
            file.seek(0)
            saved, values = torch.load(file, weights_only=True)
            pull.params = [torch.nn.Parameter(value) for value in values]
            optimizer = ProdigyPlusScheduleFree(pull.deal(TWO), **kwargs)
            optimizer.load_state_dict(saved)
        pull.walk(optimizer, range(6, 12))
        y = pull.now()
        optimizer.eval()
        ends.append(torch.cat([y, pull.now(), optimizer.param_groups[0]["d"].view(1).double()]))
    assert not torch.equal(ends[0][: len(pull.start)], pull.start)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_the_noise_differs_between_steps_groups_and_tensors():
    """The same numbers everywhere: rounded up with another chance each time."""
    shapes = [(200,), (200,), (50, 40), (200,)]  # the matrix is factored
    params = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]
    options = dict(d0=1e-3, d_coef=1e-9)
    optimizer = ProdigyPlusScheduleFree(zoo.deal(params, TWO), **options)
    rounded_down = []
    for _ in range(2):
        for p in params:
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step()
        rounded_down += [(p.detach() < 1).flatten()[:200] for p in params]
    for i, a in enumerate(rounded_down):
        assert 0 < a.sum() < 200
        assert not any(torch.equal(a, b) for b in rounded_down[:i])


# checkpoints of 2.0.1 --------------------------------------------------------------------------

SAVED = [{}, dict(use_speed=True), dict(use_schedulefree=False, weight_decay=0.1)]
SAVED += [dict(use_bias_correction=True, schedulefree_c=8.0), dict(split_groups=False)]
SAVED += [dict(split_groups_mean=True), dict(prodigy_steps=8), dict(factored=False, eps=None)]


@either_dtype
@pytest.mark.parametrize("groups", [(), TWO], ids=["one", "two"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("options", SAVED, ids=label)
def test_a_checkpoint_of_the_reference_continues_as_there(options, mode, groups, dtype):
    """10 steps there, 15 more here, against 25 there; one tensor starts at zero, where 2.0.1
    keeps p0 as a number."""
    with computing_in(dtype):
        there = Pull(dtype=dtype)
        there.params[4].data.zero_()
        start = there.now()
        optimizer = quietly(ReferenceZero, there.deal(groups), **{"d0": 1e-3, **options})
        there.walk(optimizer, range(10))
        if mode == "eval":
            optimizer.eval()
        saved = copy.deepcopy(optimizer.state_dict())
        here = Pull(dtype=dtype)
        for p, q in zip(here.params, there.params):
            p.data.copy_(q)
        optimizer.train()
        there.walk(optimizer, range(10, 25))
        optimizer.eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "math", SimpleNamespace(**{**vars(math), "pi": 4 / 1.2732395}))
        loaded = ProdigyPlusScheduleFree(here.deal(groups))
        loaded.load_state_dict(saved)
        loaded.train()
        here.walk(loaded, range(10, 25))
        loaded.eval()
    error = (here.now() - there.now()).norm() / (there.now() - start).norm()
    assert error < TOLERANCE[dtype]
    assert float(loaded.param_groups[-1]["d"]) == pytest.approx(
        float(optimizer.param_groups[-1]["d"]), rel=1e-5)


class ReferenceZero(ReferenceWide):
    """2.0.1 with wide p0 and s, and p0 of zeros as one number."""

    def initialise_state_internal(self, p, group):
        state, fresh = super().initialise_state_internal(p, group)
        if fresh and not p.any():
            state["p0"] = torch.zeros((), dtype=p.dtype)
        return state, fresh


def test_a_bfloat16_checkpoint_of_the_reference_loads_as_it_is():
    """Its p0 and s beside float32 weights are bfloat16: they stay what they are, and it runs."""
    there = Pull()
    optimizer = quietly(Reference, there.params, d0=1e-3)
    there.walk(optimizer, range(5))
    here = Pull()
    for p, q in zip(here.params, there.params):
        p.data.copy_(q)
    loaded = ProdigyPlusScheduleFree(here.params)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    there.walk(optimizer, range(5, 25))
    here.walk(loaded, range(5, 25))
    error = (here.now() - there.now()).norm() / (there.now() - there.start).norm()
    assert error < 1e-2  # from here on s is float32


# options of earlier releases -------------------------------------------------------------------

GOLDEN = {path.stem: pd.read_csv(path, keep_default_na=False, dtype={"run": str})
          for path in Path(golden.__file__).parent.glob("*.csv")}
RUNS = [(release, run) for release, runs in golden.RUNS.items() for run in runs]


class Replayed(ProdigyPlusScheduleFree):
    """Takes d from a record: 1.8.51 estimates it in another way."""

    def begin_step(self, d):
        for group in self.param_groups:
            group["d"].fill_(d)


class ArcTangent(ProdigyPlusScheduleFree):
    """dhat = atan2(r, |s|), as it was before 2.0."""

    def bound(self, group, numerator, denominator):
        return torch.atan2(numerator, denominator)

    def begin_step(self, d):
        assert abs(self.get_d() / d - 1) < 1e-8


def departure_from(release, run, build, **changed):
    """The largest difference from a golden run over the distance moved."""
    rows = GOLDEN[release].query("run == @run")
    params = golden.start()
    options = golden.COMMON | golden.RUNS[release][run] | changed
    optimizer = build(params, d_limiter=False, **options)
    here = [torch.cat([p.detach().flatten() for p in params])]
    for step, d in enumerate(rows["d"]):
        optimizer.begin_step(d)
        golden.fill(params, step)
        optimizer.step()
        here.append(torch.cat([p.detach().flatten() for p in params]))
    there = torch.tensor(rows.filter(regex=r"^p\d").values)
    moved = torch.linalg.vector_norm(there - here[0], dim=1)
    apart = torch.linalg.vector_norm(there - torch.stack(here[1:]), dim=1)
    return (apart / moved).max().item()


@pytest.mark.parametrize("release, run", RUNS, ids=["-".join(row) for row in RUNS])
def test_earlier_releases(release, run):
    """use_muon_pp of 1.8.51, on its d, and beta4 of 1.3.2."""
    build = Replayed if release.startswith("muon") else ArcTangent
    assert departure_from(release, run, build) < 1e-8


def test_golden_runs_tell_the_options_apart():
    muon, beta4 = golden.RUNS
    assert departure_from(muon, "plain", Replayed, use_muon_pp=False) > 0.1
    assert departure_from(muon, "plain", Replayed, betas=(0.9, 0.9)) > 1e-3
    for run, other in (("0.9", 0.8), ("None", 0.9)):
        with pytest.raises(AssertionError):
            departure_from(beta4, run, ArcTangent, beta4=other)
