"""What is refused, in words, and what a careful user may do although it is unusual."""

import contextlib
import logging
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zoo

import prodigy
from prodigy import Prodigy, ScheduleFreeWrapper, SGDScheduleFree
from prodigy.optimizer import FLAGS, INTEGERS, MODES, RANGES, check_gradient

WRAPPERS = ("ScheduleFreeWrapper", "Mechanic")
CLASSES = [zoo.by_name(name) for name in prodigy.__all__ if name not in WRAPPERS]
every_class = pytest.mark.parametrize("cls", CLASSES)
every_method = pytest.mark.parametrize("case", zoo.METHODS, ids=str)


def parameters(shapes=((4, 3), (5,)), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes
    ]


def pull(params, step=0):
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        xi = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (p.detach().double() - 0.3 + 0.1 * xi).to(p.dtype)


def defaults(cls):
    return cls(parameters()).defaults


def wrapped(params, **options):
    return ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.1), **options)


WRAPPER = ["weight_decay_at_y", "momentum", "weight_lr_power", "r", "warmup_steps"]
WRAPPER += ["schedulefree_c"]
WRAPPER_FLAGS = ["store_x", "closure_form"]

NUMBERS = [(cls, n) for cls in CLASSES for n in defaults(cls) if n in RANGES]
FLAGGED = [(cls, n) for cls in CLASSES for n in defaults(cls) if n in FLAGS]
FLAGGED.remove((prodigy.AdamW, "decoupled_weight_decay"))  # decoupled by definition
NUMBERS += [(wrapped, name) for name in WRAPPER]
FLAGGED += [(wrapped, name) for name in WRAPPER_FLAGS]
PAIRS = [cls for cls in CLASSES if "betas" in defaults(cls)]


def label(value):
    return getattr(value, "__name__", str(value))


# types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls, name", NUMBERS, ids=label)
@pytest.mark.parametrize("value", ["0.1", (0.1,), [0.1], True, {}, 1j], ids=str)
def test_a_number_of_the_wrong_type_is_named(cls, name, value):
    """Configuration files give strings and tuples for numbers."""
    with pytest.raises(TypeError, match=rf"^{name} must be (a number|an integer)"):
        cls(parameters(), **{name: value})


@pytest.mark.parametrize("cls, name", NUMBERS, ids=label)
def test_none_is_a_number_only_where_it_means_something(cls, name):
    atan2 = (cls, name) == (prodigy.ProdigyPlusScheduleFree, "eps")
    if name in ("beta3", "beta4", "total_training_steps") or atan2:
        cls(parameters(), **{name: None}, **(dict(use_stableadamw=False) if atan2 else {}))
        return
    with pytest.raises(TypeError, match=rf"^{name} must be (a number|an integer)"):
        cls(parameters(), **{name: None})


@pytest.mark.parametrize("cls, name", FLAGGED, ids=label)
@pytest.mark.parametrize("value", ["False", 1, 0.0, (True,)], ids=str)
def test_a_flag_must_be_a_flag(cls, name, value):
    with pytest.raises(TypeError, match=rf"^{name} must be True or False"):
        cls(parameters(), **{name: value})


@pytest.mark.parametrize("cls", PAIRS)
@pytest.mark.parametrize("value", [0.9, "0.9,0.99", (0.9,), (0.9, 0.99, 0.999), None], ids=str)
def test_betas_must_be_a_pair(cls, value):
    with pytest.raises(TypeError, match="^betas must be a pair"):
        cls(parameters(), betas=value)


@pytest.mark.parametrize("cls", PAIRS)
@pytest.mark.parametrize("value", [("0.9", 0.99), (0.9, None), (True, 0.99)], ids=str)
def test_each_beta_must_be_a_number(cls, value):
    with pytest.raises(TypeError, match=r"^betas\[[01]\] must be a number"):
        cls(parameters(), betas=value)


# ranges ----------------------------------------------------------------------------------------


