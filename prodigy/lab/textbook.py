r"""The papers' boxes, line by line, over one vector.

Every function here is the box of a paper written down as plainly as possible: exact, slow, and
the reference against which the importable optimizers are tested. All of them are called as

    trace = box(grad, x0, steps, ...the box's own parameters...)

with `grad` a function from a point to a (sub)gradient, `x0` one vector of shape (p,), computed in
float64, and `steps` the number of updates. The trace holds one row for each k = 0, ..., steps of
everything that step k knows before it moves: `trace.x[k]` of shape (p,) is the point x_k,
`trace.g[k]` its gradient, `trace.d[k]` the estimate d_k in use, `trace.dhat[k]` the lower bound
that was compared with it (dhat_0 = d_0), `trace.lam[k]` the weight or step of g_k, and so on. A
box that needs no further step (a zero first gradient) returns a shorter trace.

The numbering is that of D-Adaptation (arXiv 2301.07733, version 5), Prodigy (arXiv 2306.06101)
and The Road Less Scheduled (arXiv 2405.15682).
"""
from functools import wraps
from itertools import count, islice
from types import SimpleNamespace

import torch

__all__ = [
    "averages", "dadapt_dual_averaging", "dadapt_gd", "dadapt_adagrad", "dadapt_sgd",
    "dadapt_adam", "prodigy_gd", "prodigy_dual_averaging", "prodigy_adam", "polyak_averaging",
    "primal_averaging", "schedule_free_sgd", "dadapt_resetting", "mechanic",
    "schedule_free_polyak", "schedule_free_plus", "rectified", "schedule_free_adamw",
    "schedule_free_adamw_paper", "schedule_free_two_tensors", "nesterov_acsa",
    "exponential_average", "lookahead", "heavy_ball",
    "nesterov", "noisy_quadratic", "distance_over_gradients", "cocob",
]


# ------------------------------------------------------------------ what the boxes share
def traced(box):
    """Turn a box, a generator that yields its variables at every k, into a run of `steps` updates.

    Raises ValueError when x0 is not one vector, when steps is no positive integer, and when one
    of d0, G, G_inf, lr is given but not positive.
    """
    @wraps(box)
    def run(grad, x0, steps, **parameters):
        x0 = torch.as_tensor(x0, dtype=torch.float64)
        if x0.ndim != 1:
            raise ValueError(f"x0 must be one vector of shape (p,), not {tuple(x0.shape)}")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a positive integer, not {steps!r}")
        for name in {"d0", "G", "G_inf", "lr"} & parameters.keys():
            value = parameters[name]
            if not callable(value) and value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, not {value!r}")
        rows = list(islice(box(grad, x0, **parameters), steps + 1))
        keys = rows[0].keys()
        return SimpleNamespace(**{key: torch.stack([_double(row[key]) for row in rows])
                                  for key in keys})
    return run


def _double(value):
    return torch.as_tensor(value, dtype=torch.float64)


def norm(v, order=2):
    """The norm of a vector of shape (p,): Euclidean, or of the given order (1, 2, inf)."""
    return torch.linalg.vector_norm(v, order)


def at(schedule, k):
    """The value of a parameter at step k: a number stays itself, a function of k is called."""
    return schedule(k) if callable(schedule) else schedule


def ratio(numerator, denominator):
    """numerator / denominator, and 0 where the denominator is 0 (a bound that says nothing)."""
    return numerator / denominator if denominator > 0 else torch.zeros_like(denominator)


def averages(x, weights):
    """The running weighted means sum_{i<=k} w_i x_i / sum_{i<=k} w_i; x (n, p), weights (n,)."""
    return (weights[:, None] * x).cumsum(0) / weights.cumsum(0)[:, None]


