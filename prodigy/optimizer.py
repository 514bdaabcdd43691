"""The step that every method of the family shares.

    step = gather -> [look -> prepare] -> observe and advance, one pass -> adapt -> store

A method fills in what its paper's box says and nothing else:

    buffers(group)           the tensors kept per parameter, under the reference packages' keys
    scalars(group, t)        what changes from step to step and is the same for all entries
    observe(x, g, s, h)      update statistics; return the sums that run over all tensors
    advance(x, g, s, h)      move the point
    adapt(groups, totals)    the new d from the sums: torch.where only, never a host read
    look(x, g, s, h), prepare(groups, totals)   where the step needs this gradient's own size

Where a method's sums run over more than one step (``remembers``), a tensor that has no gradient
in this one is observed with a gradient of zero, and stays where it is: no sum forgets it.
``x, g`` are one tensor or a ``Vec`` of all tensors of a group, in float32 or wider; ``s`` maps
buffer names to the same; ``h`` holds the group's arguments by name (``h.eps``, ``h.beta1``) and
the scalars (floats, or 0-d tensors on the device). ``g`` is the gradient without entries that are
not finite, with lambda x added where weight decay is an L2 penalty. It may be ``p.grad`` itself: a
body never writes to it. The loop over parameters stands in ``Family._over`` and nowhere else.
"""

import functools
import inspect
import logging
import operator
import warnings
from numbers import Integral, Real
from types import SimpleNamespace

import torch
from torch import Tensor

from .pieces import (WIDE, abreast, add_scaled_, as_float, every, finite, join, keep_residual,
                     store_, where, working_dtype)
from .shards import everywhere, local, part_of, present, row_of, sharded
from .vec import Vec, bunched, cut, in_turn, stack

log = logging.getLogger("prodigy")

# Every numeric argument of the family with its range, checked at construction for every group.
RANGES = {
    "lr": "[0, inf)",
    "betas[0]": "[0, 1)",
    "betas[1]": "[0, 1)",
    "beta3": "[0, 1)",
    "beta4": "[0, 1)",
    "eps": "[0, inf)",
    "weight_decay": "[0, inf)",
    "weight_decay_at_y": "[0, inf)",
    "momentum": "[0, inf)",
    "dampening": "(-inf, inf)",
    "alpha": "[0, 1]",
    "lr_decay": "[0, inf)",
    "initial_accumulator_value": "[0, inf)",
    "inner_momentum": "[0, 1)",
    "d0": "(0, inf)",
    "d_coef": "(0, inf)",
    "growth_rate": "[1, inf]",
    "layer_scale": "(0, inf)",
    "slice_p": "[1, inf)",
    "peak_patience": "[1, inf)",
    "prodigy_steps": "[0, inf)",
    "total_training_steps": "[1, inf)",
    "warmup_steps": "[0, inf)",
    "r": "(-1, inf)",
    "weight_lr_power": "[0, inf)",
    "schedulefree_c": "[0, inf)",
    "log_every": "[0, inf)",
    "reps_rel": "(0, inf)",
    "f_star": "(-inf, inf)",
    "safeguard": "[0, inf)",
    "beta2": "[0, 1)",
    "momentum_max": "[0, 1)",
    "beta_polyak": "[0, 1)",
    "anneal_steps": "[0, inf)",
    "c_warmup": "[0, inf)",
    "s_decay": "[0, inf)",
    "s_init": "(0, inf)",
}
INTEGERS = {"slice_p", "peak_patience", "total_training_steps", "warmup_steps", "log_every",
            "prodigy_steps", "anneal_steps", "c_warmup"}
OPTIONAL = {"beta3", "beta4", "total_training_steps", "foreach"}
# Tensors in a compiled graph. From torch 2.13 those of one shape share a region of it, which is
# compiled once; larger graphs are slow to trace, and every graph costs time to call. Before,
# Inductor no longer fuses in larger ones what is computed with what is written, which stand far
# apart.
REGIONS = torch.__version__ >= "2.13"
GRAPH = 80 if REGIONS else 8
# Inductor's: loops become one only if they share more than a few scalars, and what two loops need
# is computed twice rather than written to memory; shapes are guarded already; what rounding to
# float16 drops is not rewritten to 0. Of the guards those
# of tensors stay, and those of the process (without a name: threads, autocast, ...): what a graph
# takes from Python objects is its key in `Family._compiled`.
OPTIONS = {"score_fusion_memory_threshold": 1024, "realize_reads_threshold": 100,
           "realize_opcount_threshold": 1000, "size_asserts": False,
           "emulate_precision_casts": True,
           "guard_filter_fn": lambda guards: [
               not g.name or "TENSOR" in g.guard_type or g.guard_type == "DUPLICATE_INPUT"
               for g in guards]}
