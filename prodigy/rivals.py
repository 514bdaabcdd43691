r"""The rivals: other methods that need no learning rate, on the same step.

DoG, L-DoG and DoWG measure the distance travelled, COCOB bets coins, Mechanic learns a factor on
any optimizer's updates, D-Adaptation with Resetting starts anew when its d has doubled, and the
Polyak steps take the size from the value of the loss, which ``step(closure)`` returns.
"""

import functools
import math

import torch
from torch import Tensor

from .classical import wide_zeros
from .dadaptation import Estimator
from .optimizer import Family, check, eagerly, given, known_zero, live, rate
from .pieces import add_scaled_, ema_, inner, join, larger, length, one_norm, put_, ratio, root
from .pieces import smaller, where, working_dtype
from .schedulefree import ScheduleFree
from .shards import average, everywhere, local, part_of
from .wrapper import Wrapper, check_base


def polynomial_average(gamma=8.0):
    r"""Polynomial-decay averaging (Shamir and Zhang 2013, 1212.1824), which DoG's authors advise.

    .. math:: \bar x_t = \bar x_{t-1} + \tfrac{1+\gamma}{t+\gamma} (x_t - \bar x_{t-1}),

    as the ``avg_fn`` of ``torch.optim.swa_utils.AveragedModel``, which counts t - 1.
    """
    def follow(mean, x, before):
        t = torch.as_tensor(before, dtype=torch.float64) + 1
        return mean + (x - mean) * ((1 + gamma) / (t + gamma))

    return follow


# distance over gradients -------------------------------------------------------------------------


class DoG(Family):
    r"""Distance over Gradients (Ivgi, Hinder and Carmon 2023, 2302.12022).

    .. math::
        \bar r_t = \max_{i \le t} \|x_i - x_0\|, \quad \bar r_0 = r_\epsilon (1 + \|x_0\|), \quad
        G_t = \textstyle\sum_{i\le t}\|g_i\|^2, \quad
        x_{t+1} = x_t - \gamma_t \frac{\bar r_t}{\sqrt{G_t + \epsilon}}\, g_t.

    The norms run over a parameter group, as in the authors' package (dog-optimizer 1.0.3); a
    parameter without a gradient in this step is left out of them. Evaluate the average of the
    iterates: ``torch.optim.swa_utils.AveragedModel(model, avg_fn=polynomial_average())``.
    Departures from the package: ``init_eta`` is left out; a gradient may be missing.

    Args:
        params: tensors, named tensors or parameter groups.
        reps_rel (float): :math:`r_\epsilon`, the first distance relative to 1 + |x_0|; the authors
            advise 1e-4 with batch normalisation; (0, inf).
        lr (float or 0-d tensor): :math:`\gamma_t`, dimensionless factor; [0, inf).
        weight_decay (float): L2 penalty; [0, inf).
        eps (float): in units of g squared; (0, inf).
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    ranges = {"eps": "(0, inf)"}
    estimates = ("rbar", "G")

    def __init__(self, params, reps_rel=1e-6, lr=1.0, weight_decay=0.0, eps=1e-8, **modes):
        super().__init__(**given(locals()))

    def begin(self, group):
        return dict(rbar=0.0, G=0.0)

    def buffers(self, group):
        return {"x0": torch.clone}

    def look(self, x, g, s, h):
        way = x - s["x0"].to(x.dtype)
        return inner(way, way), inner(g, g), inner(x, x)

    def prepare(self, groups, totals):
        for group, (way, gg, xx) in zip(groups, totals):
            first = group["reps_rel"] * (1 + xx.sqrt())
            rbar = torch.maximum(where(group["rbar"] > 0, group["rbar"], first), way.sqrt())
            self._keep(group, "rbar", rbar)
            self._keep(group, "G", group["G"] + self.weight(group) * gg)

    def weight(self, group):
        """The weight of this step's squared gradient in G."""
        return 1

    def size(self, group):
        """eta_t / lr, a 0-d tensor."""
        return group["rbar"] / (group["G"] + group["eps"]).sqrt()

    def scalars(self, group, t):
        return dict(eta=rate(group) * self.size(group))

    def advance(self, x, g, s, h):
        add_scaled_(x, g, -h.eta)

    def effective_lr(self, group=0):
        """eta of the last step, as a float (reads the device)."""
        return float(self.scalars(self.param_groups[group], 0)["eta"])