# ------------------------------------------------------------------ D-Adaptation
@traced
def dadapt_dual_averaging(grad, x0, *, d0, option=1, G=None):
    """Algorithm 1 of D-Adaptation: dual averaging, with either lower bound on D.

    option is 1 or 2. With G the normaliser is that of the non-asymptotic theorem,
    gamma_{k+1} = 1 / sqrt(G^2 + sum |g_i|^2) and gamma_0 = 1 / G; without it the one of the box.
    """
    if option not in (1, 2):
        raise ValueError(f"option must be 1 or 2, not {option!r}")
    x, s, d, dhat = x0, torch.zeros_like(x0), _double(d0), _double(d0)
    g = grad(x)
    gamma = 1 / (_double(G) if G else norm(g))
    squares = G**2 if G else 0.0
    subtracted = numerator = 0.0
    while True:
        yield {"x": x, "g": g, "s": s, "d": d, "dhat": dhat, "lam": d, "gamma": gamma}
        if torch.isinf(gamma):
            return
        subtracted = subtracted + gamma * d**2 * norm(g)**2
        numerator = numerator + gamma * d * (g @ s)
        squares = squares + norm(g)**2
        s = s + d * g
        gamma = 1 / torch.sqrt(squares)
        if option == 1:
            dhat = ratio(gamma * norm(s)**2 - subtracted, 2 * norm(s))
        else:
            dhat = ratio(numerator, norm(s))
        d = torch.maximum(d, dhat)
        x = x0 - gamma * s
        g = grad(x)


@traced
def dadapt_gd(grad, x0, *, d0, G):
    """Algorithm 2 of D-Adaptation: gradient descent; G bounds the gradients' norm."""
    x, s, d, dhat = x0, torch.zeros_like(x0), _double(d0), _double(d0)
    squares, subtracted = G**2, 0.0
    while True:
        g = grad(x)
        squares = squares + norm(g)**2
        lam = d / torch.sqrt(squares)
        yield {"x": x, "g": g, "s": s, "d": d, "dhat": dhat, "lam": lam}
        subtracted = subtracted + lam**2 * norm(g)**2
        s = s + lam * g
        dhat = ratio(norm(s)**2 - subtracted, 2 * norm(s))
        d = torch.maximum(d, dhat)
        x = x - lam * g


@traced
def dadapt_adagrad(grad, x0, *, G_inf, d0=1e-6):
    """Algorithm 3 of D-Adaptation: AdaGrad; G_inf bounds every coordinate of the gradients."""
    x, s, d, dhat = x0, torch.zeros_like(x0), _double(d0), _double(d0)
    a = torch.full_like(x0, G_inf)
    subtracted = 0.0
    while True:
        g = grad(x)
        yield {"x": x, "g": g, "s": s, "d": d, "dhat": dhat, "lam": d, "a": a}
        subtracted = subtracted + d**2 * (g**2 / a).sum()
        s = s + d * g
        a = torch.sqrt(a**2 + g**2)
        dhat = ratio((s**2 / a).sum() - subtracted, 2 * norm(s, 1))
        d = torch.maximum(d, dhat)
        x = x0 - s / a


@traced
def dadapt_sgd(grad, x0, *, d0=1e-6, gamma=1.0, beta=0.9, G=None):
    """Algorithm 4 of D-Adaptation: SGD with momentum as primal averaging.

    gamma is a number or a function of k with base value 1; G defaults to |g_0|. The factor 2 of
    dhat is the paper's: twice the provable bound, so that d <= 2 D where x = x_0 - s, that is for
    beta = 0. With momentum d may pass it: 5.8 D on |x| at the default beta.
    """
    x, s, d, dhat = x0, torch.zeros_like(x0), _double(d0), _double(d0)
    z, numerator = x0, 0.0
    for k in count():
        g = grad(x)
        G = G if G else norm(g)
        lam = d * at(gamma, k) / G
        yield {"x": x, "z": z, "g": g, "s": s, "d": d, "dhat": dhat, "lam": lam}
        if G == 0:
            return
        numerator = numerator + lam * (g @ s)
        s = s + lam * g
        z = z - lam * g
        x = beta * x + (1 - beta) * z
        dhat = ratio(2 * numerator, norm(s))
        d = torch.maximum(d, dhat)


