"""One body, several ways to run it: loop, foreach, compiled, capturable, meta tensors, vmap.

All give the same numbers; none reads a number back from the device; changing numbers compile once.
"""

import collections
import functools
import os
import subprocess
import sys

import pytest
import torch
import zoo
from torch._dynamo.utils import counters
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

import prodigy
from prodigy import vec
from prodigy.optimizer import Family


def is_ours(case):
    """The arithmetic is this package's (not a wrapped torch.optim)."""
    base = getattr(case.cls, "base", case.cls)
    return issubclass(base, Family)


def is_wrapper(case):
    return hasattr(case.cls, "base")


def is_plus(case):
    """Its pieces measure or mask each tensor for itself, and some of its options count steps."""
    return case.cls is prodigy.ProdigyPlusScheduleFree


def counts_steps(case):
    return "use_adopt" in case.kwargs or "prodigy_steps" in case.kwargs


OWN = [case for case in zoo.CASES if is_ours(case)]
CAPTURABLE = [case for case in OWN if not counts_steps(case)]
OWN_METHODS = [case for case in zoo.METHODS if is_ours(case)]
every_case = pytest.mark.parametrize("case", zoo.CASES, ids=str)
every_own_case = pytest.mark.parametrize("case", OWN, ids=str)
every_own_method = pytest.mark.parametrize("case", OWN_METHODS, ids=str)
either_way = pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])


def check_equal(case, **mode):
    """The mode gives what the loop gives: y, x and the whole trajectory of d."""
    loop, other = zoo.run(case, foreach=False), zoo.run(case, **mode)
    assert zoo.error(zoo.final(other.problem), zoo.final(loop.problem)) < 1e-9
    torch.testing.assert_close(other.d, loop.d, rtol=1e-9, atol=0)
    if case.schedule_free:
        loop.optimizer.eval()
        other.optimizer.eval()
        assert zoo.error(zoo.final(other.problem), zoo.final(loop.problem)) < 1e-9


# the same numbers ------------------------------------------------------------------------------


@every_case
def test_foreach_equals_loop(case):
    check_equal(case, foreach=True)


@every_own_case
def test_small_tensors_together_equal_the_loop(case, monkeypatch):
    """The default on a CPU; here some of a case's tensors count as small and some do not."""
    monkeypatch.setattr(vec, "SMALL", 4)
    sizes = [p.numel() for p in zoo.problem(holes=case.holes).params]
    assert sum(n <= 4 for n in sizes) > 1 and max(sizes) > 4
    check_equal(case)


def test_small_tensors_go_together():
    case = zoo.Case("", prodigy.Prodigy)
    assert count(case, 4, foreach=None).device == count(case, 40, foreach=None).device
    shapes = [(5, 3277), (3,), (), (100, 163), (128, 128)]
    rows = [(torch.zeros(shape), torch.zeros(shape), {}, None) for shape in shapes]
    large, *small = vec.bunched(rows)
    assert large is rows[0] and [len(p.parts) for p, *_ in small] == [4]
    for alone in rows[:2], rows[:1], []:
        assert vec.bunched(alone) is alone
    some = [(torch.zeros(2**14), torch.zeros(2**14), {}, None)] * 300
    assert [len(p.parts) for p, *_ in vec.bunched(some)] == [32] * 9 + [12]


@every_own_case
@either_way
def test_large_tensors_in_parts_give_the_same(case, foreach, monkeypatch):
    """Cut where a method allows it, as large tensors are; foreach takes a few parts at once."""
    whole = zoo.run(case, foreach=foreach)
    monkeypatch.setattr(vec, "CHUNK", 4)
    parts = zoo.run(case, foreach=foreach)
    assert zoo.error(zoo.final(parts.problem), zoo.final(whole.problem)) < 1e-9
    torch.testing.assert_close(parts.d, whole.d, rtol=1e-9, atol=0)


