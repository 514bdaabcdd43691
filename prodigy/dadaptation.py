"""D-Adaptation (Defazio and Mishchenko 2023, 2301.07733): the size d from a lower bound on D.

D = ||x_0 - x_*|| is the step size's only unknown. For convex f the sums that a method keeps anyway
give dhat <= D (Theorem 7), and d_{k+1} = max(d_k, dhat_{k+1}) replaces a search over learning
rates: ``lr`` stays 1 and carries the schedule. See theory/21_d_adaptation.md.

Arguments, defaults and state keys are those of dadaptation 3.2, whose checkpoints load.
"""

import functools

import torch

from .classical import wide_zeros
from .optimizer import Family, given, live, once, rate
from .pieces import add_scaled_, ema_, inner, larger, one_norm, ratio, root, where
from .shards import part_of


class Estimator(Family):
    """A method that estimates d: one d for all groups, or with ``split_groups`` one for each.

    Groups that share d may have any learning rates: with rho_g = lr_g / max lr the change of
    variables u = x / rho_g (u = x / sqrt(rho_g) for SGD) turns them into one problem of one rate,
    so their sums add up after a factor of rho_g that each ``observe`` puts where it belongs.
    A group with lr = 0, or without gradients in this step, is left out of both sums; a tensor
    without one in a group that has some counts with a gradient of zero, so that what is proved of
    d holds on. What is shared starts from one d0.
    """

    remembers = True
    sums = ()  # names of the sums that a group carries from step to step
    shared = ("d", "d_hat")  # what a group added later takes over

    @property
    def estimates(self):
        return ("d", "d_hat", *self.sums)

    def begin(self, group):
        return dict(d=group["d0"], d_hat=group["d0"], **dict.fromkeys(self.sums, 0.0))

    def inherit(self, first, group):
        if group["split_groups"]:
            return {}
        shared = {name: first[name] for name in self.shared}
        if group["capturable"]:  # written in place, so every group needs its own
            shared = {name: torch.as_tensor(value).clone() for name, value in shared.items()}
        return shared

    def validate(self, group):
        if group.get("fsdp_in_use") and not any(map(part_of, group["params"])):
            raise ValueError("fsdp_in_use=True is not supported beside plain tensors (FSDP1): use "
                             "fully_shard, whose sums run over all ranks with or without it")
        if any(group["split_groups"] != other["split_groups"] for other in self.param_groups):
            raise ValueError("split_groups must be the same for all parameter groups")
        if not group["split_groups"] and group["d0"] != self.param_groups[0]["d0"]:
            raise ValueError("d0 must be the same for groups that share d: pass split_groups=True")

    def convert(self, state_dict):
        """The reference packages copy the common sums into every group: keep them once."""
        state_dict = super().convert(state_dict)
        for group in state_dict["param_groups"][1:]:
            group.update(dict.fromkeys(self.sums, 0.0))
        return state_dict

    def _circles(self, groups):
        """(those of the groups that share one d, every group that shares it)."""
        if groups[0]["split_groups"]:
            return [([g], [g]) for g in groups]
        return [(groups, self.param_groups)]

    def _rho(self, group):
        """lr_g / max lr."""
        return ratio(rate(group), self._largest_rate(group))

    @once
    def _largest_rate(self, group):
        """max lr over the groups that share this group's d (an empty group has no say)."""
        if group["split_groups"]:
            return rate(group)
        return functools.reduce(larger, [rate(g) for g in self.param_groups if g["params"]], 0.0)

    def adapt(self, groups, totals):
        totals = dict(zip(map(id, groups), totals))
        for circle, everyone in self._circles(groups):
            home, some = circle[0]["d"], functools.reduce(larger, [live(self, g) for g in circle])
            shares = [(live(self, g), self.add_up(g, totals[id(g)])) for g in circle]
            parts = [[a.to(home) * alive for a in share] for alive, share in shares]
            top, bottom = (functools.reduce(torch.add, part) for part in zip(*parts))
            estimate = self.bound(circle[0], top, torch.where(bottom > 0, bottom, 1.0))
            valid = (bottom > 0) & estimate.isfinite()
            known = {}
            for g in everyone:
                key = (id(g["d"]), id(g.get("d_max")), *self._growth(g))
                if key not in known:
                    known[key] = self.grow(g, estimate, valid)
                for name, value in known[key].items():  # all stands still while no lr is live
                    self._set(g, name, where(some != 0, value.to(g[name]), g[name]))

    def _growth(self, group):
        return tuple(group.get(name) for name in ("d0", "d_coef", "growth_rate"))

    def add_up(self, group, sums):
        """Store what a group carries on; return its share of dhat's numerator and denominator."""
        raise NotImplementedError

    def bound(self, group, numerator, denominator):
        """dhat from the two sums."""
        return numerator / denominator

    def grow(self, group, estimate, valid):
        r"""d_{k+1} = max(d_k, min(dhat_{k+1}, growth_rate d_k))."""
        d = group["d"]
        d_hat = torch.where(valid, estimate.to(d), d)
        capped = torch.minimum(d_hat, d * group["growth_rate"])
        return dict(d=torch.maximum(d, capped), d_hat=d_hat)

    def get_d(self, group=0):
        """The estimate d of a group as a float (reads the device)."""
        return float(self.param_groups[group]["d"])

    def effective_lr(self, group=0):
        """d lr, the factor on the method's direction, as a float (reads the device)."""
        return self.get_d(group) * float(self.param_groups[group]["lr"])


