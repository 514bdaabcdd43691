"""Grids of calls: kept under an honest name, resumed, spread over processes that may die."""

import os
import signal
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch

import prodigy
from prodigy.lab import grid as lab
from prodigy.lab import runs, train
from prodigy.lab.data import load
from prodigy.lab.grid import GridError, described, fingerprint, grid

IRIS = load("iris")


def written(text, **names):
    """A function `f` from source text, as a notebook's cell makes it: of no importable module."""
    module = types.ModuleType("__main__")
    module.__dict__.update(names)
    exec(text, module.__dict__)
    return module.f


def adam(beta):
    return lambda params, lr: prodigy.Adam(params, lr=lr, betas=(beta, 0.999), capturable=True)


def noting(folder, n):
    """n^2; leaves a mark for every time it was called."""
    (folder / f"{n}.{len(list(folder.iterdir()))}.{os.getpid()}").touch()
    return n**2


def calls_made(folder):
    return sorted(int(path.name.partition(".")[0]) for path in folder.iterdir())


# the name under which a result is kept -----------------------------------------------------------


def test_functions_with_the_same_code_are_the_same():
    text = "def f(x):\n    return x + 1\n"
    assert described(written(text)) == described(written("\n\n# moved\n" + text))
    assert described(adam(0.9)) == described(adam(0.9))
    assert described(partial(max, 1)) == described(partial(max, 1))


@pytest.mark.parametrize("one, other", [
    ("def f(x): return x + 1", "def f(x): return x + 2"),
    ("def f(x): return x + 1", "def f(x): return x - 1"),
    ("def f(x): return x.a", "def f(x): return x.b"),
    ("def f(x, y=1): return x", "def f(x, y=2): return x"),
    ("def f(x, *, y=1): return x", "def f(x, *, y=2): return x"),
    ("def f(x): return [lambda: 1][0]()", "def f(x): return [lambda: 2][0]()"),
    ("f = lambda x: x", "f = lambda y: -y"),
    ("def g(): return 1\ndef f(x): return g()", "def g(): return 2\ndef f(x): return g()"),
    ("a = [1]\ndef f(x): return a", "a = [2]\ndef f(x): return a"),
    ("def f(x): return lambda: h(1)\ndef h(x): return x",
     "def f(x): return lambda: h(1)\nh = abs"),
    ("class f:\n a = 1", "class f:\n a = 2"),
    ("class g:\n def s(self): return 1\nf = g()", "class g:\n def s(self): return 2\nf = g()"),
    ("class g:\n def s(self): return 1\nf = g().s", "class g:\n def s(self): return 2\nf = g().s"),
    ("from prodigy import Adam as f", "from prodigy import AdamW as f"),
    ("from functools import partial as p\nf = p(max, 1)",
     "from functools import partial as p\nf = p(max, 2)"),
], ids=str)
def test_a_function_that_differs_is_another(one, other):
    assert described(written(one)) != described(written(other))


def test_closures_differ_by_what_they_close_over():
    assert described(adam(0.9)) != described(adam(0.8))
    assert described(train.steps_at(0.5)) != described(train.steps_at(0.6))
    assert described(prodigy.rivals.polynomial_average(8)) != described(
        prodigy.rivals.polynomial_average(4))


def test_functions_that_call_each_other_are_described():
    text = "def f(x): return g(x)\ndef g(x): return f(x) + {}\n"
    one, other = (described(written(text.format(n))) for n in (1, 2))
    assert one != other


def test_arguments_are_part_of_the_name():
    plain = dict(make=adam(0.9), data=IRIS, lrs=np.array([0.1, 0.2]), dtype=torch.float64)
    name = fingerprint(train.sweep, plain)
    assert fingerprint(train.sweep, {**plain, "lrs": np.array([0.1, 0.2])}) == name
    for change in (dict(lrs=np.array([0.1, 0.3])), dict(dtype=torch.float32),
                   dict(make=adam(0.8)), dict(data=load("wine")), dict(seeds=range(3))):
        assert fingerprint(train.sweep, plain | change) != name
    assert fingerprint(train.linear_decay, plain) != name


def test_the_name_is_the_same_in_another_process():
    code = ("from prodigy.lab import train\nfrom prodigy.lab.data import load\n"
            "from prodigy.lab.grid import fingerprint\nimport prodigy\n"
            "def f(beta):\n"
            "    return lambda p, lr: (prodigy.Adam(p, lr, betas=(beta, 0.9)), {1, 'a', None})\n"
            "arguments = dict(make=f(0.9), data=load('iris'), schedule=train.steps_at(0.5))\n"
            "print(fingerprint(train.sweep, arguments))\n")
    names = set()
    for seed in "12":
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             env=os.environ | {"PYTHONHASHSEED": seed}, check=True)
        names.add(run.stdout.strip())
    assert len(names) == 1 and len(names.pop()) == 32


def test_an_edited_package_is_another(tmp_path, monkeypatch):
    name = fingerprint(train.sweep, {})
    copy = tmp_path / "prodigy"
    for path in lab.PACKAGE.rglob("*.py"):
        (copy / path.relative_to(lab.PACKAGE)).parent.mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(lab.PACKAGE)).write_bytes(path.read_bytes())
    monkeypatch.setattr(lab, "PACKAGE", copy)
    assert fingerprint(train.sweep, {}) == name
    lab.sources.cache_clear()
    with open(copy / "classical.py", "a") as file:
        file.write("\n")
    assert fingerprint(train.sweep, {}) != name
    lab.sources.cache_clear()


# the cache ---------------------------------------------------------------------------------------


