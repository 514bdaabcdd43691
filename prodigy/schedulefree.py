r"""Schedule-Free methods (Defazio et al. 2024, The Road Less Scheduled, 2405.15682).

Three sequences: gradients are taken at y, the base method moves z, and the model is x:

.. math::
    y_t = (1-\beta) z_t + \beta x_t, \quad
    z_{t+1} = z_t - \gamma_t u_t(y_t), \quad
    x_{t+1} = (1-c_{t+1})\, x_t + c_{t+1} z_{t+1}, \quad
    c_{t+1} = w_t / \textstyle\sum_{i\le t} w_i.

The parameters hold y while training (``train()``, the start) and x for evaluation (``eval()``).
Two tensors are enough, since x = (y - (1-beta) z)/beta; ``store_x`` keeps x as a third, which
makes switching exact and beta = 0 legal. Arguments, defaults and state keys are those of
schedulefree 1.4.1, whose checkpoints load. See theory/33 for the weights.
"""

import copy
import itertools
from contextlib import contextmanager

import torch
from torch import Tensor

from .classical import wide_zeros
from .optimizer import FLAGS, RANGES, Family, check, eagerly, given, keep_, known_zero, live
from .optimizer import rate
from .pieces import WIDE, add_scaled_, ema_, join, keep_residual, larger, put_, ratio, rectify
from .pieces import root, smaller, toward_, where, working_dtype
from .shards import local
from .wrapper import Wrapper, check_base


def wide_clone(p):
    """A copy in the dtype the step computes in."""
    return p.detach().clone().to(working_dtype(p.dtype))


