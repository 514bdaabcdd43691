"""Optimizers around another optimizer: Mechanic, and Schedule-Free around any base."""

import inspect
from contextlib import contextmanager

import torch
from torch import Tensor

from .optimizer import Family, check_gradient
from .pieces import WIDE, finite, residual_dtype
from .shards import everywhere, gradient, local, part_of, present


class Wrapper(Family):
    """An ``Optimizer`` whose ``param_groups`` are the base's dictionaries.

    Schedulers set the base's lr. What is its own stands apart: its numbers in ``group[key]``, its
    tensors (named in ``kept``) in its own state, so that any base runs; a checkpoint joins the
    two. A subclass writes ``update``, within which ``self.clean(rows)`` guards the base's step.
    """

    key = ""
    kept = ()

    def __init__(self, base, entries):
        self.base, self.entries = base, entries
        torch.optim.Optimizer.__init__(self, base.param_groups, base.defaults)

    def own(self, group):
        return group[self.key]

    def add_param_group(self, param_group):
        if not any(param_group is group for group in self.base.param_groups):
            self.base.add_param_group(param_group)
        self.param_groups.append(self.base.param_groups[len(self.param_groups)])
        self._fill(self.param_groups[-1])

    def base_low(self, p):
        """The residual of a base of this family, which holds float32 beside bfloat16 p."""
        own = isinstance(self.base, Family) and p.dtype not in WIDE
        low = self.base.state.get(p, {}).get("residual") if own else None
        return local(low) if low is not None and low.dtype == residual_dtype(p) else None

    def step_param(self, p, group):
        raise RuntimeError(f"{type(self).__name__} steps its base as a whole: call step()")

    def found(self):
        """[(group, parameter)] of those with a gradient, all checked."""
        rows = [(g, p) for g in self.param_groups for p in g["params"]]
        found = set(present([p for _, p in rows]))
        rows = [(g, p) for g, p in rows if p in found]
        for _, p in rows:
            check_gradient(p)
        return rows

    @contextmanager
    def clean(self, rows):
        """Within the block gradients are copies without holes: the base may overwrite them."""
        grads = [p.grad for _, p in rows]
        try:
            holes = []
            for _, p in rows:
                (clean, bad), part = finite(gradient(p)), part_of(p)
                p.grad = part.wrap(clean) if part else clean
                holes.append((part, [bad]))
            yield
        finally:
            for (_, p), g in zip(rows, grads):
                p.grad = g
        for (group, _), (bad,) in zip(rows, everywhere(holes)):
            own = self.own(group)
            own["nonfinite"] = own["nonfinite"] + bad

    def nonfinite(self):
        return sum(int(self.own(group)["nonfinite"]) for group in self.param_groups)

    def _states(self):
        its = self.base._states() if isinstance(self.base, Family) else self.base.state.values()
        return [*self.state.values(), *its]

    def state_dict(self):
        """The base's, with this optimizer's tensors added to each parameter's state."""
        first = self.register_state_dict_post_hook(Wrapper._joined, prepend=True)
        try:
            return torch.optim.Optimizer.state_dict(self)  # with the user's hooks
        finally:
            first.remove()

    def _joined(self, mine):
        saved = self.base.state_dict()
        state = {i: dict(s) for i, s in saved["state"].items()}
        for i, s in mine["state"].items():
            if both := sorted(set(s) & set(state.setdefault(i, {}))):
                raise RuntimeError(f"the base keeps a tensor named {both[0]} too: save base apart")
            state[i].update(s)
        for group in saved["param_groups"]:
            group[self.key] = dict(group[self.key])
        return {"state": state, "param_groups": saved["param_groups"]}

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """Its own checkpoint, or what ``convert`` turns into one."""
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups = self.convert([dict(group) for group in state_dict["param_groups"]])
        state = state_dict["state"]
        base = {i: {k: v for k, v in s.items() if k not in self.kept} for i, s in state.items()}
        self._check(groups, {i: s for i, s in base.items() if state[i]})
        base = {i: {k: cloned(v) for k, v in s.items()} for i, s in base.items() if s}
        self.base.load_state_dict({"state": base, "param_groups": groups})
        self.param_groups = list(self.base.param_groups)
        self.state.clear()
        for i, p in self._numbered(groups):
            mine = {k: v for k, v in state.get(i, {}).items() if k in self.kept}
            if mine:
                self.state[p] = {k: self._restore(p, k, v) for k, v in mine.items()}
        for group in self.param_groups:
            self._fill(group)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def convert(self, groups):
        return groups

    def _numbered(self, groups):
        ids = [i for group in groups for i in group["params"]]
        return zip(ids, [p for group in self.base.param_groups for p in group["params"]])

    def _check(self, groups, state):
        """Refuse a checkpoint where the base's part, {index: {name: value}}, is empty."""
        if any(i in state and not state[i] and self.base.state.get(p)
               for i, p in self._numbered(groups)):
            raise ValueError("the base's tensors are missing: they get lost on the way through "
                             "flatten_optimizer_state_dict=True of torch.distributed.checkpoint")

    def __getstate__(self):
        return {**super().__getstate__(), "base": self.base, "entries": self.entries}

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)


def check_base(base):
    """Refuse a base that evaluates the model by itself, at points that are not ours."""
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"base must step without a closure, which {type(base).__name__} needs")


def cloned(value):
    """A copy of a tensor, where torch.optim would keep the saved one; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value