def test_parts_of_a_tensor_and_its_buffers():
    p, g, v, s = (torch.arange(n) for n in (3000, 3000, 3000, 273))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vec, "CHUNK", 500)
        rows = vec.cut(p, g, {"v": v, "s": s}, None, 11)
        assert [len(row[0]) for row in rows] == 6 * [495] + [30]
        for row in rows:  # a part's slice belongs to the part
            assert torch.equal(row[0][::11], 11 * row[2]["s"])
        assert torch.equal(torch.cat([row[2]["v"] for row in rows]), v)
        strided = torch.zeros(40, 40).t()
        assert len(vec.cut(strided, strided, {}, None)) == 1
        patch.setattr(vec, "CHUNK", 1000)
        assert [len(some) for some in vec.in_turn(rows)] == [2, 2, 2, 1]


@pytest.mark.parametrize("case", CAPTURABLE, ids=str)
@either_way
def test_capturable_equals_loop(case, foreach):
    check_equal(case, foreach=foreach, capturable=True)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def passes(case):
    """How many graphs a group has: some methods look at the gradients first, ADOPT's first step
    is another one, and Muon keeps other tensors for matrices than for vectors."""
    looks = getattr(case.cls, "look", None) is not None
    return 2 if looks or {"use_adopt", "use_muon_pp"} & set(case.kwargs) else 1


def cycle(optimizer, steps):
    """OneCycleLR, which moves lr in every step, and the momentum or beta1 where there is one."""
    target = optimizer.base if isinstance(optimizer, prodigy.ScheduleFreeWrapper) else optimizer
    return torch.optim.lr_scheduler.OneCycleLR(
        target,
        max_lr=2 * target.param_groups[0]["lr"],
        total_steps=steps + 1,
        cycle_momentum="momentum" in target.defaults or "betas" in target.defaults,
    )


@every_own_method
def test_compiled_equals_loop_and_compiles_once(case, fresh_compiler):
    """Under Inductor, while lr, momentum (or beta1), d and the step count change in every step."""
    steps, ends = 12, []
    for compiled in (False, True):
        problem = zoo.problem(shapes=[(2, 3, 4, 2), ()])
        optimizer = zoo.make(case, problem.params, compile=compiled)
        scheduler = cycle(optimizer, steps)
        zoo.run(optimizer, steps, problem=problem, each=lambda *_: scheduler.step())
        ends.append(zoo.final(problem))
    assert graphs() == passes(case)
    assert not counters["graph_break"]
    assert zoo.error(ends[1], ends[0]) < 1e-9


@every_own_case
def test_every_option_compiles_once(case, fresh_compiler, monkeypatch):
    """The graph as Dynamo traces it, run without Inductor: one per group with its own options."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    ends = []
    for compiled in (False, True):
        problem = zoo.problem(shapes=[(3, 2), (4,)])
        optimizer = zoo.make(case, problem.params, compile=compiled)
        scheduler = zoo.schedule(optimizer, zoo.warm_then_decay)
        zoo.run(optimizer, 8, problem=problem, each=lambda *_: scheduler.step())
        ends.append(zoo.final(problem))
    assert 1 <= graphs() <= passes(case) * len(optimizer.param_groups)
    assert zoo.error(ends[1], ends[0]) < 1e-9


def test_more_tensors_than_a_graph_takes(fresh_compiler, monkeypatch):
    """Every graph has its own tensors; the sums run over all of them."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(prodigy.optimizer, "GRAPH", 2)
    ends, ds = [], []
    for compiled in (False, True):
        problem = zoo.problem(shapes=[(3, 2), (4,), (5,), (2, 2), (7,)])
        optimizer = prodigy.Prodigy(problem.params, compile=compiled)
        ds.append(zoo.run(optimizer, 10, problem=problem).d)
        ends.append(zoo.final(problem))
    assert graphs() == 3
    assert zoo.error(ends[1], ends[0]) < 1e-9 and torch.allclose(*ds, rtol=1e-9)