class ScheduleFree(Family):
    """The point: which of x, y, z the parameters hold, and how y and x follow z.

    A method adds ``direction(g, s, h)`` (u above) and ``pace(group, t)`` (lr_t after warm-up).
    """

    counters = ("k", "weight_sum", "lr_max", "scheduled_lr")
    decoupled = True  # at y
    low = "residual"  # state key of what the parameter's own precision cannot hold

    # what a method fills in -------------------------------------------------------------------
    def direction(self, g, s, h):
        return g

    def pace(self, group, t):
        """lr_t: the group's lr times its linear warm-up, and scalars of the direction."""
        warmup = self.own(group)["warmup_steps"]
        ramp = smaller(t / warmup, 1.0) if warmup else 1.0
        return rate(group) * ramp, {}

    def own(self, group):
        """The dictionary that holds this method's entries of a group."""
        return group

    def beta(self, own):
        return own["momentum"] if "momentum" in own else own["betas"][0]

    # weights ----------------------------------------------------------------------------------
    def begin(self, group):
        beta = self.beta(group)
        start = dict(train_mode=not group["closure_form"], y_beta=beta, scheduled_lr=0.0)
        return dict(start, weight_sum=0.0, lr_max=0.0)

    def inherit(self, first, group):
        return {"train_mode": first["train_mode"]}

    def validate(self, group):
        beta = ScheduleFree.beta(self, group)  # the argument, a float, not what it is by now
        if beta == 0 and not group.get("store_x"):
            name = "momentum" if "momentum" in group else "betas[0]"
            raise ValueError(f"{name} = 0 (Polyak averaging) needs store_x=True: y alone is z")
        if beta == 1 and group.get("schedulefree_c"):
            raise ValueError("schedulefree_c with beta = 1 would never move x: pass 0 for one")

    def average(self, own, t, lr):
        """(c_{t+1}, sum of weights, largest lr) for w_t = t^r max(lr)^weight_lr_power.

        With schedulefree_c = C > 0, c <- min(1, c (1 - beta) C): a shorter average that no longer
        depends on beta (Song et al. 2025, Through the River, 2507.09846, Alg. 2).
        """
        lr_max = larger(lr, own["lr_max"])
        weight = where(lr_max > 0, t ** own["r"] * lr_max ** own["weight_lr_power"], 0.0)
        total = own["weight_sum"] + weight
        c = ratio(weight, total)
        if own["schedulefree_c"]:
            c = smaller(c * (1 - self.beta(own)) * own["schedulefree_c"], 1.0)
        return c, total, lr_max

    def scalars(self, group, t):
        lr, more = self.pace(group, t)
        c, _, _ = self.average(group, t, lr)
        beta = self.beta(group)
        return dict(lr=lr, c=c, beta=beta, pull=lr * (1 - beta * (1 - c)), **more)

    def adapt(self, groups, totals):
        for group in groups:  # k counts this step already
            lr, _ = self.pace(group, group["k"])
            _, total, lr_max = self.average(group, group["k"], lr)
            for name, value in zip(self.counters[1:], (total, lr_max, lr)):
                self._keep(group, name, value)

    # points -----------------------------------------------------------------------------------
    def buffers(self, group):
        return {"z": wide_clone, **({"x": wide_clone} if group.get("store_x") else {})}

    def advance(self, x, g, s, h):
        """y, z -> y, z without forming x (or with x, if it is kept), all from the old y and z.

        y' = (1-c) x + c z' moved towards z' by 1-beta; with x = (y - (1-beta) z)/beta this is
        y' = (1-c) y + c z - lr (1 - beta (1-c)) u.
        """
        y, z = x, s["z"]
        u = self.direction(g, s, h)
        if h.decouple:
            u = add_scaled_(u.clone() if u is g else u, y, h.weight_decay)
        if h.store_x:
            add_scaled_(z, u, -h.lr)
            y.copy_(s["x"].lerp_(z, h.c).lerp(z, 1 - h.beta))
        else:
            toward_(y, z, h.c)
            add_scaled_(y, u, -h.pull)
            add_scaled_(z, u, -h.lr)

    def _groups(self):
        """(the group's own entries, [(parameter, its state)] for those that have moved)."""
        for group in self.param_groups:
            states = ((p, self.state[p]) for p in group["params"] if "z" in self.state.get(p, ()))
            yield self.own(group), states

    def _move(self, own, states, old, new):
        """Parameters go from (1-old) z + old x to (1-new) z + new x; x and z stay."""
        for p, s in states:
            p, s = local(p), {name: local(t) for name, t in s.items()}
            y = join(p, s.get(self.low))
            if own.get("store_x"):
                y.copy_(s["x"].lerp(s["z"], 1 - new))
            else:
                y.lerp_(s["z"].to(y.dtype), 1 - new / old)
            put_(p, y, s.get(self.low))

    def _follow(self, moving, stepped=(), only=None):
        """Where beta was changed since the last step, take y along (also without a gradient).

        moving: ids of the groups that step, stepped: of the parameters that will; only: one
        parameter, within a fused backward pass; ``step`` does the rest.
        """
        taken = self.__dict__.get("_taken", ())
        for own, states in self._groups():
            if id(own) in moving and own["y_beta"] != self.beta(own):
                behind = [row for row in states if row[0] not in taken]
                now = behind if only is None else [row for row in behind if row[0] is only]
                self._move(own, now, own["y_beta"], self.beta(own))
                if only is None:
                    own["y_beta"] = self.beta(own)

    def gather(self, only=None):
        for own, _ in self._groups():
            self.validate(own)
        batches = super().gather(only)
        pending = self.__dict__.get("_pending", ())
        moving = {*(id(group) for group, _, _ in pending), *(id(b.group) for b in batches)}
        self._follow(moving, {id(p) for b in batches for p in b.params}, only and only[1])
        return batches

    @torch.no_grad()
    def train(self, mode=True):
        """Let the parameters hold y (or x, for mode=False); does nothing if they already do."""
        for own, states in self._groups():
            if own["train_mode"] == mode:
                continue
            if mode:
                self.validate(own)
                own["y_beta"] = self.beta(own)
                self._move(own, states, 1.0, own["y_beta"])
            else:
                self._move(own, states, own["y_beta"], 1.0)
            own["train_mode"] = mode

    def eval(self):
        """Let the parameters hold x, the point to evaluate and to publish."""
        self.train(False)

    @contextmanager
    @torch.no_grad()
    def averaged(self):
        """Within the block the parameters hold x; afterwards all is as before, bit for bit.

        Also where the block calls train() or eval(); a group that it adds takes over the mode.
        """
        books, kept = {}, []
        for own, states in self._groups():
            books[id(own)] = {name: own[name] for name in ("train_mode", "y_beta")}
            for p, s in states:
                kept += [(t, t.clone()) for t in (p, s.get(self.low)) if t is not None]
        self.eval()
        try:
            yield self
        finally:
            for t, old in kept:
                t.copy_(old)
            first = next(iter(books.values()), {})
            for own, _ in self._groups():
                own.update(books.get(id(own), {"train_mode": first.get("train_mode", True)}))

    def averaged_state_dict(self, model):
        """model.state_dict() with x in the place of y (a copy): what to save or publish."""
        with self.averaged():
            return copy.deepcopy(model.state_dict())

    def update_bn(self, loader, model, device=None, batches=None):
        """Re-estimate BatchNorm statistics at x; those seen in training belong to y.

        Args:
            loader: yields inputs, or tuples whose first entry is the input.
            model: the module whose running means and variances are replaced.
            device: where to put the inputs.
            batches: use only that many; the statistics are their plain mean, so that 50 batches
                leave 1/sqrt(50) = 14 % of one batch's noise (a running average of momentum 0.1
                would still carry 0.9^50 = 0.5 % of the old ones).
        """
        with self.averaged():
            torch.optim.swa_utils.update_bn(itertools.islice(loader, batches), model, device)

    @eagerly
    def step(self, closure=None):
        """One step. With ``closure_form`` parameters hold x before and after, y in the closure."""
        form = any(own["closure_form"] for own, _ in self._groups())
        moves = not all(known_zero(rate(group)) for group in self.param_groups)
        if form and moves and closure is None:
            raise RuntimeError("closure_form=True needs step(closure): the gradient is taken at y")
        if not form:
            self._must_train("step")
            return super().step(closure)
        self.train()
        try:
            return super().step(closure)
        finally:
            self.eval()

    def _must_train(self, name):
        if not all(own["train_mode"] for own, _ in self._groups()):
            raise RuntimeError(f"the parameters hold x: call optimizer.train() before {name}()")

    def step_param(self, p, group):
        if any(own["closure_form"] for own, _ in self._groups()):
            raise RuntimeError("closure_form=True has no step_param: it needs step(closure)")
        self._must_train("step_param")
        super().step_param(p, group)

    def effective_lr(self, group=0):
        group = self.param_groups[group]
        return float(self.scalars(group, group["k"] + 1)["lr"])

    def convert(self, state_dict):
        state_dict = super().convert(state_dict)
        for group in state_dict["param_groups"]:
            group["lr_max"] = max(group.get("lr_max", 0.0), 0.0)
            group["store_x"] = False  # x lies in none of its tensors
        return state_dict


