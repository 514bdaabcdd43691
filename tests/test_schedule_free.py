"""Schedule-Free's three points: which one the parameters hold, and that none is ever lost."""

import copy

import pytest
import torch
import zoo

import prodigy
from prodigy import AdamWScheduleFree, Prodigy, RAdamScheduleFree, ScheduleFreeWrapper
from prodigy import SGDScheduleFree


def over_sgd(params, momentum=0.9, lr=0.1, **options):
    return ScheduleFreeWrapper(torch.optim.SGD(params, lr=lr), momentum=momentum, **options)


def over_prodigy(params, momentum=0.9, lr=1.0, **options):
    return ScheduleFreeWrapper(Prodigy(params, lr=lr, d0=1e-2), momentum=momentum, **options)


def adamw(params, momentum=0.9, lr=0.05, **options):
    return AdamWScheduleFree(params, lr=lr, betas=(momentum, 0.99), **options)


def radam(params, momentum=0.9, lr=0.05, **options):
    return RAdamScheduleFree(params, lr=lr, betas=(momentum, 0.99), **options)


def sgd(params, momentum=0.9, lr=0.1, **options):
    return SGDScheduleFree(params, lr=lr, momentum=momentum, **options)


BUILDERS = [sgd, adamw, radam, over_sgd, over_prodigy]
every_builder = pytest.mark.parametrize("build", BUILDERS, ids=lambda b: b.__name__)
either_store = pytest.mark.parametrize("store_x", [False, True], ids=["two", "store_x"])