def outside(cls, name):
    """Values just outside the documented interval of an argument."""
    interval = getattr(cls, "ranges", {"momentum": "[0, 1]"}).get(name) or RANGES[name]
    interval = interval.removesuffix(" or None")
    low, high = (float(end) for end in interval[1:-1].split(","))
    kind = int if name in INTEGERS else float
    values = [float("nan")] if kind is float else []
    values += [low - 1] if low > -float("inf") else []
    values += [low] if interval[0] == "(" else []
    values += [high + 1] if interval[-1] == "]" and high < float("inf") else []
    values += [high] if interval[-1] == ")" and kind is float else []
    return [kind(v) for v in values]


LIMITS = [(cls, name, value) for cls, name in NUMBERS for value in outside(cls, name)]


@pytest.mark.parametrize("cls, name, value", LIMITS, ids=label)
def test_a_number_out_of_range_is_named_with_its_range(cls, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must lie in [\[(].*, .*[\])], got "):
        cls(parameters(), **{name: value})


@pytest.mark.parametrize("cls", PAIRS)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_beta_out_of_range_is_named(cls, index, value):
    betas = [0.9, 0.99]
    betas[index] = value
    with pytest.raises(ValueError, match=rf"^betas\[{index}\] must lie in \[0, 1[\])]"):
        cls(parameters(), betas=tuple(betas))


def test_the_ranges_that_the_references_let_through():
    """schedulefree took lr = -1, others beta3 > 1, d_coef < 0, growth < 1, slice_p = 0."""
    for cls, name, value in LIMITS:
        assert not value >= 0 or name in RANGES
    tried = {(label(cls), name) for cls, name, _ in LIMITS}
    assert ("AdamWScheduleFree", "lr") in tried and ("Prodigy", "beta3") in tried
    assert {("Prodigy", n) for n in ("d_coef", "growth_rate", "slice_p", "d0")} <= tried
    assert ("SGDScheduleFree", "warmup_steps") in tried and ("wrapped", "momentum") in tried


@every_class
@pytest.mark.parametrize(
    "lr", [torch.tensor(-0.1), torch.tensor(float("nan")), torch.ones(2)], ids=str
)
def test_a_tensor_lr_is_a_nonnegative_0d_tensor(cls, lr):
    with pytest.raises((ValueError, TypeError), match="^lr must"):
        cls(parameters(), lr=lr)
    assert cls(parameters(), lr=torch.tensor(0.1)).param_groups[0]["lr"] == torch.tensor(0.1)


@every_class
def test_a_group_is_checked_as_the_constructor_is(cls):
    params = parameters()
    with pytest.raises(ValueError, match=r"^lr must lie in \[0, inf\), got -1.0"):
        cls([{"params": params[:1]}, {"params": params[1:], "lr": -1.0}])
    optimizer = cls(params[:1])
    with pytest.raises(TypeError, match="^lr must be a number or a 0-d tensor"):
        optimizer.add_param_group({"params": params[1:], "lr": "0.1"})
    assert len(optimizer.param_groups) == 1
    pull(params)
    optimizer.step()
    optimizer.add_param_group({"params": params[1:], "lr": 0.1})
    optimizer.step()


# arguments that do not exist or cannot be served -----------------------------------------------


@every_class
@pytest.mark.parametrize("name", ["learning_rate", "d_limiter", "use_orthograd"])
def test_unknown_arguments_are_named(cls, name):
    if name in cls.__init__.__code__.co_varnames:
        assert cls is prodigy.ProdigyPlusScheduleFree
        return
    with pytest.raises(TypeError, match=f"^{cls.__name__} has no argument {name}$"):
        cls(parameters(), **{name: 1})


@every_class
@pytest.mark.parametrize("name", ["differentiable", "fused"])
def test_differentiable_and_fused_are_refused_in_words(cls, name):
    with pytest.raises(ValueError, match=f"{name}=True is not supported: "):
        cls(parameters(), **{name: True})
    cls(parameters(), **{name: False if name == "differentiable" else None})


@pytest.mark.parametrize("cls", [prodigy.Prodigy, prodigy.DAdaptSGD, prodigy.DAdaptAdam])
def test_fsdp_in_use_is_refused_in_words(cls):
    with pytest.raises(ValueError, match="fsdp_in_use=True is not supported"):
        cls(parameters(), fsdp_in_use=True)
    cls(parameters(), fsdp_in_use=False)


def test_exclusions_say_what_is_needed():
    with pytest.raises(ValueError, match="nesterov=True needs momentum > 0 and dampening = 0"):
        prodigy.SGD(parameters(), nesterov=True)
    with pytest.raises(ValueError, match="nesterov=True needs momentum > 0 and dampening = 0"):
        prodigy.SGD(parameters(), nesterov=True, momentum=0.9, dampening=0.1)
    with pytest.raises(ValueError, match=r"momentum = 0 .* needs store_x=True"):
        SGDScheduleFree(parameters(), momentum=0.0)
    with pytest.raises(ValueError, match=r"betas\[0\] = 0 .* needs store_x=True"):
        prodigy.AdamWScheduleFree(parameters(), betas=(0.0, 0.99))
    with pytest.raises(ValueError, match="split_groups must be the same"):
        Prodigy([{"params": [p], "split_groups": bool(i)} for i, p in enumerate(parameters())])


@pytest.mark.parametrize("base", [None, torch.nn.Linear(2, 2), "SGD", torch.optim.SGD], ids=str)
def test_the_wrapper_wants_an_optimizer(base):
    with pytest.raises(TypeError, match="^base must be a torch.optim.Optimizer"):
        ScheduleFreeWrapper(base)


def test_the_wrapper_refuses_a_base_that_is_schedule_free_already():
    for base in (SGDScheduleFree(parameters()), wrapped(parameters())):
        with pytest.raises(TypeError, match="not schedule-free itself"):
            ScheduleFreeWrapper(base)


# parameters and gradients ----------------------------------------------------------------------


@every_class
def test_complex_parameters_are_refused_in_words(cls):
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="complex parameters are not supported: use torch.view"):
        cls([p])