@traced
def dadapt_adam(grad, x0, *, d0=1e-6, gamma=1.0, betas=(0.9, 0.999), eps=1e-8):
    """Algorithm 5 of D-Adaptation, Adam as printed: <g_k, s_k> under the new denominator A_{k+1}.

    The dadaptation package, and prodigy.DAdaptAdam with it, takes the old denominator A_k there.
    """
    x, s, d, dhat = x0, torch.zeros_like(x0), _double(d0), _double(d0)
    m = v = torch.zeros_like(x0)
    r = 0.0
    beta1, beta2 = betas
    root = beta2**0.5
    for k in count():
        g = grad(x)
        lam = d * at(gamma, k)
        yield {"x": x, "g": g, "s": s, "m": m, "v": v, "r": r, "d": d, "dhat": dhat, "lam": lam}
        m = beta1 * m + (1 - beta1) * lam * g
        v = beta2 * v + (1 - beta2) * g**2
        A = torch.sqrt(v) + eps
        x = x - m / A
        r = root * r + (1 - root) * lam * (g * s / A).sum()
        s = root * s + (1 - root) * lam * g
        dhat = ratio(r, (1 - root) * norm(s, 1))
        d = torch.maximum(d, dhat)


# ------------------------------------------------------------------ Prodigy
@traced
def prodigy_gd(grad, x0, *, d0, G, weights=1.0):
    """Prodigy's gradient descent; weights lambda_k >= 1, nondecreasing: a number or f(k)."""
    x, d, dhat = x0, _double(d0), _double(d0)
    squares = numerator = 0.0
    for k in count():
        g = grad(x)
        weight = at(weights, k)
        squares = squares + (d * weight)**2 * norm(g)**2
        eta = d**2 * weight / torch.sqrt(d**2 * G**2 + squares)
        yield {"x": x, "g": g, "d": d, "dhat": dhat, "lam": eta}
        numerator = numerator + eta * (g @ (x0 - x))
        x = x - eta * g
        dhat = ratio(numerator, norm(x - x0))
        d = torch.maximum(d, dhat)


@traced
def prodigy_dual_averaging(grad, x0, *, d0, G):
    """Prodigy's dual averaging: weights lambda_k = d_k^2, and G^2 weighted by the newest one."""
    x, s, d, dhat = x0, torch.zeros_like(x0), _double(d0), _double(d0)
    squares = numerator = 0.0
    gamma = 1 / (d * G)
    while True:
        g = grad(x)
        lam = d**2
        yield {"x": x, "g": g, "s": s, "d": d, "dhat": dhat, "lam": lam, "gamma": gamma}
        numerator = numerator + lam * (g @ (x0 - x))
        squares = squares + lam * norm(g)**2
        s = s + lam * g
        dhat = ratio(numerator, norm(s))
        d = torch.maximum(d, dhat)
        gamma = 1 / torch.sqrt(d**2 * G**2 + squares)
        x = x0 - gamma * s


@traced
def prodigy_adam(grad, x0, *, d0=1e-6, gamma=1.0, betas=(0.9, 0.999), eps=1e-8):
    """Prodigy's Adam as printed: the step and eps d_k both use the d_k the step came with.

    gamma is a number or a function of k with base value 1.
    """
    x, s, d, dhat = x0, torch.zeros_like(x0), _double(d0), _double(d0)
    m = v = torch.zeros_like(x0)
    r = 0.0
    beta1, beta2 = betas
    root = beta2**0.5
    for k in count():
        g = grad(x)
        lam = at(gamma, k) * d**2
        yield {"x": x, "g": g, "s": s, "m": m, "v": v, "r": r, "d": d, "dhat": dhat, "lam": lam}
        m = beta1 * m + (1 - beta1) * d * g
        v = beta2 * v + (1 - beta2) * d**2 * g**2
        r = root * r + (1 - root) * lam * (g @ (x0 - x))
        s = root * s + (1 - root) * lam * g
        x = x - at(gamma, k) * d * m / (torch.sqrt(v) + d * eps)
        dhat = ratio(r, norm(s, 1))
        d = torch.maximum(d, dhat)