def test_finished_sweeps_are_kept(tmp_path, monkeypatch):
    runs = {b: dict(make=adam(b), data=IRIS, lrs=[0.1], seeds=[0], epochs=2) for b in (0.9, 0.8)}
    first = train.sweeps(runs, 1, cache=tmp_path)
    monkeypatch.setattr(lab, "attempt", None)  # nothing may be computed now
    again = train.sweeps(runs, 1, cache=tmp_path)
    for key in runs:
        np.testing.assert_array_equal(first[key].loss, again[key].loss)
    with pytest.raises(GridError, match="NoneType"):
        train.sweeps(runs | {0.7: runs[0.9] | dict(make=adam(0.7))}, 1, cache=tmp_path)


def test_an_interrupted_grid_goes_on_where_it_was(tmp_path):
    marks, cache = tmp_path / "marks", tmp_path / "cache"
    marks.mkdir()

    def interrupted(n, stop):
        if n == 3 and stop.is_file():
            raise KeyboardInterrupt
        return noting(marks, n)

    stop = tmp_path / "stop"
    stop.touch()
    calls = {n: dict(n=n, stop=stop) for n in range(1, 6)}
    with pytest.raises(KeyboardInterrupt):
        grid(interrupted, calls, 1, cache, quiet=True)
    assert calls_made(marks) == [1, 2]
    stop.unlink()
    assert grid(interrupted, calls, 1, cache, quiet=True) == {n: n**2 for n in range(1, 6)}
    assert calls_made(marks) == [1, 2, 3, 4, 5]


def test_the_folder_of_the_cache(monkeypatch, tmp_path):
    assert lab.folder("auto") == Path(prodigy.__file__).parents[1] / "build" / "cache"
    assert lab.folder("there") == Path("there")
    monkeypatch.setattr(lab, "PACKAGE", tmp_path / "site-packages" / "prodigy")
    assert lab.folder("auto") == Path("build/cache")


# what goes wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_cell_is_reported_with_its_parameters_and_loses_no_other(tmp_path, jobs):
    runs = {lr: dict(make=adam(0.9), data=IRIS, lrs=[lr], seeds=[0], epochs=1, batch=batch)
            for lr, batch in ((0.1, 16), (0.2, 999), (0.3, 16))}
    with pytest.raises(GridError) as caught:
        train.sweeps(runs, jobs, cache=tmp_path)
    text = str(caught.value)
    assert text.startswith("1 of 3 calls failed\n0.2: make=")
    assert "lrs=[0.2]" in text and "batch=999" in text and "ValueError: batch must be" in text
    assert sorted(caught.value.results) == [0.1, 0.3]
    runs[0.2]["batch"] = 16
    assert list(train.sweeps(runs, jobs, cache=tmp_path)) == [0.1, 0.2, 0.3]


def fragile(folder, n, weak=3, always=False):
    """n^2, but for n = weak the process is killed, the first time or always."""
    if n == weak and (always or not (folder / "killed").is_file()):
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return n**2


def test_a_killed_worker_loses_nothing(tmp_path):
    here, folder = fragile, tmp_path
    calls = {n: dict(n=n) for n in range(1, 9)}

    def function(n):
        return here(folder, n)

    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        assert grid(function, calls, 2, quiet=True) == {n: n**2 for n in calls}
    assert (tmp_path / "killed").is_file()


def test_a_call_that_always_kills_its_worker_is_reported(tmp_path):
    calls = {n: dict(folder=tmp_path, n=n, weak=1, always=True) for n in (1, 2)}
    message = r"^1 of 2 calls failed\n1: folder=.*n=1.*\nTerminated"
    with pytest.raises(GridError, match=message) as caught:
        grid(fragile, calls, 2, quiet=True)
    assert caught.value.results == {2: 4}


# another engine ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True,
                                  dashboard_address=":0") as cluster:
        yield cluster


def test_sweeps_run_on_a_dask_cluster(cluster, capsys):
    runs = {b: dict(make=adam(b), data=IRIS, lrs=[0.1], seeds=[0], epochs=2) for b in (0.9, 0.8)}
    away = train.sweeps(runs, scheduler=cluster.scheduler_address)
    assert "Dask dashboard: http" in capsys.readouterr().out
    here = train.sweeps(runs, 1)
    for key in runs:
        np.testing.assert_allclose(away[key].loss, here[key].loss, rtol=1e-12)


def test_the_work_is_done_by_the_clusters_processes(cluster):
    workers = {pid for pid in cluster.scheduler_info["workers"]}
    pids = grid(lambda n: os.getpid(), {n: dict(n=n) for n in range(4)}, quiet=True,
                scheduler=cluster.scheduler_address)
    assert os.getpid() not in pids.values() and len(set(pids.values())) <= len(workers)


def test_a_killed_worker_of_the_cluster_loses_nothing(cluster, tmp_path):
    calls = {n: dict(folder=tmp_path, n=n) for n in range(1, 9)}
    results = grid(fragile, calls, quiet=True, scheduler=cluster.scheduler_address)
    assert results == {n: n**2 for n in calls} and (tmp_path / "killed").is_file()


def test_without_dask_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"scheduler needs Dask: pip install"):
        grid(abs, {}, scheduler="tcp://127.0.0.1:1")


def test_a_finished_run_is_known_by_its_key(tmp_path):
    """Whatever numbers, texts or None it is made of, also after the way through the file."""
    keys = [dict(lr=lr, name=name, C=None) for lr in (1 / 3, 2.0**-20) for name in ("001", "1e3")]
    calls = []

    def trained(key):
        calls.append(key)
        return pd.DataFrame({"loss": [1 / 7]})

    first, again = (runs.collect(trained, keys, tmp_path / "runs.csv") for _ in range(2))
    assert len(calls) == len(keys) == len(first) == len(again)
    assert again["lr"].tolist() == [key["lr"] for key in keys]
    assert again["name"].tolist() == [key["name"] for key in keys]
