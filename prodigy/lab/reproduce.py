"""The notebook runner behind `make reproduce` and `make figures`.

    python -m prodigy.lab.reproduce [NOTEBOOK ...] [--profile NAME] [--refresh] [--root FOLDER]

Without --refresh every `notebooks/NN_*.ipynb` is executed by papermill into `build/notebooks`, and
its pictures and numbers go to `build/figures`; the committed files are only read. A notebook whose
sources, parameters, package files and Python and torch versions are those of its last finished run
is not run again. With --refresh the notebooks are executed in place without timestamps, and
`figures/` is brought up to date. Both end with the table of differences: how far each number
behind a figure is from the committed one. The exit code is 1 if a notebook failed.
"""

import argparse
import ast
import copy
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import torch
import yaml
from jupyter_client.manager import KernelManager
from nbconvert.preprocessors import ExecutePreprocessor
from pandas.api.types import is_numeric_dtype
from traitlets.config import Config

KERNEL = "python3"
WIDGET = "application/vnd.jupyter.widget-view+json"
# plain TCP between runner and kernel draws a warning in every run
ENCRYPTED = Config({"KernelManager": {"transport_encryption": "auto"}})


@dataclass(frozen=True)
class Layout:
    """Where everything is, from the root of the repository."""

    root: Path

    @property
    def notebooks(self):
        return self.root / "notebooks"

    @property
    def committed(self):
        return self.root / "figures"

    @property
    def runs(self):
        return self.root / "build" / "notebooks"

    @property
    def figures(self):
        return self.root / "build" / "figures"


def parameters_cell(notebook):
    """The one cell tagged `parameters`. Raises ValueError where there is none or several."""
    found = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(found) != 1:
        raise ValueError(f"{len(found)} cells are tagged parameters; there must be one")
    return found[0]


def parameters(notebook):
    """Names and default values of the parameters cell, which may assign literals only."""
    values = {}
    for statement in ast.parse(parameters_cell(notebook).source).body:
        line = ast.unparse(statement)
        targets = getattr(statement, "targets", [])
        if len(targets) != 1 or not isinstance(targets[0], ast.Name):
            raise ValueError(f"the parameters cell holds {line!r}; write name = literal")
        try:
            values[targets[0].id] = ast.literal_eval(statement.value)
        except ValueError:
            raise ValueError(f"the parameters cell computes {line!r}; write a literal") from None
    return values


def profile_values(layout, profile, stem):
    """The values of section `stem` in notebooks/<profile>.yml; {} without profile or section."""
    if not profile:
        return {}
    path = layout.notebooks / f"{profile}.yml"
    if not path.is_file():
        raise SystemExit(f"profile: there is no {path}")
    return (yaml.safe_load(path.read_text()) or {}).get(stem) or {}


def select(layout, names):
    """The notebooks to run, sorted; names are stems (with or without .ipynb) or their numbers."""
    every = {path.stem: path for path in sorted(layout.notebooks.glob("[0-9][0-9]_*.ipynb"))}
    if not every:
        raise SystemExit(f"no notebooks in {layout.notebooks}; run this in the repository's root")
    stems = []
    for name in names:
        wanted = Path(name).name.removesuffix(".ipynb")
        matches = [stem for stem in every if wanted in (stem, stem[:2])]
        if not matches:
            raise SystemExit(f"no notebook {name!r}; there are {', '.join(every)}")
        stems += matches
    return [path for stem, path in every.items() if stem in stems or not names]


