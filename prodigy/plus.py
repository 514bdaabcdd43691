"""Prodigy + Schedule-Free, with every option of prodigy-plus-schedule-free 2.0.1.

The parts are :mod:`prodigy.prodigy`'s (the size d), :mod:`prodigy.schedulefree`'s (the point) and
one function of :mod:`prodigy.pieces` for each option.
"""

import functools
import math
import operator
import warnings

import torch

from .classical import wide_zeros
from .dadaptation import Estimator
from .optimizer import Family, given, known_zero, live, rate
from .pieces import add_scaled_, atan2, by_tensor, cautious, ema_, every, factor_, factored_axes
from .pieces import focus, grams, inner, length, mean, one_norm, orthogonal, orthogonalised, ratio
from .pieces import rectify, rms_clip_, smaller, toward_, unfactored_root, where, working_dtype
from .prodigy import beta3
from .schedulefree import ScheduleFree, check_rectified, wide_clone
from .shards import local, part_of, total

SLICE = 11  # d is estimated from every 11th entry
GROWTH = 2**0.25  # largest factor on d in a step, with d_limiter and SPEED
SPEED = {"exp_avg_x0_dot": math.nan, "max_x0_minus_l1_norm": 1e-8, "max_x0_minus_l2_norm": 1e-8}
FOREIGN = ("running_d_numerator", "running_d_denom", "running_weight_sum", "effective_lr",
           "d_prev", "optimiser_version")  # entries of 2.0.1's groups without a use here
# what cannot go together: (this, that, which of them is turned off with a warning)
EXCLUSIONS = (
    ("use_cautious", "use_grams", "use_grams"),
    ("use_focus", "factored", "factored"),
    ("use_focus", "use_muon_pp", "use_muon_pp"),
    ("eps is None", "use_stableadamw", "use_stableadamw"),
)


