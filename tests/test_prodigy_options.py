"""Prodigy's own options: the cosine, slices, safeguarded warm-up, growth, and d to look at."""

import math

import prodigyopt
import pytest
import torch
import zoo

from prodigy import DAdaptAdam, Prodigy


def parameters(shapes=((4, 3), (5,)), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes
    ]


def pull(params, step, noise=0.1, target=0.3):
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        xi = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (p.detach().double() - target + noise * xi).to(p.dtype)


def walk(optimizer, params, steps, each=None, **options):
    for step in steps:
        pull(params, step, **options)
        optimizer.step()
        if each:
            each(step)


def stall_and_peak(ds, d0, patience):
    """The definition: k such that d last grew patience steps before k, after it exceeded d0."""
    quiet = 0
    for k in range(1, len(ds)):
        quiet = quiet + 1 if ds[k] <= ds[k - 1] and ds[k - 1] > d0 else 0
        if quiet >= patience:
            return k
    return None


def factors(total, patience, steps, split_groups=False, modes=None, d0=1e-3):
    """(cosine factor of every step, d before the first step and after every step)."""
    params = parameters()
    options = dict(d0=d0, split_groups=split_groups, **(modes or {}))
    optimizer = Prodigy(
        params, cosine_decay=True, peak_patience=patience, total_training_steps=total, **options
    )
    seen, ds = [], [optimizer.get_d()]
    for step in range(steps):
        seen.append(optimizer.effective_lr() / optimizer.get_d())
        walk(optimizer, params, [step])
        ds.append(optimizer.get_d())
    return seen, ds, optimizer, params


# the cosine ------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [3, 10])
@pytest.mark.parametrize("total", [120, 80])
@pytest.mark.parametrize("modes", [{}, {"capturable": True}, {"foreach": True}], ids=str)
def test_the_cosine_runs_from_the_peak_to_the_end(patience, total, modes):
    """1 until d has not grown for ``patience`` steps; cos over the steps that remain; then 0."""
    seen, ds, optimizer, params = factors(total, patience, total + 10, modes=modes)
    peak = stall_and_peak(ds, 1e-3, patience)
    assert patience < peak < total / 2
    assert float(optimizer.param_groups[0]["peak"]) == peak
    for k, factor in enumerate(seen):
        done = min(max((k - peak) / (total - peak), 0.0), 1.0)
        assert factor == pytest.approx(0.5 * (1 + math.cos(math.pi * done)), abs=1e-12)
    assert seen[peak] == 1.0 and seen[total - 1] > 0
    assert seen[total:] == [0.0] * 10
    before = [p.detach().clone() for p in params]
    walk(optimizer, params, range(500, 505))
    assert all(torch.equal(p, q) for p, q in zip(params, before))


def test_without_a_total_the_cosine_takes_a_thousand_steps():
    seen, ds, optimizer, _ = factors(None, 5, 60)
    peak = stall_and_peak(ds, 1e-3, 5)
    for k in range(peak, 60):
        assert seen[k] == pytest.approx(0.5 * (1 + math.cos(math.pi * (k - peak) / 1000)))
    clock = optimizer.param_groups[0]["clock"]
    clock.fill_(peak + 999)
    assert optimizer.effective_lr() > 0
    for k in (peak + 1000, peak + 5000):
        clock.fill_(k)
        assert optimizer.effective_lr() == 0.0


def test_the_cosine_counts_the_steps_of_all_groups():
    """Groups that take turns are as far after 60 steps as groups that do not."""
    ends = []
    for turns in (False, True):
        params = parameters()
        optimizer = Prodigy([{"params": params[:1]}, {"params": params[1:]}], d0=1e-3,
                            cosine_decay=True, peak_patience=4, total_training_steps=60)
        for step in range(61):
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = 1.0 if not turns or step % 2 == i else 0.0
            walk(optimizer, params, [step])
        assert [int(g["clock"]) for g in optimizer.param_groups] == [61, 61]
        optimizer.param_groups[0]["lr"] = 1.0
        ends.append(optimizer.effective_lr())
    assert ends == [0.0, 0.0]


def test_the_step_itself_is_multiplied():
    """The same run with the factor as an outside schedule on lr."""
    params, others = parameters(), parameters()
    inside = Prodigy(params, d0=1e-3, cosine_decay=True, peak_patience=4, total_training_steps=60)
    outside = Prodigy(others, d0=1e-3)
    for step in range(60):
        outside.param_groups[0]["lr"] = inside.effective_lr() / inside.get_d()
        walk(inside, params, [step])
        walk(outside, others, [step])
        assert inside.get_d() == pytest.approx(outside.get_d(), rel=1e-12)
    assert outside.param_groups[0]["lr"] < 0.01
    ends = [torch.cat([p.detach().flatten() for p in ps]) for ps in (params, others)]
    assert zoo.error(*ends) < 1e-12