def source_hash(notebook):
    """sha256 of the notebook's cells without their outputs, the parameters cell included."""
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def signature(layout, notebook, values):
    """Hash of all that the run depends on: cells, values, package, published curves, versions."""
    parts = [source_hash(notebook), values, platform.python_version(), torch.__version__]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    files = [*layout.root.glob("prodigy/**/*.py"), *layout.root.glob("figures/published/*.csv")]
    for path in sorted(files):
        digest.update(f"\n{path.relative_to(layout.root)} ".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def up_to_date(layout, stem, key):
    """Whether a finished run with this key stands in build/, with all that it wrote."""
    record = layout.runs / f"{stem}.json"
    if not record.is_file() or not (layout.runs / f"{stem}.ipynb").is_file():
        return False
    last = json.loads(record.read_text())
    return last["key"] == key and all((layout.figures / name).is_file() for name in last["files"])


def written(folder, stem):
    """Names of the pictures and tables in folder that carry this notebook's number."""
    return sorted(path.name for path in folder.glob(f"{stem[:3]}*") if path.is_file())


def with_figures(notebook, folder):
    """A copy of the notebook whose parameters cell says `figures = folder`."""
    changed = copy.deepcopy(notebook)
    cell = parameters_cell(changed)
    lines = cell.source.splitlines()
    for statement in ast.parse(cell.source).body:
        if statement.targets[0].id == "figures":
            lines[statement.lineno - 1:statement.end_lineno] = [f"figures = {str(folder)!r}"]
    cell.source = "\n".join(lines)
    return changed


def execute_into_build(layout, path, values, label):
    """Run by papermill into build/notebooks; the committed notebook is only read."""
    bar = {"desc": label, "disable": not sys.stderr.isatty(), "leave": False}
    papermill.execute_notebook(
        str(path), str(layout.runs / path.name), parameters=values, kernel_name=KERNEL,
        progress_bar=bar, cwd=str(layout.runs), config=ENCRYPTED,
    )


def drop_widgets(notebook):
    """Take the widgets and their state out: they live in a kernel only, under random names."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]


def execute_in_place(layout, path):
    """Run by nbconvert and write outputs into the committed notebook; its sources stay.

    Widgets are left out: a cell that shows one is committed without it. The hash of these sources
    is left in the notebook's metadata (prodigy: sources), so that a test sees when cells were
    edited and not run.
    """
    notebook = nbformat.read(path, as_version=4)
    run = with_figures(notebook, layout.figures)
    executor = ExecutePreprocessor(
        timeout=None, kernel_name=KERNEL, record_timing=False, config=ENCRYPTED)
    executor.preprocess(run, {"metadata": {"path": str(layout.notebooks)}})
    parameters_cell(run).source = parameters_cell(notebook).source
    drop_widgets(run)
    run.metadata["prodigy"] = {"sources": source_hash(run)}
    nbformat.write(run, path)


def run_one(layout, path, profile, refresh, label):
    """Run one notebook unless it is up to date; returns whether it ran, raises where it failed."""
    notebook = nbformat.read(path, as_version=4)
    values = profile_values(layout, profile, path.stem) | {"figures": str(layout.figures)}
    unknown = sorted(set(values) - set(parameters(notebook)))
    if unknown:
        raise ValueError(f"the parameters cell does not name {', '.join(unknown)}")
    key = signature(layout, notebook, values)
    record = layout.runs / f"{path.stem}.json"
    if not refresh and up_to_date(layout, path.stem, key):
        return False
    print(f"{label}: running", flush=True)
    record.unlink(missing_ok=True)
    for name in written(layout.figures, path.stem):
        (layout.figures / name).unlink()
    if refresh:
        execute_in_place(layout, path)
        for name in written(layout.figures, path.stem):
            shutil.copy(layout.figures / name, layout.committed / name)
    else:
        execute_into_build(layout, path, values, label)
        files = written(layout.figures, path.stem)
        record.write_text(json.dumps({"key": key, "files": files}))
    return True


def describe(error):
    """One line for a failed run: the cell, where one is known, and the error."""
    count = getattr(error, "exec_count", None)
    where = f"cell In [{count}]: " if count else ""
    kind = getattr(error, "ename", type(error).__name__)
    text = str(getattr(error, "evalue", error)).strip().splitlines() or [""]
    return f"{where}{kind}: {text[0]}"


def compare_tables(new, old):
    """Lines that say how far the table new is from the committed table old, column by column."""
    lines = []
    for words, columns in (("missing", old.columns.difference(new.columns, sort=False)),
                           ("extra", new.columns.difference(old.columns, sort=False))):
        if len(columns):
            lines.append(f"{words} columns: {', '.join(columns)}")
    rows = min(len(new), len(old))
    if len(new) != len(old):
        lines.append(f"{len(new)} rows here, {len(old)} committed; the first {rows} are compared")
    for column in old.columns.intersection(new.columns, sort=False):
        here, there = new[column].iloc[:rows], old[column].iloc[:rows]
        lines.append(f"{column}: {compare_columns(here, there)}")
    return lines


def compare_columns(here, there):
    """The largest absolute and relative difference of two columns, or how many texts differ."""
    if not (is_numeric_dtype(here) and is_numeric_dtype(there)):
        texts = (column.astype(str).fillna("") for column in (here, there))
        differ = sum(a != b for a, b in zip(*texts))
        return f"{differ} of {len(here)} texts differ" if differ else "same texts"
    a, b = here.to_numpy(float), there.to_numpy(float)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(all="ignore"):
        absolute = np.where(same, 0, np.abs(a - b))
        relative = np.where(same, 0, absolute / np.abs(b))
    absolute[np.isnan(absolute)] = np.inf
    relative[np.isnan(relative)] = np.inf
    largest = absolute.max(initial=0), relative.max(initial=0)
    return "max abs {:.1e}, max rel {:.1e}".format(*largest) if max(largest) else "equal"


def tables(folder, stems):
    """{file name: table} of the CSV files in folder that belong to the notebooks stems."""
    prefixes = {stem[:3] for stem in stems}
    paths = sorted(path for path in folder.glob("*.csv") if path.name[:3] in prefixes)
    return {path.name: pd.read_csv(path) for path in paths}


def difference_report(new, old):
    """The table of differences, figure by figure, from two results of `tables`."""
    lines = []
    for name in sorted({*new, *old}):
        if name not in new:
            lines.append(f"{name}: committed, but not written by this run")
        elif name not in old:
            lines.append(f"{name}: new, nothing is committed to compare with")
        else:
            lines.append(f"{name}: {len(new[name])} rows")
            lines += [f"    {line}" for line in compare_tables(new[name], old[name])]
    return lines


def check_kernel():
    """Refuse, in words, a kernel python3 that is another Python than the one running this."""
    command = KernelManager(kernel_name=KERNEL).format_kernel_cmd()[0]
    if command != sys.executable:
        raise SystemExit(
            f"the Jupyter kernel {KERNEL} starts {command}, not {sys.executable}; remove that "
            "kernel (jupyter kernelspec list shows where it is) or unset JUPYTER_PATH"
        )


def run_all(layout, paths, profile, refresh):
    """Run the notebooks one after the other; returns {stem: line} of those that failed."""
    failures = {}
    for number, path in enumerate(paths, 1):
        label = f"[{number}/{len(paths)}] {path.stem}"
        start = time.monotonic()
        try:
            ran = run_one(layout, path, profile, refresh, label)
        except Exception as error:  # whatever a notebook raises must not stop the others
            failures[path.stem] = describe(error)
            print(f"{label}: FAILED, {failures[path.stem]}", flush=True)
        else:
            state = f"done in {time.monotonic() - start:.0f} s" if ran else "up to date"
            print(f"{label}: {state}", flush=True)
    return failures


def main(arguments=None):
    """Run what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run the notebooks and compare their figures.")
    parser.add_argument("notebook", nargs="*", help="names or numbers; all if none is given")
    parser.add_argument("--profile", default="", help="inject the values of notebooks/PROFILE.yml")
    parser.add_argument("--refresh", action="store_true", help="renew notebooks/ and figures/")
    parser.add_argument("--root", type=Path, default=Path(), help="the repository's root")
    asked = parser.parse_args(arguments)
    if asked.refresh and asked.profile:
        parser.error("--refresh commits the defaults; it takes no --profile")
    layout = Layout(asked.root.resolve())
    paths = select(layout, asked.notebook)
    for path in paths:
        profile_values(layout, asked.profile, path.stem)
    check_kernel()
    os.environ["TQDM_DISABLE"] = "1"  # for the kernels, which are never terminals
    for folder in (layout.runs, layout.figures, layout.committed):
        folder.mkdir(parents=True, exist_ok=True)
    stems = [path.stem for path in paths]
    old, begun = tables(layout.committed, stems), time.time()
    failures = run_all(layout, paths, asked.profile, asked.refresh)
    finished = [stem for stem in stems if stem not in failures]
    if asked.profile:
        print(f"\nParameters of {asked.profile}.yml: other numbers than the committed ones")
    print("\nDifferences from the committed figures")
    new = tables(layout.figures, finished)
    mine = {name: table for name, table in old.items() if name[:3] in {s[:3] for s in finished}}
    print("\n".join(difference_report(new, mine)) or "no tables")
    for stem, line in failures.items():
        written = layout.runs / f"{stem}.ipynb"
        fresh = written.is_file() and written.stat().st_mtime >= begun
        print(f"\n{stem} FAILED: {line}" + f"\n    see {written}" * fresh)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