# ------------------------------------------------------------------ averaging
# These boxes count t = 1, 2, ...: row k of a trace is t = k + 1. lr, weights and beta are numbers
# or functions of t; x_t is the mean of z_1, ..., z_t with weights w_t.
@traced
def polyak_averaging(grad, x0, *, lr, weights=1.0):
    """SGD whose output is the Polyak-Ruppert average: gradients at z_t, x_t only returned."""
    x = z = x0
    total = at(weights, 1)
    for t in count(1):
        g = grad(z)
        yield {"x": x, "y": z, "z": z, "g": g}
        z = z - at(lr, t) * g
        total = total + at(weights, t + 1)
        x = x + at(weights, t + 1) / total * (z - x)


@traced
def primal_averaging(grad, x0, *, lr, weights=1.0):
    """Primal averaging: gradients at the average x_t itself."""
    x = z = x0
    total = at(weights, 1)
    for t in count(1):
        g = grad(x)
        yield {"x": x, "y": x, "z": z, "g": g}
        z = z - at(lr, t) * g
        total = total + at(weights, t + 1)
        x = x + at(weights, t + 1) / total * (z - x)


@traced
def schedule_free_sgd(grad, x0, *, lr, beta=0.9, weights=1.0):
    """Schedule-Free SGD with any weights w_t > 0 and any beta_t in [0, 1]; x, y, z all kept."""
    x = z = x0
    total = at(weights, 1)
    for t in count(1):
        y = (1 - at(beta, t)) * z + at(beta, t) * x
        g = grad(y)
        yield {"x": x, "y": y, "z": z, "g": g}
        z = z - at(lr, t) * g
        total = total + at(weights, t + 1)
        c = at(weights, t + 1) / total
        x = (1 - c) * x + c * z


# ------------------------------------------------------------------ rivals
@traced
def dadapt_resetting(grad, x0, *, d0):
    """D-Adaptation with Resetting: Algorithm 1, Option II, begun anew whenever dhat > 2 d.

    In `trace.start[k]` the number of restarts before step k. Rebuilt from the description in
    versions 1 to 3 of Prodigy's paper.
    """
    d = dhat = _double(d0)
    for start in count():
        x, s = x0, torch.zeros_like(x0)
        squares = numerator = eta = _double(0.0)
        while dhat <= 2 * d:
            g = grad(x)
            yield {"x": x, "g": g, "s": s, "d": d, "dhat": dhat, "start": start}
            numerator = numerator + eta * d * (g @ s)
            squares = squares + norm(g)**2
            s = s + d * g
            eta = ratio(_double(1.0), torch.sqrt(squares))
            dhat = ratio(numerator, norm(s))
            x = x0 - eta * s
        d = dhat


@traced
def mechanic(grad, x0, *, update, betas=(0.9, 0.99), decay=0.01, s_init=1e-8, eps=1e-8):
    """Algorithm 1 of Mechanic (arXiv 2306.00144): the scale S of the updates of a base method.

    update(k, x, g) is the base's update u at step k.
    """
    beta = torch.tensor(betas, dtype=torch.float64)
    x, delta = x0, torch.zeros_like(x0)
    s = r = v = torch.zeros_like(beta)
    m = torch.full_like(beta, 1e-6)
    for k in count():
        g = grad(x)
        yield {"x": x, "g": g, "s": s, "delta": delta}
        h = delta @ (g + decay * s.sum() * norm(g) * x / (norm(x) + eps))
        m = torch.maximum(beta * m, abs(h))
        v = beta**2 * v + h**2
        r = torch.clamp(beta * r - s * h, min=0)
        s = (s_init / len(beta) * m + r) / (torch.sqrt(v) + eps)
        delta = delta + update(k, x, g)
        x = x0 + s.sum() * delta


