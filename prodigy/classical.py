"""The classical methods: a direction, a hand-tuned size ``lr``, the gradient at x itself.

Arguments, defaults and state keys are those of ``torch.optim``, whose checkpoints load. Beside
bfloat16 parameters the averages are float32 and the parameter carries 16 more bits (see
``pieces.residual``), where torch.optim rounds both to bfloat16.
"""

import torch

from .optimizer import Family, given, rate
from .pieces import add_scaled_, ema_, root, sub_ratio_, where, working_dtype


def wide_zeros(p):
    """Zeros in the dtype the step computes in."""
    return torch.zeros_like(p, dtype=working_dtype(p.dtype))


class Classical(Family):
    """A method that writes ``advance`` only; it counts each parameter's own steps."""

    own_clock = True
    freezes = False  # lr = 0 multiplies every motion, and the averages go on, as in torch.optim

    def convert(self, state_dict):
        state_dict = super().convert(state_dict)
        for s in state_dict["state"].values():  # torch's SGD counts no steps
            s.setdefault("step", torch.tensor(1.0))
            for name in [name for name, value in s.items() if value is None]:
                del s[name]
        return state_dict


class SGD(Classical):
    r"""Stochastic gradient descent with momentum (Polyak 1964; Sutskever et al. 2013).

    .. math::
        b_{t} = \mu b_{t-1} + (1-\tau) g_t \quad (b_1 = g_1), \qquad
        x_{t+1} = x_t - \gamma\,(g_t + \mu b_t \text{ if Nesterov else } b_t)

    with :math:`g_t = \nabla f(x_t) + \lambda x_t`. This is torch's form: ``lr`` multiplies the sum
    of the averaged gradients, so the textbook's damped rate is ``lr / (1 - momentum)``.

    Args:
        params: tensors, named tensors or dictionaries of them (parameter groups).
        lr (float or 0-d tensor): step size, in units of x over units of g; [0, inf).
        momentum (float): :math:`\mu`, [0, inf).
        dampening (float): :math:`\tau`.
        weight_decay (float): :math:`\lambda`, the factor of an L2 penalty; [0, inf).
        nesterov (bool): look ahead; needs momentum > 0 and dampening = 0.
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    def __init__(self, params, lr=1e-3, momentum=0, dampening=0, weight_decay=0, nesterov=False,
                 **modes):
        super().__init__(**given(locals()))

    def validate(self, group):
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("nesterov=True needs momentum > 0 and dampening = 0")

    def buffers(self, group):
        return {"momentum_buffer": wide_zeros} if group["momentum"] != 0 else {}

    def scalars(self, group, t):
        return dict(gain=1 - group["dampening"] * where(t > 1, 1.0, 0.0))

    def advance(self, x, g, s, h):
        if "momentum_buffer" in s:
            b = add_scaled_(s["momentum_buffer"].mul_(h.momentum), g, h.gain)
            g = add_scaled_(g.clone(), b, h.momentum) if h.nesterov else b
        add_scaled_(x, g, -h.lr)


class Adagrad(Classical):
    r"""AdaGrad (Duchi, Hazan, Singer, JMLR 2011, Fig. 1, diagonal form).

    .. math::
        v_{t} = v_{t-1} + g_t^2, \qquad
        x_{t+1} = x_t - \frac{\gamma}{1 + (t-1)\eta} \frac{g_t}{\sqrt{v_t} + \epsilon}

    Args:
        params: tensors, named tensors or parameter groups.
        lr (float or 0-d tensor): :math:`\gamma`, in units of x; [0, inf).
        lr_decay (float): :math:`\eta`, [0, inf).
        weight_decay (float): L2 penalty, [0, inf).
        initial_accumulator_value (float): :math:`v_0`, [0, inf).
        eps (float): in units of g; [0, inf).
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    def __init__(self, params, lr=1e-2, lr_decay=0, weight_decay=0, initial_accumulator_value=0,
                 eps=1e-10, **modes):
        super().__init__(**given(locals()))

    def buffers(self, group):
        return {"sum": lambda p: wide_zeros(p).add_(group["initial_accumulator_value"])}

    def scalars(self, group, t):
        return dict(clr=rate(group) / (1 + (t - 1) * group["lr_decay"]))

    def advance(self, x, g, s, h):
        v = s["sum"].add_(g.square())
        sub_ratio_(x, g, v.sqrt().add_(h.eps), h.clr)