class ProdigyPlusScheduleFree(ScheduleFree, Estimator):
    r"""Prodigy + Schedule-Free (LoganBooker, prodigy-plus-schedule-free 2.0.1; no paper).

    With u Adam's update for :math:`d_k g_k` without a first moment, :math:`\ell_k = d_k\gamma_k`,

    .. math::
        v_{k+1} = \beta_2 v_k + (1-\beta_2)\, d_k^2 g_k^2, \quad
        u_k = d_k g_k / (\sqrt{v_{k+1}} + d_k\epsilon) + \lambda y_k,

        z_{k+1} = z_k - \ell_k u_k, \quad
        x_{k+1} = (1-c_k)\,x_k + c_k z_{k+1}, \quad
        c_k = \ell_k^2 / \textstyle\sum_{i\le k}\ell_i^2, \quad
        y_{k+1} = (1-\beta_1) z_{k+1} + \beta_1 x_{k+1},

        r_{k+1} = \beta_3 r_k + d_k^2 \langle g_k, x_0 - z_k\rangle, \quad
        s_{k+1} = \beta_3 s_k + d_k^2 g_k,

        \hat d_{k+1} = r_{k+1} / \|s_{k+1}\|_1, \quad
        d_{k+1} = \max(d_k, \texttt{d\_coef} \min(\hat d_{k+1}, 2^{1/4} d_k)).

    r and s run over every 11th entry of the whole tensor, sharded or not. Negative terms of r
    count only after d has left d0.
    Departures from 2.0.1: p0 and s are float32 beside float32 weights (there bfloat16); the
    factored second moment of tall matrices is the whole product (there the row factor cancels);
    ``use_focus`` averages the weights, bias corrected (there d_k^2 times them, so that all is
    drawn to 0); with ``use_adopt`` an entry's first gradient only fills its second moment, also
    where it comes later (there it moves by g/eps); ``split_groups_mean`` leaves out groups that
    do not move; ``use_cautious`` without Schedule-Free masks the average (there the step goes
    uphill); a missing gradient counts as in :class:`Prodigy`;
    orthograd of one entry is 0 (there amplified rounding); ``use_adopt`` without Schedule-Free
    averages d g over its denominator (there g over it, times d: a step of d^2, and d stays at
    d0); groups that share d may have any lr ratios; float64 stays float64; nothing is printed.

    Args:
        params: tensors, named tensors or parameter groups.
        lr (float or 0-d tensor): :math:`\gamma_k`, dimensionless factor on d; [0, inf).
        betas (pair of floats): :math:`\beta_1` in (0, 1) with Schedule-Free, :math:`\beta_2` in
            [0, 1).
        beta3 (float or None): None = sqrt(beta2); [0, 1).
        weight_decay (float): :math:`\lambda`, at y; [0, inf).
        weight_decay_by_lr (bool): False: decay is not multiplied by :math:`\ell_k`.
        d0 (float): first estimate, at most D; in units of x; (0, inf).
        d_coef (float): factor on dhat; (0, inf).
        d_limiter (bool): d grows by at most 2^(1/4) a step; a d_coef of 2^(-1/4) = 0.84 or less
            then keeps d at d0, with a warning (theory/34, Proposition 4): pass False with it.
        prodigy_steps (int): from this step on d stays, and p0 and s are freed; 0 = never.
        schedulefree_c (float): C of the refined average (2507.09846); 0 = off.
        eps (float or None): in units of g; (0, inf); None = Adam-atan2 (2407.05872).
        split_groups (bool): one d for each parameter group.
        split_groups_mean (bool): their harmonic mean is the step size of all; groups with lr = 0
            or without a gradient so far have no part in it.
        factored (bool): second moments of matrices as two vectors (Adafactor, 1804.04235).
        factored_fp32 (bool): False keeps them in the parameter's dtype.
        use_bias_correction (bool): RAdam's rectified warm-up (1908.03265), Adam's corrected beta2.
        use_stableadamw (bool): clip the update's root mean square, softly.
        use_schedulefree (bool): False is Prodigy with a first moment.
        use_speed (bool): SPEED in the place of dhat: d grows, by 2^(1/4) d_coef^(1/8) at most,
            whenever r sets a record, in which <g, x0 - z> is a running average over the largest
            ||x0 - z||_1 so far and the largest (1 + ||x0 - z||)^2.
        stochastic_rounding (bool): bfloat16 weights (and z) are rounded at random, E[p] = x, with
            noise seeded by the step (where compiled or capturable, by torch's own generator, so
            that such a run resumes with other noise), and x0 - z is summed up from the moves
            before rounding, so that the noise does not reach d; False keeps 16 more bits (see
            pieces.residual).
        fused_back_pass (bool): accepted; ``step_param`` works without it.
        use_cautious (bool): C-Optim (2411.16085). use_grams (bool): Grams (2412.17107).
        use_adopt (bool): the denominator before this gradient: ADOPT (2411.02853).
        use_orthograd (bool): OrthoGrad (2501.04697). use_focus (bool): FOCUS (2501.12243), which
            has no eps.
        use_muon_pp (bool): of 1.8.51: the gradient of tensors of two or more dimensions is
            orthogonalised (Muon), in the dtype of the step (there bfloat16), over one running root
            mean square instead of Adam's denominator; orthograd leaves these tensors alone. A
            sharded tensor is gathered for it on every rank, in every step.
        beta4 (float or None): of 1.3: d <- beta4 d + (1 - beta4) d_{k+1}; None = sqrt(beta1);
            0 = off; [0, 1).
        closure_form (bool): as in SGDScheduleFree.
        **modes: see :class:`prodigy.optimizer.Family`.

    ``ProdigyPlusScheduleFree(params, **EARLIER)`` has the defaults of 1.8.51.
    """

    ranges = {"eps": "(0, inf) or None"}
    sums = ("d_numerator",)
    sampled, stride = ("s", "p0", "away"), SLICE
    shared = ("d", "d_hat", "prev_d_numerator", "max_d_numerator", "shared_d")
    rounded = ("z",)
    optional = (*sampled, *SPEED)  # freed after prodigy_steps, and one of p0 and away is enough
    by_entry = False  # clips and factors are taken tensor by tensor
    stored = (*ScheduleFree.stored, "z", "away", "exp_avg_sq_row", "exp_avg_sq_col")

    def __init__(self, params, lr=1.0, betas=(0.9, 0.99), beta3=None, weight_decay=0.0,
                 weight_decay_by_lr=True, d0=1e-6, d_coef=1.0, d_limiter=True, prodigy_steps=0,
                 schedulefree_c=0, eps=1e-8, split_groups=True, split_groups_mean=False,
                 factored=True, factored_fp32=True, use_bias_correction=False,
                 use_stableadamw=True, use_schedulefree=True, use_speed=False,
                 stochastic_rounding=True, fused_back_pass=False, use_cautious=False,
                 use_grams=False, use_adopt=False, use_orthograd=False, use_focus=False, *,
                 use_muon_pp=False, beta4=0.0, closure_form=False, **modes):
        options = given(locals())
        settle(options, stacklevel=3)
        if d_limiter is True and isinstance(d_coef, float) and 0 < d_coef * GROWTH <= 1:
            warnings.warn("d_limiter with d_coef <= 2^(-1/4) keeps d at d0: pass d_limiter=False",
                          stacklevel=2)
        super().__init__(**options)

    @property
    def estimates(self):
        names = ("prev_d_numerator", "max_d_numerator", "shared_d", "d_denom")
        return (*Estimator.estimates.fget(self), *names, *self.counters[1:])

    def begin(self, group):
        d0, zero = group["d0"], dict(prev_d_numerator=0.0, max_d_numerator=0.0, d_denom=0.0)
        return {**ScheduleFree.begin(self, group), **Estimator.begin(self, group), **zero,
                "shared_d": d0}

    def inherit(self, first, group):
        return ScheduleFree.inherit(self, first, group) | Estimator.inherit(self, first, group)

    def validate(self, group):
        Estimator.validate(self, group)
        settle(group, stacklevel=4)
        if group["use_bias_correction"]:
            check_rectified(group)
        if group["use_schedulefree"]:
            ScheduleFree.validate(self, group)
        if group["capturable"] and (group["use_adopt"] or group["prodigy_steps"]):
            raise ValueError("use_adopt and prodigy_steps count steps: not with capturable=True")

    def _groups(self):
        """Groups without Schedule-Free have one point: nothing to switch, nothing to refuse."""
        for group, (own, states) in zip(self.param_groups, super()._groups()):
            if group["use_schedulefree"]:
                yield own, states

    # the size ---------------------------------------------------------------------------------
    def _adapts(self, group, t):
        if not group["prodigy_steps"]:
            return True
        if not group["split_groups"]:  # one d: it stays for all from the first group's end on
            t += max(g["k"] for g in self.param_groups) - group["k"]
        return t < group["prodigy_steps"]

    def _size(self, group):
        mean = group["split_groups"] and group["split_groups_mean"]
        return group["shared_d" if mean else "d"]

    def pace(self, group, t):
        """l_t = d_t gamma_t, rectified if asked."""
        lr = self._size(group) * rate(group)
        if group["use_bias_correction"]:
            factor, applies = rectify(group["betas"][1], t)
            lr = lr * where(applies, factor, 0.0)
        if group["use_adopt"] and t == 1:  # ADOPT's first step only fills the second moment
            lr = lr * 0.0
        return lr, {}

    def average(self, own, t, lr):
        """(c, sum of weights, lr) for the weights lr^2: today's, also when lr has fallen."""
        total = own["weight_sum"] + lr**2
        c = ratio(lr**2, total)
        if own["schedulefree_c"]:
            c = smaller(c * (1 - self.beta(own)) * own["schedulefree_c"], 1.0)
        return c, total, lr

    def scalars(self, group, t):
        d, beta2 = group["d"], group["betas"][1]
        if group["use_bias_correction"] or group["use_focus"]:
            beta2 = 1 - (1 - beta2) / (1 - beta2**t)
        first = group["use_adopt"] and t == 1
        decay, lr = group["weight_decay"], self.pace(group, t)[0]
        return dict(super().scalars(group, t), d=d, beta2=0.0 if first else beta2, first=first,
                    beta3=beta3(group), adapts=self._adapts(group, t) and not first,
                    d_eps=None if group["eps"] is None else d * group["eps"],
                    d_update=d**2 / group["d0"] ** 0.5, rho=self._rho(group),
                    speed=where(t > 1, 1 - t**-0.75, 0.0), clamp=t**0.25,
                    decay=0.0 if first else decay * (lr if group["weight_decay_by_lr"] else 1.0))

    # the pass ---------------------------------------------------------------------------------
    def buffers(self, group):
        def muon(p):
            return group["use_muon_pp"] and p.dim() > 1

        def second(p):
            return factored_axes(p.shape) if group["factored"] and not muon(p) else None

        def line(axis):
            def make(p):
                if second(p) is None:
                    return None
                flat, mine = second(p)[axis], local(p)
                shape = [1 if i == flat else n for i, n in enumerate(mine.shape)]
                dtype = working_dtype(p.dtype) if group["factored_fp32"] else p.dtype
                zeros, part = mine.new_zeros(shape, dtype=dtype), part_of(p)
                return part.wrap(zeros, flat) if part else zeros
            return make

        fresh = wide_clone if group["use_focus"] else wide_zeros
        names = {"rms_sq": lambda p: scalar_like(p, 0.0) if muon(p) else None,
                 "exp_avg_sq": lambda p: None if muon(p) or second(p) else fresh(p),
                 "exp_avg_sq_row": line(1), "exp_avg_sq_col": line(0)}
        if group["use_schedulefree"]:
            exact = not group["stochastic_rounding"]
            names["z"] = (lambda p: super(ProdigyPlusScheduleFree, self).buffers(group)["z"](p)
                          if exact or p.dtype != torch.bfloat16 else p.detach().clone())
        else:
            names["exp_avg"] = wide_zeros
        if not self._adapts(group, group["k"] + 1):
            return names
        at_random = functools.partial(self._rounds_at_random, group)
        names["p0"] = lambda p: None if at_random(p) else every(p, SLICE).clone()
        names["away"] = lambda p: wide_zeros(every(p, SLICE)) if at_random(p) else None
        if group["use_speed"]:
            return names | {name: functools.partial(scalar_like, value=value)
                            for name, value in SPEED.items()}
        return names | {"s": lambda p: wide_zeros(every(p, SLICE))}

    def _ready(self, group, p, buffers):
        s = self.state[p]
        if "p0" in s and self._rounds_at_random(group, p):  # a checkpoint of 2.0.1
            x0 = s.pop("p0").to(working_dtype(p.dtype))
            s["away"] = x0 - every(s.get("z", p), SLICE)
        s = super()._ready(group, p, buffers)
        if not self._adapts(group, group["k"] + 1):
            for name in ("p0", "away", "s"):
                s.pop(name, None)
        return s

    def observe(self, x, g, s, h):
        if not h.adapts:
            return h.d * 0.0, h.d * 0.0
        g, away = every(g, SLICE, h.part), s.get("away")
        if away is None:
            away = s["p0"].to(x.dtype) - every(s.get("z", x), SLICE, h.part)
        if h.use_speed:
            averages = [s[name] for name in SPEED]
            speed = progress_(*averages, g, away, h.speed, h.d_update, h.part)
            return once(speed, h.part).sum(), once(averages[2], h.part).sum()
        s = add_scaled_(s["s"].mul_(h.beta3), g, h.d_update * h.rho)
        return inner(g, away) * h.d_update, one_norm(s)

    def advance(self, x, g, s, h):
        point = s.get("z", x)
        start = every(point, SLICE, h.part).clone() if "away" in s else None
        before = self.denominator(s, point, h) if h.use_adopt else None
        if "rms_sq" in s:
            g = orthogonalised(g, h.part)
        dg = g * h.d
        self.second_moment(s, dg.square(), point, h)
        if h.first:
            return
        b = before if h.use_adopt else self.denominator(s, point, h)
        if "z" in s:
            known = seen(b) if h.use_adopt and not h.use_focus else None
            u = self.divide(dg, b, point, h)
            u = u if known is None else u.mul_(known)
        else:
            u = self.averaged_update(g, dg, b, point, s, h)
        del b  # the lines below need its memory
        if h.use_orthograd and "rms_sq" not in s:
            u = orthogonal(u, point, h.part)
        if h.use_stableadamw:
            u = rms_clip_(u, h.part)
        if "z" in s:
            self.follow(x, u, s, h)
        else:
            x.mul_(1 - h.decay)
            add_scaled_(x, u, -h.lr)
        if start is not None:
            s["away"].add_(start - every(point, SLICE, h.part))

    def second_moment(self, s, gg, point, h):
        if "rms_sq" in s:
            ema_(s["rms_sq"], mean(gg, h.part), h.beta2)
        elif h.use_focus:
            ema_(s["exp_avg_sq"], point, h.beta2)
        elif "exp_avg_sq_row" in s:
            factor_(s["exp_avg_sq_row"], s["exp_avg_sq_col"], gg, h.beta2, h.part)
        else:
            ema_(s["exp_avg_sq"], gg, h.beta2)

    def denominator(self, s, like, h):
        """Root of the second moment (FOCUS: the average of the weights itself)."""
        if "rms_sq" in s:
            return s["rms_sq"].sqrt()
        if "exp_avg_sq_row" in s:
            return unfactored_root(s["exp_avg_sq_row"], s["exp_avg_sq_col"], like, h.part)
        return s["exp_avg_sq"].clone() if h.use_focus else s["exp_avg_sq"].sqrt()

    def divide(self, a, b, point, h):
        if h.use_focus:
            return focus(a, point, b)
        return atan2(a, b) if h.d_eps is None else a.div_(b.add_(h.d_eps))

    def averaged_update(self, g, dg, b, point, s, h):
        """Without Schedule-Free: the first moment, divided (ADOPT: the average of divided d g)."""
        if h.use_adopt:
            g = dg = clamp(self.divide(dg, b, point, h), h.clamp)
        m = ema_(s["exp_avg"], dg, h.beta1)
        if h.use_cautious:
            u = cautious(m, g, h.part)
        else:
            u = grams(m, g) if h.use_grams else m.clone()
        return u if h.use_adopt else self.divide(u, b, point, h)

    def follow(self, y, u, s, h):
        """y and z after the update u, weight decay at y; the mask acts on y's whole move."""
        z, beside = s["z"], h.decouple and not h.weight_decay_by_lr
        old = y.clone() if beside else None
        if h.decouple and h.weight_decay_by_lr:
            add_scaled_(u, y, h.weight_decay)
        if h.use_cautious or h.use_grams:
            move = add_scaled_((y - z) * h.c, u, h.pull)
            y.sub_(cautious(move, u, h.part) if h.use_cautious else grams(move, u))
        else:
            toward_(y, z, h.c)
            add_scaled_(y, u, -h.pull)
        add_scaled_(z, u, -h.lr)
        if beside:
            add_scaled_(z, old, -h.weight_decay)
            add_scaled_(y, old, -h.weight_decay * (1 - h.beta * (1 - h.c)))

    # d ----------------------------------------------------------------------------------------
    def adapt(self, groups, totals):
        ScheduleFree.adapt(self, groups, totals)
        rows = [(g, sums) for g, sums in zip(groups, totals) if self._adapts(g, g["k"])]
        if not rows:
            return
        groups, totals = map(list, zip(*rows))
        for circle, _ in self._circles(groups):
            mine = [sums for g, sums in rows if any(g is other for other in circle)]
            fresh = functools.reduce(torch.add, [sums[0].to(mine[0][0]) for sums in mine])
            for g, sums in zip(circle, mine):
                counts = (g["d"] > g["d0"]) | (fresh.to(g["d"]) > 0)
                sums[0] = torch.where(counts, sums[0], 0.0)
        Estimator.adapt(self, groups, totals)
        if groups[0]["split_groups"] and groups[0]["split_groups_mean"]:
            home = groups[0]["d"]
            taking = [(where(g["k"] > 0, live(self, g), 0), g["d"].to(home))
                      for g in self.param_groups if g["params"] and not known_zero(rate(g))]
            count = functools.reduce(operator.add, [a for a, _ in taking])
            mean = count / functools.reduce(torch.add, [a / d for a, d in taking])
            for g in self.param_groups:
                self._keep(g, "shared_d", mean)

    def add_up(self, group, sums):
        self._keep(group, "d_numerator", beta3(group) * group["d_numerator"] + sums[0])
        self._keep(group, "d_denom", sums[1])
        return group["d_numerator"], group["d_denom"]

    def bound(self, group, numerator, denominator):
        """dhat, or for SPEED the running progress r itself."""
        return numerator if group["use_speed"] else numerator / denominator

    def grow(self, group, estimate, valid):
        d, estimate = group["d"], estimate.to(group["d"])
        if group["use_speed"]:
            new = self._speed_up(group, estimate, valid)
        else:
            estimate = torch.minimum(estimate, d * GROWTH) if group["d_limiter"] else estimate
            d_hat = torch.where(valid, estimate * group["d_coef"], d)
            new = dict(d=torch.maximum(d, d_hat), d_hat=d_hat)
        beta4 = group["betas"][0] ** 0.5 if group["beta4"] is None else group["beta4"]
        return dict(new, d=new["d"].lerp(d, beta4) if beta4 else new["d"])

    def _speed_up(self, group, r, valid):
        """SPEED: d grows while r sets records, by sqrt(r_{k+1} / r_k) and at most 2^(1/4)."""
        d, before = group["d"], group["prev_d_numerator"]
        record = torch.maximum(r, group["max_d_numerator"])
        factor = (r / torch.where(before > 0, before, 1.0)).clamp_min(0.0).sqrt()
        factor = factor.clamp_max(GROWTH) * group["d_coef"] ** 0.125
        rises = valid & (r >= record) & (r > 0) & (before > 0)
        d_hat = torch.where(rises, d * factor, d)
        return dict(d=torch.maximum(d, d_hat), d_hat=d_hat, prev_d_numerator=r,
                    max_d_numerator=record)

    def _growth(self, group):
        names = ("d_limiter", "use_speed", "beta4")
        return (*super()._growth(group), *(group[name] for name in names), group["betas"][0])

    def _restore(self, p, key, value, stride=1):
        """z is as wide as the step, or rounded at random like bfloat16 weights."""
        value = super()._restore(p, key, value, stride)
        rounded = value.dtype == p.dtype == torch.bfloat16
        return value if key != "z" or rounded else value.to(working_dtype(p.dtype))

    def convert(self, state_dict):
        """2.0.1 counts from 1, keeps SPEED's numbers as floats and p0 of zeros as one number."""
        for group in state_dict["param_groups"]:  # there: of the step before
            group["prev_d_numerator"] = group["d_numerator"]
        split = state_dict["param_groups"][0]["split_groups"]
        state_dict = Family.convert(self, state_dict) if split else Estimator.convert(
            self, state_dict)
        for s in state_dict["state"].values():
            s.pop("exp_avg_sq_metadata", None)
            if "p0" in s:
                like = every(s["z"] if "z" in s else s["exp_avg"], SLICE)
                s["p0"] = s["p0"].expand(like.shape).clone()
            for name in SPEED:
                if name in s:
                    s[name] = torch.tensor(s[name], dtype=torch.float64)
        for group in state_dict["param_groups"]:
            for name in FOREIGN:
                group.pop(name, None)
            group.update(k=group["k"] - 1, d_hat=group["d"])
            group["shared_d"] = group["d"] if group["shared_d"] is None else group["shared_d"]
        return state_dict