# Numbers that groups of some methods carry, by which a checkpoint tells whose it is: of the first
# five those of a reference package too.
BOOKS = ("d", "weight_sum", "rbar", "size", "e_weight",
         "d_numerator", "numerator_weighted", "sksq_weighted", "g0_norm", "keep")
TELLING = {"exp_avg_sq", "z", "s", "p0", "x0"}  # names of tensors that do the same
ALIKE = {"Adam": ("AdamW",), "AdamW": ("Adam",)}
NO_COMPILER = {"InvalidCxxCompiler", "TritonMissing"}  # names of Inductor's exceptions
MODES = dict(foreach=None, maximize=False, capturable=False, compile=False)
FLAGS = {*MODES, "nesterov", "centered", "amsgrad", "decoupled_weight_decay", "decouple",
         "use_bias_correction", "safeguard_warmup", "fsdp_in_use", "cosine_decay", "split_groups",
         "silent_sgd_phase", "store_x", "closure_form", "weight_decay_by_lr", "d_limiter",
         "split_groups_mean", "factored", "factored_fp32", "use_stableadamw", "use_schedulefree",
         "use_speed", "stochastic_rounding", "fused_back_pass", "use_cautious", "use_grams",
         "use_adopt", "use_orthograd", "use_focus", "use_muon_pp", "adam"}


def check(name, value, ranges={}, read=True):
    """Raise a TypeError or ValueError that names the argument and its range.

    >>> check("lr", -1.0)
    Traceback (most recent call last):
    ValueError: lr must lie in [0, inf), got -1.0
    """
    if value is None and (name in OPTIONAL or "None" in ranges.get(name, "")):
        return
    if name in FLAGS:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
        return
    if name == "betas":
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise TypeError(f"betas must be a pair of numbers in [0, 1), got {value!r}")
        for index, beta in enumerate(value):
            check(f"betas[{index}]", beta, ranges)
        return
    interval = ranges.get(name) or RANGES[name]
    if isinstance(value, Tensor) and name == "lr" and value.dim() == 0:
        if not read or value.device.type != "cpu":
            return
        value = value.item()
    kinds, kind = (Integral, "an integer") if name in INTEGERS else (Real, "a number")
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind += " or a 0-d tensor" * (name == "lr")
        raise TypeError(f"{name} must be {kind} in {interval}, got {value!r}")
    interval = interval.removesuffix(" or None")
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = low < value or (interval[0] == "[" and low == value)
    below = value < high or (interval[-1] == "]" and high == value)
    if not (above and below):
        raise ValueError(f"{name} must lie in {interval}, got {value!r}")


def once(method):
    """A method ``f(self, group)`` of what groups share, asked once for all of their scalars."""

    @functools.wraps(method)
    def run(self, group):
        shared = None if group["split_groups"] else self.__dict__.get("_shared")
        if shared is None:
            return method(self, group)
        key = method.__name__, group["d"].device, group["d"].dtype
        if key not in shared:
            shared[key] = method(self, group)
        return shared[key]

    return run


def eagerly(step):
    """A step that a torch.compile around it leaves alone: it compiles itself, if asked to."""

    @functools.wraps(step)
    def run(*arguments, **named):
        if not hasattr(step, "alone"):  # not at import: it loads all of Dynamo
            step.alone = torch.compiler.disable(step)
        return step.alone(*arguments, **named)

    return run


