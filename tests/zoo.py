"""The one table of methods x options x references x problems that the generic tests run over.

    CASES        every class with several sets of options, beside the reference it must agree with
    METHODS      one case per class, all options at their defaults
    problem()    noisy least squares over parameters of mixed shapes, the same noise for everybody
    make, run    build an optimizer of a case; let it take steps on a problem
    DEPARTURES   where we differ from a reference on purpose, with the test that shows it

Adding a method: its cases in ``CASES``, its class in ``METHODS``, departures in ``DEPARTURES``.
"""

import contextlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import dadaptation
import dog
import parameterfree
import prodigyopt
import schedulefree
import torch

import prodigy
from prodigy.optimizer import MODES
from prodigy.rivals import PolyakStep

STEPS = 60
SHAPES = [(7, 5), (3,), (), (2, 3, 4, 2), (1,), (2, 3, 4)]  # the 4-d one is channels_last


# problems --------------------------------------------------------------------------------------


class LeastSquares:
    """f(p) = 1/2 sum_j a_j (p_j - b_j)^2 with 1/n <= a_j <= 1 and gradient noise of variance 0.01.

    ``fill(step)`` writes ``p.grad`` at the current p. The noise depends on (seed, step) alone, not
    on who asks in which order. With ``holes`` every fourth parameter, in turn, has no gradient.
    """

    def __init__(self, dtype, device, seed, shapes, holes, start):
        self.seed, self.holes = seed, holes
        generator = torch.Generator().manual_seed(seed)

        def normal(shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.params, self.targets, self.curvatures = [], [], []
        for shape in shapes:
            p, b = start * normal(shape), normal(shape)
            a = torch.arange(1, p.numel() + 1, dtype=torch.float64).view(shape) / max(p.numel(), 1)
            p = p.to(device, dtype)
            p = p.to(memory_format=torch.channels_last) if p.dim() == 4 else p
            self.params.append(torch.nn.Parameter(p))
            self.targets.append(b)
            self.curvatures.append(a)

    @torch.no_grad()
    def fill(self, step):
        generator = torch.Generator().manual_seed(1000 * self.seed + step + 1)
        for i, (p, a, b) in enumerate(zip(self.params, self.curvatures, self.targets)):
            noise = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if self.holes and (i + step) % 4 == 0:
                p.grad = None
            else:
                g = (p.to("cpu", torch.float64) - b) * a + noise
                p.grad = torch.empty_like(p).copy_(g)

    @torch.no_grad()
    def loss(self):
        """f(p), a float."""
        rows = zip(self.params, self.curvatures, self.targets)
        terms = [a * (p.to("cpu", torch.float64) - b) ** 2 for p, a, b in rows]
        return 0.5 * sum(float(term.sum()) for term in terms)


def problem(dtype=torch.float64, device="cpu", seed=0, shapes=SHAPES, holes=False, start=1.0):
    """A fresh ``LeastSquares`` from ``start`` times a standard normal point."""
    return LeastSquares(dtype, device, seed, shapes, holes, start)


def final(problem):
    """All parameters as one float64 vector on the CPU (a copy)."""
    return torch.cat([p.detach().to("cpu", torch.float64).flatten() for p in problem.params])


# cases -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One method with one set of options.

    cls: our class, or for the wrapper ``wrapper(base)``; called as cls(params, **kwargs).
    reference, reference_kwargs: what it must agree with and how that is called (the same way).
    groups: overrides per parameter group; the parameters are dealt to the groups in turn.
    schedule: factor on lr as a function of the step, applied by ``LambdaLR``; None = constant.
    holes: leave gradients out on some steps.
    """

    name: str
    cls: Callable
    kwargs: dict = field(default_factory=dict)
    reference: Callable | None = None
    reference_kwargs: dict = field(default_factory=dict)
    rtol: float = 1e-8
    estimates_d: bool = False
    schedule_free: bool = False
    groups: tuple = ()
    schedule: Callable | None = None
    holes: bool = False

    def __str__(self):
        return self.name


def wrapper(base, **base_kwargs):
    """(params, **kwargs) -> our ScheduleFreeWrapper over base(params, **base_kwargs).

    The modes (foreach, capturable, compile, maximize) go to the base, which does the arithmetic.
    """

    def build(params, **kwargs):
        modes = {name: kwargs.pop(name) for name in MODES if name in kwargs}
        return prodigy.ScheduleFreeWrapper(base(params, **base_kwargs, **modes), **kwargs)

    build.base, build.wrap = base, prodigy.ScheduleFreeWrapper
    return build


def mechanic(base, **base_kwargs):
    """The same for Mechanic, with an s_init from which it moves within a few steps."""

    def tuned(params, **kwargs):
        its = {n: kwargs.pop(n) for n in (*MODES, "lr", "weight_decay") if n in kwargs}
        options = {"s_init": 1e-2, **kwargs}
        return prodigy.Mechanic(base(params, **{**base_kwargs, **its}), **options)

    tuned.base, tuned.wrap = base, prodigy.Mechanic
    return tuned


def share_of_mean(g):
    """A vector whose squared length, averaged over all ranks, is that of the whole gradient."""
    if not hasattr(g, "to_local"):
        return g
    cut = [g.device_mesh.size(i) for i, q in enumerate(g.placements) if q.is_shard()]
    return g.to_local() * math.prod(cut) ** 0.5


class WithLoss:
    """A method that needs the loss, for tests that give gradients alone: it takes |g|^2/2."""

    def step(self, closure=None):
        return PolyakStep.step(self, closure or self.stand_in)

    def stand_in(self):
        rows = [(group, p) for group in self.param_groups for p in group["params"]]
        rows = [(group, p.grad) for group, p in rows if p.grad is not None]
        if not rows or any(g.is_sparse for _, g in rows):
            return torch.zeros(())
        grads = [share_of_mean(g) for _, g in rows]
        wide = [g.flatten().to(torch.promote_types(g.dtype, torch.float32)) for g in grads]
        half = -0.5 if self.param_groups[0]["maximize"] else 0.5
        return half * torch.cat(wide).nan_to_num(0.0, 0.0, 0.0).square().sum()


class ScheduleFreePolyak(WithLoss, prodigy.ScheduleFreePolyak):
    __doc__ = prodigy.ScheduleFreePolyak.__doc__


class ScheduleFreePlus(WithLoss, prodigy.ScheduleFreePlus):
    __doc__ = prodigy.ScheduleFreePlus.__doc__


WITH_LOSS = {cls.__name__: cls for cls in (ScheduleFreePolyak, ScheduleFreePlus)}
# Where a method starts so that it gets somewhere within the tests' few steps.
STARTS = {"DoG": {"reps_rel": 0.1}, "LDoG": {"reps_rel": 0.1}, "DoWG": {"reps_rel": 0.1},
          "DAdaptResetting": {"d0": 0.05}}


def by_name(name):
    """The class of this name that steps without a closure."""
    return WITH_LOSS.get(name) or getattr(prodigy, name)


def reference_wrapper(base, **base_kwargs):
    """The same over schedulefree's own wrapper, in its three-sequence form."""

    def build(params, **kwargs):
        return schedulefree.ScheduleFreeWrapperReference(base(params, **base_kwargs), **kwargs)

    return build


def deal(params, groups):
    """Parameter groups with the given overrides, the parameters dealt to them in turn."""
    params = list(params)
    if not groups:
        return params
    return [dict(group, params=params[i :: len(groups)]) for i, group in enumerate(groups)]


def make(case, params, **extra):
    """Our optimizer of a case over the parameters; ``extra`` overrides its arguments."""
    return case.cls(deal(params, case.groups), **{**case.kwargs, **extra})


def make_reference(case, params):
    """The reference optimizer of a case, in train mode where it has one, its prints swallowed."""
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = case.reference(deal(params, case.groups), **case.reference_kwargs)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def schedule(optimizer, factor):
    """LambdaLR on an optimizer (on its base where the wrapper is no Optimizer)."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.base
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def run(case, steps=STEPS, reference=False, problem=None, each=None, optimizer=None, **extra):
    """Let a case (ours or its reference) take steps: (problem, optimizer, d of every step).

    case: a ``Case``, or an optimizer over ``problem``'s parameters.
    each(step, optimizer): called after every step. Schedule-Free methods are left in train mode.
    """
    optimizer = optimizer if isinstance(case, Case) else case
    case = case if isinstance(case, Case) else Case("", type(case))
    problem = problem or globals()["problem"](holes=case.holes)
    if optimizer is None:
        build = make_reference if reference else make
        optimizer = build(case, problem.params, **extra)
    scheduler = schedule(optimizer, case.schedule) if case.schedule else None
    trajectory = []
    for step in range(steps):
        problem.fill(step)
        optimizer.step()
        if scheduler:
            scheduler.step()
        trajectory.append(float(optimizer.param_groups[0].get("d", 0.0)))
        if each:
            each(step, optimizer)
    d = torch.tensor(trajectory, dtype=torch.float64)
    return SimpleNamespace(problem=problem, optimizer=optimizer, d=d)


def error(a, b):
    """Relative error |a - b| / |b| of two vectors, in the 2-norm."""
    return float((a - b).norm() / b.norm())


# the table -------------------------------------------------------------------------------------


def warm_then_decay(step):
    """A factor on lr: up over 5 steps, then down to a third at step 60; never 0."""
    return (step + 1) / 5 if step < 5 else 1 - (step - 5) / 82.5


def halves(step):
    """A factor on lr: halved every 20 steps."""
    return 0.5 ** (step // 20)


def ours_and(reference, **shared):
    """A builder of cases of the class of the same name: options given once, taken by both."""

    def case(label, **options):
        how = {k: options.pop(k) for k in ("groups", "schedule", "holes", "rtol") if k in options}
        name = reference.__name__
        kwargs = {**shared, **options}
        return Case(
            f"{name}-{label}",
            getattr(prodigy, name),
            kwargs,
            reference,
            kwargs,
            estimates_d="DAdapt" in name or name == "Prodigy",
            schedule_free="ScheduleFree" in name,
            **how,
        )

    return case


def plus_case(label, **options):
    """A case of ProdigyPlusScheduleFree; test_plus.py compares it with 2.0.1, in float32."""
    how = {k: options.pop(k) for k in ("groups", "schedule", "holes") if k in options}
    free = options.get("use_schedulefree", True)
    name = "ProdigyPlusScheduleFree" + f"-{label}" * bool(label)
    kwargs = dict(estimates_d=True, schedule_free=free, **how)
    return Case(name, prodigy.ProdigyPlusScheduleFree, options, **kwargs)


def rival(name, reference=None):
    """A builder of cases of a class of rivals.py; the reference takes the same options."""

    def case(label, **options):
        how = {k: options.pop(k) for k in ("groups", "schedule", "holes") if k in options}
        agree = dict(reference=reference, reference_kwargs=options) if reference else {}
        how |= dict(estimates_d="DAdapt" in name, schedule_free="ScheduleFree" in name)
        return Case(f"{name}-{label}", by_name(name), options, **agree, **how)

    return case


def mechanic_case(label, base, base_kwargs={}, **options):
    how = {k: options.pop(k) for k in ("groups", "schedule", "holes") if k in options}
    return Case(f"Mechanic-{label}", mechanic(base, **base_kwargs), options, **how)


def wrapper_case(label, ours, theirs, base_kwargs, **options):
    """A case of the wrapper: over our base and over the reference's."""
    how = {k: options.pop(k) for k in ("groups", "schedule", "holes", "rtol") if k in options}
    apart = {k: options.pop(k) for k in ("store_x",) if k in options}
    return Case(
        f"ScheduleFreeWrapper-{label}",
        wrapper(ours, **base_kwargs),
        {**options, **apart},
        reference_wrapper(theirs, **base_kwargs) if theirs else None,
        options,
        estimates_d=ours in (prodigy.Prodigy, prodigy.DAdaptAdam),
        schedule_free=True,
        **how,
    )


def _cases():
    two = ({"weight_decay": 0.1}, {"weight_decay": 0.0})
    uneven = dict(schedule=halves, holes=True)
    warmed = dict(schedule=warm_then_decay, holes=True)

    sgd = ours_and(torch.optim.SGD, lr=0.1)
    yield sgd("plain")
    yield sgd("momentum", momentum=0.9, dampening=0.3, weight_decay=0.1)
    yield sgd("nesterov", momentum=0.9, nesterov=True, maximize=True, lr=0.01)
    yield sgd("scheduled", momentum=0.9, groups=({"lr": 0.05}, {"momentum": 0.5}), **uneven)

    adagrad = ours_and(torch.optim.Adagrad, lr=0.1)
    yield adagrad("plain")
    yield adagrad("decay", lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.2)
    yield adagrad("scheduled", groups=({"lr": 0.3, "eps": 1e-3}, {"lr_decay": 0.01}), **uneven)

    rmsprop = ours_and(torch.optim.RMSprop)
    yield rmsprop("plain")
    yield rmsprop("centred", momentum=0.9, centered=True, weight_decay=0.1)
    yield rmsprop("maximize", maximize=True, alpha=0.9, eps=1e-3)
    yield rmsprop("scheduled", momentum=0.5, groups=({"alpha": 0.9}, {"momentum": 0.0}), **uneven)

    adam = ours_and(torch.optim.Adam, lr=0.1)
    yield adam("plain")
    yield adam("amsgrad", amsgrad=True, weight_decay=0.1, betas=(0.5, 0.9))
    yield adam("decoupled", decoupled_weight_decay=True, weight_decay=0.1, maximize=True, lr=0.01)
    yield adam("scheduled", groups=({"betas": (0.0, 0.9)}, {"eps": 1e-2}), **uneven)

    adamw = ours_and(torch.optim.AdamW, lr=0.1)
    yield adamw("plain")
    yield adamw("amsgrad", amsgrad=True, betas=(0.8, 0.99), eps=1e-3)
    yield adamw("scheduled", groups=two, **uneven)

    dsgd = ours_and(dadaptation.DAdaptSGD)
    yield dsgd("plain")
    yield dsgd("growth", momentum=0.9, growth_rate=1.05, d0=1e-2)
    yield dsgd("scheduled", momentum=0.5, d0=1e-3, groups=({}, {}), schedule=warm_then_decay)
    yield rival("DAdaptSGD")("holes", momentum=0.5, d0=1e-3, groups=({}, {}), **warmed)

    dadagrad = ours_and(dadaptation.DAdaptAdaGrad)
    yield dadagrad("plain")
    yield dadagrad("momentum", momentum=0.9, weight_decay=0.1, d0=1e-2)
    yield dadagrad("growth", growth_rate=1.02, eps=1e-3, d0=1e-2)
    yield dadagrad("scheduled", momentum=0.5, d0=1e-3, groups=two, **warmed)

    dadam = ours_and(dadaptation.DAdaptAdam)
    yield dadam("plain")
    yield dadam("coupled", weight_decay=0.1, d0=1e-3, betas=(0.8, 0.99))
    yield dadam(
        "decoupled", decouple=True, weight_decay=0.1, use_bias_correction=True, growth_rate=1.3
    )
    yield dadam("layer_scale", groups=({"layer_scale": 0.5}, {"eps": 1e-3}), lr=0.7)
    yield dadam("scheduled", decouple=True, groups=two, schedule=warm_then_decay)
    yield rival("DAdaptAdam")("holes", decouple=True, groups=two, **warmed)

    prod = ours_and(prodigyopt.Prodigy, eps=1e-24)
    yield prod("plain")
    yield prod("coupled", decouple=False, weight_decay=0.1, d_coef=2.0)
    yield prod("betas", betas=(0.8, 0.99), beta3=0.9, weight_decay=0.1, d0=1e-4)
    yield prod("beta1=0", betas=(0.0, 0.99), d0=10.0)
    yield prod(
        "safeguard",
        safeguard_warmup=True,
        lr=0.5,
        slice_p=3,
        use_bias_correction=True,
        growth_rate=1.2,
        d0=1e-3,
    )
    yield prod("scheduled", groups=two, schedule=warm_then_decay)
    yield rival("Prodigy")("holes", groups=two, **warmed)

    sfsgd = ours_and(schedulefree.SGDScheduleFree, lr=0.3)
    yield sfsgd("plain")
    yield sfsgd("weights", warmup_steps=5, weight_decay=0.1, r=1.0, weight_lr_power=1.0)
    yield sfsgd("momentum", momentum=0.5, weight_lr_power=0.0)
    yield sfsgd("scheduled", momentum=0.7, groups=({"lr": 0.1}, {"warmup_steps": 7}), **uneven)

    sfadamw = ours_and(schedulefree.AdamWScheduleFree, lr=0.1)
    yield sfadamw("plain")
    yield sfadamw("weights", warmup_steps=5, weight_decay=0.1, weight_lr_power=1.0, r=0.5)
    yield sfadamw("betas", betas=(0.95, 0.9), eps=1e-3)
    yield sfadamw("scheduled", groups=({"lr": 0.05, "r": 2.0}, {"weight_decay": 0.1}), **uneven)

    sfradam = ours_and(schedulefree.RAdamScheduleFree, lr=0.1)
    yield sfradam("plain")
    yield sfradam("loud", silent_sgd_phase=False, weight_decay=0.1, betas=(0.8, 0.99))
    yield sfradam("scheduled", groups=({"lr": 0.05}, {"r": 1.0}), **uneven)

    torch_sgd = (torch.optim.SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.5))
    yield wrapper_case("SGD", *torch_sgd)
    yield wrapper_case("SGD-decay", *torch_sgd, weight_decay_at_y=0.1, r=1, momentum=0.7)
    yield wrapper_case("SGD-store_x", *torch_sgd, weight_lr_power=0, store_x=True, schedule=halves)
    yield wrapper_case("Adagrad", torch.optim.Adagrad, torch.optim.Adagrad, dict(lr=0.3))
    prod_base = (prodigy.Prodigy, prodigyopt.Prodigy, dict(eps=1e-24))
    yield wrapper_case("Prodigy", *prod_base)
    yield wrapper_case("Prodigy-decay", *prod_base, weight_decay_at_y=0.1, r=1, store_x=True)
    dadam_base = (prodigy.DAdaptAdam, dadaptation.DAdaptAdam, dict(d0=1e-3, weight_decay=0.1))
    yield wrapper_case("DAdaptAdam", *dadam_base, schedule=warm_then_decay)

    yield plus_case("plain")
    yield plus_case("averaged", use_schedulefree=False, weight_decay=0.1, use_adopt=True, d0=1e-3)
    yield plus_case("masked", use_schedulefree=False, use_cautious=True, d0=1e-3)
    yield plus_case("speed", use_speed=True, use_bias_correction=True, d_coef=2.0, d0=1e-3)
    yield plus_case("cautious", use_cautious=True, use_orthograd=True, schedulefree_c=8.0)
    yield plus_case("grams", use_grams=True, weight_decay=0.01, weight_decay_by_lr=False, d0=1e-3)
    yield plus_case("focus", use_focus=True, factored=False, betas=(0.8, 0.9), d0=1e-3)
    yield plus_case("atan2", eps=None, use_stableadamw=False, d_limiter=False, d0=1e-3)
    yield plus_case("steps", prodigy_steps=20, split_groups=False, groups=two, d0=1e-3)
    yield plus_case("muon", use_muon_pp=True, use_orthograd=True, beta4=None, d0=1e-3)
    yield plus_case("scheduled", split_groups_mean=True, groups=two, **warmed)

    for name, cls in dict(DoG=dog.DoG, LDoG=dog.LDoG).items():
        case = rival(name, cls)
        yield case("plain")
        yield case("decay", reps_rel=0.01, lr=0.5, weight_decay=0.1, eps=1e-4)
        yield case("scheduled", schedule=halves, groups=({"reps_rel": 0.1}, {"weight_decay": 0.1}))
        yield rival(name)("holes", reps_rel=0.01, holes=True)
    cocob = rival("COCOB", parameterfree.COCOB)
    yield cocob("plain")
    yield cocob("decay", alpha=3.0, weight_decay=0.1, eps=1e-3, holes=True)
    yield rival("COCOB")("scheduled", groups=({"alpha": 10.0}, {"lr": 0.5}), **uneven)
    dowg = rival("DoWG")
    yield dowg("plain")
    yield dowg("decay", reps_rel=0.01, lr=0.5, weight_decay=0.1)
    yield dowg("scheduled", groups=({"reps_rel": 0.1}, {"weight_decay": 0.1}), **uneven)
    resetting = rival("DAdaptResetting")
    yield resetting("plain", d0=0.05)
    yield resetting("decay", d0=1e-2, weight_decay=0.1, lr=0.5)
    yield resetting("scheduled", d0=1e-2, groups=two, **warmed)
    yield resetting("split", d0=1e-2, split_groups=True, groups=two)
    polyak = rival("ScheduleFreePolyak")
    yield polyak("plain")
    yield polyak("adam", adam=True, safeguard=1e-3, f_star=-0.1, weight_decay=0.1, warmup_steps=5)
    yield polyak("scheduled", momentum=0.7, safeguard=0.1, groups=({"lr": 0.5}, {}), **uneven)
    plus = rival("ScheduleFreePlus")
    yield plus("plain")
    yield plus("annealed", anneal_steps=9, c_warmup=4, warmup_steps=3, weight_decay=2.0, r=1.0)
    yield plus("scheduled", store_x=True, anneal_steps=9, groups=({"lr": 0.5}, {}), **uneven)
    yield mechanic_case("SGD", prodigy.SGD, dict(lr=1.0))
    yield mechanic_case("torch.AdamW", torch.optim.AdamW, dict(lr=1.0), s_decay=0.0)
    yield mechanic_case("scheduled", prodigy.AdamW, betas=(0.9, 0.99), schedule=halves, holes=True)