@traced
def schedule_free_polyak(grad, x0, *, loss, f_star=0.0, M=0.0, beta=0.9, adam=None):
    """Schedule-Free with a Polyak step (arXiv 2511.07767): the oracle, or safeguarded for M > 0.

    loss is the function from a point to f, f_star its minimum (or a lower bound); adam is
    (beta2, eps) for the norm of D^-1, or None for the Euclidean one.
    """
    x = z = x0
    v = torch.zeros_like(x0)
    for t in count(1):
        y = (1 - beta) * z + beta * x
        g = grad(y)
        direction = g
        if adam:
            beta2, eps = adam
            v = beta2 * v + (1 - beta2) * g**2
            direction = g / (torch.sqrt(v / (1 - beta2**t)) + eps)
        gap = torch.clamp(_double(loss(y)) - f_star + beta * (g @ (z - x)), min=0)
        lam = ratio(gap, torch.clamp(g @ direction, min=M))
        yield {"x": x, "y": y, "z": z, "g": g, "lam": lam}
        z = z - lam * direction
        x = (1 - 1 / t) * x + z / t


@traced
def schedule_free_plus(grad, x0, *, loss, f_star=0.0, betas=(0.9, 0.95), momentum=(0.9, 0.965),
                       anneal=0, beta_polyak=0.9, eps=1e-8, decay=0.0, c_warmup=0, r=0.0, power=2):
    """ScheduleFree+ (arXiv 2605.19095); momentum goes from its first to its second value.

    The step k = 0, 1, ... builds y with beta_k, and the Polyak step uses the beta of that y.
    """
    x = y = z = x0
    m = v = torch.zeros_like(x0)
    e = total = largest = _double(0.0)
    beta1, beta2 = betas
    for k in count():
        g = grad(y)
        e = beta_polyak * e + (1 - beta_polyak) * (torch.pi / 2)**0.5 * norm(g, 1)
        gap = torch.clamp(_double(loss(y)) - f_star + g @ (z - y), min=0)
        lam = ratio(gap, e / (1 - beta_polyak**(k + 1)))
        yield {"x": x, "y": y, "z": z, "g": g, "lam": lam}
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        u = m / (1 - beta1**(k + 1)) / (torch.sqrt(v / (1 - beta2**(k + 1))) + eps)
        z = z - lam**2 * decay * y - lam * u
        largest = torch.maximum(largest, lam)
        c = _double(1.0)
        if k >= c_warmup:
            weight = (k + 1)**r * largest**power
            total = total + weight
            c = ratio(weight, total)
        x = (1 - c) * x + c * z
        p = min(k / anneal, 1) if anneal else 0
        beta = 1 - (1 - momentum[0])**(1 - p) * (1 - momentum[1])**p
        y = beta * x + (1 - beta) * z


# ------------------------------------------------------------------ Schedule-Free with Adam's step
# Here x_{t+1} is the mean of z_2, ..., z_{t+1}, in which z_{t+1} has the weight w_t of its step:
# weights shifted by one against the boxes above.
def rectified(beta2, t):
    """RAdam's factor of step t (arXiv 1908.03265, Algorithm 2); 0 while rho_t <= 4."""
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho <= 4:
        return 0.0
    return ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))**0.5