@pytest.mark.parametrize("name", ["AdamW", "Prodigy", "AdamWScheduleFree"])
def test_a_compiled_step_notices_what_changes_under_it(name, fresh_compiler):
    """A shared gradient, layouts of gradient, weight and buffer, options, a missing gradient."""
    plain, ends = torch.contiguous_format, []
    for compiled in (False, True):
        problem = zoo.problem(shapes=[(4, 6, 3, 2), (5,), (5,)])
        filters, other, last = problem.params
        optimizer = getattr(prodigy, name)(problem.params, weight_decay=0.1, compile=compiled)
        group, fill = optimizer.param_groups[0], problem.fill

        def fill_otherwise(step):
            fill(step)
            if step < 2:
                last.grad = other.grad
            if step >= 4:
                filters.grad = filters.grad.contiguous(memory_format=plain)
            if step == 8:
                last.grad = None

        def change(step, _):
            s = optimizer.state[filters]
            if step == 4:
                filters.data = filters.data.contiguous(memory_format=plain)
            elif step == 5:
                s.update({key: t.contiguous(memory_format=plain) for key, t in s.items()})
            elif step == 6:
                group.update(weight_decay=0.0, maximize=True)

        problem.fill = fill_otherwise
        assert not filters.is_contiguous()
        zoo.run(optimizer, 10, problem=problem, each=change)
        assert filters.is_contiguous()
        ends.append(zoo.final(problem))
    assert zoo.error(ends[1], ends[0]) < 1e-9


def test_a_compiled_step_takes_a_gradient_in_its_parameters_memory(fresh_compiler):
    ends = []
    for compile in (False, True):
        p = torch.nn.Parameter(torch.ones(3, 4))
        optimizer = prodigy.AdamW([p], compile=compile)
        p.grad = p.detach()
        optimizer.step()
        ends.append(p.detach().clone())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("name", ["AdamW", "Prodigy", "SGDScheduleFree"])
def test_compiled_equals_loop_beside_float16_weights(name, fresh_compiler):
    """What rounding drops is kept: Inductor would make x - (x rounded) 0."""
    ends = []
    for compile in (False, True):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(64).half())
        optimizer = getattr(prodigy, name)([p], compile=compile,
                                           **({} if name == "Prodigy" else dict(lr=1e-4)))
        for _ in range(60):
            p.grad = (p.detach().float() - 3).half()
            optimizer.step()
        s = optimizer.state[p]
        assert s["residual"].any()
        ends.append(p.detach().float() + s["residual"])
    torch.manual_seed(0)
    moved = (ends[0] - torch.randn(64).half().float()).norm()
    assert (ends[1] - ends[0]).norm() < 0.01 * moved  # gradients in float16 magnify rounding


@pytest.mark.parametrize("name", ["AdamW", "Prodigy", "SGDScheduleFree"])
def test_compiled_equals_loop_beside_bfloat16_weights(name, fresh_compiler):
    ends = []
    for compiled in (False, True):
        problem = zoo.problem(torch.bfloat16, shapes=[(7, 5), (3,)])
        zoo.run(getattr(prodigy, name)(problem.params, compile=compiled), 20, problem=problem)
        ends.append(zoo.final(problem))
    assert zoo.error(ends[1], ends[0]) < 2**-8  # one rounding of bfloat16
    assert graphs() == 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "shape", [(40, 33, 1, 1), (16, 32, 3, 3), (48, 32, 2, 3), (20, 3, 48, 48)], ids=str)
def test_compiled_factored_moments_equal_the_loops(shape, layout, fresh_compiler):
    """Tensors large enough to be factored; the means over short rows are taken in two stages."""
    ends = []
    for compiled in (False, True):
        problem = zoo.problem(shapes=[shape])
        problem.params[0].data = problem.params[0].data.contiguous(memory_format=layout)
        optimizer = prodigy.ProdigyPlusScheduleFree(problem.params, compile=compiled)
        zoo.run(optimizer, 10, problem=problem)
        assert "exp_avg_sq_row" in optimizer.state[problem.params[0]]
        ends.append(zoo.final(problem))
    assert zoo.error(ends[1], ends[0]) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [
    {}, {"factored": False}, {"use_schedulefree": False}, {"use_stableadamw": False},
    {"use_cautious": True}, {"use_orthograd": True}, {"use_adopt": True}, {"use_speed": True},
    {"use_muon_pp": True}, {"use_focus": True, "factored": False}], ids=str)
