"""What a step costs: words that pass through memory, time beside another optimizer's, memory.

    words(Prodigy)                      10.0: what any program must read and write, per parameter
    loops(generated(Prodigy), entries)  [(3, 0), (5, 4)]: reads and writes of Inductor's loops
    compare(makers, shapes, rounds)     steps timed in turn, as ratios to the first of the makers
    peak(optimizer)                     the most memory that a step takes beyond what was there

Times of one machine mean little on another, and little beside other programs; their ratios mean
more, if the steps are taken in turn: what slows one round slows all of it. All tensors lie in the
same memory when their optimizer steps: what a process asks for early may be scattered over pages,
and the first of several equal optimizers is then slower than the last.
"""

import contextlib
import io
import re
import time
import weakref
from functools import partial
from pkgutil import resolve_name

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.codecache import PyCodeCache
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

import prodigy
from prodigy.optimizer import Family

from .train import QUIET


def resnet18(classes=10):
    """Shapes of the 62 tensors (11.2 M entries) of ResNet-18 for 32 x 32 images."""
    shapes, before = [(64, 3, 3, 3), (64,), (64,)], 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(width, before, 3, 3), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            if before != width:
                shapes += [(width, before, 1, 1), (width,), (width,)]
            before = width
    return [*shapes, (classes, 512), (classes,)]


def gpt(width=448, layers=6, vocabulary=2048, context=512):
    """Shapes of the tensors of a GPT, 12 a layer and 4; by default 76 with 15.6 M entries."""
    vector = (width,)
    block = [vector, vector, (3 * width, width), (3 * width,), (width, width), vector,
             vector, vector, (4 * width, width), (4 * width,), (width, 4 * width), vector]
    return [(vocabulary, width), (context, width), *block * layers, vector, vector]


NETWORKS = {
    "two matrices": [(256, 256), (256, 256), (256,)],
    "gpt, 2 layers": gpt(512, 2, 1024, 256),
    "gpt": gpt(),
    "gpt, 124 M": gpt(768, 12, 50304, 1024),
    "resnet18": resnet18(),
}


PROFILED = 5  # rounds, after the others, in which the time inside of programs is taken


class Idle(Family):
    """A method that does nothing: what the step that all methods share costs by itself."""

    def __init__(self, params, lr=1.0, **modes):
        super().__init__(params, lr=lr, **modes)

    def advance(self, x, g, s, h):
        pass


SLICED, ALONE = "Prodigy, slice_p 11", "The step alone"
# method: (class or what makes it, its reference as package:class or "")
METHODS = {
    "SGD": (prodigy.SGD, ""),
    "Adagrad": (prodigy.Adagrad, ""),
    "RMSprop": (prodigy.RMSprop, ""),
    "Adam": (prodigy.Adam, ""),
    "AdamW": (prodigy.AdamW, "torch.optim:AdamW"),
    "D-Adapt SGD": (prodigy.DAdaptSGD, "dadaptation:DAdaptSGD"),
    "D-Adapt AdaGrad": (prodigy.DAdaptAdaGrad, "dadaptation:DAdaptAdaGrad"),
    "D-Adapt Adam": (prodigy.DAdaptAdam, "dadaptation:DAdaptAdam"),
    "Prodigy": (prodigy.Prodigy, "prodigyopt:Prodigy"),
    SLICED: (partial(prodigy.Prodigy, slice_p=11), "prodigyopt:Prodigy"),
    "Schedule-Free SGD": (prodigy.SGDScheduleFree, "schedulefree:SGDScheduleFree"),
    "Schedule-Free AdamW": (prodigy.AdamWScheduleFree, "schedulefree:AdamWScheduleFree"),
    "Schedule-Free RAdam": (prodigy.RAdamScheduleFree, "schedulefree:RAdamScheduleFree"),
    "Prodigy + Schedule-Free": (prodigy.ProdigyPlusScheduleFree,
                                "prodigyplus:ProdigyPlusScheduleFree"),
    "DoG": (prodigy.DoG, ""),
    "L-DoG": (prodigy.LDoG, ""),
    "DoWG": (prodigy.DoWG, ""),
    "COCOB": (prodigy.COCOB, ""),
    "Schedule-Free Polyak": (prodigy.ScheduleFreePolyak, ""),
    "ScheduleFree+": (prodigy.ScheduleFreePlus, ""),
    "D-Adapt Resetting": (prodigy.DAdaptResetting, ""),
    ALONE: (Idle, ""),
}