def parameters(dtype=torch.float64, shapes=((4, 3), (5,)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes
    ]


def pull(params, step=0):
    """p.grad of |p - 0.3|^2/2 with noise that depends on the step and the index alone."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        xi = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (p.detach().double() - 0.3 + 0.1 * xi).to(p.dtype)


def walk(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        pull(params, step)
        optimizer.step()


def values(params):
    return [p.detach().clone() for p in params]


def equal(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def distance(a, b):
    pairs = zip(a, b, strict=True)
    return max(float((s.detach().double() - t.detach().double()).abs().max()) for s, t in pairs)


def own(optimizer, group=0):
    return optimizer.own(optimizer.param_groups[group])


def set_beta(optimizer, beta, group=0):
    entries = own(optimizer, group)
    if "momentum" in entries:
        entries["momentum"] = beta
    else:
        entries["betas"] = (beta, *entries["betas"][1:])


def average_of(optimizer, params):
    with optimizer.averaged():
        return values(params)


# modes -----------------------------------------------------------------------------------------


@every_builder
def test_training_starts_without_a_call(build):
    params = parameters()
    optimizer = build(params)
    assert own(optimizer)["train_mode"]
    start = values(params)
    walk(optimizer, params, 8)
    assert not equal(start, values(params))


@every_builder
@either_store
def test_switching_is_idempotent_and_legal_before_any_step(build, store_x):
    params = parameters()
    optimizer = build(params, store_x=store_x)
    start = values(params)
    for switch in (optimizer.eval, optimizer.eval, optimizer.train, optimizer.train):
        switch()
        assert equal(start, values(params))
    walk(optimizer, params, 10)
    y = values(params)
    optimizer.train()
    assert equal(y, values(params))
    optimizer.eval()
    x = values(params)
    assert distance(x, y) > 1e-4
    optimizer.eval()
    optimizer.train(False)
    assert equal(x, values(params))


@every_builder
def test_a_step_in_eval_mode_is_refused_in_words(build):
    params = parameters()
    optimizer = build(params)
    walk(optimizer, params, 3)
    optimizer.eval()
    before = values(params)
    pull(params)
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        optimizer.step()
    assert equal(before, values(params))
    optimizer.train()
    optimizer.step()


def test_one_group_in_eval_mode_is_enough_to_refuse_a_step():
    params = parameters()
    optimizer = sgd([{"params": [p]} for p in params])
    optimizer.param_groups[1]["train_mode"] = False
    pull(params)
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        optimizer.step()


@every_builder
def test_stored_x_makes_the_round_trip_exact(build):
    params = parameters(torch.float32)
    optimizer = build(params, store_x=True)
    walk(optimizer, params, 20)
    y = values(params)
    optimizer.eval()
    x = values(params)
    assert not equal(x, y)
    for _ in range(5):
        optimizer.train()
        assert equal(y, values(params))
        optimizer.eval()
        assert equal(x, values(params))


@every_builder
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_thousand_round_trips_do_not_drift(build, dtype):
    """Without store_x a switch rounds once: half a spacing in float32, and it stays at that.

    In float64 the factors beta and 1/beta are themselves rounded, to as many digits as the numbers
    they multiply, so that y - z grows by up to one spacing per trip. A bfloat16 parameter is a
    float32 number with its residual, whose upper half may flip over to the next.
    """
    params = parameters(dtype)
    optimizer = build(params)
    walk(optimizer, params, 20)
    y = values(params)
    spacing = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    largest = max(float(p.detach().abs().max()) for p in params)
    optimizer.eval()
    optimizer.train()
    once = distance(y, values(params))
    for _ in range(1000):
        optimizer.eval()
        optimizer.train()
    bounds = {torch.float32: 2 * spacing, torch.float64: 1000 * spacing, torch.bfloat16: 2**-8}
    assert once <= (2**-8 if dtype == torch.bfloat16 else 2 * spacing) * largest
    assert distance(y, values(params)) <= bounds[dtype] * largest


@every_builder
@either_store
def test_training_between_switches_is_the_run_without_switches(build, store_x):
    runs = []
    for switching in (False, True):
        params = parameters()
        optimizer = build(params, store_x=store_x)
        for step in range(20):
            walk(optimizer, params, 1, start=step)
            if switching and step % 3 == 0:
                optimizer.eval()
                optimizer.train()
        runs.append(values(params))
    assert distance(*runs) < (1e-15 if store_x else 1e-12)


# beta ------------------------------------------------------------------------------------------


@every_builder
@either_store
def test_a_new_beta_moves_y_and_leaves_x(build, store_x):
    """Changed in train mode, then eval; changed in eval mode, then train: x is what it was."""
    params = parameters()
    optimizer = build(params, store_x=store_x)
    walk(optimizer, params, 20)
    x = average_of(optimizer, params)
    y = values(params)
    set_beta(optimizer, 0.6)
    optimizer.eval()
    assert distance(x, values(params)) < 1e-12
    optimizer.train()
    z = [optimizer.state[p]["z"] for p in params]
    expected = [0.4 * b + 0.6 * a for a, b in zip(x, z)]
    assert distance(expected, values(params)) < 1e-12
    assert distance(y, values(params)) > 1e-4
    set_beta(optimizer, 0.95)
    optimizer.eval()
    assert distance(x, values(params)) < 1e-12


@every_builder
@either_store
def test_x_is_the_same_average_of_z_whatever_beta_does(build, store_x):
    """x_t = (1-c) x + c z' with beta jumping every step, against the average formed by hand."""
    params = parameters()
    optimizer = build(params, store_x=store_x)
    x = values(params)
    total, largest = 0.0, 0.0
    for step in range(25):
        set_beta(optimizer, 0.5 + 0.4 * (step % 3) / 2)
        pull(params, step)
        if step % 4 == 1:
            params[1].grad = None  # x of an idle parameter stays, although its y follows beta
        optimizer.step()
        entries = own(optimizer)
        largest = max(largest, float(entries["scheduled_lr"]))
        weight = largest**2 if largest else 0.0
        total += weight
        c = weight / total if total else 0.0
        for i, p in enumerate(params):
            if p.grad is not None:
                x[i] = x[i].lerp(optimizer.state[p]["z"], c)
        assert distance(x, average_of(optimizer, params)) < 1e-11


@every_builder
def test_one_cycle_momentum_keeps_x(build):
    params = parameters()
    optimizer = build(params)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=30)
    shadow_params = parameters()
    shadow = build(shadow_params, store_x=True)
    follow = torch.optim.lr_scheduler.OneCycleLR(shadow, max_lr=0.1, total_steps=30)
    for step in range(29):
        walk(optimizer, params, 1, start=step)
        walk(shadow, shadow_params, 1, start=step)
        scheduler.step()
        follow.step()
        assert distance(average_of(optimizer, params), average_of(shadow, shadow_params)) < 1e-11
    if build in (sgd, adamw, radam):
        assert own(optimizer)["y_beta"] != 0.9