class DoWG(DoG):
    r"""Distance over Weighted Gradients (Khaled, Mishchenko and Jin 2023, 2305.16284).

    .. math::
        v_t = v_{t-1} + \bar r_t^2 \|g_t\|^2, \qquad
        x_{t+1} = x_t - \gamma_t \frac{\bar r_t^2}{\sqrt{v_t}}\, g_t,

    with :math:`\bar r_t` of :class:`DoG`: gradients seen while the distance was small lose their
    weight, so that the step grows with it (Prodigy with the distance in the place of d). optax's
    eps is left out: a zero gradient moves nothing.

    Args:
        params, reps_rel, lr, weight_decay, **modes: as in :class:`DoG`.
    """

    def __init__(self, params, reps_rel=1e-6, lr=1.0, weight_decay=0.0, **modes):
        Family.__init__(self, **given(locals()))

    def weight(self, group):
        return group["rbar"] ** 2

    def size(self, group):
        return ratio(group["rbar"] ** 2, group["G"].sqrt())


class LDoG(Family):
    r"""L-DoG (2302.12022): :class:`DoG` with :math:`\bar r` and G of every tensor by itself.

    ``effective_lr()`` is lr: every tensor has its own step beside it.

    Args:
        params, reps_rel, lr, weight_decay, eps, **modes: as in :class:`DoG`.
    """

    ranges = DoG.ranges
    by_entry = False

    def __init__(self, params, reps_rel=1e-6, lr=1.0, weight_decay=0.0, eps=1e-8, **modes):
        super().__init__(**given(locals()))

    def buffers(self, group):
        def first(p):
            x = local(p).to(working_dtype(p.dtype))
            return group["reps_rel"] * (1 + length(x, part_of(p)))

        return {"x0": torch.clone, "rbar": first,
                "G": lambda p: local(p).new_full((), group["eps"], dtype=working_dtype(p.dtype))}

    def advance(self, x, g, s, h):
        rbar, G = s["rbar"], s["G"]
        rbar.clamp_min_(length(x - s["x0"].to(x.dtype), h.part))
        G.add_(length(g, h.part).square())
        x.sub_(g * (rbar / G.sqrt() * h.lr))


# coin betting ------------------------------------------------------------------------------------


