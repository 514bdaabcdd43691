"""Many calls of one function as one grid: spread over an engine, kept on disk, resumed.

    results = grid(sweep, {("iris", "Adam"): dict(make=..., data=...), ...}, cache="auto")

joblib runs the calls, on this machine's cores or on the Dask cluster at ``scheduler``, and
joblib.Memory keeps what each returned. What a result is filed under is a hash of all it depends
on: the arguments, functions by their code (see ``described``), the files of the package
``prodigy``, and the versions of torch and numpy. An edited optimizer therefore computes anew.
"""

import dis
import hashlib
import sys
import traceback
from contextlib import contextmanager
from functools import cache as once
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType

import joblib
import numpy as np
import torch
from tqdm.auto import tqdm

import prodigy

PACKAGE = Path(prodigy.__file__).parent
FIXED = {"prodigy", "torch", "numpy", *sys.stdlib_module_names} - {"__main__"}  # known by name


class GridError(RuntimeError):
    """Some calls of a grid failed; ``results`` holds what the others returned."""

    def __init__(self, message, results):
        super().__init__(message)
        self.results = results


def grid(function, calls, jobs=-1, cache="", scheduler="", label="", quiet=False):
    """{key: function(**arguments)} for every call, in the order of `calls`.

    What is found in the cache is not called again, so that an interrupted grid goes on where it
    was. A call that raises is reported at the end and the others are kept. Where a worker dies,
    what had not ended is called again, at first one by itself; if its worker dies too, it failed.

    Args:
        function: importable, or a closure; its results are pickled.
        calls: {key: arguments by name}; started in this order.
        jobs: how many at a time; -1 is one for each core (or worker of the cluster).
        cache: folder of finished calls; "auto" is build/cache of the checkout, "" keeps none.
        scheduler: address of a Dask scheduler; "" is this machine, or what
            ``joblib.parallel_config`` says.
        label, quiet: what the progress bar says, and whether there is none.

    Raises:
        GridError: naming every call that failed, with its arguments; the rest is in ``results``.
    """
    memory = joblib.Memory(folder(cache), verbose=0) if cache else None
    kept = memory and memory.cache(keep, ignore=["result"])
    names = {key: fingerprint(function, calls[key]) for key in calls if kept}
    results = {key: kept(name, None) for key, name in names.items()
               if kept.check_call_in_cache(name, None)}
    missing, failed, crowd = [key for key in calls if key not in results], {}, True
    bar = tqdm(total=len(calls), initial=len(results), desc=label, leave=False, disable=quiet)
    with bar, engine(scheduler):
        while missing:
            now = missing if crowd else missing[:1]
            parallel = joblib.Parallel(jobs, return_as="generator_unordered", max_nbytes=None)
            tasks = [joblib.delayed(attempt)(function, key, calls[key]) for key in now]
            try:
                for key, result, error in parallel(tasks):
                    if error:
                        failed[key] = error
                    else:
                        results[key] = kept(names[key], result) if kept else result
                    missing.remove(key)
                    bar.update()
                crowd = True
            except Exception as error:  # calls raise nothing: a worker died, or the engine failed
                if not crowd:
                    failed[missing.pop(0)] = f"{type(error).__name__}: {error}"
                crowd = not crowd
    if failed:
        reports = [f"{key!r}: {short(calls[key])}\n{text}" for key, text in failed.items()]
        message = "\n".join([f"{len(failed)} of {len(calls)} calls failed", *reports])
        raise GridError(message, results)
    return {key: results[key] for key in calls}


def attempt(function, key, arguments):
    """(key, result, None), or (key, None, what went wrong)."""
    try:
        return key, function(**arguments), None
    except Exception:
        return key, None, traceback.format_exc()


def keep(name, result):
    """What joblib.Memory files under a name."""
    return result


def short(arguments):
    """Arguments on one line, large ones shortened."""
    texts = (f"{name}={' '.join(repr(value).split())}" for name, value in arguments.items())
    return ", ".join(text if len(text) < 80 else text[:77] + "..." for text in texts)


def folder(cache):
    """The cache's folder: "auto" is build/cache beside the package, or here if it is installed."""
    root = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else Path()
    return root / "build" / "cache" if cache == "auto" else Path(cache)


@contextmanager
def engine(scheduler):
    """Within it joblib runs on the Dask cluster at that address, if there is one."""
    if not scheduler:
        yield
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError("scheduler needs Dask: pip install 'prodigy-family[dask]'") from error
    with Client(scheduler) as client, joblib.parallel_config(backend="dask"):
        print(f"Dask dashboard: {client.dashboard_link}")
        yield


# what a result depends on ------------------------------------------------------------------------


def fingerprint(function, arguments):
    """A hash of a call: of the function, its arguments, the package and the versions."""
    versions = (torch.__version__, np.__version__, sys.version_info[:2])
    return joblib.hash((described(function), described(arguments), sources(PACKAGE), versions))


@once
def sources(package):
    """A hash of the package's files, taken once in a process: of the code that is imported."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def described(value, seen=()):
    """A hash of a value that is the same in every process.

    Functions and classes of prodigy, torch, numpy and Python stand for themselves, by name. Any
    other, and every closure, is its code with constants, defaults, and what the code looks up:
    variables of enclosing functions and globals. Modules are known by name.
    """
    if id(value) in seen:
        return "itself"
    return joblib.hash(parts(value, partial(described, seen=(*seen, id(value)))))


def parts(value, inner):
    """What a value is made of: strings and hashes by `inner`, or itself."""
    if isinstance(value, partial):
        return "partial", inner(value.func), inner(value.args), inner(value.keywords)
    if isinstance(value, MethodType):
        return "method", inner(value.__func__), inner(value.__self__)
    if isinstance(value, ModuleType):
        return "module", value.__name__
    if isinstance(value, CodeType):
        names = inner(value.co_names + value.co_varnames + value.co_freevars)
        return "code", value.co_code, value.co_exceptiontable, names, inner(value.co_consts)
    if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        if known(value) and "<locals>" not in value.__qualname__:
            return "name", value.__module__, value.__qualname__
        if isinstance(value, type):
            own = {n: a for n, a in vars(value).items() if n not in ("__dict__", "__weakref__")}
            return "class", inner(value.__bases__), inner(own)
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        used = {n: value.__globals__[n] for n in looked_up(value.__code__) & {*value.__globals__}}
        rest = value.__defaults__, value.__kwdefaults__, cells, dict(sorted(used.items()))
        return "function", inner(value.__code__), *map(inner, rest)
    if isinstance(value, dict):
        return "dict", *(inner(part) for item in value.items() for part in item)
    if isinstance(value, (list, tuple)):
        return type(value).__name__, *map(inner, value)
    if hasattr(value, "__dict__") and not known(type(value)):
        return "object", inner(type(value)), inner(vars(value))
    return value


def known(value):
    """Whether a function or class belongs to what the versions and `sources` pin down."""
    return (value.__module__ or "builtins").partition(".")[0] in FIXED


def looked_up(code):
    """The global names that code, and the functions within it, may look up."""
    loads = [i for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    names = {i.argval for i in loads}
    return names.union(*(looked_up(part) for part in code.co_consts if isinstance(part, CodeType)))