@traced
def schedule_free_adamw(grad, x0, *, lr, betas=(0.9, 0.999), eps=1e-8, decay=0.0, decay_at="y",
                        r=0.0, power=2, C=None):
    """Schedule-Free AdamW as released since schedulefree 1.3; with C, the refined average.

    lr is a number or a function of t: min(1, t / warmup) times a number for warm-up, `rectified`
    times a number for the RAdam form. decay_at is "y" (as released) or "z". C is that of Through
    the River (arXiv 2507.09846, Algorithm 2). `trace.c[k]` and `trace.lam[k]` are of step k + 1.
    """
    x = z = x0
    v = torch.zeros_like(x0)
    total, largest = _double(0.0), 0.0
    beta1, beta2 = betas
    for t in count(1):
        y = (1 - beta1) * z + beta1 * x
        g = grad(y)
        v = beta2 * v + (1 - beta2) * g**2
        pace = at(lr, t)
        largest = max(largest, pace)
        weight = t**r * largest**power
        total = total + weight
        c = ratio(_double(weight), total)
        if C:
            c = torch.clamp(c * (1 - beta1) * C, max=1)
        u = g / (torch.sqrt(v / (1 - beta2**t)) + eps) + decay * {"y": y, "z": z}[decay_at]
        yield {"x": x, "y": y, "z": z, "g": g, "u": u, "lam": pace, "c": c}
        z = z - pace * u
        x = (1 - c) * x + c * z


@traced
def schedule_free_adamw_paper(grad, x0, *, lr, betas=(0.9, 0.999), eps=1e-8, decay=0.0, warmup=0):
    """Algorithm 1 of The Road Less Scheduled as printed: bias correction within the step size."""
    x = z = x0
    v = torch.zeros_like(x0)
    total = _double(0.0)
    beta1, beta2 = betas
    for t in count(1):
        y = (1 - beta1) * z + beta1 * x
        g = grad(y)
        v = beta2 * v + (1 - beta2) * g**2
        pace = lr * (1 - beta2**t)**0.5 * (min(1, t / warmup) if warmup else 1)
        total = total + pace**2
        c = pace**2 / total
        yield {"x": x, "y": y, "z": z, "g": g, "lam": pace, "c": c}
        z = z - pace * g / (torch.sqrt(v) + eps) - pace * decay * y
        x = (1 - c) * x + c * z


@traced
def schedule_free_two_tensors(grad, x0, *, lr, beta=0.9, kept="yz", store=None):
    """Schedule-Free SGD with equal weights from two of its tensors, "yz" (as released) or "xz".

    store is what a tensor turns into when it is put away, such as a rounding.
    """
    store = store or (lambda tensor: tensor)
    first = z = store(x0)
    for t in count(1):
        x = (first - (1 - beta) * z) / beta if kept == "yz" else first
        y = first if kept == "yz" else (1 - beta) * z + beta * first
        g = grad(y)
        yield {"x": x, "y": y, "z": z, "g": g}
        c = 1 / (t + 1)
        if kept == "yz":
            first = store((1 - c) * y + c * z - at(lr, t) * (1 - beta * (1 - c)) * g)
            z = store(z - at(lr, t) * g)
        else:
            z = store(z - at(lr, t) * g)
            first = store((1 - c) * first + c * z)


@traced
def nesterov_acsa(grad, x0, *, L):
    """Nesterov's accelerated method for L-smooth f, as The Road Less Scheduled prints AC-SA.

    It is schedule_free_sgd with weights t, beta_t = t / (t + 2) and lr_t = (t + 1) / (2 L).
    """
    x = z = x0
    for t in count(1):
        c = 2 / (t + 2)
        y = (1 - c) * x + c * z
        g = grad(y)
        yield {"x": x, "y": y, "z": z, "g": g}
        z = z - (t + 1) / (2 * L) * g
        x = (1 - c) * x + c * z


# ------------------------------------------------------------------ averages of a stream
def exponential_average(g, beta):
    """m_t = beta m_{t-1} + (1 - beta) g_t from m_0 = 0, over the rows g_1, g_2, ... of g.

    Returns m and the corrected average m_t / (1 - beta^t), both of g's shape.
    """
    m, rows = torch.zeros_like(g[0]), []
    for row in g:
        m = beta * m + (1 - beta) * row
        rows.append(m)
    t = torch.arange(1, len(g) + 1, dtype=g.dtype).reshape(-1, *[1] * (g.ndim - 1))
    m = torch.stack(rows)
    return m, m / (1 - beta**t)