class COCOB(Family):
    r"""COntinuous COin Betting (Orabona and Tommasi 2017, 1705.07795, Alg. 2), by coordinate.

    .. math::
        L \leftarrow \max(L, |g|), \quad G \leftarrow G + |g|, \quad \theta \leftarrow \theta - g,
        \quad R \leftarrow \max(R - g\,(x - x_0),\, 0),

        x \leftarrow x_0 + \theta\, \frac{L + R}{L \max(G + L,\, \alpha L)}.

    A gambler with L to begin with and the reward R bets the fraction theta/(L max(...)) of it.

    Args:
        params: tensors, named tensors or parameter groups.
        alpha (float): about the number of steps of warm-up; [0, inf).
        eps (float): first value of L, in units of g; (0, inf).
        weight_decay (float): L2 penalty; [0, inf).
        lr (float or 0-d tensor): weight of the gradient, which carries a schedule; a constant
            changes nothing once \|g\| > eps; [0, inf).
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    ranges = {"alpha": "[0, inf)", "eps": "(0, inf)"}

    def __init__(self, params, alpha=100.0, eps=1e-8, weight_decay=0.0, lr=1.0, **modes):
        super().__init__(**given(locals()))

    def buffers(self, group):
        names = ("sum_negative_gradients", "grad_norm_sum", "reward")
        return {"x0": torch.clone, "L": lambda p: wide_zeros(p).add_(group["eps"]),
                **dict.fromkeys(names, wide_zeros)}

    def advance(self, x, g, s, h):
        theta, G, R = s["sum_negative_gradients"], s["grad_norm_sum"], s["reward"]
        x0, L = s["x0"].to(x.dtype), s["L"]
        g = g * h.lr
        size = g.abs()
        L.clamp_min_(size)
        G.add_(size)
        theta.sub_(g)
        R.sub_(g * (x - x0))
        R.add_(R.abs()).mul_(0.5)  # max(R, 0), exactly
        bottom = (G + L).clamp_min_(L * h.alpha).mul_(L)
        x.copy_(x0 + theta * (L + R) / bottom)


# a tuner around any optimizer --------------------------------------------------------------------


class Mechanic(Wrapper):
    r"""Mechanic (Cutkosky, Defazio and Mehta 2023, 2306.00144): the scale of any base's updates.

    .. math::
        h_t = \Big\langle \Delta_t,\, g_t + \lambda S_t \frac{\|g_t\|}{\|x_t\|} x_t \Big\rangle,
        \quad m_{t+1} = \max(\beta m_t, |h_t|), \quad v_{t+1} = \beta^2 v_t + h_t^2,

        r_{t+1} = \max(\beta r_t - s_t h_t,\, 0), \quad
        s_{t+1} = \frac{s_{\text{init}}\, m_{t+1}/n + r_{t+1}}{\sqrt{v_{t+1}} + \epsilon}, \quad
        S = \textstyle\sum_{\beta} s,

        \Delta_{t+1} = \Delta_t + u_t, \qquad x_{t+1} = x_0 + S_{t+1} \Delta_{t+1},

    with u the update of the base, m, v, r, s one entry for each of the n betas, and S one number
    for all groups. An ``Optimizer`` whose ``param_groups`` are the base's dictionaries: schedulers
    set the base's lr, best 1 at its peak. Delta is always kept (mechanic-pytorch 0.0.1 divides by
    S otherwise). Departures from that package: the decay takes :math:`x_t` as the box does, not
    :math:`x_t + u_t`; betas are as precise as the step (there float32 beside float64 weights);
    tensors keep to the base's groups.

    Args:
        base (torch.optim.Optimizer): any whose step needs no closure; beside bfloat16 weights best
            one of this package, whose updates are not rounded.
        s_decay (float): :math:`\lambda`; [0, inf).
        betas (sequence of floats): each in [0, 1].
        s_init (float): in units of 1/lr; (0, inf).
        eps (float): in units of h; (0, inf).

    Raises:
        TypeError: if base is not a torch.optim.Optimizer, is schedule-free or a Mechanic, or
            cannot step without a closure (LBFGS).
    """

    key = "mechanic"
    kept = ("ref", "delta")
    stored = ("ref",)

    def __init__(self, base, s_decay=0.01, betas=(0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999),
                 s_init=1e-8, eps=1e-8):
        refused = isinstance(base, (ScheduleFree, Mechanic))
        if refused or not isinstance(base, torch.optim.Optimizer):
            raise TypeError("base must be an Optimizer, neither schedule-free nor a Mechanic")
        check_base(base)
        entries = dict(s_decay=s_decay, s_init=s_init, eps=eps)
        for name, value in entries.items():
            check(name, value, {"eps": "(0, inf)"})
        if not betas:
            raise ValueError("betas must hold at least one number in [0, 1]")
        for index, beta in enumerate(betas):
            check(f"betas[{index}]", beta, {f"betas[{index}]": "[0, 1]"})
        super().__init__(base, {**entries, "betas": tuple(betas)})

    def _fill(self, group):
        """The n betas with their m, v, r and s: the same tensors in every group."""
        known = [p for g in self.param_groups for p in g["params"]]
        home = local(known[0]) if known else torch.empty(0, dtype=torch.float64)
        betas = home.new_tensor(self.entries["betas"], dtype=working_dtype(home.dtype))
        fresh = {name: torch.zeros_like(betas) for name in ("v", "r", "s")}
        fresh |= dict(m=torch.full_like(betas, 1e-6), betas=betas)
        first = self.param_groups[0].get("mechanic", {})
        fresh |= {name: first[name] for name in fresh if name in first}
        own = group.get("mechanic", {})
        group["mechanic"] = {**self.entries, "k": 0, "nonfinite": 0, **fresh, **own}

    def _point(self, p):
        return join(local(p.detach()), self.base_low(p)).to(working_dtype(p.dtype))

    @torch.no_grad()
    def update(self):
        """Sums at x_t, the base's step, then S and the new point."""
        found = self.found()
        for _, p in found:
            self._ready(p)
        rows = [(g, p, self._point(p).clone()) for g, p in found if not known_zero(rate(g))]
        with self.clean(found):
            sums = [(part_of(p), [a * live(self, g) for a in self._sums(g, p, x)])
                    for g, p, x in rows]
            self.base.step()
        if rows:
            self._tune(rows, everywhere(sums))
        scale = self.own(self.param_groups[0])["s"].sum()
        for g, p, old in rows:
            ref, kept = (local(self.state[p][name]) for name in ("ref", "delta"))
            alive, delta = live(self, g) != 0, kept + (self._point(p) - old)
            x = ref.to(old.dtype) + delta * scale.to(delta)
            kept.copy_(where(alive, delta, kept))
            put_(local(p), where(alive, x, old), self.base_low(p))

    def _ready(self, p):
        if "ref" not in self.state[p]:
            self.state[p].update(ref=p.detach().clone(), delta=wide_zeros(p))

    def _sums(self, group, p, x):
        g, delta = local(p.grad).to(x.dtype), local(self.state[p]["delta"])
        g = -g if group.get("maximize") else g
        return inner(delta, g), inner(delta, x), inner(g, g), inner(x, x)

    def _tune(self, rows, sums):
        """The new s from the sums over all tensors."""
        own, like = self.own(self.param_groups[0]), sums[0][0]
        sums = [functools.reduce(torch.add, [a.to(like) for a in part]) for part in zip(*sums)]
        m, v, r, s, beta = (own[name].to(like) for name in ("m", "v", "r", "s", "betas"))
        eps = own["eps"]
        h = sums[0] + own["s_decay"] * s.sum() * sums[2].sqrt() / (sums[3].sqrt() + eps) * sums[1]
        new = dict(m=torch.maximum(beta * m, h.abs()), v=beta**2 * v + h**2)
        new["r"] = (beta * r - s * h).clamp_min(0)
        wealth = own["s_init"] * new["m"] / len(beta) + new["r"]
        new["s"] = wealth / (new["v"].sqrt() + eps)
        alive = functools.reduce(larger, [live(self, g) for g, _, _ in rows])
        new = {name: where(alive != 0, a, own[name].to(a)) for name, a in new.items()}
        for g in self.param_groups:
            self.own(g).update(new, k=self.own(g)["k"] + alive)

    def effective_lr(self, group=0):
        """S lr, the factor on the base's direction, as a float (reads the device)."""
        group = self.param_groups[group]
        return float(self.own(group)["s"].sum()) * float(group["lr"])


