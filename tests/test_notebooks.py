"""Every committed notebook: its form, a small run, and its numbers."""

import json
import re
import symtable
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import yaml

from prodigy.lab import reproduce

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = reproduce.Layout(ROOT)
PATHS = sorted(LAYOUT.notebooks.glob("*.ipynb"))
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/*])/(?:home|root|Users|tmp|opt|mnt|var|private|work)/\w")
TOLERANCE = 1e-6

every_notebook = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def table_names(folder, stem):
    names = {path.name for path in folder.glob(f"{stem[:3]}*.csv")}
    return {name for name in names if not name.endswith("_full.csv")}


@every_notebook
def test_name_and_kernel(path):
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)
    assert [other.stem[:2] for other in PATHS].count(path.stem[:2]) == 1
    assert read(path).metadata.kernelspec.name == "python3"


@every_notebook
def test_first_cells(path):
    cells = read(path).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    assert [cell.cell_type for cell in cells[1:4]] == ["code"] * 3
    assert "import" in cells[1].source
    assert cells[2].metadata.tags == ["parameters"]


@every_notebook
def test_parameters_cell_holds_commented_literals(path):
    notebook = read(path)
    values = reproduce.parameters(notebook)
    assert isinstance(values["seed"], int)
    assert values["device"] == "auto" and values["figures"] == ""
    for line in reproduce.parameters_cell(notebook).source.splitlines():
        assert re.fullmatch(r"\w+ = .+  # .+", line), line


@every_notebook
def test_committed_as_executed_from_top_to_bottom(path):
    notebook = read(path)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    kinds = [(output.output_type, output.get("name")) for output in outputs(notebook)]
    assert ("error", None) not in kinds
    assert ("stream", "stderr") not in kinds


@every_notebook
def test_nothing_of_the_machine_is_committed(path):
    text = path.read_text()
    assert not ABSOLUTE_PATH.search(text)
    assert len(text.encode()) < 300_000
    notebook = json.loads(text)
    assert "papermill" not in notebook["metadata"]
    for cell in notebook["cells"]:
        assert not {"papermill", "execution"} & set(cell["metadata"])


@every_notebook
def test_closes_with_checks(path):
    notebook = read(path)
    headings = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert any(re.search(r"^#+ Checks", source, re.MULTILINE) for source in headings)
    assert any(cell.source.count("assert ") >= 3 for cell in code_cells(notebook))


@every_notebook
def test_no_cell_overwrites_a_parameter(path):
    """The checks that follow would ask the new value whether the run was the committed one."""
    notebook = read(path)
    names = set(reproduce.parameters(notebook)) - {"device"}  # "auto" becomes what it stands for
    cells = [c for c in code_cells(notebook) if "parameters" not in c.metadata.get("tags", ())]
    for cell in cells:
        source = re.sub(r"(?m)^[%!].*$", "", cell.source)
        symbols = symtable.symtable(source, path.stem, "exec").get_symbols()
        assert not names & {symbol.get_name() for symbol in symbols if symbol.is_assigned()}


@every_notebook
def test_no_cell_prints_into_an_output_widget(path):
    """A run may then wait for ever: nbclient answers such a widget on the channel on which it
    waits for the cell's end, and can miss it (jupyter/nbclient#312)."""
    sources = "".join(cell.source for cell in code_cells(read(path)))
    assert not re.search(r"interact|Output\(", sources)


@pytest.mark.parametrize("profile", ["quick", "gpu"])
def test_profiles_name_notebooks_and_parameters(profile):
    sections = yaml.safe_load((LAYOUT.notebooks / f"{profile}.yml").read_text()) or {}
    known = {path.stem: set(reproduce.parameters(read(path))) for path in PATHS}
    for stem, values in sections.items():
        assert set(values or {}) <= known[stem], stem


@every_notebook
def test_outputs_belong_to_the_sources(path):
    """A slow notebook is not recomputed here, so `make figures` leaves the hash of what it ran."""
    if reproduce.profile_values(LAYOUT, "quick", path.stem):
        notebook = read(path)
        recorded = notebook.metadata.get("prodigy", {}).get("sources")
        assert recorded == reproduce.source_hash(notebook), f"make figures NB={path.stem}"


@every_notebook
def test_runs_and_gives_the_committed_tables(path, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    quick = reproduce.profile_values(LAYOUT, "quick", path.stem)
    figures = tmp_path / "figures"
    figures.mkdir()
    run = papermill.execute_notebook(
        str(path), str(tmp_path / path.name), parameters=quick | {"figures": str(figures)},
        kernel_name="python3", progress_bar=False, cwd=str(tmp_path), execution_timeout=900,
    )
    stray = [output.text for output in outputs(run) if output.get("name") == "stderr"]
    assert not stray
    names = table_names(figures, path.stem)
    assert names == table_names(LAYOUT.committed, path.stem)
    assert {file.name for file in figures.iterdir()} <= names | {
        name.replace(".csv", ".svg") for name in names}
    for name in names:
        ours, committed = pd.read_csv(figures / name), pd.read_csv(LAYOUT.committed / name)
        assert list(ours.columns) == list(committed.columns)
        if not quick:
            pd.testing.assert_frame_equal(ours, committed, rtol=TOLERANCE, atol=TOLERANCE)