def check_rectified(group):
    """Refuse a beta2 for which RAdam's rho_t never exceeds 4, so that nothing would ever move."""
    if group["betas"][1] <= 0.6:
        raise ValueError(f"betas[1] must exceed 0.6 to be rectified, got {group['betas'][1]}: "
                         "below, RAdam never leaves its silent phase")


class SGDScheduleFree(ScheduleFree):
    r"""Schedule-Free SGD (2405.15682, Sec. 2; Theorem 2 for the weights).

    The module's three lines with :math:`u_t = \nabla f(y_t) + \lambda y_t` and
    :math:`w_t = t^r \max_{i\le t}\gamma_i^p`.

    Departures from schedulefree 1.4.1: starts in train mode; a step with lr = 0 is no step; beta
    may change between steps (x is recovered with the beta that y was built with).

    Args:
        params: tensors, named tensors or parameter groups.
        lr (float or 0-d tensor): :math:`\gamma`, in units of x over units of g; [0, inf).
        momentum (float): :math:`\beta`, [0, 1]; 1 is primal averaging, 0 (Polyak-Ruppert) needs
            store_x.
        weight_decay (float): :math:`\lambda`, at y; [0, inf).
        warmup_steps (int): linear warm-up of lr; [0, inf).
        r (float): power of t in the weights; (-1, inf).
        weight_lr_power (float): :math:`p`, [0, inf).
        store_x (bool): keep x in a tensor of its own.
        schedulefree_c (float): C of the refined average, 0 = off; [0, inf).
        closure_form (bool): the parameters hold x between steps; ``step`` takes a closure and
            needs no train()/eval().
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    ranges = {"momentum": "[0, 1]"}

    def __init__(self, params, lr=1.0, momentum=0.9, weight_decay=0, warmup_steps=0, r=0.0,
                 weight_lr_power=2, foreach=None, *, store_x=False, schedulefree_c=0.0,
                 closure_form=False, **modes):
        super().__init__(**given(locals()))


class AdamWScheduleFree(ScheduleFree):
    r"""Schedule-Free AdamW (2405.15682, Alg. 1, as released since schedulefree 1.3).

    The module's three lines with

    .. math::
        v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2, \qquad
        u_t = \frac{g_t}{\sqrt{v_t/(1-\beta_2^t)} + \epsilon} + \lambda y_t, \qquad
        \gamma_t = \gamma \min(1, t/T_{\text{warm}}).

    The paper's box puts the bias correction into :math:`\gamma_t` instead, which weakens decay
    during warm-up. There is no first moment: :math:`\beta_1` is the interpolation.

    Departures from schedulefree 1.4.1: see :class:`SGDScheduleFree`.

    Args:
        params: tensors, named tensors or parameter groups.
        lr (float or 0-d tensor): :math:`\gamma`, in units of x; [0, inf).
        betas (pair of floats): :math:`\beta_1` in [0, 1] (0 needs store_x), :math:`\beta_2` in
            [0, 1).
        eps (float): in units of g; [0, inf).
        weight_decay (float): :math:`\lambda`, at y, in units of 1/lr; [0, inf).
        warmup_steps, r, weight_lr_power, store_x, schedulefree_c, closure_form: as in
            :class:`SGDScheduleFree`.
        inner_momentum (float): replace g in u by its bias-corrected running average (for large
            batches); 0 = off; [0, 1).
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    ranges = {"betas[0]": "[0, 1]"}

    def __init__(self, params, lr=0.0025, betas=(0.9, 0.999), eps=1e-8, weight_decay=0,
                 warmup_steps=0, r=0.0, weight_lr_power=2.0, foreach=None, *, inner_momentum=0.0,
                 store_x=False, schedulefree_c=0.0, closure_form=False, **modes):
        super().__init__(**given(locals()))

    def buffers(self, group):
        names = ["exp_avg_sq"] + ["exp_avg"] * (group["inner_momentum"] > 0)
        return {**super().buffers(group), **dict.fromkeys(names, wide_zeros)}

    def scalars(self, group, t):
        return dict(super().scalars(group, t), correction=root(1 - group["betas"][1] ** t),
                    inner_correction=1 - group["inner_momentum"] ** t)

    def direction(self, g, s, h):
        v = ema_(s["exp_avg_sq"], g.square(), h.beta2)
        if "exp_avg" in s:
            g = ema_(s["exp_avg"], g, h.inner_momentum) / h.inner_correction
        return g / v.sqrt().div_(h.correction).add_(h.eps)