# the size from the loss --------------------------------------------------------------------------


class PolyakStep(ScheduleFree):
    """Schedule-Free whose size is f's linear model at z over the gradient's squared size.

    All groups share the step, gamma_g = lr_g size; their rates enter the size's denominator, so
    that lr_g acts as a diagonal change of the norm. A method adds ``square(g, s, h)``. The loss is
    that of the gradient: where gradients of several batches are added up, the closure returns the
    same sum of their losses (Lightning's returns the last one). On several processes f is the mean
    of their losses: it is taken here over the mesh of DTensors (FSDP2), while under DDP the
    closure must return it.
    """

    estimates = ("size", "weight_sum", "lr_max", "scheduled_lr")

    def begin(self, group):
        return dict(super().begin(group), size=0.0)

    one = ("f_star", "maximize")  # arguments that all groups must have in common

    def validate(self, group):
        super().validate(group)
        for name in self.one:
            if group[name] != self.param_groups[0][name]:
                raise ValueError(f"{name} must be the same for all parameter groups: "
                                 "there is one loss, and one step size from it")

    @eagerly
    def step(self, closure=None):
        """One step; ``closure`` re-evaluates the model, calls backward and returns the loss."""
        if closure is None:
            raise RuntimeError(f"{type(self).__name__} needs the loss: call step(closure)")

        def noted():
            loss = closure()
            if not isinstance(loss, (Tensor, float)) or torch.as_tensor(loss).numel() != 1:
                raise TypeError(f"the closure must return the loss as one number, got {loss!r}")
            self._loss = torch.as_tensor(loss).detach().reshape(())
            return loss

        return super().step(noted)

    def look(self, x, g, s, h):
        return inner(g, s["z"] - x), self.square(g, s, h)  # z - y = beta (z - x)

    def prepare(self, groups, totals):
        top = functools.reduce(larger, [rate(g) for g in groups])
        home = groups[0]["size"]
        params = [p for group in self.param_groups for p in group["params"]]
        loss = average(local(self._loss).to(home, copy=True), params)
        f_star, square = groups[0]["f_star"], 0.0
        model = f_star - loss if groups[0]["maximize"] else loss - f_star
        for group, (descent, squares) in zip(groups, totals):
            model = model + descent.to(home)
            square = square + squares.to(home) * ratio(rate(group), top)
        size = ratio(model.clamp_min(0), self.denominator(groups, square))
        for group in groups:
            self._keep(group, "size", where(size.isfinite(), size, 0.0).to(group["size"]))

    def pace(self, group, t):
        lr, more = super().pace(group, t)
        return lr * group["size"], more