@every_class
def test_sparse_parameters_are_refused_in_words(cls):
    p = torch.nn.Parameter(torch.zeros(3, 3).to_sparse())
    with pytest.raises(TypeError, match="sparse parameters are not supported"):
        cls([p])


@every_method
def test_sparse_gradients_are_refused_in_words(case):
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = zoo.make(case, embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients are not supported: use sparse=False"):
        optimizer.step()


@every_method
def test_a_gradient_that_is_not_its_parameters_is_described(case):
    params = parameters()
    optimizer = zoo.make(case, params)
    pull(params)
    params[1].data = params[1].data.float()
    with pytest.raises(RuntimeError, match=r"\(5,\), torch.float64, cpu.*\(5,\), torch.float32"):
        optimizer.step()
    params[1].data = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"\(5,\).* must match its parameter .*\(2,\)"):
        optimizer.step()


def test_a_gradient_on_another_device_is_described():
    p = SimpleNamespace(**{name: getattr(torch.zeros(3), name) for name in ("shape", "dtype")})
    p.device, p.grad = torch.device("meta"), torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"cpu\) must match its parameter \(.*meta\)"):
        check_gradient(p)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("foreach", [False, True])
def test_every_floating_dtype_stays_what_it_is_and_learns(case, dtype, foreach):
    """Denominators are float32: an eps of 1e-8 underflows in float16."""
    if "torch" in case.name:
        case = zoo.wrapper_case("prodigy.AdamW", prodigy.AdamW, None, {})
    params = parameters(dtype=dtype)
    options = {} if case.estimates_d or case.schedule_free else {"lr": 0.05}
    options |= dict(stochastic_rounding=False) if "ProdigyPlus" in case.name else {}
    optimizer = zoo.make(case, params, foreach=foreach, **options)
    loss = [sum(float((p.detach().double() - 0.3).square().sum()) for p in params)]
    for step in range(60):
        for p in params:
            p.grad = p.detach() - 0.3
        optimizer.step()
        loss.append(sum(float((p.detach().double() - 0.3).square().sum()) for p in params))
    assert all(p.dtype == dtype and p.isfinite().all() for p in params)
    assert min(loss) < 0.999 * loss[0]  # over Prodigy, whose momentum comes on top, x overshoots
    wide = torch.promote_types(dtype, torch.float32)
    kept = [row for p in params for row in optimizer.state[p].items()]
    for t in [t for name, t in kept if name not in ("p0", "x0", "ref")]:
        assert t.dtype in (wide, torch.int16) or t.dim() == 0