def test_filters_sixteen_abreast_change_nothing(options, dtype, fresh_compiler, monkeypatch):
    """The graph as Dynamo traces it, in which small filters are seen in another shape."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    shapes, ends = [(16, 32, 3, 3), (3,)], []
    for compiled in (False, True):
        problem = zoo.problem(dtype, shapes=shapes)
        problem.params[0].data = problem.params[0].data.contiguous()
        optimizer = prodigy.ProdigyPlusScheduleFree(
            problem.params, d0=0.1, compile=compiled, stochastic_rounding=False, **options)
        zoo.run(optimizer, 6, problem=problem)
        ends.append(zoo.final(problem))
    assert prodigy.pieces.abreast(shapes[0]) == (16, 2, 144)
    assert zoo.error(ends[1], ends[0]) < (2**-8 if dtype == torch.bfloat16 else 1e-9)


# no host read ----------------------------------------------------------------------------------


def meta_problem(dtype=torch.float32):
    """Parameters without numbers, and a function that gives each a gradient."""
    shapes = [(3, 2), (), (4,), (2, 3, 4, 2)]
    params = [torch.nn.Parameter(torch.empty(s, device="meta", dtype=dtype)) for s in shapes]

    def fill():
        for p in params:
            p.grad = torch.empty_like(p)

    return params, fill


MORE_OPTIONS = [
    zoo.Case("Prodigy-cosine", prodigy.Prodigy, dict(cosine_decay=True, peak_patience=1)),
    zoo.Case(
        "Prodigy-cosine-total",
        prodigy.Prodigy,
        dict(cosine_decay=True, total_training_steps=4, peak_patience=1),
    ),
    zoo.Case("Prodigy-rates", prodigy.Prodigy, groups=({"lr": 0.5}, {"betas": (0.8, 0.9)})),
    *(
        zoo.Case(f"{name}-split", getattr(prodigy, name), dict(split_groups=True), groups=({}, {}))
        for name in ("Prodigy", "DAdaptSGD", "DAdaptAdaGrad", "DAdaptAdam")
    ),
    *(
        zoo.Case(
            f"{name}-refined", getattr(prodigy, name), dict(store_x=True, schedulefree_c=50.0)
        )
        for name in ("SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree")
    ),
    zoo.Case("AdamWScheduleFree-inner", prodigy.AdamWScheduleFree, dict(inner_momentum=0.9)),
]


CASES_AND_DTYPES = [(case, torch.float32) for case in [*OWN, *MORE_OPTIONS]]
CASES_AND_DTYPES += [(case, torch.bfloat16) for case in OWN_METHODS]


@pytest.mark.parametrize("case", zoo.METHODS, ids=str)
def test_a_compiled_function_around_the_step_changes_nothing(case, fresh_compiler):
    """torch.compile of the user's own step, or of the whole training function."""
    ends = []
    for around in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        problem = zoo.problem()
        optimizer = zoo.make(case, problem.params)
        step = around(lambda: optimizer.step())
        for k in range(5):
            problem.fill(k)
            step()
        ends.append(zoo.final(problem))
    assert torch.equal(*ends) and not torch.equal(ends[0], zoo.final(zoo.problem()))


def test_what_groups_share_is_computed_once(monkeypatch):
    """The time of a step grows with the number of groups, not with its square."""
    counts = []
    for n in (10, 40):
        calls = []
        for module in (prodigy.dadaptation, prodigy.prodigy, prodigy.optimizer):
            monkeypatch.setattr(module, "rate", lambda group: calls.append(1) or group["lr"])
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(n)]
        optimizer = prodigy.Prodigy([{"params": [p]} for p in params])
        for p in params:
            p.grad = torch.ones(2)
        optimizer.step()
        counts.append(len(calls))
    assert counts[1] < 5 * counts[0]


def test_step_counts_move_to_where_the_options_want_them():
    """A checkpoint may have been saved with capturable=False."""
    params, fill = meta_problem()
    optimizer = prodigy.Adam(params, capturable=True)
    for p in params:
        optimizer.state[p]["step"] = torch.zeros(())
    fill()
    optimizer.step()
    assert {optimizer.state[p]["step"].device.type for p in params} == {"meta"}