class ScheduleFreePolyak(PolyakStep):
    r"""Schedule-Free with an adaptive Polyak step (Oikonomou et al. 2025, 2511.07767 v2).

    .. math::
        \gamma_t = \frac{[f_t(y_t) - f_* + \beta \langle g_t, z_t - x_t\rangle]_+}
            {\max(\|g_t\|^2, M)}, \quad
        z_{t+1} = z_t - \gamma_t g_t, \quad x_{t+1} = (1 - \tfrac1t) x_t + \tfrac1t z_{t+1}.

    The numerator is the linear model of :math:`f_t` at z, since beta (z - x) = z - y. Oracle form:
    M = 0 and f_* the batch's loss at the solution (0 under interpolation). Safeguarded form:
    M > 0 and f_* any lower bound of it. With ``adam``, :math:`\|g\|^2` is taken in the norm of
    :math:`D^{-1}`, :math:`D = \mathrm{diag}(\sqrt{v_t/(1-\beta_2^t)} + \epsilon)`, and g in the
    step is :math:`D^{-1} g`. ``step`` needs a closure that returns the loss; where the loss or the
    size is not finite, z stays.

    Args:
        params: tensors, named tensors or parameter groups.
        lr (float or 0-d tensor): dimensionless factor on gamma; [0, inf).
        momentum (float): :math:`\beta`, [0, 1]; 0 needs store_x.
        f_star (float): f_*, in units of the loss, a bound from below (from above, to maximize);
            one for all groups.
        safeguard (float): M, in units of g squared (of |g| with adam); 0 = oracle; [0, inf).
        adam (bool): the diagonal norm.
        beta2 (float), eps (float): those of D; [0, 1), and (0, inf) in units of g.
        weight_decay (float): at y, in units of 1/gamma; [0, inf).
        warmup_steps, r, weight_lr_power, store_x, schedulefree_c, closure_form: as in
            :class:`SGDScheduleFree`; equal weights by default.
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    ranges = {"momentum": "[0, 1]", "eps": "(0, inf)"}
    one = (*PolyakStep.one, "safeguard")

    def __init__(self, params, lr=1.0, momentum=0.9, f_star=0.0, safeguard=0.0, adam=False,
                 beta2=0.999, eps=1e-8, weight_decay=0.0, *, warmup_steps=0, r=0.0,
                 weight_lr_power=0.0, store_x=False, schedulefree_c=0.0, closure_form=False,
                 **modes):
        super().__init__(**given(locals()))

    def buffers(self, group):
        return {**super().buffers(group), **({"exp_avg_sq": wide_zeros} if group["adam"] else {})}

    def scalars(self, group, t):
        return dict(super().scalars(group, t), correction=root(1 - group["beta2"] ** t))

    def square(self, g, s, h):
        if not h.adam:
            return inner(g, g)
        v = s["exp_avg_sq"].lerp(g.square(), 1 - h.beta2)
        return inner(g, g / v.sqrt_().div_(h.correction).add_(h.eps))

    def denominator(self, groups, square):
        return square.clamp_min(groups[0]["safeguard"])

    def direction(self, g, s, h):
        if not h.adam:
            return g
        v = ema_(s["exp_avg_sq"], g.square(), h.beta2)
        return g / v.sqrt().div_(h.correction).add_(h.eps)


class ScheduleFreePlus(PolyakStep):
    r"""ScheduleFree+: AdamC, Schedule-Free and a Polyak step (Defazio 2026, 2605.19095).

    .. math::
        e_t = \beta_p e_{t-1} + (1-\beta_p) \sqrt{\pi/2}\, \|g_t\|_1, \quad
        \gamma_t = \gamma\, \frac{[f_t(y_t) - f_* + \langle g_t, z_t - y_t\rangle]_+}
            {e_t/(1-\beta_p^t)},

        z_{t+1} = z_t - \gamma_t \frac{m_t/(1-\beta_1^t)}{\sqrt{v_t/(1-\beta_2^t)} + \epsilon}
            - \gamma_t^2 \lambda\, y_t, \quad
        w_t = t^r \max_{i\le t} \gamma_i^p, \quad c_t = w_t / \textstyle\sum_{i\le t} w_i,

        x_{t+1} = (1-c_t) x_t + c_t z_{t+1}, \quad
        y_{t+1} = \mu_t x_{t+1} + (1 - \mu_t) z_{t+1},

    with Adam's m and v, c = 1 for the first ``c_warmup`` steps, and 1 - mu moved from
    1 - ``momentum`` to 1 - ``momentum_max`` along a geometric sequence of ``anneal_steps`` steps.
    For Gaussian gradients sqrt(pi/2) |g|_1 is about |g|^2 in Adam's norm. Departure from the
    author's code: the inner product uses the mu that y was built with, so that the numerator is
    the linear model of f at z.

    With c_warmup = 0, a step that grows makes x follow z and so feeds itself: without noise most
    l1, max-affine and least-squares problems in 20 dimensions diverge. c_warmup = 50,
    betas[0] = 0.5 or weight_lr_power = 0 each prevents it; c_warmup is advised to be once or
    twice the warm-up of lr.

    Args:
        params: tensors, named tensors or parameter groups.
        lr (float or 0-d tensor): dimensionless factor on gamma; [0, inf).
        betas (pair of floats): of m and v; [0, 1).
        momentum (float), momentum_max (float): mu at the start and in the end; (0, 1) and [0, 1).
        anneal_steps (int): 0 = mu stays ``momentum``.
        beta_polyak (float): :math:`\beta_p`, [0, 1).
        f_star (float): f_*, in units of the loss, a bound from below (from above, to maximize);
            one for all groups.
        eps (float): in units of g; (0, inf).
        weight_decay (float): lambda, at y, in units of 1/gamma^2 (AdamC: try 5 to 50); [0, inf).
        c_warmup (int): steps without averaging.
        warmup_steps, r, weight_lr_power, store_x, schedulefree_c, closure_form: as in
            :class:`SGDScheduleFree`.
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    ranges = {"momentum": "(0, 1)", "eps": "(0, inf)"}
    one = (*PolyakStep.one, "beta_polyak")
    estimates = (*PolyakStep.estimates, "y_beta", "e", "e_weight")

    def __init__(self, params, lr=1.0, betas=(0.9, 0.95), momentum=0.9, momentum_max=0.965,
                 anneal_steps=0, beta_polyak=0.9, f_star=0.0, eps=1e-8, weight_decay=0.0, *,
                 c_warmup=0, warmup_steps=0, r=0.0, weight_lr_power=2.0, store_x=False,
                 schedulefree_c=0.0, closure_form=False, **modes):
        super().__init__(**given(locals()))

    def begin(self, group):
        return dict(super().begin(group), y_beta=group["momentum"], e=0.0, e_weight=0.0)

    def inherit(self, first, group):
        shared = {name: first[name].clone() for name in ("e", "e_weight")}
        return {**super().inherit(first, group), **shared}

    def beta(self, own):
        return own.get("y_beta", own["momentum"])

    def validate(self, group):
        super().validate(group)
        if group["anneal_steps"] and not (group["momentum_max"] or group["store_x"]):
            raise ValueError("momentum_max = 0 needs store_x=True: y alone is z in the end")

    def _follow(self, moving, stepped=(), only=None):
        """mu moves inside ``advance``, with the step; here, for what has no gradient in it."""
        for own, states in self._groups() if only is None else ():
            if id(own) in moving:
                taken = self.__dict__.get("_taken", ())
                idle = [row for row in states if id(row[0]) not in stepped and row[0] not in taken]
                new = where(live(self, own) != 0, self._annealed(own, own["k"]), own["y_beta"])
                self._move(own, idle, own["y_beta"], new)

    def _annealed(self, group, k):
        """mu_k, from momentum at k = 0 to momentum_max at k = anneal_steps."""
        start, end, steps = (group[n] for n in ("momentum", "momentum_max", "anneal_steps"))
        done = smaller(k / steps, 1.0) if steps else 0.0
        return 1 - (1 - start) * ((1 - end) / (1 - start)) ** done

    def buffers(self, group):
        return {**super().buffers(group), **dict.fromkeys(("exp_avg", "exp_avg_sq"), wide_zeros)}

    def average(self, own, t, lr):
        c, total, lr_max = super().average(own, t, lr)
        early = t <= own["c_warmup"]
        return where(early, 1.0, c), where(early, 0 * total, total), lr_max

    def scalars(self, group, t):
        h, new = super().scalars(group, t), self._annealed(group, t - 1)
        lr, keep = h["lr"], new * (1 - h["c"])
        c = h["c"] if group["store_x"] else 1 - keep / group["y_beta"]  # y and z without x
        beta1, beta2 = group["betas"]
        decay = lr * group["weight_decay"]
        return dict(h, c=c, beta=new, pull=lr * (1 - keep), weight_decay=decay,
                    correction1=1 - beta1**t, correction2=root(1 - beta2**t))

    def adapt(self, groups, totals):
        super().adapt(groups, totals)
        for group in groups:
            new = self._annealed(group, group["k"] - 1)
            self._keep(group, "y_beta", torch.zeros_like(group["y_beta"]) + new)

    def square(self, g, s, h):
        return one_norm(g)

    def denominator(self, groups, square):
        """The running mean of sqrt(pi/2) |g|_1, one for all groups."""
        beta, e, weight = (groups[0][n] for n in ("beta_polyak", "e", "e_weight"))
        e = beta * e + (1 - beta) * math.sqrt(math.pi / 2) * square
        weight = beta * weight + (1 - beta)
        alive = functools.reduce(larger, [live(self, g) for g in groups])
        for group in self.param_groups:
            for name, new in dict(e=e, e_weight=weight).items():
                self._set(group, name, where(alive != 0, new.to(group[name]), group[name]))
        return e / weight

    def direction(self, g, s, h):
        m = ema_(s["exp_avg"], g, h.beta1)
        v = ema_(s["exp_avg_sq"], g.square(), h.beta2)
        return (m / h.correction1).div_(v.sqrt().div_(h.correction2).add_(h.eps))