@traced
def lookahead(grad, x0, *, lr, alpha=0.5, k=5):
    """Lookahead (arXiv 1907.08610) over SGD: every k fast steps of z, x goes alpha of their way.

    Rows are fast steps; x is constant between two synchronisations, after which z starts from x.
    """
    x = z = x0
    for t in count(1):
        g = grad(z)
        yield {"x": x, "z": z, "g": g}
        z = z - at(lr, t) * g
        if t % k == 0:
            x = z = x + alpha * (z - x)


# ------------------------------------------------------------------ momentum
@traced
def heavy_ball(grad, x0, *, lr, beta):
    """Polyak's heavy ball, x_{-1} = x_0; lr is a number or a function of k."""
    x = before = x0
    for k in count():
        g = grad(x)
        yield {"x": x, "g": g}
        x, before = x - at(lr, k) * g + beta * (x - before), x


@traced
def nesterov(grad, x0, *, lr, beta):
    """Nesterov's accelerated gradient with a constant beta: gradients at the look-ahead y_k."""
    x = y = x0
    for k in count():
        g = grad(y)
        yield {"x": x, "y": y, "g": g}
        before, x = x, y - at(lr, k) * g
        y = x + beta * (x - before)


def noisy_quadratic(spectrum, noise, steps, lr, beta=0.0, start=1.0):
    """E f(x_k), k = 0, ..., steps, of the heavy ball on f(x) = sum_i spectrum_i x_i^2 / 2, exact.

    The gradients carry independent noise of the variances `noise`, shaped as spectrum, and start
    is E x_i^2 at k = 0. Tensors lr and beta that broadcast against spectrum give many runs at
    once; the result has the steps first and the spectrum's axis summed away.
    """
    spectrum, lr, beta = _double(spectrum), _double(lr), _double(beta)
    noise, trace = lr**2 * _double(noise), 1 + beta - lr * spectrum
    now = mixed = before = torch.zeros_like(noise * trace) + start
    f = []
    for _ in range(steps + 1):
        f.append((spectrum * now).sum(-1) / 2)
        now, mixed, before = (trace**2 * now - 2 * trace * beta * mixed + beta**2 * before + noise,
                              trace * now - beta * mixed, now)
    return torch.stack(f)


# ------------------------------------------------------------------ distance and coins
@traced
def distance_over_gradients(grad, x0, *, d0=1e-6, power=1):
    """DoG (power 1, arXiv 2302.12022) and DoWG (power 2, 2305.16284) without their eps.

    `trace.d[k]` is the distance in use, max(d0, max_{i<=k} |x_i - x_0|), and `trace.lam[k]` the
    weight d^power of x_k in the average that is returned.
    """
    x, d, squares = x0, _double(d0), _double(0.0)
    while True:
        g = grad(x)
        d = torch.maximum(d, norm(x - x0))
        squares = squares + (d**(power - 1) * norm(g))**2
        yield {"x": x, "g": g, "d": d, "lam": d**power, "squares": squares}
        x = x - ratio(d**power, torch.sqrt(squares)) * g


@traced
def cocob(grad, x0, *, alpha=100.0, eps=1e-8):
    """COCOB (arXiv 1705.07795, Algorithm 2), coordinate by coordinate; eps is the first L.

    `trace.wealth[k]` is L + R, what the gambler of each coordinate owns before step k.
    """
    x, theta, total, reward = x0, *(torch.zeros_like(x0) for _ in range(3))
    L = torch.full_like(x0, eps)
    while True:
        g = grad(x)
        yield {"x": x, "g": g, "L": L, "wealth": L + reward}
        L = torch.maximum(L, g.abs())
        total, theta = total + g.abs(), theta - g
        reward = torch.clamp(reward - g * (x - x0), min=0)
        x = x0 + theta * (L + reward) / (L * torch.maximum(total + L, alpha * L))