@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
@either_way
@pytest.mark.parametrize(("case", "dtype"), CASES_AND_DTYPES, ids=str)
def test_no_host_read(case, dtype, foreach, capturable):
    """A meta tensor has no numbers: whoever asks it for one, or for a branch, gets an error."""
    if capturable and counts_steps(case):
        with pytest.raises(ValueError, match="not with capturable"):
            zoo.make(case, meta_problem(dtype)[0], capturable=True)
        return
    params, fill = meta_problem(dtype)
    optimizer = zoo.make(case, params, foreach=foreach, capturable=capturable)
    scheduler = zoo.schedule(optimizer, zoo.warm_then_decay)
    for _ in range(4):
        fill()
        optimizer.step()
        scheduler.step()
    if hasattr(optimizer, "averaged"):
        with optimizer.averaged():
            pass
        optimizer.eval()
        optimizer.train()
    optimizer.state_dict()
    with pytest.raises(RuntimeError):
        optimizer.nonfinite()  # the test itself: reading does raise


@either_way
@pytest.mark.parametrize("case", [c for c in OWN_METHODS if not is_wrapper(c)], ids=str)
def test_no_host_read_of_a_tensor_lr(case, foreach):
    params, fill = meta_problem()
    lr = torch.empty((), device="meta")
    optimizer = zoo.make(case, params, foreach=foreach, capturable=True, lr=lr)
    for _ in range(3):
        fill()
        optimizer.step()


# kernels ---------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts what runs on the (meta) device, views apart, and what runs on the host."""

    VIEWS = {"view", "_unsafe_view", "split_with_sizes", "slice", "alias", "detach", "unsqueeze"}
    VIEWS |= {"expand", "_reshape_alias", "reshape", "as_strided", "permute", "t", "select"}

    def __init__(self):
        super().__init__()
        self.device, self.host = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        devices = {a.device.type for a in leaves if isinstance(a, torch.Tensor)}
        name = function._schema.name.removeprefix("aten::")
        if devices and name not in self.VIEWS:
            (self.device if "meta" in devices else self.host)[name] += 1
        return result


def count(case, tensors, dtype=torch.float32, foreach=True, **extra):
    """What the third step over equal tensors launches."""
    like = torch.empty(3, 2, device="meta", dtype=dtype)
    params = [torch.nn.Parameter(like.clone()) for _ in range(tensors)]
    optimizer = zoo.make(zoo.Case("", case.cls, case.kwargs), params, foreach=foreach, **extra)
    for step in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        with Count() as counted:
            optimizer.step()
    return counted


WHOLE = [c for c in OWN if not is_wrapper(c) and not is_plus(c)]


@pytest.mark.parametrize("case", WHOLE + MORE_OPTIONS, ids=str)
def test_kernels_of_the_foreach_step_do_not_grow_with_the_number_of_tensors(case):
    """What grows: views, which launch nothing, and on the host the classical methods' step counts
    (one number per tensor, as in torch.optim)."""
    few, many = count(case, 4), count(case, 40)
    assert few.device == many.device
    grown = {name for name in many.host if many.host[name] != few.host[name]}
    counts = {"add_", "_local_scalar_dense", "lift_fresh"}
    assert grown <= (counts if case.cls.own_clock else set())


def test_what_does_grow_with_the_number_of_tensors():
    """Per tensor: joining and splitting float32 numbers beside bfloat16 weights, undoing a step
    for a tensor lr that may freeze, the wrapper's own books, and clips tensor by tensor."""
    prod = zoo.Case("", prodigy.Prodigy)
    wrapped = zoo.wrapper_case("", prodigy.Prodigy, None, {})
    plus = zoo.plus_case("")
    on_device = dict(capturable=True, lr=torch.empty((), device="meta"))
    for case, extra in (
        (prod, dict(dtype=torch.bfloat16)),
        (prod, on_device),
        (wrapped, {}),
        (plus, {}),
    ):
        few, many = (sum(count(case, n, **extra).device.values()) for n in (4, 40))
        per_tensor = (many - few) / 36
        assert 0 < per_tensor <= 25