class RMSprop(Classical):
    r"""RMSprop (Tieleman and Hinton 2012; centred form: Graves 2013).

    .. math::
        v_t = \alpha v_{t-1} + (1-\alpha) g_t^2, \qquad
        x_{t+1} = x_t - \gamma\, b_t, \quad
        b_t = \mu b_{t-1} + \frac{g_t}{\sqrt{v_t - \bar g_t^2} + \epsilon}

    where :math:`\bar g_t` is the average of :math:`g_t` if ``centered``, else 0.

    Args:
        params: tensors, named tensors or parameter groups.
        lr (float or 0-d tensor): in units of x; [0, inf).
        alpha (float): [0, 1].
        eps (float): in units of g; [0, inf).
        weight_decay (float): L2 penalty, [0, inf).
        momentum (float): :math:`\mu`, [0, inf).
        centered (bool): subtract the squared average gradient.
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    def __init__(self, params, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0,
                 centered=False, **modes):
        super().__init__(**given(locals()))

    def buffers(self, group):
        names = ["square_avg"]
        names += ["momentum_buffer"] * (group["momentum"] > 0) + ["grad_avg"] * group["centered"]
        return dict.fromkeys(names, wide_zeros)

    def advance(self, x, g, s, h):
        v = ema_(s["square_avg"], g.square(), h.alpha)
        if h.centered:
            v = (v - ema_(s["grad_avg"], g, h.alpha).square()).abs()  # not below 0 by rounding
        u = g / v.sqrt().add_(h.eps)
        if "momentum_buffer" in s:
            u = s["momentum_buffer"].mul_(h.momentum).add_(u)
        add_scaled_(x, u, -h.lr)


class Adam(Classical):
    r"""Adam (Kingma and Ba 2015, 1412.6980, Alg. 1); AMSGrad (Reddi et al. 2018, Alg. 2).

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2,
        \quad
        x_{t+1} = x_t - \gamma\,
            \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    Args:
        params: tensors, named tensors or parameter groups.
        lr (float or 0-d tensor): :math:`\gamma`, in units of x; [0, inf).
        betas (pair of floats): [0, 1).
        eps (float): in units of g; [0, inf).
        weight_decay (float): L2 penalty; decoupled, in units of 1/lr, if decoupled_weight_decay.
        amsgrad (bool): divide by the largest :math:`v` so far.
        decoupled_weight_decay (bool): AdamW's :math:`x \leftarrow (1 - \gamma\lambda) x`.
        **modes: see :class:`prodigy.optimizer.Family`.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0,
                 amsgrad=False, *, decoupled_weight_decay=False, **modes):
        super().__init__(**given(locals()))

    def buffers(self, group):
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
        return dict.fromkeys(names, wide_zeros)

    def scalars(self, group, t):
        beta1, beta2 = group["betas"]
        lr = rate(group)
        return dict(step=lr / (1 - beta1**t), correction=root(1 - beta2**t),
                    shrink=1 - lr * group["weight_decay"])

    def advance(self, x, g, s, h):
        if h.decouple:
            x.mul_(h.shrink)
        m = ema_(s["exp_avg"], g, h.beta1)
        v = ema_(s["exp_avg_sq"], g.square(), h.beta2)
        if h.amsgrad:
            v = s["max_exp_avg_sq"].clamp_min_(v)
        sub_ratio_(x, m, v.sqrt().div_(h.correction).add_(h.eps), h.step)


class AdamW(Adam):
    r"""Adam with decoupled weight decay (Loshchilov and Hutter 2019, 1711.05101, Alg. 2).

    .. math:: x_{t+1} = (1 - \gamma\lambda)\,x_t - \gamma\,
        \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    The arguments are :class:`Adam`'s with ``weight_decay=1e-2``, in units of 1/lr: torch
    multiplies decay by lr, the paper's box does not.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2,
                 amsgrad=False, **modes):
        super().__init__(**given(locals()), decoupled_weight_decay=True)