def test_float64_is_not_truncated():
    """A step of 1e-12 beside weights of 1 is lost in float32."""
    for cls in (prodigy.AdamW, prodigy.Prodigy, prodigy.AdamWScheduleFree, SGDScheduleFree):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = cls([p], lr=1e-12, **({"d0": 1.0} if cls is Prodigy else {}))
        p.grad = torch.ones_like(p)
        optimizer.step()
        moved = (1 - p.detach()).abs().max().item()
        assert 1e-14 < moved < 1e-11


@every_method
def test_parameters_of_every_shape_and_layout(case):
    """0-d, one entry, no entry, transposed, channels_last, expanded strides."""
    params = [
        torch.nn.Parameter(torch.tensor(1.0)),
        torch.nn.Parameter(torch.ones(1)),
        torch.nn.Parameter(torch.ones(0, 3)),
        torch.nn.Parameter(torch.randn(4, 3).t()),
        torch.nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)),
    ]
    for foreach in (False, True):
        optimizer = zoo.make(case, params, foreach=foreach)
        before = [p.detach().clone() for p in params]
        for step in range(8):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        for p, x in zip(params, before):
            assert p.shape == x.shape and p.stride() == x.stride() and p.isfinite().all()
            assert p.numel() == 0 or not torch.equal(p, x)