class RAdamScheduleFree(ScheduleFree):
    r"""Schedule-Free RAdam (schedulefree 1.4.1; Liu et al. 2019, 1908.03265, Alg. 2).

    :class:`AdamWScheduleFree` with :math:`\gamma_t = \gamma\,` :func:`prodigy.pieces.rectify` in
    the place of warm-up. While :math:`\rho_t \le 4` (4 steps at the default) the direction is g
    and :math:`\gamma_t = 0`, or :math:`\gamma` if not ``silent_sgd_phase``.

    Departures from schedulefree 1.4.1: see :class:`SGDScheduleFree`.

    Args:
        params, lr, betas, eps, weight_decay, r, weight_lr_power, store_x, schedulefree_c,
            closure_form: as in :class:`AdamWScheduleFree`.
        silent_sgd_phase (bool): do not move during the first steps.
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    ranges = {"betas[0]": "[0, 1]"}

    def __init__(self, params, lr=0.0025, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, r=0.0,
                 weight_lr_power=2.0, foreach=None, silent_sgd_phase=True, *, store_x=False,
                 schedulefree_c=0.0, closure_form=False, **modes):
        super().__init__(**given(locals()))

    def validate(self, group):
        super().validate(group)
        if group["silent_sgd_phase"]:
            check_rectified(group)

    def buffers(self, group):
        return {**super().buffers(group), "exp_avg_sq": wide_zeros}

    def pace(self, group, t):
        factor, applies = rectify(group["betas"][1], t)
        before = 0.0 if group["silent_sgd_phase"] else 1.0
        lr = rate(group) * where(applies, factor, before)
        return lr, dict(adaptive=where(applies, 1.0, 0.0))

    def scalars(self, group, t):
        return dict(super().scalars(group, t), correction=root(1 - group["betas"][1] ** t))

    def direction(self, g, s, h):
        v = ema_(s["exp_avg_sq"], g.square(), h.beta2)
        denominator = v.sqrt().div_(h.correction).add_(h.eps)
        return g / denominator.mul_(h.adaptive).add_(1 - h.adaptive)


class ScheduleFreeWrapper(Wrapper, ScheduleFree):
    r"""Schedule-Free around any base optimizer (schedulefree 1.4.1's wrapper).

    The module's three lines with :math:`z_{t+1}` = the base optimizer's step from :math:`z_t` on
    the gradient at :math:`y_t`, and :math:`w_t = t^r \max_{i\le t}(\gamma_i d_i)^p`, where d is
    the base's own estimate if it has one (Prodigy, D-Adaptation).

    An ``Optimizer`` itself: its ``param_groups`` are the base's dictionaries, so that schedulers
    set the base's lr; its own entries stand in ``group["schedule_free"]`` and its tensors apart
    from the base's state, so that any base runs. Checkpoints hold both. Departures from
    schedulefree: ``p.grad`` is untouched and cleaned for the base too; mode and beta are saved;
    parameters without a gradient stay.

    Args:
        base (torch.optim.Optimizer): any whose step needs no closure; best without momentum of
            its own (Prodigy and DAdaptAdam: beta1 = 0), which would average twice, and beside
            bfloat16 weights best one of this package: torch's round z to bfloat16 in every step,
            and small steps are lost.
        weight_decay_at_y (float): decay taken at y and applied to z, in units of 1/lr; [0, inf).
            (The base's own weight decay acts at z.)
        momentum (float): :math:`\beta`, [0, 1]; 0 needs store_x.
        weight_lr_power, r, warmup_steps, store_x, schedulefree_c, closure_form: as in
            :class:`SGDScheduleFree`.

    Raises:
        TypeError: if base is not a torch.optim.Optimizer, is schedule-free already, or cannot step
            without a closure (LBFGS).
    """

    key = "schedule_free"
    low = "y_residual"
    kept = ("z", "x", "y_residual")

    def __init__(self, base, weight_decay_at_y=0.0, momentum=0.9, weight_lr_power=2, r=0, *,
                 warmup_steps=0, store_x=False, schedulefree_c=0.0, closure_form=False):
        entries = {name: a for name, a in locals().items() if name in RANGES or name in FLAGS}
        if not isinstance(base, torch.optim.Optimizer) or isinstance(base, ScheduleFree):
            raise TypeError("base must be a torch.optim.Optimizer, not schedule-free itself")
        check_base(base)
        for name, value in entries.items():
            check(name, value, {"momentum": "[0, 1]"})
        self.validate(entries)
        super().__init__(base, entries)

    def _fill(self, group):
        fresh = {**self.entries, **self.begin(self.entries), "k": 0, "nonfinite": 0}
        if group is not self.param_groups[0]:
            fresh["train_mode"] = self.own(self.param_groups[0])["train_mode"]
        own = group["schedule_free"] = {**fresh, **group.get("schedule_free", {})}
        like = rate(group) * group.get("d", 1.0)
        if isinstance(like, Tensor):
            own.update({name: torch.as_tensor(own[name]).to(like) for name in self.counters[1:]})

    @torch.no_grad()
    def update(self):
        """z goes into the parameters, the base steps, then x and y follow."""
        for group in self.param_groups:
            self.validate(self.own(group))
        rows = self.found()
        for group, p in rows:
            self._ready(group, p)
        rates = [(group, group["lr"]) for group in self.param_groups]
        active = [(group, p) for group, p in rows if not known_zero(rate(group))]
        self._follow({id(self.own(group)) for group, _ in active})
        still = [row for group, p in rows for row in self._still(group, p)]
        begun = []
        try:
            for group, p in active:
                begun.append((group, p, self._to_z(group, p)))
            for group, lr in rates:
                group["lr"] = lr * self._ramp(group)
            with self.clean(rows):
                self.base.step()
        except BaseException:  # the base refused, or was interrupted: back to y
            for group, p, z in begun:
                self._to_y(group, p, 0.0, z)
            raise
        finally:
            for group, lr in rates:
                group["lr"] = lr
        moved = {id(group): group for group, _ in active}
        books = {i: self._average(group) for i, group in moved.items()}
        for group, p in active:
            self._to_y(group, p, books[id(group)][0])
        for t, old, alive in still:
            keep_(t, old, alive)
        for i, group in moved.items():
            own, alive = self.own(group), live(self, group)
            new = zip(self.counters[1:], books[i][1:])
            own.update({name: where(alive != 0, a, own[name]) for name, a in new})
            own.update(k=own["k"] + alive)

    def _ramp(self, group):
        own = self.own(group)
        return smaller((own["k"] + 1) / own["warmup_steps"], 1.0) if own["warmup_steps"] else 1.0

    def _average(self, group):
        """c and the next weight_sum, lr_max and scheduled_lr."""
        lr = rate(group) * self._ramp(group) * group.get("d", 1.0)
        return (*self.average(self.own(group), self.own(group)["k"] + 1, lr), lr)

    def _ready(self, group, p):
        """z (and x) of a parameter, where it has none yet."""
        own, s = self.own(group), self.state[p]
        if "z" not in s:
            s["z"] = wide_clone(p)
            if own.get("store_x"):
                s["x"] = wide_clone(p)
        keep_residual(s, "y_residual", None if p.dtype in WIDE else p)

    def _still(self, group, p):
        """[(tensor, its value now, whether it may move)], for a group whose lr is or may be 0."""
        alive = 0 if known_zero(rate(group)) else live(self, group)
        mine = (p, *self.state[p].values())
        moves = not isinstance(alive, Tensor) and alive
        return [] if moves else [(t, t.clone(), alive) for t in mine]

    def _here(self, group, p):
        """The group's own entries, this rank's state, p and the base's residual."""
        s = {name: local(t) for name, t in self.state[p].items()}
        return self.own(group), s, local(p), self.base_low(p)

    def _to_z(self, group, p):
        """p: y -> z; x waits in z's buffer (or its own). Returns z where p will not hold it."""
        own, s, p, low = self._here(group, p)
        y, z = join(p, s.get("y_residual")).clone(), s["z"].clone()
        if not own["store_x"]:
            s["z"].copy_(y.lerp(z, 1 - 1 / own["y_beta"]))
        decays = own["weight_decay_at_y"]
        old = z.clone() if decays or (low is None and z.dtype != p.dtype) else None
        if decays:
            add_scaled_(z, y, -rate(group) * self._ramp(group) * decays)
        put_(p, z, low)
        return old

    def _to_y(self, group, p, c, z=None):
        """p: new z -> y; x moves towards z by c. z: what p holds, where that is not the base's."""
        own, s, p, low = self._here(group, p)
        if z is None:
            z = join(p, low).clone().to(working_dtype(p.dtype))
        x = s["x"] if own["store_x"] else s["z"].clone()
        y = x.lerp_(z, c).lerp(z, 1 - own["momentum"])
        s["z"].copy_(z)
        put_(p, y, s.get("y_residual"))

    # what a user reads, and checkpoints -------------------------------------------------------
    def get_d(self, group=0):
        """The base's estimate d (AttributeError where it has none)."""
        return self.base.get_d(group)

    def effective_lr(self, group=0):
        """lr times the base's d, if it has one, as a float."""
        return float(self._average(self.param_groups[group])[-1])

    def convert(self, groups):
        """The groups of a checkpoint of schedulefree's wrapper, which saves no mode."""
        for group, mine in zip(groups, self.param_groups):
            if self.key not in group:
                names = [name for name in ("k", "weight_sum", "lr_max") if name in group]
                own = {name: group.pop(name) if name != "k" else group[name] for name in names}
                group[self.key] = {**own, "train_mode": self.own(mine)["train_mode"]}
            group[self.key] = dict(group[self.key])
        return groups