class DAdaptSGD(Estimator):
    r"""SGD with D-Adaptation (2301.07733 v5, Alg. 4).

    .. math::
        \lambda_k = d_k \gamma_k / \|g_0\|, \quad s_{k+1} = s_k + \lambda_k g_k, \quad
        z_{k+1} = x_0 - s_{k+1}, \quad x_{k+1} = \beta x_k + (1-\beta) z_{k+1},

        \hat d_{k+1} = \frac{2 \sum_{i\le k} \lambda_i \langle g_i, s_i\rangle}{\|s_{k+1}\|}, \quad
        d_{k+1} = \max(d_k, \min(\hat d_{k+1}, \texttt{growth\_rate}\, d_k)).

    The factor 2 is the paper's: twice the provable bound. The default momentum is 0 as in the
    package (the box has 0.9). Departures from dadaptation 3.2: weight decay enters
    :math:`\|g_0\|`; a first gradient of zero divides nothing, the first that is not zero counts as
    :math:`g_0`; z = x_0 - s is not stored.

    Args:
        params: tensors, named tensors or parameter groups.
        lr (float or 0-d tensor): :math:`\gamma_k`, dimensionless factor on d; [0, inf).
        momentum (float): :math:`\beta`, [0, 1].
        weight_decay (float): L2 penalty, [0, inf).
        log_every (int): log d at INFO every so many steps; 0 = never.
        d0 (float): first estimate, at most D; in units of x; (0, inf).
        growth_rate (float): largest factor from d_k to d_{k+1}; [1, inf].
        fsdp_in_use (bool): not needed, sums run over all shards of a DTensor (FSDP2) by
            themselves; refused where no parameter is one (FSDP1).
        split_groups (bool): one d for each parameter group.
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    ranges = {"momentum": "[0, 1]"}
    sums = ("numerator_weighted",)
    shared = ("d", "d_hat", "g0_norm")

    def __init__(self, params, lr=1.0, momentum=0.0, weight_decay=0, log_every=0, d0=1e-6,
                 growth_rate=float("inf"), fsdp_in_use=False, *, split_groups=False, **modes):
        super().__init__(**given(locals()))

    @property
    def estimates(self):
        return (*super().estimates, "g0_norm")

    def begin(self, group):
        return dict(super().begin(group), g0_norm=0.0)

    def buffers(self, group):
        return {"x0": torch.clone, "s": wide_zeros}

    def look(self, x, g, s, h):
        return [inner(g, g)]

    def prepare(self, groups, totals):
        """||g_0||, from the first gradient that is not zero."""
        totals = dict(zip(map(id, groups), totals))
        for circle, everyone in self._circles(groups):
            home = circle[0]["g0_norm"]
            parts = [self._rho(g) * totals[id(g)][0].to(home) for g in circle]
            norm = functools.reduce(torch.add, parts).sqrt()
            for g in everyone:
                self._set(g, "g0_norm", torch.where(g["g0_norm"] > 0, g["g0_norm"], norm))

    def scalars(self, group, t):
        lr, top, norm = rate(group), self._largest_rate(group), group["g0_norm"]
        size = group["d"] / torch.where(norm > 0, norm, 1.0)
        return dict(weight=size * top, step=size * lr, inverse_rho=ratio(top, lr))

    def observe(self, x, g, s, h):
        numerator = inner(g, s["s"]) * h.weight
        s = add_scaled_(s["s"], g, h.step)
        return numerator, inner(s, s) * h.inverse_rho

    def advance(self, x, g, s, h):
        z = s["x0"].to(x.dtype) - s["s"]
        x.lerp_(z, 1 - h.momentum)

    def add_up(self, group, sums):
        self._keep(group, "numerator_weighted", group["numerator_weighted"] + sums[0])
        return group["numerator_weighted"], sums[1]

    def bound(self, group, numerator, denominator):
        return 2 * numerator / denominator.sqrt()

    def convert(self, state_dict):
        state_dict = super().convert(state_dict)
        for s in state_dict["state"].values():
            s.pop("z", None)
        for group in state_dict["param_groups"]:
            group.setdefault("g0_norm", 0.0)
        return state_dict


class DAdaptAdaGrad(Estimator):
    r"""AdaGrad with D-Adaptation (2301.07733 v5, Alg. 3, as the package runs it).

    .. math::
        a_{k+1} = a_k + g_k^2, \quad s_{k+1} = s_k + d_k \gamma_k g_k, \quad
        A_k = \mathrm{diag}(\sqrt{a_k} + \epsilon),

        \hat d_{k+1} = \frac{\|s_{k+1}\|^2_{A_{k+1}^{-1}}
            - \sum_{i\le k} d_i^2 \gamma_i^2 \|g_i\|^2_{A_{i+1}^{-1}}}{\|s_{k+1}\|_1}, \quad
        x_{k+1} = \beta x_k + (1-\beta)\,(x_0 - A_{k+1}^{-1} s_{k+1}).

    Departures of the package from the paper, kept: no factor 1/2 in dhat, a_0 = 1e-6 in place of
    G_inf, A_{i+1} in the subtracted sum, primal averaging by ``momentum``. Departures from the
    package: weight_decay leaves ``p.grad`` alone, sparse gradients are refused.

    Args:
        params: tensors, named tensors or parameter groups.
        lr (float or 0-d tensor): :math:`\gamma_k`, dimensionless factor on d; [0, inf).
        momentum (float): :math:`\beta`, [0, 1].
        log_every (int): log d at INFO every so many steps; 0 = never.
        weight_decay (float): L2 penalty, [0, inf).
        eps (float): in units of g; (0, inf).
        d0 (float): first estimate, at most D_inf; in units of x; (0, inf).
        growth_rate (float): largest factor from d_k to d_{k+1}; [1, inf].
        split_groups (bool): one d for each parameter group.
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    ranges = {"momentum": "[0, 1]", "eps": "(0, inf)"}
    sums = ("sksq_weighted", "gsq_weighted", "skl1")

    def __init__(self, params, lr=1.0, momentum=0, log_every=0, weight_decay=0.0, eps=1e-6,
                 d0=1e-6, growth_rate=float("inf"), *, split_groups=False, **modes):
        super().__init__(**given(locals()))

    def buffers(self, group):
        return {"x0": torch.clone, "sk": wide_zeros, "alphak": lambda p: wide_zeros(p).add_(1e-6)}

    def scalars(self, group, t):
        lr, top, d = rate(group), self._largest_rate(group), group["d"]
        return dict(step=d * lr, square=(d * top) ** 2 * self._rho(group),
                    inverse_rho=ratio(top, lr))

    def observe(self, x, g, s, h):
        a, s = s["alphak"], s["sk"]
        before = inner(s, s / a.sqrt().add_(h.eps)), one_norm(s)
        gg = g.square()
        denominator = a.add_(gg).sqrt().add_(h.eps)
        s = add_scaled_(s, g, h.step)
        change = inner(s, s / denominator) - before[0]
        squares = gg.div_(denominator).sum()
        return change * h.inverse_rho, squares * h.square, one_norm(s) - before[1]

    def advance(self, x, g, s, h):
        a, x0, s = s["alphak"], s["x0"].to(x.dtype), s["sk"]
        x.lerp_(x0 - s / a.sqrt().add_(h.eps), 1 - h.momentum)

    def add_up(self, group, sums):
        for name, change in zip(self.sums, sums):
            self._keep(group, name, group[name] + change)
        return group["sksq_weighted"] - group["gsq_weighted"], group["skl1"]