@every_method
def test_the_layout_of_a_gradient_does_not_matter(case):
    """A gradient with other strides than its parameter's, in both ways to run."""
    ends = []
    for foreach in (False, True):
        for strided in (False, True):
            params = parameters(((3, 4), (2, 3, 4, 4)))
            optimizer = zoo.make(case, params, foreach=foreach)
            for step in range(6):
                pull(params, step)
                if strided:
                    params[0].grad = params[0].grad.t().contiguous().t()
                    last = torch.channels_last
                    params[1].grad = params[1].grad.to(memory_format=last)
                optimizer.step()
            ends.append(torch.cat([p.detach().flatten() for p in params]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-12, atol=1e-14)


@every_class
def test_no_parameters_is_an_error_as_in_torch(cls):
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        cls([])


@every_class
def test_a_lone_tensor_is_an_error_as_in_torch(cls):
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an"):
        cls(parameters()[0])


@every_class
def test_duplicate_parameters_as_in_torch(cls):
    params = parameters()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        cls([params[0], params[0]])
    with pytest.raises(ValueError, match="more than one parameter group"):
        cls([{"params": params}, {"params": params[:1]}])


@every_class
def test_a_tensor_that_is_no_leaf_is_an_error_as_in_torch(cls):
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        cls([parameters()[0] * 2])


@every_class
def test_only_empty_groups_are_harmless(cls):
    optimizer = cls([{"params": []}])
    optimizer.step()
    assert optimizer.nonfinite() == 0 and optimizer.effective_lr() >= 0
    optimizer.load_state_dict(optimizer.state_dict())
    params = parameters()
    optimizer.add_param_group({"params": params})
    for step in range(8):
        pull(params, step)
        optimizer.step()


# what frameworks call --------------------------------------------------------------------------


@every_method
def test_hooks_fire_once_around_the_step(case):
    params = parameters()
    optimizer = zoo.make(case, params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    pull(params)
    optimizer.step()
    assert calls == ["before", "after"]

    def closure():
        calls.append("closure")
        pull(params, 1)
        return torch.tensor(2.0)

    assert optimizer.step(closure) == 2.0
    assert calls == ["before", "after", "before", "closure", "after"]


@every_method
def test_every_class_is_an_optimizer(case):
    params = parameters()
    optimizer = zoo.make(case, params)
    assert isinstance(optimizer, torch.optim.Optimizer)
    pull(params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    assert type(optimizer).__name__ in repr(optimizer)
    assert "lr" in repr(optimizer)
    assert optimizer.defaults["lr"] == optimizer.param_groups[0]["lr"]


@every_method
def test_named_parameters_keep_their_names(case):
    model = torch.nn.Linear(3, 2)
    optimizer = zoo.make(case, model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    pull(list(model.parameters()))
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": parameters()})
    assert len(optimizer.param_groups) == 1


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: k / 5),
    "Cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "Plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "Cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.0, 0.1, 4),
}


@every_method
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_accept_it(case, kind):
    params = parameters()
    optimizer = zoo.make(case, params)
    cycles = kind in ("OneCycle", "Cyclic")
    if cycles and not {"momentum", "betas"} & set(optimizer.defaults):
        assert case.cls in (prodigy.Adagrad, prodigy.DoG, prodigy.LDoG, prodigy.DoWG,
                            prodigy.COCOB, prodigy.DAdaptResetting)
        with pytest.raises(ValueError, match="momentum"):
            SCHEDULERS[kind](optimizer)
        return
    scheduler = SCHEDULERS[kind](optimizer)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as: step() of the scheduler before the optimizer's
        for step in range(10):
            pull(params, step)
            optimizer.step()
            scheduler.step(*([1.0] if kind == "Plateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) > 2
    assert all(p.isfinite().all() for p in params)


@every_method
@pytest.mark.parametrize("grad", [True, False])
def test_a_closure_runs_with_gradients_and_its_loss_comes_back(case, grad):
    params = parameters()
    optimizer = zoo.make(case, params)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum((p - 0.3).square().sum() for p in params)
        loss.backward()
        return loss

    with contextlib.nullcontext() if grad else torch.no_grad():
        losses = [float(optimizer.step(closure).detach()) for _ in range(40)]
    assert min(losses) < 0.9999 * losses[0]


def test_numbers_of_numpy_are_numbers():
    """And are saved as Python's own, which torch.load(weights_only=True) reads."""
    params = parameters()
    optimizer = prodigy.Prodigy(
        [{"params": params[:1], "d_coef": np.float32(2)}, {"params": params[1:]}],
        lr=np.float32(0.5), betas=(np.float64(0.9), np.float32(0.5)), slice_p=np.int64(2),
        total_training_steps=np.int64(100))
    for group in (*optimizer.param_groups, optimizer.defaults):
        values = [a for a in group.values() if not isinstance(a, (torch.Tensor, list))]
        values += group["betas"]
        assert not any(isinstance(a, np.generic) for a in values)
    assert optimizer.param_groups[0]["d_coef"] == 2.0 and optimizer.param_groups[1]["slice_p"] == 2
    with pytest.raises(TypeError, match="slice_p must be an integer"):
        prodigy.Prodigy(params, slice_p=np.float64(2))
    with pytest.raises(ValueError, match="lr must lie in"):
        prodigy.Prodigy(params, lr=np.float32(-1))


def test_log_every_logs_and_prints_nothing(caplog, capsys):
    params = parameters()
    optimizer = prodigy.DAdaptAdam(params, log_every=3)
    with caplog.at_level(logging.INFO, logger="prodigy"):
        for step in range(7):
            pull(params, step)
            optimizer.step()
    assert [r.getMessage().split()[0] for r in caplog.records] == ["k=3", "k=6"]
    assert "d=[1e-06]" not in caplog.records[-1].getMessage()
    assert " d=[" in caplog.records[-1].getMessage()
    assert capsys.readouterr() == ("", "")


def test_every_public_class_documents_its_arguments():
    for name in prodigy.__all__:
        cls = getattr(prodigy, name)
        code = cls.__init__.__code__
        names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        text = cls.__doc__ + (prodigy.Adam.__doc__ if cls is prodigy.AdamW else "")
        for argument in set(names) - set(MODES):
            assert argument in text, (name, argument)
        assert "math::" in text or ":math:" in text, name