CASES = list(_cases())

# Every class at its defaults (the wrapper over a foreign base and over our own).
METHODS = [
    Case(
        name,
        by_name(name),
        STARTS.get(name, {}),
        estimates_d="DAdapt" in name or name == "Prodigy",
        schedule_free="ScheduleFree" in name,
    )
    for name in prodigy.__all__
    if name not in ("ScheduleFreeWrapper", "ProdigyPlusScheduleFree", "Mechanic")
]
METHODS += [
    plus_case(""),
    plus_case("averaged", use_schedulefree=False),
    wrapper_case("torch.AdamW", torch.optim.AdamW, None, {}),
    wrapper_case("prodigy.Prodigy", prodigy.Prodigy, None, {}),
    mechanic_case("prodigy.AdamW", prodigy.AdamW),
]

# Methods with one size for all groups, whenever they were added.
ONE_SIZE = [case for case in METHODS if case.cls in WITH_LOSS.values() or "Mechanic" in case.name]


@dataclass(frozen=True)
class Departure:
    classes: str
    reference: str
    theirs: str
    ours: str
    test: str


# Where we differ on purpose: what the reference does, what we do, and the test in this folder that
# shows both.
DEPARTURES = [
    Departure(
        "Prodigy, DAdaptSGD, DAdaptAdam",
        "prodigyopt, dadaptation",
        "a tensor without a gradient drops out of dhat's denominator alone: d runs beyond D",
        "it counts with a gradient of zero",
        "test_departure_missing_gradient",
    ),
    Departure(
        "Prodigy",
        "prodigyopt",
        "eps times the new d",
        "eps d_k, as the box",
        "test_departure_prodigy_eps",
    ),
    Departure(
        "Prodigy",
        "prodigyopt",
        "beta1 = 0: the step has the new d",
        "d_k^2, as the box",
        "test_departure_prodigy_beta1_zero",
    ),
    Departure(
        "Prodigy, DAdaptAdaGrad, DAdaptAdam",
        "prodigyopt, dadaptation",
        "a step whose gradients are all zero returns early",
        "it counts, and weight decay acts",
        "test_departure_zero_gradient",
    ),
    Departure(
        "DAdaptSGD",
        "dadaptation",
        "divides by zero when the first gradient is zero or missing",
        "the first gradient that is not zero counts as g_0",
        "test_departure_dadapt_sgd_first_gradient",
    ),
    Departure(
        "DAdaptSGD",
        "dadaptation",
        "leaves weight decay out of |g_0|",
        "weight decay is part of every gradient",
        "test_departure_dadapt_sgd_weight_decay",
    ),
    Departure(
        "Prodigy, DAdaptSGD, DAdaptAdaGrad, DAdaptAdam",
        "prodigyopt, dadaptation",
        "a group whose lr becomes 0 still moves",
        "it is frozen",
        "test_departure_frozen_group",
    ),
    Departure(
        "Prodigy, DAdaptSGD, DAdaptAdaGrad, DAdaptAdam",
        "prodigyopt, dadaptation",
        "groups with two rates: an error, or the first group's rate for all",
        "any ratio, by a change of variables",
        "test_departure_lr_ratios",
    ),
    Departure(
        "Prodigy, DAdaptAdam",
        "prodigyopt, dadaptation",
        "betas of the first group for all",
        "each group its own",
        "test_departure_betas_per_group",
    ),
    Departure(
        "Prodigy, DAdaptAdam",
        "prodigyopt, dadaptation",
        "a group added late has the first group's step count in its bias correction",
        "its own clock",
        "test_departure_late_group_clock",
    ),
    Departure(
        "Prodigy",
        "prodigyopt",
        "bfloat16 weights: x - x_0 is rounded away and d stays at d0",
        "float32 statistics and 16 more bits per weight",
        "test_departure_bfloat16_starves_d",
    ),
    Departure(
        "every class (the wrappers: over a base of this package)",
        "torch.optim, schedulefree",
        "bfloat16 weights and averages are rounded in every step",
        "the float32 run, bit for bit",
        "test_departure_bfloat16_is_float32",
    ),
    Departure(
        "Prodigy, DAdaptSGD, DAdaptAdaGrad, DAdaptAdam",
        "prodigyopt, dadaptation",
        "reads the device twice per tensor and step",
        "never",
        "test_departure_host_reads",
    ),
    Departure(
        "Prodigy, DAdaptAdam",
        "prodigyopt, dadaptation",
        "prints at construction",
        "silent",
        "test_departure_no_prints",
    ),
    Departure(
        "the D-Adaptation and Schedule-Free classes, Prodigy",
        "all but torch.optim",
        "p.grad is overwritten",
        "untouched",
        "test_departure_gradient_untouched",
    ),
    Departure(
        "every class",
        "all",
        "one NaN in a gradient destroys the parameters",
        "such entries count as missing",
        "test_departure_nonfinite",
    ),
    Departure(
        "SGD, Adagrad",
        "torch.optim",
        "sparse and complex gradients",
        "refused by name",
        "test_departure_sparse_and_complex",
    ),
    Departure(
        "the Schedule-Free classes",
        "schedulefree",
        "start in eval mode",
        "start in train mode",
        "test_departure_schedulefree_starts_in_train_mode",
    ),
    Departure(
        "the Schedule-Free classes",
        "schedulefree",
        "a step with lr = 0 counts and averages on",
        "no step",
        "test_departure_schedulefree_zero_lr",
    ),
    Departure(
        "the Schedule-Free classes",
        "schedulefree",
        "switching takes today's beta: a changed beta corrupts x",
        "the beta that y was built with",
        "test_departure_schedulefree_beta_change",
    ),
    Departure(
        "the Schedule-Free classes",
        "schedulefree",
        "a group added while training is left behind by eval() and train()",
        "it takes over the mode",
        "test_departure_schedulefree_late_group",
    ),
    Departure(
        "the Schedule-Free classes",
        "schedulefree",
        "a group without gradients counts the step",
        "it does not",
        "test_departure_schedulefree_idle_group",
    ),
    Departure(
        "the Schedule-Free classes",
        "schedulefree",
        "beta = 0 divides by zero in eval(), or is refused",
        "with store_x it is Polyak-Ruppert averaging; without, an error says so",
        "test_departure_schedulefree_beta_zero",
    ),
    Departure(
        "ScheduleFreeWrapper",
        "schedulefree",
        "KeyError over AdamW, Adam, RMSprop, DAdaptSGD and others: z in the base's state",
        "a state of its own: any base",
        "test_departure_wrapper_bases",
    ),
    Departure(
        "ScheduleFreeWrapper",
        "schedulefree",
        "the reference form moves parameters that have no gradient",
        "they stay",
        "test_departure_wrapper_missing_gradient",
    ),
    Departure(
        "ScheduleFreeWrapper",
        "schedulefree",
        "the fast form fails on 0-d and non-contiguous parameters",
        "any strided tensor",
        "test_departure_wrapper_layouts",
    ),
    Departure(
        "ScheduleFreeWrapper",
        "schedulefree",
        "is no Optimizer: torch's schedulers refuse it; mode and beta are not saved",
        "an Optimizer; both are saved",
        "test_departure_wrapper_is_an_optimizer",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "factored: a tall matrix keeps one of its two factors",
        "both; exact for rank one",
        "test_departure_plus_factored_tall",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "use_cautious without Schedule-Free drops its mask and goes uphill",
        "the average is masked",
        "test_departure_plus_cautious_goes_uphill",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "use_orthograd scales up the rounding noise of a single entry",
        "such a tensor stays",
        "test_departure_plus_orthograd_one_entry",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "use_adopt without Schedule-Free: steps of d^2, d stays at d0",
        "the average of clipped d g over its denominator",
        "test_departure_plus_adopt_without_schedulefree",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "use_adopt: an entry whose first gradient comes later moves by g/eps",
        "that gradient only fills its second moment",
        "test_departure_plus_adopt_late_entries",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "use_focus draws to the average of d^2 x, which is nearly 0",
        "to the bias-corrected average of x",
        "test_departure_plus_focus",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "d_limiter=False, a missing gradient: as prodigyopt",
        "as Prodigy",
        "test_departure_plus_missing_gradient",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "split_groups_mean: a group with lr = 0 holds the others at d0",
        "the mean of those that move",
        "test_departure_plus_mean_of_what_moves",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "p0 in bfloat16 beside float32 weights: d grows before anything moved",
        "p0 and s are as wide as the weights",
        "test_departure_plus_starting_point",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "float64 weights are rounded to float32 in every step",
        "float64 stays",
        "test_departure_plus_float64",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "loading recasts p0, s and the factors",
        "every tensor keeps its dtype",
        "test_departure_plus_resume",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "prints at construction and while training",
        "warnings for exclusions, else silent",
        "test_departure_plus_prints",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "one NaN in a gradient stops d and spoils the weights",
        "such entries count as missing",
        "test_departure_plus_nonfinite",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "empty and late groups: IndexError, KeyError",
        "they run",
        "test_departure_plus_groups",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "a pickled optimizer cannot step",
        "it goes on",
        "test_departure_plus_copies",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "eval() takes today's beta: a changed beta corrupts x",
        "the beta that y was built with",
        "test_departure_plus_beta_change",
    ),
    Departure(
        "ProdigyPlusScheduleFree",
        "prodigyplus",
        "groups that share d: their lr ratios do not reach s",
        "any ratio, by a change of variables",
        "test_departure_plus_lr_ratios",
    ),
    Departure(
        "Mechanic",
        "mechanic-pytorch",
        "the decay takes the point after the base's step",
        "x_t, as the box",
        "test_departure_mechanic_decay_point",
    ),
    Departure(
        "DoG, LDoG",
        "dog-optimizer",
        "a missing gradient is an error",
        "left out of the norms",
        "test_departure_dog_missing_gradient",
    ),
]