@every_builder
def test_beta_zero_needs_x(build):
    with pytest.raises(ValueError, match="= 0 .*needs store_x=True"):
        build(parameters(), momentum=0.0)
    params = parameters()
    optimizer = build(params)
    walk(optimizer, params, 3)
    set_beta(optimizer, 0.0)
    before = values(params)
    pull(params)
    with pytest.raises(ValueError, match="needs store_x=True"):
        optimizer.step()
    assert equal(before, values(params))
    optimizer.eval()
    with pytest.raises(ValueError, match="needs store_x=True"):
        optimizer.train()


@pytest.mark.parametrize("build", [sgd, over_sgd], ids=lambda b: b.__name__)
def test_beta_zero_is_polyak_averaging(build):
    """y = z: SGD's own path, with x the plain mean of its points."""
    params, reference = parameters(), parameters()
    optimizer = build(params, momentum=0.0, store_x=True)
    plain = torch.optim.SGD(reference, lr=0.1)
    points = []
    for step in range(30):
        walk(optimizer, params, 1, start=step)
        walk(plain, reference, 1, start=step)
        points.append(values(reference))
        assert distance(values(params), values(reference)) < 1e-13
    mean = [torch.stack(column).mean(0) for column in zip(*points)]
    optimizer.eval()
    assert distance(values(params), mean) < 1e-13


@pytest.mark.parametrize("build", [sgd, over_sgd], ids=lambda b: b.__name__)
def test_beta_one_is_primal_averaging(build):
    """y = x: gradients are taken at the average itself."""
    params = parameters()
    optimizer = build(params, momentum=1.0)
    z, x = values(params), values(params)
    for step in range(20):
        pull(params, step)
        z = [a - 0.1 * p.grad for a, p in zip(z, params)]
        optimizer.step()
        x = [a + (b - a) / (step + 1) for a, b in zip(x, z)]
        assert distance(values(params), x) < 1e-13
    optimizer.eval()
    assert distance(values(params), x) < 1e-13


# groups ----------------------------------------------------------------------------------------


@every_builder
@pytest.mark.parametrize("mode", [True, False])
def test_an_added_group_takes_over_the_mode(build, mode):
    params = parameters()
    optimizer = build(params[:1])
    walk(optimizer, params[:1], 5)
    optimizer.train(mode)
    optimizer.add_param_group({"params": params[1:]})
    assert own(optimizer, 1)["train_mode"] == mode
    start = params[1].detach().clone()
    optimizer.eval()
    optimizer.train()
    assert torch.equal(params[1], start)
    walk(optimizer, params, 8)
    y = values(params)
    optimizer.eval()
    optimizer.train()
    assert distance(y, values(params)) < 1e-13


# what to evaluate, save and normalize ----------------------------------------------------------