class Family(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` whose step calls a method's ``observe`` and ``advance``.

    Keyword arguments that every method but the wrappers takes beside its own:

    foreach (bool or None): all tensors of a group in one ``torch._foreach`` call per line (None:
        on CUDA, as in torch.optim, and on a CPU those with few entries).
    maximize (bool): step up instead of down.
    capturable (bool): keep step counts and a tensor ``lr`` on the device.
    compile (bool): run the pass under ``torch.compile``; the first step then takes up to a minute
        or so, and seconds where Inductor's cache has it. Without a compiler: a warning, no error.
    differentiable, fused: accepted for torch.optim's sake, refused with a ValueError when set.

    Parameters may be DTensors (FSDP2, tensor parallelism), plain tensors, or both. A rank steps
    its own shards; the sums over tensors run over all of them, in one all_reduce a step and mesh,
    so that d is that of one process and the same on every rank bit for bit. Another one, of a flag
    for each parameter, tells who has a gradient; one that a rank alone lacks is zero there. So
    ``step`` must be called on every rank. State tensors are DTensors laid out like their
    parameter, for torch.distributed.checkpoint.

    Raises:
        TypeError, ValueError: at construction, naming the argument and its range; for the flat
            parameters of FSDP1.
        RuntimeError: from ``step``, before anything is written, for sparse or complex gradients
            and for gradients whose shape, dtype or device is not the parameter's.
    """

    ranges = {}  # where a method's range differs from RANGES
    own_clock = False  # True: t counts each parameter's own steps (torch.optim), else the group's
    decoupled = False  # where no argument says it: weight decay apart from the gradient
    freezes = True  # a group with lr = 0 takes no part in the step at all
    sums = ()  # names of sums over all entries that a group carries from step to step
    remembers = False  # sums of earlier steps count: also those of tensors without a gradient now
    by_entry = True  # bodies treat all entries alike, apart from sums: a tensor may come in parts
    estimates = ()  # names of the group's 0-d tensors that adapt() moves
    rounded = ()  # names of buffers that may be kept in the parameter's own low precision
    optional = ()  # names of buffers that a checkpoint may lack, or have without use
    stored = ("p0", "x0")  # names of buffers that keep the dtype they were saved in
    sampled, stride = (), 1  # names of buffers of every stride-th entry (or slice_p-th)
    counters = ("k",)  # names of its numbers that are 0-d tensors too when capturable

    def __init__(self, params, *, differentiable=False, fused=None, **defaults):
        unknown = set(defaults) - set(MODES) - self._arguments(type(self))
        if unknown:
            raise TypeError(f"{type(self).__name__} has no argument {', '.join(sorted(unknown))}")
        if differentiable:
            raise ValueError("differentiable=True is not supported: the step writes in place")
        if fused:
            raise ValueError("fused=True is not supported: pass compile=True for one fused pass")
        defaults = {name: plain(value) for name, value in defaults.items()}
        super().__init__(params, {**MODES, "differentiable": False, **defaults})

    @staticmethod
    def _arguments(cls):
        codes = [c.__init__.__code__ for c in cls.__mro__ if issubclass(c, Family)]
        return {n for c in codes for n in c.co_varnames[: c.co_argcount + c.co_kwonlyargcount]}

    # what a method fills in -------------------------------------------------------------------
    def buffers(self, group):
        """{name: how to make it from p}, for the tensors kept per parameter."""
        return {}

    def begin(self, group):
        """{name: value} of the group's own counters and 0-d tensors before its first step."""
        return {}

    def scalars(self, group, t):
        """{name: number} that bodies read as ``h.name`` in step t = 1, 2, ...; changes nothing."""
        return {}

    def observe(self, x, g, s, h):
        return ()

    def advance(self, x, g, s, h):
        raise NotImplementedError

    def adapt(self, groups, totals):
        pass

    look = None  # look(x, g, s, h) -> sums, for methods that need the gradient's size first

    def prepare(self, groups, totals):
        pass

    def validate(self, group):
        """Exclusions of a method, checked at construction and for every added group."""

    # groups -----------------------------------------------------------------------------------
    def add_param_group(self, param_group):
        """Add a group: missing arguments are the constructor's, d and mode are inherited."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name, value in group.items():
                if name in RANGES or name in FLAGS or name == "betas":
                    check(name, value, self.ranges, read=not group["capturable"])
                    group[name] = plain(value)
            for p in group["params"]:
                if p.is_complex():
                    raise TypeError("complex parameters are not supported: use torch.view_as_real")
                if p.layout != torch.strided:
                    raise TypeError("sparse parameters are not supported")
                if hasattr(p, "_fsdp_flattened") or hasattr(p, "_is_flat_param"):
                    raise TypeError("FSDP1's flat shards are not supported: use fully_shard")
            self.validate(group)
        except Exception:
            self.param_groups.pop()
            raise
        self._fill(group)

    def _fill(self, group):
        """Give a group whatever key it lacks; numbers that adapt() moves become 0-d tensors."""
        for name, value in self.defaults.items():
            group.setdefault(name, value)
        for name, value in self._begin(group).items():
            group.setdefault(name, value)
        self._place(group)

    def _begin(self, group):
        first = self.param_groups[0]
        fresh = {"k": 0, "nonfinite": 0, **self.begin(group)}
        return fresh if first is group else {**fresh, **self.inherit(first, group)}

    def inherit(self, first, group):
        """{name: value} that a group added later takes over from the first group."""
        return {}

    def _place(self, group):
        """Keep the group's 0-d tensors where its parameters are, in their working dtype."""
        home = local(group["params"][0]) if group["params"] else None
        names = self.estimates + (self.counters if group["capturable"] else ())
        for name in (*names, "nonfinite"):
            value = group[name]
            if home is None and isinstance(value, Tensor):
                continue
            dtype = torch.int64 if name == "nonfinite" else None
            dtype = dtype or (torch.float64 if home is None else working_dtype(home.dtype))
            if not isinstance(value, Tensor):
                new = torch.full if home is None else home.new_full
                group[name] = new((), value, dtype=dtype)
            elif value.device != home.device or value.dtype != dtype:
                group[name] = value.to(home.device, dtype)

    def _set(self, group, name, value):
        """A new value for one of the group's 0-d tensors (in place where a graph was captured)."""
        if group["capturable"]:
            group[name].copy_(value)
        elif isinstance(group[name], Tensor):
            group[name] = value.to(group[name])
        else:
            group[name] = value

    def _keep(self, group, name, value):
        """``_set`` for the group's own books, which stand still while its tensor lr is 0."""
        self._set(group, name, where(live(self, group) != 0, value, group[name]))

    # the step ---------------------------------------------------------------------------------
    @eagerly
    def step(self, closure=None):
        """One step; ``closure``, if given, re-evaluates the model and its loss is returned.

        All or nothing: every gradient is checked before the first tensor is written. Parameters
        without a gradient are left alone.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    @torch.no_grad()
    def update(self):
        """The step without the closure."""
        batches = self.gather()
        self._set_scalars(batches)
        if self.look is not None and batches:
            self.prepare(*self._totals(self._sums(batches, "_look")))
            self._set_scalars(batches)
        pending = self.__dict__.pop("_pending", [])
        self.__dict__.pop("_taken", None)
        groups, totals = self._totals(pending + self._sums(batches, "_pass"))
        if not groups:
            return
        for group, sums in zip(groups, totals):
            self._set(group, "nonfinite", group["nonfinite"] + sums.pop())
            self._set(group, "k", group["k"] + live(self, group))
        self.adapt(groups, totals)
        self._report(groups)

    @eagerly
    @torch.no_grad()
    def step_param(self, p, group):
        """The step of one parameter, as soon as its gradient is there (fused backward).

            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.register_post_accumulate_grad_hook(
                        lambda p, group=group: optimizer.step_param(p, group))

        ``step()`` then steps what is left, if anything, and adapts d, once for the whole pass. Set
        ``p.grad = None`` after ``step_param`` to free each gradient during the backward pass.

        Raises:
            RuntimeError: if the method needs the size of the whole gradient first, or if p was
                stepped since the last ``step()`` (gradient accumulation: only call this in the
                last backward pass).
        """
        if self.look is not None:
            raise RuntimeError(f"{type(self).__name__} needs all gradients first: call step()")
        if not any(group is g for g in self.param_groups):  # from before load_state_dict
            group = next(g for g in self.param_groups if any(p is q for q in g["params"]))
        taken = self.__dict__.setdefault("_taken", set())
        if p in taken:
            raise RuntimeError("this parameter was stepped already: call step() after every "
                               "backward pass, one that failed too, and step_param in the last "
                               "pass of an accumulation only")
        batches = self.gather(only=(group, p))
        self._set_scalars(batches)
        self.__dict__.setdefault("_pending", []).extend(self._sums(batches, "_pass"))
        taken.add(p)

    def gather(self, only=None):
        """Check everything, then sort what has a gradient by group, device, dtype and clock."""
        if only is None:
            everyone = [p for group in self.param_groups for p in group["params"]]
            found = present(everyone, self.__dict__.get("_taken", ()))
        else:
            found = [only[1]] if only[1].grad is not None else []
        found = set(map(id, found))  # tensors are slow to hash
        active = []
        for group in self.param_groups if only is None else [only[0]]:
            params = [p for p in group["params"] if id(p) in found]
            for p in params:
                check_gradient(p)
            active.append((group, params))
        batches = {}
        for group, params in active:
            if params:
                self._place(group)
            frozen, buffers = self.freezes and known_zero(rate(group)), self.buffers(group)
            idle = () if frozen or only else self._idle(group, params)
            for number, p in enumerate((*params, *idle)):
                s = self._ready(group, p, buffers)
                if frozen:  # its tensors exist for torch.distributed.checkpoint to fill
                    continue
                t, clock = self._tick(group, s, p)
                part = part_of(p)
                key = (id(group), p.device, p.dtype, clock, frozenset(s), part and part.ranks,
                       number >= len(params))
                batch = batches.get(key)
                if batch is None:
                    batch = batches[key] = SimpleNamespace(
                        group=group, t=t, clock=clock, params=[], states=[], parts=[], h={},
                        idle=key[-1])
                batch.params.append(p)
                batch.states.append(s)
                batch.parts.append(part)
        return list(batches.values())

    def _idle(self, group, params):
        """What has moved before and has no gradient, while others of its group have (or had)."""
        taken = self.__dict__.get("_taken", ())
        if not self.remembers or len(params) == len(group["params"]):
            return ()
        if not params and not any(p in taken for p in group["params"]):
            return ()
        found = set(map(id, params))
        return [p for p in group["params"]
                if id(p) not in found and p not in taken and self.state.get(p)]

    def _ready(self, group, p, buffers):
        """The state of one parameter, with every buffer the method asks for."""
        s = self.state[p]
        for name, make in buffers.items():
            if name not in s and (buffer := make(p)) is not None:
                s[name] = buffer
        exact = self._rounds_at_random(group, p) or p.dtype in WIDE
        keep_residual(s, "residual", None if exact else p)
        if self.own_clock:  # where torch.optim has it, also after a checkpoint of the other kind
            s["step"] = torch.as_tensor(s.get("step", 0), dtype=torch.float32,
                                        device=p.device if group["capturable"] else "cpu")
        return s

    def _rounds_at_random(self, group, p):
        return bool(group.get("stochastic_rounding")) and p.dtype == torch.bfloat16

    def _tick(self, group, s, p):
        """The number of this step, counted from 1, and a key for those that share it."""
        if not self.own_clock:
            return group["k"] + 1, None
        s["step"] += 1
        if group["capturable"]:
            return s["step"].to(working_dtype(p.dtype)), id(s["step"])
        return int(s["step"]), int(s["step"])

    def _set_scalars(self, batches):
        known, self._shared = {}, {}
        try:
            for b in batches:
                key = (id(b.group), b.clock)
                if key not in known:
                    known[key] = self.scalars(b.group, b.t)
                b.h = known[key]
        finally:
            del self._shared

    def _knobs(self, group):
        """The group's arguments as bodies read them: h.lr, h.eps, h.beta1, h.nesterov, ...

        l2 and decouple say how weight_decay acts: not at all, in the gradient, or apart from it.
        """
        known = {n: a for n, a in group.items() if n in FLAGS or n in INTEGERS}
        numbers = {n: a for n, a in group.items() if n in RANGES and n not in known}
        numbers |= dict(zip(("beta1", "beta2"), group.get("betas", ())))
        known |= {n: a if a is None else float(a) for n, a in numbers.items() if n != "lr"}
        apart = group.get("decouple", group.get("decoupled_weight_decay", self.decoupled))
        decays = bool(group.get("weight_decay"))
        known |= {"l2": decays and not apart, "decouple": decays and apart}
        return {**known, "lr": rate(group)}

    def _totals(self, rows):
        """(groups, for each the sums over its tensors, on all ranks) from rows of ``_sums``."""
        totals = {}
        for (group, _, _), sums in zip(rows, everywhere([row[1:] for row in rows])):
            _, so_far = totals.get(id(group), (None, None))
            if so_far is not None:
                sums = [a + s.to(a.device) for a, s in zip(so_far, sums)]
            totals[id(group)] = group, sums
        return [group for group, _ in totals.values()], [sums for _, sums in totals.values()]

    def _sums(self, batches, name):
        """[(group, part, sums over this rank's tensors)] of each batch, which is run."""
        return [(b.group, b.parts[0], self._run(b, name)) for b in batches]

    def _run(self, b, name):
        """One batch as a loop over tensors, as Vecs, or compiled: the same body."""
        group, device = b.group, b.params[0].device
        h = {**self._knobs(group), **b.h, "live": live(self, group), "noise": None}
        h["alone"] = not self.sums or group.get("slice_p", 1) > 1  # see pieces.finite
        h["idle"], h["l2"] = b.idle, h["l2"] and not b.idle
        if self._rounds_at_random(group, b.params[0]) and isinstance(group["k"], int):
            place = [id(g) for g in self.param_groups].index(id(group))
            first = [id(p) for p in group["params"]].index(id(b.params[0]))
            seed = hash((group["k"], place, first, *(b.parts[0].offset if b.parts[0] else ())))
            if device.type != "meta" and not group["compile"]:
                h["noise"] = torch.Generator(device).manual_seed(seed % 2**63)
        keys = [key for key in (*self.buffers(group), "residual") if key in b.states[0]]
        rows = [row_of(p, s, keys, part) for p, s, part in zip(b.params, b.states, b.parts)]
        dtype = working_dtype(b.params[0].dtype)
        h = {key: a.to(device, dtype) if isinstance(a, Tensor) else a for key, a in h.items()}
        run = getattr(self, name)
        if group["compile"] and not self.__dict__.get("_no_compiler"):
            return self._compiled(rows, run, h)
        if self.by_entry:
            rows = [piece for whole in rows for piece in cut(*whole, group.get("slice_p", 1))]
        if device.type == "cuda" if group["foreach"] is None else group["foreach"]:
            rows = [stack(some) for some in in_turn(rows)]
        elif not group["capturable"]:
            h = {key: as_float(a) for key, a in h.items()}
            rows = bunched(rows) if group["foreach"] is None else rows
        return self._over(rows, run, Scalars(h))

    def _compiled(self, rows, run, h):
        """The loop over the rows in graphs of a few, each kept for rows of the same shapes."""
        p, _, s, _ = rows[0]
        dtype, graphs = working_dtype(p.dtype), self.__dict__.setdefault("_graphs", {})
        numbers = {name: number(name, a, dtype, p.device) if isinstance(a, float) else a
                   for name, a in h.items() if isinstance(a, (float, Tensor))}
        fixed = {name: a for name, a in h.items() if name not in numbers}
        keys, names, values = tuple(s), tuple(numbers), tuple(numbers.values())
        # Inductor (torch 2.13) drops in-place writes to 0-d CPU tensors: one-entry views
        # nor does a region take a gradient in the memory of its parameter
        lines = [(lined(p), lined(g.clone() if g.data_ptr() == p.data_ptr() else g), part,
                  *map(lined, s.values())) for p, g, s, part in rows]
        if not self.by_entry:
            lines = [widened(*line) for line in lines]
        sums = []
        for start in range(0, len(rows), GRAPH):
            few, some = rows[start : start + GRAPH], lines[start : start + GRAPH]
            key = (run.__name__, keys, names, *fixed.values(), *(p.shape for p, *_ in few),
                   *(part for *_, part in few))
            if key not in graphs:
                graphs[key] = self._graph(run, fixed, keys, names, len(few))
            try:
                sums.append(graphs[key](some, *values))
            except torch._dynamo.exc.BackendCompilerFailed as error:  # nothing was written
                self._give_up_compiling(error)
                sums.append(self._over(few, run, Scalars(h)))
        return [functools.reduce(operator.add, same) for same in zip(*sums)]

    def _graph(self, run, fixed, keys, names, few):
        """The loop over a few lines of tensors, to be compiled when it is called first."""
        known = inspect.signature(torch.compile).parameters
        alone = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}

        def one(p, g, part, *tensors):
            h = {**fixed, **dict(zip(names, tensors[len(keys):]))}
            return run(p, g, dict(zip(keys, tensors)), part, Scalars(h))

        if REGIONS:
            one = torch.compiler.nested_compile_region(one, max_reuse_entries=few)
        return torch.compile(lambda rows, *h: self._over(rows, one, *h),
                             fullgraph=True, dynamic=False, options=OPTIONS, **alone)

    def _give_up_compiling(self, error):
        """Warn where there is no compiler, once; raise anything else."""
        if type(error.inner_exception).__name__ not in NO_COMPILER:
            raise error
        if not self.__dict__.get("_no_compiler"):
            warnings.warn("compile=True finds no compiler (on a CPU a C++ compiler named by CXX, "
                          "on a GPU Triton): the step runs without, with the same numbers and "
                          f"slower. {str(error.inner_exception).splitlines()[0]}", stacklevel=3)
        self._no_compiler = True

    def _over(self, rows, one, *h):
        """The loop over parameters: the sums of one(*row, *h)."""
        totals = None
        for row in rows:
            sums = one(*row, *h)
            totals = sums if totals is None else [a + b for a, b in zip(totals, sums)]
        return [a if isinstance(a, Tensor) else NONE for a in totals]

    def _pass(self, p, g, s, part, h):
        """One parameter: load, observe, advance, store; its sums and its count of holes."""
        h.part = part
        x, g, bad = load(p, g, s, h)
        narrow = {key: s[key] for key in self.rounded if key in s and s[key].dtype != x.dtype}
        s = s | {key: t.to(x.dtype) for key, t in narrow.items()} if narrow else s
        may_stand = not isinstance(h.live, int)  # a tensor lr that may be 0: undo what moved
        kept = [x, *(s[key] for key in s if key != "residual")] if may_stand else ()
        before = [t.clone() for t in kept]
        sums = [*self.observe(x, g, s, h), bad]
        if not h.idle:
            self.advance(x, g, s, h)
        if may_stand:
            sums = [a * h.live for a in sums]
            for t, old in zip(kept, before):
                keep_(t, old, h.live)
        store_(p, x, s.get("residual"), h.noise)
        for key, t in narrow.items():
            store_(t, s[key], None, h.noise)
        return sums

    def _look(self, p, g, s, part, h):
        """One parameter's sums, for methods that need the gradients' size first."""
        h.part = part
        x, g, _ = load(p, g, s, h, counted=False)
        return [a * h.live for a in self.look(x, g, s, h)]

    # what a user reads ------------------------------------------------------------------------
    def effective_lr(self, group=0):
        """The factor on the method's direction in the next step, as a float (reads the device)."""
        return float(self.param_groups[group]["lr"])

    def nonfinite(self):
        """How many gradient entries were not finite so far (reads the device)."""
        return sum(int(group["nonfinite"]) for group in self.param_groups)

    def state_bytes(self):
        """Bytes kept for each parameter entry beside it and its gradient, since the first step."""
        tensors = [local(t) for s in self._states() for t in s.values()]
        size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        params = [p for group in self.param_groups for p in group["params"]]
        return size / max(sum(local(p).numel() for p in params), 1)

    def _states(self):
        return self.state.values()

    def _report(self, groups):
        every = groups[0].get("log_every", 0)
        if every and groups[0]["k"] % every == 0:
            rates = [self.effective_lr(i) for i in range(len(self.param_groups))]
            ds = [float(group["d"]) for group in self.param_groups if "d" in group]
            log.info("k=%d effective_lr=%s d=%s", groups[0]["k"], rates, ds)

    # checkpoints ------------------------------------------------------------------------------
    def state_dict(self):
        """As in torch.optim; the groups' 0-d tensors are copies: a snapshot of them.

        What a sharded parameter keeps of every stride-th entry alone has no regular shards: here,
        in the checkpoint, it stands in a DTensor of the parameter's shape, 0 in between.
        """
        first = self.register_state_dict_post_hook(Family._written, prepend=True)
        try:
            return super().state_dict()
        finally:
            first.remove()

    def _written(self, saved):
        for i, p, stride in self._strides(saved):
            s = saved["state"].get(i, {})
            if (part := part_of(p)) and stride > 1 and s:
                spread = {key: part.spread(s[key], stride) for key in self.sampled if key in s}
                saved["state"][i] = {**s, **spread}
        copies = {}
        for group in saved["param_groups"]:
            for name, value in group.items():
                if isinstance(value, Tensor):
                    group[name] = copies.setdefault(id(value), value.clone())
            group["method"] = self._method()

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """As in torch.optim, but every tensor is copied and keeps its own dtype.

        Loads what the reference package of the same class saved: keys that are missing get this
        optimizer's own values, keys that differ are converted (logged at INFO).

        Raises:
            ValueError: for the checkpoint of another method, before anything is changed.
        """
        read = []

        def last(_, given):  # once the user's own hooks have run
            read.append(self._read(copied(given)))
            return read[0]

        def first(_):  # before the user's own
            for i, p, stride in self._strides(read[0]):
                if i in read[0]["state"]:
                    self.state[p] = {key: self._restore(p, key, a, stride)
                                     for key, a in read[0]["state"][i].items()}

        hooks = (self.register_load_state_dict_pre_hook(last),
                 self.register_load_state_dict_post_hook(first, prepend=True))
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _read(self, state_dict):
        """A checkpoint (a copy) in this class's own form; ValueError for another method's."""
        groups = state_dict["param_groups"]
        foreign = any("nonfinite" not in group for group in groups)
        names = [group.pop("method", None) for group in groups]
        mine = {self._method(), *ALIKE.get(self._method(), ())}
        if odd := [name for name in names if name and name not in mine]:
            self._refuse(f"it is one of {odd[0]}")
        for theirs, mine in zip(groups, self.param_groups):
            self._refuse("it lacks {}", (n for n in BOOKS[:5] if n in mine and n not in theirs))
            self._refuse("it has {}", (n for n in BOOKS if n in theirs and n not in mine))
        if foreign:
            state_dict = self.convert(state_dict)
            log.info("%s: converted a checkpoint of the reference package", type(self).__name__)
        if any(names):
            return state_dict
        for theirs, mine in zip(state_dict["param_groups"], self.param_groups):
            buffers = self.buffers({**mine, **theirs, "params": mine["params"]})
            for i, p in zip(theirs["params"], mine["params"]):
                if saved := state_dict["state"].get(i):
                    odd = set(saved) - {"step", "residual", *self.optional, *buffers}
                    self._refuse("it has {}", sorted(odd & TELLING) if foreign else ())
                    lacks = sorted(set(buffers) - set(self.optional) - set(saved))
                    self._refuse("it lacks {}", (n for n in lacks if foreign or odd
                                                 if buffers[n](p) is not None))
        return state_dict

    def _method(self):
        """The class's name, or of the class of this package that it was derived from elsewhere."""
        home = [c for c in type(self).__mro__ if c.__module__.split(".")[0] == __package__]
        return home[0].__name__

    def _refuse(self, why, names=("",)):
        for name in names:
            raise ValueError(f"not a checkpoint of {type(self).__name__} or its reference "
                             f"package: {why.format(name)}. Start anew from the weights, without "
                             "the other optimizer's state")

    def _strides(self, state_dict):
        """(index in the checkpoint, parameter, every how many entries are sampled)."""
        for theirs, group in zip(state_dict["param_groups"], self.param_groups):
            stride = group.get("slice_p", self.stride)
            yield from ((i, p, stride) for i, p in zip(theirs["params"], group["params"]))

    def _restore(self, p, key, value, stride=1):
        """A saved value on p's device in its own dtype, never in p's; whole ones are cut."""
        if not isinstance(value, Tensor):
            return value
        if key == "step":
            return value.to(dtype=torch.float32, copy=True)
        exact = key in self.stored or not value.is_floating_point()
        dtype = value.dtype if exact else working_dtype(p.dtype)
        value, part = value.to(device=p.device, dtype=dtype, copy=True), part_of(p)
        sampled = key in self.sampled and stride > 1
        if part and not part_of(value) and value.dim():
            value = part.distribute(value, stride if sampled else 1)
        return every(value, stride).clone() if sampled and value.shape == p.shape else value

    def convert(self, state_dict):
        """Turn a reference package's state_dict (already a copy) into this class's own."""
        groups = state_dict["param_groups"]
        for group in groups:
            group.pop("foreach", None)
            group.pop("fused", None)
        return state_dict

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            self._fill(group)


def plain(value):
    """A number of Python's for one of numpy's, which torch.load(weights_only=True) refuses."""
    if isinstance(value, (tuple, list)):
        return tuple(map(plain, value))
    foreign = isinstance(value, Real) and type(value) not in (int, float, bool)
    return value.item() if foreign and hasattr(value, "item") else value


def given(names):
    """What an ``__init__`` hands on: its arguments by name, from its ``locals()``."""
    own = {n: a for n, a in names.items() if n not in ("self", "__class__", "modes")}
    return own | names["modes"]


@functools.lru_cache(maxsize=4096)
def number(name, value, dtype, device):
    """A 0-d tensor for the graph, which a float would make compile anew whenever it changes.

    Every name has its own: a tensor that stands for two names in one step and not in the next
    would compile anew as well.
    """
    return torch.full((), value, dtype=dtype, device=device)


def lined(t):
    """t, or a one-entry view of a 0-d tensor (torch.atleast_1d takes ten times as long)."""
    return t if t.dim() else t.view(1)


def widened(p, g, part, *tensors):
    """The line with small filters seen `abreast`, where they lie in memory one after another."""
    shape = abreast(p.shape) if p.is_cpu and not part else None
    if shape:
        line = [(t, t.shape == p.shape) for t in (p, g, *tensors)]
        if all(t.is_contiguous() for t, alike in line if alike):
            p, g, *tensors = (t.view(shape) if alike else t for t, alike in line)
    return p, g, part, *tensors


NONE = torch.zeros((), dtype=torch.int64, device="cpu")  # the count of holes where none is known


class Scalars:
    """A dictionary's entries as attributes: a ``SimpleNamespace`` that torch.compile traces."""

    def __init__(self, values):
        self.__dict__.update(values)


def rate(group):
    """The group's lr: a float, or the 0-d tensor itself where only the device knows it."""
    lr = group["lr"]
    host = isinstance(lr, Tensor) and lr.device.type == "cpu" and not group.get("capturable")
    return lr.item() if host else lr


def known_zero(lr):
    return not isinstance(lr, Tensor) and lr == 0


def live(method, group):
    """1; for a tensor lr 0 on the device while it is 0 and the method freezes then."""
    lr = rate(group)
    return (lr != 0).to(lr.dtype) if method.freezes and isinstance(lr, Tensor) else 1


def load(p, g, s, h, counted=True):
    """x (p itself in float32 and float64), a clean g with its L2 penalty, the count of holes."""
    x = join(p, s.get("residual"))
    g = g if g.dtype == x.dtype else g.to(x.dtype)
    g, bad = finite(g, h.alone, counted, None if h.capturable else x)
    g = -g if h.maximize else g
    return x, add_scaled_(g.clone(), x, h.weight_decay) if h.l2 else g, bad


def keep_(t, old, live):
    """t <- t where live, else old."""
    if isinstance(t, Vec):
        t.each(lambda a, b: a.copy_(torch.where(live != 0, a, b)), old)
    else:
        t.copy_(where(live != 0, t, old))


def copied(state_dict):
    """The dictionaries of a state_dict, new; the tensors, shared."""
    state = {i: dict(s) for i, s in state_dict["state"].items()}
    groups = [dict(group) for group in state_dict["param_groups"]]
    return {**state_dict, "state": state, "param_groups": groups}


def check_gradient(p):
    g = p.grad
    if g is None:  # of a sharded parameter, whose gradient other ranks have
        return
    if sharded(g) != sharded(p):
        raise RuntimeError("gradient and parameter must both be DTensors, or neither")
    if g.layout != torch.strided:
        raise RuntimeError("sparse gradients are not supported: use sparse=False in the embedding")
    if g.shape != p.shape or g.dtype != p.dtype or g.device != p.device:
        if g.is_complex():
            raise RuntimeError("complex gradients are not supported: use torch.view_as_real")
        raise RuntimeError(
            f"the gradient ({tuple(g.shape)}, {g.dtype}, {g.device}) must match its parameter "
            f"({tuple(p.shape)}, {p.dtype}, {p.device})"
        )