class DAdaptAdam(Estimator):
    r"""Adam with D-Adaptation (2301.07733 v5, Alg. 5).

    .. math::
        m_{k+1} = \beta_1 m_k + (1-\beta_1)\, d_k \gamma_k g_k, \quad
        v_{k+1} = \beta_2 v_k + (1-\beta_2)\, g_k^2, \quad
        A_{k} = \mathrm{diag}(\sqrt{v_{k}} + \epsilon),

        s_{k+1} = \sqrt{\beta_2}\, s_k + (1-\sqrt{\beta_2})\, d_k \gamma_k g_k, \quad
        r_{k+1} = \sqrt{\beta_2}\, r_k
            + (1-\sqrt{\beta_2})\, d_k \gamma_k \langle g_k, s_k\rangle_{A_k^{-1}},

        \hat d_{k+1} = \frac{r_{k+1}}{(1-\sqrt{\beta_2})\,\|s_{k+1}\|_1}, \quad
        d_{k+1} = \max(d_k, \min(\hat d_{k+1}, \texttt{growth\_rate}\, d_k)), \quad
        x_{k+1} = x_k - A_{k+1}^{-1} m_{k+1}.

    As in the package, and unlike the printed box, <g, s> is weighed by the old denominator A_k;
    the box's A_{k+1} is ``prodigy.lab.textbook``'s. Bias correction multiplies gamma_k.

    Args:
        params: tensors, named tensors or parameter groups; a group's ``layer_scale`` (default 1)
            scales its rate as a ratio of ``lr`` does.
        lr (float or 0-d tensor): :math:`\gamma_k`, dimensionless factor on d; [0, inf).
        betas (pair of floats): [0, 1).
        eps (float): in units of g; (0, inf).
        weight_decay (float): L2 penalty, or decoupled in units of 1/(d lr); [0, inf).
        log_every (int): log d at INFO every so many steps; 0 = never.
        decouple (bool): decoupled weight decay.
        use_bias_correction (bool): Adam's bias correction, as a factor on lr.
        d0 (float): first estimate, at most D_inf; in units of x; (0, inf).
        growth_rate (float): largest factor from d_k to d_{k+1}; [1, inf].
        fsdp_in_use (bool): not needed, sums run over all shards of a DTensor (FSDP2) by
            themselves; refused where no parameter is one (FSDP1).
        split_groups (bool): one d for each parameter group.
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    ranges = {"eps": "(0, inf)"}
    sums = ("numerator_weighted",)

    def __init__(self, params, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, log_every=0,
                 decouple=False, use_bias_correction=False, d0=1e-6, growth_rate=float("inf"),
                 fsdp_in_use=False, *, split_groups=False, **modes):
        super().__init__(**given(locals()))

    def begin(self, group):
        return dict(super().begin(group), layer_scale=1.0)

    def buffers(self, group):
        return dict.fromkeys(("s", "exp_avg", "exp_avg_sq"), wide_zeros)

    def scalars(self, group, t):
        lr, top, scale = rate(group), self._largest_rate(group), group["layer_scale"]
        size = group["d"] * bias_correction(group, t)
        rho = scale * self._rho(group)
        return dict(rho=rho, weight=size * top * rho, common=size * top, step=size * lr * scale,
                    beta3=root(group["betas"][1]), shrink=1 - group["weight_decay"] * size * lr)

    def observe(self, x, g, s, h):
        v, s = s["exp_avg_sq"], s["s"]
        numerator = inner(g, s / v.sqrt().add_(h.eps)) * h.weight
        s = ema_(s, g * h.common, h.beta3)
        return numerator, one_norm(s) * h.rho * (1 - h.beta3)

    def advance(self, x, g, s, h):
        m = ema_(s["exp_avg"], g * h.step, h.beta1)
        v = ema_(s["exp_avg_sq"], g.square(), h.beta2)
        if h.decouple:
            x.mul_(h.shrink)
        x.addcdiv_(m, v.sqrt().add_(h.eps), value=-1)

    def add_up(self, group, sums):
        beta3 = group["betas"][1] ** 0.5
        r = beta3 * group["numerator_weighted"] + (1 - beta3) * sums[0]
        self._keep(group, "numerator_weighted", r)
        return group["numerator_weighted"], sums[1]

    def effective_lr(self, group=0):
        return super().effective_lr(group) * self.param_groups[group]["layer_scale"]


def bias_correction(group, t):
    """Adam's correction as a factor on the step, sqrt(1 - beta2^t) / (1 - beta1^t), or 1."""
    beta1, beta2 = group["betas"]
    return root(1 - beta2**t) / (1 - beta1**t) if group["use_bias_correction"] else 1.0