def scalar_like(p, value):
    """A 0-d tensor beside p, in its working dtype."""
    return local(p).new_full((), value, dtype=working_dtype(p.dtype))


@by_tensor
def progress_(average, l1, l2, g, away, beta, weight, part=None):
    """SPEED's numerator: running <g, x0 - z> over ||x0 - z||_1, damped by (1 + ||x0 - z||)^2."""
    dot = total((g * away).sum(), part)
    before = torch.where(average.isnan(), dot, average)
    average.copy_(before * beta + dot * (1 - beta))
    l1.copy_(torch.maximum(l1, total(away.norm(1), part)))
    l2.copy_(torch.maximum(l2, length(away, part)))
    return average / l1 * weight / (l2 + 1).square()


@by_tensor
def once(a, part):
    """a on the first of a tensor's pieces, else 0: a sum over ranks counts it once."""
    return a if part is None or part.first else a * 0.0


@by_tensor
def clamp(u, size):
    return u.clamp(-size, size)


@by_tensor
def seen(b):
    """1 where a denominator is not 0, else 0: there is nothing yet to divide a gradient by."""
    return b.ne(0).to(b.dtype)


def settle(options, stacklevel):
    """Turn off, with a warning, what another option of the same group excludes."""
    for first, second, off in EXCLUSIONS:
        chosen = options["eps"] is None if first == "eps is None" else options[first]
        if chosen is True and options[second] is True:
            warnings.warn(f"{first} excludes {second}: {off} is off", stacklevel=stacklevel)
            options[off] = False


# ProdigyPlusScheduleFree(params, **EARLIER): what 1.8.51 had by default and 2.0 has not. Its dhat
# was atan2(d_coef r, ||s||_1), which is the quotient while that is small.
EARLIER = dict(split_groups_mean=True, d_limiter=False)