@every_builder
@either_store
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_averaged_restores_every_bit(build, store_x, dtype):
    params = parameters(dtype)
    optimizer = build(params, store_x=store_x)
    walk(optimizer, params, 20)
    before = copy.deepcopy(optimizer.state_dict())
    y = values(params)
    with optimizer.averaged() as inside:
        assert inside is optimizer
        x = values(params)
        assert not own(optimizer)["train_mode"]
        assert torch.is_grad_enabled()
    assert equal(y, values(params)) and not equal(x, y)
    with pytest.raises(ZeroDivisionError), optimizer.averaged():
        1 / 0
    assert equal(y, values(params))
    after = optimizer.state_dict()
    assert own(optimizer)["train_mode"]
    for i, state in before["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, after["state"][i][name]), name
    with torch.no_grad(), optimizer.averaged():
        assert not torch.is_grad_enabled()
    optimizer.eval()
    with optimizer.averaged():
        assert equal(x, values(params))
    assert not own(optimizer)["train_mode"]


@every_builder
@either_store
def test_averaged_restores_every_bit_whatever_the_block_does(build, store_x):
    params = parameters()
    optimizer = build(params, store_x=store_x)
    walk(optimizer, params, 20)
    y = values(params)
    set_beta(optimizer, 0.6)  # a scheduler did
    with optimizer.averaged():
        x = values(params)
        optimizer.train()
        optimizer.eval()
    assert equal(y, values(params))
    with optimizer.averaged():
        assert equal(x, values(params))
        optimizer.add_param_group({"params": parameters(seed=1)})
    walk(optimizer, params, 1)  # not refused: the new group trains too
    optimizer.eval()
    x = values(params)
    with optimizer.averaged():
        optimizer.train()
    assert equal(x, values(params)) and not own(optimizer)["train_mode"]
    assert not own(optimizer, 1)["train_mode"]


def test_the_averaged_state_dict_keeps_what_is_no_tensor():
    class Counting(torch.nn.Linear):
        def get_extra_state(self):
            return {"seen": [3]}

    model = Counting(2, 1)
    optimizer = SGDScheduleFree(model.parameters())
    walk(optimizer, list(model.parameters()), 2)
    saved = optimizer.averaged_state_dict(model)
    assert saved["_extra_state"] == {"seen": [3]} and saved._metadata[""]["version"] == 1


@pytest.mark.parametrize("build", [sgd, adamw, radam, over_sgd], ids=lambda b: b.__name__)
def test_primal_averaging_has_no_refined_average(build):
    with pytest.raises(ValueError, match="schedulefree_c with beta = 1 would never move x"):
        build(parameters(), momentum=1.0, schedulefree_c=10.0)


@pytest.mark.parametrize("beta2", [0.5, 0.6])
def test_a_rectified_step_needs_a_memory(beta2):
    for cls, options in ((RAdamScheduleFree, {}),
                         (prodigy.ProdigyPlusScheduleFree, dict(use_bias_correction=True))):
        with pytest.raises(ValueError, match=r"betas\[1\] must exceed 0.6"):
            cls(parameters(), betas=(0.9, beta2), **options)
    params = parameters()
    start, loud = values(params), RAdamScheduleFree(params, betas=(0.9, beta2),
                                                    silent_sgd_phase=False)
    walk(loud, params, 2)
    assert not equal(start, values(params))


@every_builder
def test_the_averaged_state_dict_is_the_model_at_x(build):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = build(model.parameters())
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
    y = {name: t.clone() for name, t in model.state_dict().items()}
    saved = optimizer.averaged_state_dict(model)
    assert all(torch.equal(t, y[name]) for name, t in model.state_dict().items())
    optimizer.eval()
    for name, t in model.state_dict().items():
        assert torch.equal(saved[name], t), name
    assert not torch.equal(saved["0.weight"], y["0.weight"])
    assert torch.equal(saved["1.running_mean"], y["1.running_mean"])
    saved["0.weight"].zero_()
    assert model.state_dict()["0.weight"].abs().max() > 0


@every_builder
@pytest.mark.parametrize("batches", [None, 3])
def test_update_bn_gives_the_statistics_at_x(build, batches):
    torch.manual_seed(0)
    linear, norm = torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)
    model = torch.nn.Sequential(linear, norm).double()
    data = [torch.randn(16, 4, dtype=torch.float64) for _ in range(5)]
    optimizer = build(model.parameters())
    for batch in data * 3:
        optimizer.zero_grad()
        (model(batch) - 1).square().mean().backward()
        optimizer.step()
    y, seen = values(model.parameters()), norm.running_mean.clone()
    optimizer.update_bn(data, model, batches=batches)
    assert equal(y, values(model.parameters()))
    assert norm.momentum == 0.1 and model.training
    with optimizer.averaged(), torch.no_grad():
        features = [linear(batch) for batch in data[:batches]]
    mean = torch.stack([f.mean(0) for f in features]).mean(0)
    variance = torch.stack([f.var(0) for f in features]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert (norm.running_mean - seen).abs().max() > 1e-3


# forms -----------------------------------------------------------------------------------------


@every_builder
@either_store
def test_the_closure_form_is_the_same_run(build, store_x):
    params, others = parameters(), parameters()
    normal = build(params, store_x=store_x)
    form = build(others, store_x=store_x, closure_form=True)
    for step in range(15):
        pull(params, step)
        normal.step()

        def closure():
            assert distance(values(others), seen) > 1e-6 or step < 6
            pull(others, step)
            return torch.tensor(float(step))

        seen = values(others)
        assert form.step(closure) == step
        assert distance(values(others), average_of(normal, params)) < 1e-13
    form.eval()
    assert distance(values(others), average_of(normal, params)) < 1e-13


@every_builder
def test_the_closure_form_without_a_closure_is_refused(build):
    params = parameters()
    optimizer = build(params, closure_form=True)
    pull(params)
    with pytest.raises(RuntimeError, match="closure_form=True needs step\\(closure\\)"):
        optimizer.step()


@every_builder
def test_a_closure_that_raises_leaves_x_in_place(build):
    params = parameters()
    optimizer = build(params, closure_form=True, store_x=True)

    def closure():
        pull(params)
        return 0.0

    for _ in range(8):
        optimizer.step(closure)
    x = values(params)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert equal(x, values(params))


@every_builder
def test_refined_averaging_contains_the_plain_one(build):
    """C = 1/(1-beta) cancels the factor (1-beta) C."""
    plain, refined = parameters(), parameters()
    a, b = build(plain, momentum=0.75), build(refined, momentum=0.75, schedulefree_c=4.0)
    walk(a, plain, 20)
    walk(b, refined, 20)
    assert distance(values(plain), values(refined)) < 1e-14


@every_builder
def test_refined_averaging_has_the_papers_weight(build):
    """c = min(1, (1-beta) C / t) for a constant rate: a window of t / ((1-beta) C) steps."""
    beta, big = 0.9, 50.0
    params = parameters(shapes=((3,),))
    optimizer = build(params, momentum=beta, schedulefree_c=big)
    x = params[0].detach().clone()
    total = largest = 0.0
    shortened = 0
    for step in range(30):
        walk(optimizer, params, 1, start=step)
        largest = max(largest, float(own(optimizer)["scheduled_lr"]))
        total += largest**2
        c = largest**2 / total if total else 0.0
        shortened += c < min(1.0, c * (1 - beta) * big)
        x = x.lerp(optimizer.state[params[0]]["z"], min(1.0, c * (1 - beta) * big))
        assert distance([x], average_of(optimizer, params)) < 1e-12
    assert shortened > 10


def test_inner_momentum_averages_the_gradient_first():
    """Against the three lines of the docstring over one vector."""
    mu, beta2, lr, eps = 0.8, 0.95, 0.1, 1e-8
    params = parameters(shapes=((5,),))
    optimizer = AdamWScheduleFree(params, lr=lr, betas=(0.9, beta2), inner_momentum=mu)
    p = params[0]
    z, x = p.detach().clone(), p.detach().clone()
    m, v = torch.zeros_like(z), torch.zeros_like(z)
    for t in range(1, 20):
        pull(params, t)
        g = p.grad
        m = mu * m + (1 - mu) * g
        v = beta2 * v + (1 - beta2) * g**2
        z = z - lr * (m / (1 - mu**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        x = x + (z - x) / t
        optimizer.step()
        assert distance([0.1 * z + 0.9 * x], [p]) < 1e-12
    with_none = parameters(shapes=((5,),))
    walk(AdamWScheduleFree(with_none, lr=lr, betas=(0.9, beta2)), with_none, 19, start=1)
    assert distance(with_none, params) > 1e-3


@pytest.mark.parametrize("build", [sgd, adamw, over_sgd, over_prodigy], ids=lambda b: b.__name__)
def test_warm_up_is_linear_in_the_rate_and_counts_in_the_weights(build):
    params = parameters()
    optimizer = build(params, warmup_steps=10)
    top = optimizer.param_groups[0]["lr"]
    rates, total = [], 0.0
    for step in range(15):
        expected = optimizer.effective_lr()
        walk(optimizer, params, 1, start=step)
        rate = float(own(optimizer)["scheduled_lr"])
        total += rate**2
        if build is not over_prodigy:
            assert expected == pytest.approx(rate)
            assert rate == pytest.approx(top * min(1.0, (step + 1) / 10))
            assert float(own(optimizer)["weight_sum"]) == pytest.approx(total)
        assert optimizer.param_groups[0]["lr"] == top
        rates.append(rate)
    assert rates[0] < rates[5] < rates[9] and rates[-1] > 0


@pytest.mark.parametrize("build", [sgd, adamw], ids=lambda b: b.__name__)
def test_weights_follow_t_to_the_r(build):
    params = parameters(shapes=((3,),))
    optimizer = build(params, r=2.0, weight_lr_power=0.0)
    points, weights = [], []
    for step in range(12):
        walk(optimizer, params, 1, start=step)
        points.append(optimizer.state[params[0]]["z"].clone())
        weights.append(float(step + 1) ** 2)
    mean = sum(w * z for w, z in zip(weights, points)) / sum(weights)
    assert distance([mean], average_of(optimizer, params)) < 1e-13


def test_silent_steps_of_radam_do_not_move_and_loud_ones_are_sgd():
    quiet, loud = parameters(), parameters()
    start = values(quiet)
    a = RAdamScheduleFree(quiet, lr=0.01)
    b = RAdamScheduleFree(loud, lr=0.01, silent_sgd_phase=False)
    reference = parameters()
    plain = SGDScheduleFree(reference, lr=0.01)
    for step in range(8):
        pull(quiet, step)
        walk(b, loud, 1, start=step)
        a.step()
        if step < 4:  # rho_t <= 4 at beta2 = 0.999
            walk(plain, reference, 1, start=step)
            assert equal(start, values(quiet))
            assert distance(values(loud), values(reference)) < 1e-14
    assert not equal(start, values(quiet))


# copies and precision --------------------------------------------------------------------------


@every_builder
@pytest.mark.parametrize("mode", [True, False])
def test_a_deep_copy_goes_on_by_itself(build, mode):
    params = parameters()
    optimizer = build(params)
    walk(optimizer, params, 6)
    optimizer.train(mode)
    others, twin = copy.deepcopy((params, optimizer))
    assert own(twin)["train_mode"] == mode
    optimizer.train()
    twin.train()
    walk(optimizer, params, 6, start=6)
    walk(twin, others, 3, start=6)
    held = values(params)
    walk(twin, others, 3, start=9)
    assert equal(held, values(params)) and equal(held, values(others))


@pytest.mark.parametrize("build", [sgd, adamw, radam, over_prodigy], ids=lambda b: b.__name__)
@either_store
def test_bfloat16_parameters_average_in_float32(build, store_x):
    """Over 2000 steps c falls to 1/2000, an update far below bfloat16's spacing of 1/256."""
    wide, narrow = parameters(torch.float32), parameters(torch.bfloat16)
    for p, q in zip(wide, narrow):
        p.data.copy_(q)
    a, b = build(wide, store_x=store_x), build(narrow, store_x=store_x)
    for step in range(300):
        pull(narrow, step)
        for p, q in zip(wide, narrow):
            p.grad = q.grad.float()
        a.step()
        b.step()
    a.eval()
    b.eval()
    for p, q in zip(wide, narrow):
        assert (p - q.float()).abs().max() <= 2**-8 * p.abs().max()
    if store_x:
        for p, q in zip(wide, narrow):
            torch.testing.assert_close(a.state[p]["x"], b.state[q]["x"], rtol=1e-4, atol=1e-5)


# the wrapper -----------------------------------------------------------------------------------

BASES = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.3),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
    "our AdamW": lambda params: prodigy.AdamW(params, lr=0.1),
    "Prodigy": lambda params: Prodigy(params, d0=1e-2),
    "DAdaptAdam": lambda params: prodigy.DAdaptAdam(params, d0=1e-3),
    "DAdaptSGD": lambda params: prodigy.DAdaptSGD(params, d0=1e-2),
    "DAdaptAdaGrad": lambda params: prodigy.DAdaptAdaGrad(params, d0=1e-2),
}


@pytest.mark.parametrize("base", BASES)
@either_store
def test_the_wrapper_runs_over_any_base(base, store_x):
    """z takes the base's step on the gradient at y, x averages z: by hand with the base alone."""
    params, shadow = parameters(), parameters()
    optimizer = ScheduleFreeWrapper(BASES[base](params), weight_lr_power=0, store_x=store_x)
    alone = BASES[base](shadow)
    x = values(params)
    for step in range(12):
        pull(params, step)
        for p, z in zip(params, shadow):
            z.grad = p.grad.clone()
        optimizer.step()
        alone.step()
        x = [a + (z.detach() - a) / (step + 1) for a, z in zip(x, shadow)]
        y = [0.9 * a + 0.1 * z.detach() for a, z in zip(x, shadow)]
        assert distance(values(params), y) < 1e-9
    optimizer.eval()
    assert distance(values(params), x) < 1e-9
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_the_wrappers_tensors_stand_apart_from_the_bases():
    params = parameters()
    base = torch.optim.AdamW(params, lr=0.1)
    optimizer = ScheduleFreeWrapper(base)
    walk(optimizer, params, 3)
    assert set(optimizer.state[params[0]]) == {"z"}
    assert set(base.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.param_groups[0] is base.param_groups[0]
    saved = optimizer.state_dict()["state"][0]
    assert set(saved) == {"step", "exp_avg", "exp_avg_sq", "z"}


def test_a_group_added_to_the_wrapper_reaches_its_base():
    params = parameters()
    base = torch.optim.SGD(params[:1], lr=0.1)
    optimizer = ScheduleFreeWrapper(base)
    optimizer.add_param_group({"params": params[1:], "lr": 0.2})
    assert [g["lr"] for g in base.param_groups] == [0.1, 0.2]
    assert base.param_groups[1] is optimizer.param_groups[1]


def test_hooks_and_schedulers_see_the_wrapper_as_an_optimizer():
    params = parameters()
    optimizer = ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    walk(optimizer, params, 1)
    scheduler.step()
    assert calls == ["before", "after"]
    assert optimizer.base.param_groups[0]["lr"] == 0.05
    assert optimizer.effective_lr() == 0.05


@pytest.mark.parametrize("cls", [ScheduleFreeWrapper, prodigy.Mechanic])
def test_checkpoint_hooks_see_the_whole_checkpoint(cls):
    params = parameters()
    optimizer = cls(torch.optim.AdamW(params, lr=0.1))
    walk(optimizer, params, 2)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("pre"))
    optimizer.register_state_dict_post_hook(
        lambda _, saved: calls.append(len(saved["state"][0])) or {**saved, "mine": 1})
    saved = optimizer.state_dict()
    assert saved["mine"] == 1 and calls == ["pre", 3 + len(optimizer.state[params[0]])]
    other = cls(torch.optim.AdamW(params, lr=0.1))
    other.register_load_state_dict_pre_hook(lambda _, given: {**given, **given["inside"]})
    other.register_load_state_dict_post_hook(
        lambda loaded: calls.append(len(loaded.state[params[0]])))
    other.load_state_dict({"inside": saved})
    assert calls[-1] == len(optimizer.state[params[0]])


@pytest.mark.parametrize("cls", [ScheduleFreeWrapper, prodigy.Mechanic])
def test_a_tensor_rate_of_a_base_that_knows_no_capturable(cls):
    """torch.optim.SGD and Adagrad take one, and have no such argument in their groups."""
    ends = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        params = parameters()
        walk(cls(torch.optim.Adagrad(params, lr=lr)), params, 5)
        ends.append(values(params))
    assert distance(*ends) < 1e-12


@pytest.mark.parametrize("cls", [ScheduleFreeWrapper, prodigy.Mechanic])
def test_a_base_that_needs_a_closure_is_refused(cls):
    with pytest.raises(TypeError, match="without a closure, which LBFGS needs"):
        cls(torch.optim.LBFGS(parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@either_store
def test_where_the_base_fails_all_is_as_before(dtype, error, store_x):
    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise error("no step")
            super().step(closure)

    params = parameters(dtype)
    optimizer = ScheduleFreeWrapper(Failing(params, lr=0.1), weight_decay_at_y=0.5,
                                    store_x=store_x)
    walk(optimizer, params, 8)
    y, z = values(params), [optimizer.state[p]["z"].clone() for p in params]
    optimizer.base.fails = True
    for _ in range(3):
        with pytest.raises(error):
            optimizer.step()
    assert equal(z, [optimizer.state[p]["z"] for p in params])
    assert distance(y, values(params)) <= (1e-14 if dtype == torch.float64 else 0)


def test_decay_at_y_is_taken_where_the_gradient_is():
    """z' = z - lr (g(y) + decay y), by hand over plain SGD."""
    params = parameters(shapes=((4,),))
    optimizer = ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.1), weight_decay_at_y=0.3)
    p = params[0]
    z, x = p.detach().clone(), p.detach().clone()
    for step in range(10):
        pull(params, step)
        z = z - 0.1 * (p.grad + 0.3 * p.detach())
        x = x + (z - x) / (step + 1)
        optimizer.step()
        assert distance([0.1 * z + 0.9 * x], [p]) < 1e-13


def test_the_wrapper_of_prodigy_reads_its_d():
    params = parameters()
    optimizer = over_prodigy(params)
    walk(optimizer, params, 10)
    assert optimizer.get_d() == optimizer.base.get_d() > 1e-2
    assert optimizer.effective_lr() == pytest.approx(optimizer.get_d())
    with pytest.raises(AttributeError):
        over_sgd(parameters()).get_d()


@pytest.mark.parametrize("case", [c for c in zoo.CASES if c.schedule_free], ids=str)
def test_eval_and_train_are_inverse_with_every_option(case):
    done = zoo.run(case, steps=20)
    y = zoo.final(done.problem)
    done.optimizer.eval()
    x = zoo.final(done.problem)
    done.optimizer.train()
    assert zoo.error(zoo.final(done.problem), y) < 1e-14
    assert x.isfinite().all()