# restarts ----------------------------------------------------------------------------------------


class DAdaptResetting(Estimator):
    r"""D-Adaptation with Resetting (Prodigy's paper 2306.06101, versions 1 to 3, Alg. 3).

    Dual averaging with a constant d, as in D-Adaptation's Alg. 1,

    .. math::
        s_{k+1} = s_k + d \gamma_k g_k, \quad
        \eta_{k+1} = 1/\sqrt{\textstyle\sum_{i\le k}\|g_i\|^2}, \quad
        x_{k+1} = x_0 - \eta_{k+1} s_{k+1}, \quad
        \hat d_{k+1} = \frac{\sum_{i\le k} \eta_i d \gamma_i \langle g_i, s_i\rangle}
            {\|s_{k+1}\|},

    until :math:`\hat d_{k+1} > 2d`: then :math:`d \leftarrow \hat d_{k+1}`, every sum is cleared
    and x goes back to :math:`x_0`. At most log2(D/d_0) restarts; the rate has the root of
    that logarithm (theory/23, Theorem 3). The box itself is not published any more: this follows
    its description. A parameter without a gradient in the step that resets stays where it is.

    Args:
        params: tensors, named tensors or parameter groups.
        lr (float or 0-d tensor): :math:`\gamma_k`, dimensionless factor on d; [0, inf).
        weight_decay (float): L2 penalty, [0, inf).
        log_every (int): log the effective rate at INFO every so many steps; 0 = never.
        d0 (float): first estimate, at most D; in units of x; (0, inf).
        split_groups (bool): one d for each parameter group.
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    sums = ("numerator_weighted", "squares")
    shared = ("d", "d_hat", "squares")

    def __init__(self, params, lr=1.0, weight_decay=0.0, log_every=0, d0=1e-6, *,
                 split_groups=False, **modes):
        super().__init__(**given(locals()))

    @property
    def estimates(self):
        return (*super().estimates, "eta", "keep", "fresh")

    def begin(self, group):
        return dict(super().begin(group), eta=0.0, keep=1.0, fresh=1.0)

    def buffers(self, group):
        return {"x0": torch.clone, "s": wide_zeros}

    def look(self, x, g, s, h):
        s = s["s"]
        return inner(g, s) * h.fresh, inner(g, g), inner(s, s) * h.fresh

    def prepare(self, groups, totals):
        """dhat_{k+1} from |s_{k+1}|^2 = |s|^2 + 2 <step g, s> + |step g|^2; keep = 0 resets."""
        totals = dict(zip(map(id, groups), totals))
        for circle, everyone in self._circles(groups):
            first = circle[0]
            d, top = first["d"], self._largest_rate(first)
            rows = [(self._rho(g), ratio(top, rate(g)), totals[id(g)]) for g in circle]
            parts = [(gs.to(d), rho * gg.to(d), inverse * ss.to(d))
                     for rho, inverse, (gs, gg, ss) in rows]
            gs, gg, ss = (functools.reduce(torch.add, part) for part in zip(*parts))
            step, before = d * top, first["squares"].sqrt()
            own = {id(g): g["numerator_weighted"] + ratio(step * part[0], before)
                   for g, part in zip(circle, parts)}
            numerator = functools.reduce(torch.add, [own[id(g)] * live(self, g) for g in circle])
            squares = first["squares"] + gg
            length = (ss + 2 * step * gs + step**2 * gg).clamp_min(0).sqrt()
            d_hat = ratio(numerator, length)
            keep = where(d_hat > 2 * d, 0.0, 1.0)
            new = dict(d_hat=d_hat, keep=keep, eta=ratio(d / d, squares.sqrt()),
                       squares=squares * keep)
            for g in everyone:
                new["numerator_weighted"] = own.get(id(g), g["numerator_weighted"]) * keep
                takes_part = id(g) in own and live(self, g) != 0
                # fresh = 0: s is to be cleared when the group steps again
                new["fresh"] = where(takes_part, g["fresh"], g["fresh"] * keep)
                for name, value in new.items():
                    self._set(g, name, where(top != 0, value.to(g[name]), g[name]))

    def scalars(self, group, t):
        names = ("eta", "keep", "fresh")
        return dict(step=group["d"] * rate(group), **{name: group[name] for name in names})

    def observe(self, x, g, s, h):
        add_scaled_(s["s"].mul_(h.fresh), g, h.step).mul_(h.keep)
        return ()

    def advance(self, x, g, s, h):
        x.copy_(s["x0"].to(x.dtype) - s["s"] * h.eta)

    def adapt(self, groups, totals):
        for circle, everyone in self._circles(groups):
            for g in everyone:
                self._set(g, "d", torch.where(g["keep"] > 0, g["d"], g["d_hat"]))
        for g in groups:
            self._keep(g, "fresh", torch.ones_like(g["fresh"]))