def parameters(shapes, device="cpu", seed=0):
    """Normal parameters of size 0.05 with normal gradients of size 0.01, all float32."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in shapes:
        p = torch.nn.Parameter((0.05 * torch.randn(shape, generator=generator)).to(device))
        p.grad = (0.01 * torch.randn(shape, generator=generator)).to(device)
        params.append(p)
    return params


def stepper(optimizer):
    """A function that takes one step; losses, where a method asks for one, are 1."""
    if hasattr(optimizer, "train"):
        optimizer.train()
    return lambda: optimizer.step(lambda: torch.ones(()))


def build(make, shapes, device="cpu", seed=0):
    """make(parameters), without what reference packages print."""
    with contextlib.redirect_stdout(io.StringIO()):
        return make(parameters(shapes, device, seed))


# time --------------------------------------------------------------------------------------------


def compare(makers, shapes, rounds=20, device="cpu", seed=0):
    """Step times as ratios to the first method's, every method stepping once in every round.

    Args:
        makers: {name: function of a list of parameters that returns an optimizer}.
        shapes: of the parameters; every optimizer has its own.
        rounds (int): how many, after three steps of each to warm up.

    Returns:
        DataFrame with a row for each name: ratio (median over the rounds), ratio_low and
        ratio_high (quartiles), fixed (ratio of a step of as many tensors of two entries: what
        costs the same whatever their size), programs (ratio of what a compiled step spends in
        Inductor's programs and torch's AdamW in its own, in further rounds, on a CPU), first
        (seconds of the first step, with compilation), bytes_per_parameter (state).
    """
    device = torch.device(device)
    steps, fixed, first, state, held, seats = {}, {}, {}, {}, {}, {}
    torch.empty(2**23 - 2**12)  # like a batch's activations: after 32 MB are freed, glibc keeps
    for name in tqdm(makers, desc="first steps", disable=QUIET):  # memory for the next time
        optimizer = build(makers[name], shapes, device, seed)
        steps[name] = stepper(optimizer)
        first[name] = seconds(steps[name], device)
        fixed[name] = stepper(build(makers[name], [(2,)] * len(shapes), device, seed))
        for step in (steps[name], fixed[name]) * 2:
            step()
        state[name] = state_bytes(optimizer)
        held[name] = moved(optimizer, seats)
    times = {name: ([], []) for name in makers}
    for _ in tqdm(range(rounds), desc="rounds", disable=QUIET):
        for name, taken in times.items():
            with seated(*held[name]):
                for step, seen in zip((steps[name], fixed[name]), taken):
                    seen.append(seconds(step, device))
    inside = {name: [] for name in makers}
    for _ in range(PROFILED):
        for name, seen in inside.items():
            with seated(*held[name]), programs() as spent:
                whole = seconds(steps[name], device)
            seen.append((sum(spent) if spent and device.type == "cpu" else np.nan, whole))
    spent, whole = np.array([*inside.values()]).T  # rounds x names
    share = dict(zip(makers, np.median(spent / whole[:, :1], axis=0)))
    base = np.array(next(iter(times.values()))[0])
    rows = []
    for name, (taken, few) in times.items():
        low, middle, high = np.quantile(np.array(taken) / base, [0.25, 0.5, 0.75])
        rows.append(dict(name=name, ratio=middle, ratio_low=low, ratio_high=high,
                         fixed=np.median(np.array(few) / base), programs=share[name],
                         bytes_per_parameter=state[name], first=first[name]))
    return pd.DataFrame(rows).set_index("name")


def moved(optimizer, seats):
    """Let its tensors lie in seats that others use in turn: ([its seats], [what it left there]).

    seats: {(parameter, which of its tensors, dtype): memory}, filled where one is missing.
    """
    places, kept, number = [], [], -1
    for t, name in tensors(optimizer).values():
        if name == "p":
            number, role, size = number + 1, 0, t.numel()
        key = number, role, t.dtype
        if key not in seats:
            seats[key] = t.new_zeros(size)
        kept.append(t.detach().clone())
        t.data = seats[key][: t.numel()].as_strided(t.shape, t.stride())
        places.append(t.detach())
        role += 1
    return places, kept


@contextlib.contextmanager
def seated(places, kept):
    """Within the block the seats hold what an optimizer left there, which is kept again."""
    torch._foreach_copy_(places, kept)
    yield
    torch._foreach_copy_(kept, places)


@contextlib.contextmanager
def programs():
    """A list, to which calls of Inductor's programs and of torch's AdamW add their seconds."""
    spent = []

    def timed(run):
        def call(*args, **kwargs):
            start = time.perf_counter()
            out = run(*args, **kwargs)
            spent.append(time.perf_counter() - start)
            return out
        return call

    places = [(vars(module), name) for module in PyCodeCache.modules for name in vars(module)
              if name.startswith("cpp_fused")] + [(vars(torch), "_fused_adamw_")]
    before = [(names, name, names[name]) for names, name in places]
    for names, name, run in before:
        names[name] = timed(run)
    try:
        yield spent
    finally:
        for names, name, run in before:
            names[name] = run


def seconds(step, device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(network, names, compiled=(), rounds=20, device="cpu", seed=0):
    """The methods beside torch's AdamW (fused and foreach) and their references, one table.

    Every method has rounds of its own, in which AdamW, the method in its modes and its reference
    take one step each: a row does not depend on what else is measured.

    Args:
        network: a key of ``NETWORKS``.
        names: keys of ``METHODS``, run eager and beside a reference that is installed.
        compiled: those of them that are compiled too.

    Returns:
        DataFrame with method, mode (fused, foreach, eager, compiled, reference), ratio with its
        quartiles, fixed and programs (see `compare`), floor (words over those of AdamW), words,
        bytes_per_parameter, reference (the package), device, torch, network; and as its
        attrs["first"] the seconds of first steps.
    """
    adamw = torch.optim.AdamW
    blocks = {"AdamW": {"foreach": partial(adamw, foreach=True)}}
    for name in names:
        make, reference = METHODS[name]
        block = blocks.setdefault(name, {})
        block["eager"] = make
        if name in compiled:
            block["compiled"] = partial(make, compile=True)
        if reference and name != "AdamW" and (theirs := installed(reference)):
            block["reference"] = partial(theirs, **getattr(make, "keywords", {}))
    tables = []
    for name, block in tqdm(blocks.items(), desc=network, disable=QUIET):
        makers = {("AdamW", "fused"): partial(adamw, fused=True),
                  **{(name, mode): make for mode, make in block.items()}}
        tables.append(compare(makers, NETWORKS[network], rounds, device, seed))
    table = pd.concat(tables)
    table = table[~table.index.duplicated()].reset_index()
    first = table.pop("first")
    table.insert(0, "mode", [mode for _, mode in table.name])
    table.insert(0, "method", [method for method, _ in table.pop("name")])
    floor = {name: words(METHODS[name][0]) for name in {*names, "AdamW"}}
    table.insert(7, "words", table.method.map(floor))
    table.insert(7, "floor", table.words / floor["AdamW"])
    packages = {name: reference.split(":")[0] for name, (_, reference) in METHODS.items()}
    device = torch.device(device)
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    table = table.assign(reference=table.method.map(packages), device=named,
                         torch=torch.__version__, network=network)
    table.attrs["first"] = dict(zip(zip(table.method, table["mode"]), first))
    return table


def installed(reference):
    """The class that package:class names, or None where the package is missing."""
    try:
        return resolve_name(reference)
    except ImportError:
        return None


# memory ------------------------------------------------------------------------------------------


def tensors(optimizer):
    """{address of its storage: (tensor, "p", "g" or its state key)} of all that a step may use."""
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            named = [(p, "p"), (p.grad, "g"), *((t, k) for k, t in optimizer.state[p].items())]
            found |= {t.untyped_storage().data_ptr(): (t, name) for t, name in named
                      if isinstance(t, Tensor) and t.dim()}
    return found


def state_bytes(optimizer):
    """Bytes of state for each parameter entry, without the parameter and its gradient."""
    rows = tensors(optimizer).values()
    size = sum(t.numel() * t.element_size() for t, name in rows if name not in ("p", "g"))
    return size / sum(t.numel() for t, name in rows if name == "p")


class Peak(TorchDispatchMode):
    """The most bytes alive at once of the storages that operations return within the block.

    known: tensors that were there before and do not count.
    """

    def __init__(self, known=()):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakSet(t.untyped_storage() for t in known)

    def freed(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        storages = [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)]
        for storage in storages:
            if storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.most = max(self.most, self.now)
        return out


def peak(optimizer):
    """The most bytes that an eager step holds at once beyond parameters, gradients and state."""
    step = stepper(optimizer)
    for _ in range(3):
        step()
    with Peak([t for t, _ in tensors(optimizer).values()]) as memory:
        step()
    return memory.most


# words -------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Which of the known storages are read, and which written, in the current phase."""

    def __init__(self, known):
        super().__init__()
        self.known, self.phases = known, [(set(), set())]

    def next_phase(self):
        self.phases.append((set(), set()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            read, written = self.phases[-1]
            for argument, value in zip(function._schema.arguments, args):
                changes = argument.alias_info is not None and argument.alias_info.is_write
                only_written = changes and "copy_" in function._schema.name
                for t in value if isinstance(value, (list, tuple)) else [value]:
                    key = t.untyped_storage().data_ptr() if isinstance(t, Tensor) else None
                    if key in self.known:
                        read |= set() if only_written else {key}
                        written |= {key} if changes else set()
        return out


def words(make, shape=(600, 1000)):
    """The floor: words that a step must read and write for each parameter entry of a matrix.

    Every tensor that the step uses is read once and, where it changes, written once; what must
    be known of all gradients before the first entry can move is another reading.
    """
    optimizer = build(make, [shape])
    step = stepper(optimizer)
    for _ in range(3):
        step()
    known = tensors(optimizer)
    with Traffic(known) as traffic:
        run = optimizer._over
        optimizer._over = lambda *a: (traffic.next_phase(), run(*a))[1]
        step()
    size = {key: t.numel() for key, (t, _) in known.items()}
    phases = traffic.phases[1:]
    looked, passed = phases if optimizer.look is not None else ((), merged(phases))
    moved = [key for part in (*looked, *passed) for key in part]
    return sum(size[key] for key in moved) / np.prod(shape)


def merged(phases):
    """The storages of several phases as those of one."""
    read, written = zip(*phases)
    return set().union(*read), set().union(*written)


def generated(make, *shapes):
    """The C++ program that Inductor makes of a step over tensors, or a matrix, on the CPU."""
    torch._dynamo.reset()
    step = stepper(build(partial(make, compile=True), shapes or [(600, 1000)]))
    # programs that are taken from these caches have no text
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        return run_and_get_code(step)[1][-1]


def moves(code, entries):
    """(loop, "::loadu" or ".store", tensor, entries at once) in the loops over all entries.

    A loop, named by its line, may be a nest of several; what it moves for a row or a column alone
    does not count.
    """
    nest = []
    for place, line in enumerate(code.splitlines()):
        depth = len(line) - len(line.lstrip())
        if line.strip() not in ("", "{"):
            nest = [level for level in nest if level[0] < depth]
        if begun := re.match(r" *for\(int64_t (x\d)=.*?<static_cast<int64_t>\((\d+)L\)", line):
            nest.append((depth, begun[1], int(begun[2]), place))
        moved = re.search(r"(::loadu|\.store)\((\w+) \+ static_cast<int64_t>\((.*?)\)"
                          r"(?:, static_cast<int64_t>\((\d+)L?\))?\)", line)
        if moved and np.prod([size for _, x, size, _ in nest if x in moved[3]]) == entries:
            yield nest[-1][-1], moved[1], moved[2], moved[4] and int(moved[4])


def loops(code, entries):
    """(words read, words written) in every loop of a generated program over so many entries."""
    found = {}
    for loop, kind, name, _ in moves(code, entries):
        found.setdefault(loop, (set(), set()))[kind == ".store"].add(name)
    return [(len(reads), len(writes)) for reads, writes in found.values()]


def lanes(code, entries):
    """How many entries the loads of a program's loops over all entries take at once."""
    return {width for _, kind, _, width in moves(code, entries) if kind == "::loadu"}


def buffers(code):
    """How many entries each tensor has that a generated program makes for itself."""
    shapes = re.findall(r"empty_strided_cpu\(\(([\d, ]*)\)", code)
    return [int(np.prod([int(n) for n in re.findall(r"\d+", shape)])) for shape in shapes]