def test_patience_does_not_count_before_d_leaves_d0():
    """70 steps of d = d0 (no gradient signal) are no peak; the count starts with the growth."""
    params = parameters()
    optimizer = Prodigy(params, d0=1e-3, cosine_decay=True, peak_patience=5)
    for _ in range(70):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    group = optimizer.param_groups[0]
    assert optimizer.get_d() == 1e-3 and group["peak"] == -1 and group["stall"] == 0
    ds = [1e-3]
    walk(optimizer, params, range(70, 140), lambda _: ds.append(optimizer.get_d()))
    assert group["peak"] == 70 + stall_and_peak(ds, 1e-3, 5)


def test_noise_that_never_moves_d_is_no_peak():
    """Large noise holds dhat below d0 for long: the step stays whole."""
    params = parameters(((40, 40),))
    optimizer = Prodigy(params, cosine_decay=True, peak_patience=5, total_training_steps=300)
    stalled = 0
    for step in range(100):
        pull(params, step, noise=100.0)
        optimizer.step()
        stalled += optimizer.get_d() <= 1e-6
        if optimizer.get_d() <= 1e-6:
            assert optimizer.effective_lr() == optimizer.get_d()
            assert optimizer.param_groups[0]["peak"] == -1
    assert stalled > 20


def test_a_warm_up_of_lr_is_no_peak():
    params = parameters()
    optimizer = Prodigy(params, cosine_decay=True, peak_patience=5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.0 if k < 60 else 1.0)
    for step in range(60):
        walk(optimizer, params, [step])
        scheduler.step()
    assert optimizer.param_groups[0]["peak"] == -1
    walk(optimizer, params, range(60, 66))
    assert optimizer.get_d() > 1e-6 and optimizer.param_groups[0]["peak"] == -1


def test_growth_restarts_the_count():
    """Three idle steps after every growing one: never four in a row, and so no peak."""
    params = parameters()
    optimizer = Prodigy(params, d0=1e-3, cosine_decay=True, peak_patience=4)
    ds, group = [1e-3], optimizer.param_groups[0]

    def note(_):
        ds.append(optimizer.get_d())

    for step in range(28):
        group["d_coef"] = 1.0 if step < 3 else 1e-6  # dhat stays low from here on
        if step % 4 == 0:
            group["d_max"] = group["d_max"] * 1.1  # what d follows
        walk(optimizer, params, [step], note)
    idle = sum(b <= a for a, b in zip(ds, ds[1:]) if a > 1e-3)
    assert idle > 16 and stall_and_peak(ds, 1e-3, 4) is None
    assert group["peak"] == -1


def test_groups_share_the_peak_or_have_their_own():
    for split in (False, True):
        params = parameters()
        optimizer = Prodigy(
            [{"params": [p]} for p in params],
            d0=1e-3,
            cosine_decay=True,
            peak_patience=5,
            split_groups=split,
        )
        ds = [[1e-3], [1e-3]]
        for step in range(60):
            walk(optimizer, params, [step])
            for i in range(2):
                ds[i].append(optimizer.get_d(i))
        peaks = [float(g["peak"]) for g in optimizer.param_groups]
        assert peaks == [stall_and_peak(d, 1e-3, 5) for d in ds]
        assert (ds[0] == ds[1]) == (not split)


def test_the_cosine_reads_nothing_from_the_device():
    """On the meta device a host read raises; get_d() is such a read."""
    params = [torch.nn.Parameter(torch.empty(3, 2, device="meta")) for _ in range(2)]
    optimizer = Prodigy(params, cosine_decay=True, total_training_steps=9, peak_patience=2)
    for _ in range(5):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.get_d()


def test_without_the_option_nothing_of_it_happens():
    params, others = parameters(), parameters()
    plain = Prodigy(params, d0=1e-3)
    patient = Prodigy(others, d0=1e-3, cosine_decay=True, peak_patience=10**6)
    walk(plain, params, range(60))
    walk(patient, others, range(60))
    assert all(torch.equal(p, q) for p, q in zip(params, others))
    assert plain.param_groups[0]["peak"] == -1


