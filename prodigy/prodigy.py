"""Prodigy (Mishchenko and Defazio 2024, 2306.06101): D-Adaptation that forgets its small d.

Weighing gradients by d_k^2 instead of d_k lets the estimate grow geometrically and saves a factor
sqrt(log(D/d_0)) in the rate. Arguments, defaults and state keys are those of prodigyopt 1.1.2,
whose checkpoints load.
"""

import functools
import math

import torch

from .classical import wide_zeros
from .dadaptation import Estimator, bias_correction
from .optimizer import given, once, rate
from .pieces import add_scaled_, ema_, every, inner, larger, one_norm, ratio, sub_ratio_


class Prodigy(Estimator):
    r"""Adam with Prodigy's step size (2306.06101 v3, Alg. 4).

    .. math::
        m_{k+1} = \beta_1 m_k + (1-\beta_1)\, d_k g_k, \quad
        v_{k+1} = \beta_2 v_k + (1-\beta_2)\, d_k^2 g_k^2,

        r_{k+1} = \beta_3 r_k + \gamma_k d_k^2 \langle g_k, x_0 - x_k\rangle, \quad
        s_{k+1} = \beta_3 s_k + \gamma_k d_k^2 g_k,

        \hat d_{k+1} = \texttt{d\_coef}\; r_{k+1} / \|s_{k+1}\|_1, \quad
        d_{k+1} = \max(d_k, \hat d_{k+1}),

        x_{k+1} = x_k - \gamma_k d_k\, m_{k+1} / (\sqrt{v_{k+1}} + d_k \epsilon).

    r and s are kept divided by :math:`d_0` and without the box's common factor :math:`1-\beta_3`.
    Departures from prodigyopt 1.1.2: the denominator has eps d_k as in the box, not eps d_{k+1};
    a step whose gradients are all zero counts as a step; a tensor without a gradient counts in r
    and s with a gradient of zero (there ||s||_1 leaves it out, and d may exceed D); groups may
    differ in every argument but split_groups and, where they share d, d0.

    Args:
        params: tensors, named tensors or parameter groups. A group with lr = 0 is frozen.
        lr (float or 0-d tensor): :math:`\gamma_k`, dimensionless factor on d that carries the
            schedule; groups may have any ratio; [0, inf).
        betas (pair of floats): :math:`\beta_1, \beta_2` in [0, 1).
        beta3 (float or None): None = sqrt(beta2); [0, 1).
        eps (float): in units of g; (0, inf).
        weight_decay (float): in units of 1/(d lr) if decouple, else L2; [0, inf).
        decouple (bool): decoupled weight decay (AdamW).
        use_bias_correction (bool): Adam's bias correction, as a factor on lr.
        safeguard_warmup (bool): leave lr out of s, for warm-up schedules.
        d0 (float): first estimate, at most D; in units of x; (0, inf).
        d_coef (float): factor on dhat; (0, inf).
        growth_rate (float): largest factor from d_k to d_{k+1} once d has left d0; [1, inf].
        fsdp_in_use (bool): as in :class:`prodigy.DAdaptSGD`.
        slice_p (int): take r and s over every slice_p-th entry, counted in the whole tensor, so
            that sharding does not change d; [1, inf). A state dict of sharded parameters has s
            and p0 in full shape, 0 in between: two words an entry while it is kept.
        cosine_decay (bool): when d has stopped growing, let the step fall to 0 along a cosine. The
            peak is reached after ``peak_patience`` consecutive steps without growth, counted after
            d first exceeded d0.
        peak_patience (int): in steps; [1, inf).
        total_training_steps (int or None): the cosine ends there; None: 1000 steps after the peak.
        split_groups (bool): one d for each parameter group instead of one for all.
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    ranges = {"eps": "(0, inf)"}
    sums = ("d_numerator",)
    sampled = ("s", "p0")

    def __init__(self, params, lr=1.0, betas=(0.9, 0.999), beta3=None, eps=1e-8, weight_decay=0,
                 decouple=True, use_bias_correction=False, safeguard_warmup=False, d0=1e-6,
                 d_coef=1.0, growth_rate=float("inf"), fsdp_in_use=False, slice_p=1,
                 cosine_decay=False, peak_patience=50, total_training_steps=None, *,
                 split_groups=False, **modes):
        super().__init__(**given(locals()))

    @property
    def estimates(self):
        return (*super().estimates, "d_max", "d_denom", "stall", "peak", "clock")

    def begin(self, group):
        # stall: steps since d last grew; peak: the step at which it had stalled, -1 before; clock:
        # steps of all groups that share d, whoever took part
        return dict(super().begin(group), d_max=group["d0"], d_denom=0.0, stall=0.0, peak=-1.0,
                    clock=group.get("k", 0))

    shared = ("d", "d_hat", "d_max", "stall", "peak", "clock")

    def buffers(self, group):
        p = group["slice_p"]
        names = ["exp_avg"] * (group["betas"][0] > 0) + ["exp_avg_sq"]
        return {"s": lambda x: wide_zeros(every(x, p)), "p0": lambda x: every(x, p).clone(),
                **dict.fromkeys(names, wide_zeros)}

    def scalars(self, group, t):
        lr, top, d = rate(group), self._largest_rate(group), group["d"]
        factor = self._anneal(group) * bias_correction(group, t)
        common, scaled = self._common(group), d * factor
        s_step = d * ratio(lr, top) if group["safeguard_warmup"] else scaled * lr
        return dict(d=d, d_eps=d * group["eps"], dlr=scaled * lr, beta3=beta3(group),
                    r_weight=common * self._largest_d(group) * factor * top,
                    s_weight=common * s_step, shrink=1 - group["weight_decay"] * scaled * lr)

    def _anneal(self, group):
        """1 before d's peak, then a cosine from 1 to 0 (a 0-d tensor)."""
        if not group["cosine_decay"]:
            return 1.0
        peak, end = group["peak"], group["total_training_steps"]
        length = 1000.0 if end is None else (end - peak).clamp_min(1.0)
        done = ((group["clock"] - peak) / length).clamp(0.0, 1.0)
        return torch.where(peak < 0, 1.0, 0.5 * (1 + torch.cos(math.pi * done)))

    def observe(self, x, g, s, h):
        x0, gp = s["p0"].to(x.dtype), every(g, h.slice_p, h.part)
        r = inner(gp, x0 - every(x, h.slice_p, h.part)) * h.r_weight
        s = add_scaled_(s["s"].mul_(h.beta3), gp, h.s_weight)
        return r, one_norm(s)

    def moments(self, g, s, h):
        """m and v; what they are made of is freed before the point moves."""
        dg = g * h.d
        m = ema_(s["exp_avg"], dg, h.beta1) if "exp_avg" in s else dg.clone()
        return m, ema_(s["exp_avg_sq"], dg.mul_(dg), h.beta2)

    def advance(self, x, g, s, h):
        m, v = self.moments(g, s, h)
        if h.decouple:
            x.mul_(h.shrink)
        sub_ratio_(x, m, v.sqrt().add_(h.d_eps), h.dlr)

    def add_up(self, group, sums):
        r = beta3(group) * group["d_numerator"] + sums[0]
        self._keep(group, "d_numerator", r)
        self._keep(group, "d_denom", sums[1])
        return group["d_numerator"], group["d_denom"]

    def grow(self, group, estimate, valid):
        """d_{k+1}; from d0 straight to dhat, afterwards by at most growth_rate a step."""
        d, rate_ = group["d"], group["growth_rate"]
        d_hat = torch.where(valid, estimate.to(d) * group["d_coef"], d)
        at_start = d <= group["d0"] * (1 + 1e-6)  # d0, or d0 in another group's precision
        start = torch.where(at_start, torch.maximum(d, d_hat), d)
        d_max = torch.maximum(group["d_max"], d_hat)
        new = dict(d=torch.minimum(d_max, start * rate_), d_max=d_max, d_hat=d_hat,
                   clock=group["clock"] + 1)
        if group["cosine_decay"]:
            idle = (new["d"] <= d) & ~at_start
            new["stall"] = torch.where(idle, group["stall"] + valid, 0.0)
            reached = (group["peak"] < 0) & (new["stall"] >= group["peak_patience"])
            new["peak"] = torch.where(reached, new["clock"], group["peak"])
        return new

    def _growth(self, group):
        return super()._growth(group) + (group["cosine_decay"], group["peak_patience"])

    def _common(self, group):
        """d / d0 of the groups that share d: keeps r and s in floating-point range."""
        first = group if group["split_groups"] else self.param_groups[0]
        return self._largest_d(group) / first["d0"]

    @once
    def _largest_d(self, group):
        """The d that groups with one estimate share; the largest where d_coef made them differ."""
        if group["split_groups"]:
            return group["d"]
        ds = {id(g["d"]): g["d"].to(group["d"]) for g in self.param_groups}
        return functools.reduce(torch.maximum, ds.values())

    def effective_lr(self, group=0):
        group = self.param_groups[group]
        return float(self.scalars(group, group["k"] + 1)["dlr"])

    def convert(self, state_dict):
        """prodigyopt keeps s and p0 flat, and p0 of an all-zero tensor as one number."""
        state_dict = super().convert(state_dict)
        for group in state_dict["param_groups"]:
            states = [state_dict["state"].get(i, {}) for i in group["params"]]
            for s in [s for s in states if "p0" in s]:
                like = every(s["exp_avg_sq"], group.get("slice_p", 1))
                for name in ("s", "p0"):
                    s[name] = s[name].flatten().expand(like.numel()).reshape(like.shape)
            group.update(d_hat=group.get("d_hat", group["d"]), d_denom=group.get("d_denom", 0.0))
        return state_dict


def beta3(group):
    return math.sqrt(group["betas"][1]) if group["beta3"] is None else group["beta3"]