def test_foreach_launches_fewer_kernels_than_the_loop():
    for case in OWN_METHODS:
        if not is_wrapper(case) and not is_plus(case):
            launched = [count(case, 40, foreach=mode).device.total() for mode in (True, False)]
            assert launched[0] < launched[1] / 5


# sweeps ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap loops over some
@pytest.mark.parametrize("case", OWN_METHODS, ids=str)
def test_vmap_over_lr_and_seed_equals_separate_runs(case):
    """Five problems in one batched run: own rate, start, noise and d; lr = 0 stays frozen."""
    steps, size = 25, 5
    generator = torch.Generator().manual_seed(0)
    starts = torch.randn(5, size, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(5, steps, size, generator=generator, dtype=torch.float64)
    rates = torch.tensor([1.0, 0.5, 0.1, 2.0, 0.0], dtype=torch.float64)
    if not (case.estimates_d or "SGD" in case.name):
        rates = 0.1 * rates

    def train(lr, start, noise):
        p = start.clone()
        if is_wrapper(case):
            optimizer = case.cls.wrap(case.cls.base([p], lr=lr, capturable=True))
        else:
            optimizer = case.cls([p], lr=lr, capturable=True, **case.kwargs)
        for step in range(steps):
            p.grad = (p - 1) * torch.arange(1, size + 1) / size + noise[step]
            optimizer.step()
        return p, torch.as_tensor(optimizer.param_groups[0].get("d", 0.0), dtype=torch.float64)

    batched, d = vmap(train)(rates, starts, noise)
    for i in range(5):
        alone, own_d = train(rates[i].item(), starts[i], noise[i])
        torch.testing.assert_close(batched[i], alone, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(d[i], own_d, rtol=1e-9, atol=0)
    assert len({round(float(a), 12) for a in batched[:, 0]}) == 5
    assert torch.equal(batched[4], starts[4])


# without a compiler ----------------------------------------------------------------------------

SCRIPT = """
import sys, warnings, torch, prodigy

def run(compiled):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((3, 2), (), (4,))]
    optimizer = prodigy.Prodigy([dict(params=params[:2]), dict(params=params[2:])],
                                compile=compiled)
    for _ in range(5):
        for p in params:
            p.grad = p.detach().clone()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params]), optimizer.get_d()

with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    compiled, d = run(True)
plain, e = run(False)
assert torch.equal(compiled, plain) and d == e
print(*[str(w.message) for w in heard if "compile=True" in str(w.message)], sep="\\n")
"""


def test_without_a_compiler_the_step_runs_with_one_warning(tmp_path):
    env = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    env.pop("TORCHINDUCTOR_FORCE_DISABLE_CACHES", None)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("compile=True finds no compiler") and "no-such-compiler" in line


def test_an_error_of_the_compiler_that_is_not_a_missing_one_is_raised(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("broken backend")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, options, **modes: compile(
        run, backend=broken, **modes))
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="broken backend"):
        prodigy.SGD([p], lr=0.1, compile=True).step()
    assert torch.equal(p, torch.ones(3))


# on a GPU --------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def strict():
    """Whoever waits for the device gets an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("mode", [{}, dict(foreach=False), dict(compile=True)],
                         ids=["foreach", "loop", "compiled"])
@pytest.mark.parametrize("case", [c for c in OWN_METHODS if not is_wrapper(c)], ids=str)
def test_no_synchronisation_in_steady_state(case, mode, strict, fresh_compiler):
    problem = zoo.problem(torch.float32, "cuda")
    optimizer = zoo.make(case, problem.params, **mode)
    zoo.run(optimizer, 3, problem=problem)
    strict()
    for _ in range(3):
        optimizer.step()


@needs_cuda
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "Prodigy", "AdamWScheduleFree", "DAdaptAdam"])
def test_the_step_is_captured_in_a_graph(name, foreach):
    """Replays give the numbers of as many steps."""
    ends = []
    for captured in (False, True):
        problem = zoo.problem(torch.float32, "cuda")
        problem.fill(0)
        optimizer = getattr(prodigy, name)(problem.params, capturable=True, foreach=foreach)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for _ in range(4):
            graph.replay() if captured else optimizer.step()
        ends.append(zoo.final(problem))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)