# slices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2, 3, 11, 1000])
@pytest.mark.parametrize("foreach", [False, True])
def test_slices_take_r_and_s_over_every_pth_entry(p, foreach):
    shapes = ((7, 5), (3,), (), (2, 3, 4, 2))
    params = parameters(shapes)
    params[3].data = params[3].data.to(memory_format=torch.channels_last)
    start = [q.detach().clone() for q in params]
    optimizer = Prodigy(params, slice_p=p, d0=1e-2, foreach=foreach)
    r, s = 0.0, [torch.zeros_like(q.flatten()[::p]) for q in params]
    for step in range(10):
        pull(params, step)
        d = optimizer.get_d()
        weight = d * d / 1e-2  # r and s are kept divided by d0
        r *= 0.999**0.5
        for i, (q, x0) in enumerate(zip(params, start)):
            cut = q.grad.flatten()[::p]
            r += weight * float((cut * (x0.flatten()[::p] - q.detach().flatten()[::p])).sum())
            s[i] = 0.999**0.5 * s[i] + weight * cut
        optimizer.step()
        norm = sum(float(t.abs().sum()) for t in s)
        assert optimizer.get_d() == pytest.approx(max(d, r / norm), rel=1e-9)
        for q, t in zip(params, s):
            torch.testing.assert_close(optimizer.state[q]["s"].flatten(), t)
            assert optimizer.state[q]["p0"].numel() == t.numel() == math.ceil(q.numel() / p)
    assert optimizer.get_d() > 1e-2


# safeguarded warm-up and growth ----------------------------------------------------------------


def test_the_safeguard_leaves_lr_out_of_s():
    """s sums d_k^2 g_k, whatever the schedule; r keeps the factor lr."""
    params = parameters(((6,),))
    optimizer = Prodigy(params, safeguard_warmup=True, d0=1e-2)
    s = torch.zeros(6, dtype=torch.float64)
    plain = torch.zeros(6, dtype=torch.float64)
    for step in range(12):
        lr = optimizer.param_groups[0]["lr"] = (step + 1) / 12
        pull(params, step)
        weight = optimizer.get_d() ** 2 / 1e-2
        s = 0.999**0.5 * s + weight * params[0].grad
        plain = 0.999**0.5 * plain + lr * weight * params[0].grad
        optimizer.step()
        torch.testing.assert_close(optimizer.state[params[0]]["s"], s, rtol=1e-9, atol=0)
    assert (s - plain).abs().max() > 0.01 * s.abs().max()


def test_the_safeguard_makes_a_warm_up_cautious():
    ends = []
    for safeguard in (False, True):
        params = parameters()
        optimizer = Prodigy(params, safeguard_warmup=safeguard)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (k + 1) / 20)
        for step in range(15):
            walk(optimizer, params, [step])
            scheduler.step()
        ends.append(optimizer.get_d())
    assert 1e-6 < ends[1] < ends[0]


def test_the_first_growth_is_not_limited_and_later_ones_are():
    """growth_rate as in prodigyopt: from d0 straight to dhat, afterwards at most a factor."""
    params = parameters()
    optimizer = Prodigy(params, growth_rate=1.02)
    reference_params = parameters()
    reference = prodigyopt.Prodigy(reference_params, growth_rate=1.02)
    ds, theirs = [1e-6], [1e-6]
    for step in range(40):
        walk(optimizer, params, [step])
        walk(reference, reference_params, [step])
        ds.append(optimizer.get_d())
        theirs.append(reference.param_groups[0]["d"])
    growth = [b / a for a, b in zip(ds, ds[1:]) if b > a]
    assert growth[0] > 1.1
    assert max(growth[1:]) == pytest.approx(1.02)
    assert ds == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("empty", [False, True])
def test_the_first_growth_is_the_same_whatever_the_dtype_of_the_first_group(empty):
    """d0 rounded to a float32 group's precision is still d0 for a float64 group beside it."""
    params = parameters(((6,),), dtype=torch.float32) + parameters(((5,),), dtype=torch.float64)
    first = {"params": []} if empty else {"params": params[:1]}
    optimizer = Prodigy([first, {"params": params[1:]}], growth_rate=1.02)
    ds = []

    def note(_):
        ds.append((optimizer.get_d(0), optimizer.get_d(1)))

    walk(optimizer, params, range(5), note)
    for one, other in ds:
        assert one == pytest.approx(other, rel=1e-6)
    assert ds[-1][1] > 1.2e-6


def test_growth_of_one_means_d_moves_once():
    params = parameters()
    optimizer = Prodigy(params, growth_rate=1.0)
    ds = []
    walk(optimizer, params, range(30), lambda _: ds.append(optimizer.get_d()))
    assert len(set(ds)) == 2


@pytest.mark.parametrize("d_coef", [0.5, 2.0])
def test_d_coef_multiplies_dhat(d_coef):
    params = parameters()
    optimizer = Prodigy(params, d0=1e-3, d_coef=d_coef)
    walk(optimizer, params, range(10))
    group = optimizer.param_groups[0]
    expected = d_coef * float(group["d_numerator"]) / float(group["d_denom"])
    assert float(group["d_hat"]) == pytest.approx(expected)


def test_eps_is_multiplied_by_the_steps_own_d():
    """The box has eps d_k beside lr d_k; prodigyopt takes eps d_{k+1}. One step shows it."""
    d0, eps = 1e-6, 1e-2
    params, others = parameters(((5,),)), parameters(((5,),))
    ours, theirs = Prodigy(params, d0=d0, eps=eps), prodigyopt.Prodigy(others, d0=d0, eps=eps)
    walk(ours, params, range(1))
    walk(theirs, others, range(1))
    start, x = params[0].detach().clone(), others[0].detach().clone()
    torch.testing.assert_close(start, x)
    before = ours.get_d()
    m, v = (ours.state[params[0]][name].clone() for name in ("exp_avg", "exp_avg_sq"))
    walk(ours, params, range(1, 2))
    walk(theirs, others, range(1, 2))
    after = ours.get_d()
    assert after > before
    g = params[0].grad
    m = 0.9 * m + 0.1 * before * g
    v = 0.999 * v + 0.001 * before**2 * g**2
    expected = start - before * m / (v.sqrt() + before * eps)
    torch.testing.assert_close(params[0].detach(), expected, rtol=1e-12, atol=0)
    theirs_expected = x - before * m / (v.sqrt() + after * eps)
    torch.testing.assert_close(others[0].detach(), theirs_expected, rtol=1e-12, atol=0)
    assert not torch.equal(params[0], others[0])


# what a user reads -----------------------------------------------------------------------------


def test_effective_lr_is_what_the_next_step_multiplies_with():
    """d lr with the bias correction of that step, per group; the step moves by that much."""
    params = parameters(((5,), (4,)))
    options = dict(d0=1e-2, betas=(0.0, 0.99), use_bias_correction=True, eps=1e-30)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (1.0, 0.3))]
    optimizer = Prodigy(groups, **options)
    for step in range(5):
        pull(params, step)
        before = [p.detach().clone() for p in params]
        rates = [optimizer.effective_lr(i) for i in range(2)]
        d = optimizer.get_d()
        assert rates[0] == pytest.approx(d * (1 - 0.99 ** (step + 1)) ** 0.5)
        assert rates[1] == pytest.approx(0.3 * rates[0])
        optimizer.step()
        for p, x, rate in zip(params, before, rates):
            v = optimizer.state[p]["exp_avg_sq"]
            torch.testing.assert_close(p.detach(), x - rate * d * p.grad / v.sqrt())


@pytest.mark.parametrize("cls", [Prodigy, DAdaptAdam])
def test_the_groups_d_prints_formats_and_compares_like_a_float(cls):
    params = parameters(dtype=torch.float32)
    optimizer = cls(params)
    walk(optimizer, params, range(10))
    d = optimizer.param_groups[0]["d"]
    value = optimizer.get_d()
    assert f"{d:.3e}" == f"{value:.3e}" and f"{d}" == f"{value}"
    assert float(d) == value == d.item() and d > 1e-6 and d == value and d < 1e9
    assert max(d, 0.0) == d and d * 2 == 2 * value and "%.3e" % d == "%.3e" % value
    assert round(float(d) * 1e6, 3) == round(value * 1e6, 3)
    logged = optimizer.param_groups[0]["d"] * optimizer.param_groups[0]["lr"]  # as kohya's loggers
    assert float(logged) == pytest.approx(value)


def test_d_is_copied_out_when_logged():
    """A logged d does not follow the run."""
    params = parameters()
    optimizer = Prodigy(params, d0=1e-3)
    log = []
    walk(optimizer, params, range(15), lambda _: log.append(optimizer.param_groups[0]["d"]))
    values = [float(d) for d in log]
    assert values[0] < values[-1] == optimizer.get_d()


def test_d_hat_may_fall_while_d_does_not():
    params = parameters()
    optimizer = Prodigy(params, d0=1e-2)
    ds, hats = [], []

    def note(_):
        ds.append(optimizer.get_d())
        hats.append(float(optimizer.param_groups[0]["d_hat"]))

    walk(optimizer, params, range(60), note)
    assert ds == sorted(ds)
    assert hats != sorted(hats)
    assert max(hats) == pytest.approx(ds[-1])


def test_the_first_points_are_taken_at_the_first_gradient():
    """Wrappers exchange weights after construction and adapters get gradients late."""
    params = parameters()
    optimizer = Prodigy(params)
    params[0].data = torch.zeros_like(params[0])
    walk(optimizer, params, range(1))
    assert not optimizer.state[params[0]]["p0"].any()
    assert optimizer.get_d() == 1e-6
    with torch.no_grad():
        assert (params[0] != 0).all()
