"""The notebook runner on two small notebooks: runs, skips, failures, differences, refreshing."""

import json
import os
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from prodigy.lab import reproduce

TABLE = """
from pathlib import Path
if figures:
    rows = "\\n".join(f"{k},{height * k},point {k}" for k in range(steps))
    Path(figures, "11_line.csv").write_text("k,value,label\\n" + rows + "\\n")
    Path(figures, "11_line.svg").write_text("<svg/>")
"""
PARAMETERS = """seed = 0  # of nothing
height = 2.0  # slope
steps = 3  # rows
figures = ""  # folder"""


def notebook(*sources, parameters=PARAMETERS):
    cells = [new_markdown_cell("# Draw a line"),
             new_code_cell(parameters, metadata={"tags": ["parameters"]}),
             *(new_code_cell(source) for source in sources)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


@pytest.fixture
def root(tmp_path):
    """A repository with the notebooks 11_line and 12_fails, a package and committed figures."""
    for folder in ("notebooks", "prodigy", "figures"):
        (tmp_path / folder).mkdir()
    nbformat.write(notebook(TABLE), tmp_path / "notebooks" / "11_line.ipynb")
    nbformat.write(notebook("height + 1", "1 / 0", "2"), tmp_path / "notebooks" / "12_fails.ipynb")
    (tmp_path / "notebooks" / "gpu.yml").write_text("11_line:\n  height: 5.0\n")
    (tmp_path / "prodigy" / "step.py").write_text("x = 1\n")
    (tmp_path / "figures" / "11_line.csv").write_text("k,value,label\n0,0.0,point 0\n")
    return tmp_path


def run(root, *arguments):
    """The exit code of the runner over this repository, called in this process."""
    return reproduce.main([*arguments, "--root", str(root)])


def stamp(root):
    return (root / "build" / "notebooks" / "11_line.ipynb").stat().st_mtime_ns


def test_a_run_leaves_outputs_in_build_and_the_committed_files_alone(root, capsys):
    before = {path: path.read_bytes() for path in root.glob("[nf]*/*")}
    assert run(root, "11_line") == 0
    text = capsys.readouterr().out
    assert "[1/1] 11_line: running" in text and "[1/1] 11_line: done in" in text
    made = nbformat.read(root / "build" / "notebooks" / "11_line.ipynb", as_version=4)
    assert any("injected-parameters" in cell.metadata.get("tags", []) for cell in made.cells)
    table = pd.read_csv(root / "build" / "figures" / "11_line.csv")
    assert table["value"].tolist() == [0, 2, 4]
    assert "3 rows here, 1 committed" in text and "value: equal" in text
    assert {path: path.read_bytes() for path in root.glob("[nf]*/*")} == before


def test_what_is_up_to_date_is_skipped_and_what_changed_is_run(root, capsys):
    run(root, "11")
    first = stamp(root)
    assert run(root, "11") == 0
    last = capsys.readouterr().out.rpartition("11_line: done in")[2]
    assert "11_line: up to date" in last and "running" not in last and stamp(root) == first
    (root / "prodigy" / "step.py").write_text("x = 2\n")
    run(root, "11")
    second = stamp(root)
    assert second != first
    assert run(root, "11", "--profile", "gpu") == 0
    assert stamp(root) != second
    table = pd.read_csv(root / "build" / "figures" / "11_line.csv")
    assert table["value"].tolist() == [0, 5, 10]
    assert "other numbers than the committed ones" in capsys.readouterr().out


def test_a_failed_run_makes_the_one_before_it_count_no_more(root, capsys):
    nbformat.write(notebook("1 / (1 - seed)"), root / "notebooks" / "13_plain.ipynb")
    (root / "notebooks" / "gpu.yml").write_text("13_plain:\n  seed: 1\n")
    assert run(root, "13") == 0
    assert run(root, "13", "--profile", "gpu") == 1
    capsys.readouterr()
    assert run(root, "13") == 0
    assert "done in" in capsys.readouterr().out


def test_the_key_changes_with_all_that_a_run_depends_on(root):
    layout = reproduce.Layout(root)
    made = notebook(TABLE)
    key = reproduce.signature(layout, made, {"height": 1.0})
    assert reproduce.signature(layout, notebook(TABLE), {"height": 1.0}) == key
    assert reproduce.signature(layout, made, {"height": 2.0}) != key
    assert reproduce.signature(layout, notebook(TABLE + "\n"), {"height": 1.0}) != key
    (root / "prodigy" / "lab").mkdir()
    (root / "prodigy" / "lab" / "new.py").write_text("")
    with_file = reproduce.signature(layout, made, {"height": 1.0})
    assert with_file != key
    (root / "figures" / "published").mkdir()
    (root / "figures" / "published" / "curve.csv").write_text("k\n1\n")
    assert reproduce.signature(layout, made, {"height": 1.0}) != with_file


def test_an_output_counts_only_when_its_run_finished(root):
    layout = reproduce.Layout(root)
    layout.runs.mkdir(parents=True)
    layout.figures.mkdir()
    assert not reproduce.up_to_date(layout, "11_line", "key")
    record = {"key": "key", "files": ["11_line.csv"]}
    (layout.runs / "11_line.json").write_text(json.dumps(record))
    (layout.figures / "11_line.csv").write_text("k\n")
    assert not reproduce.up_to_date(layout, "11_line", "key")
    (layout.runs / "11_line.ipynb").write_text("{}")
    assert reproduce.up_to_date(layout, "11_line", "key")
    assert not reproduce.up_to_date(layout, "11_line", "another key")
    (layout.figures / "11_line.csv").unlink()
    assert not reproduce.up_to_date(layout, "11_line", "key")


def test_a_failure_names_notebook_and_cell_and_does_not_stop_the_others(root):
    broken = root / "notebooks" / "10_broken.ipynb"
    nbformat.write(notebook("raise RuntimeError('first')"), broken)
    command = [sys.executable, "-m", "prodigy.lab.reproduce"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 1
    assert "10_broken FAILED: cell In [3]: RuntimeError: first" in done.stdout
    assert "12_fails FAILED: cell In [4]: ZeroDivisionError: division by zero" in done.stdout
    assert "[2/3] 11_line: done in" in done.stdout
    assert (root / "build" / "figures" / "11_line.csv").is_file()
    assert not (root / "build" / "notebooks" / "12_fails.json").exists()
    assert str(root / "build" / "notebooks" / "12_fails.ipynb") in done.stdout


def test_a_value_for_an_unknown_parameter_is_a_failure(root, capsys):
    (root / "notebooks" / "gpu.yml").write_text("11_line:\n  heigth: 5.0\n")
    assert run(root, "11", "--profile", "gpu") == 1
    assert "the parameters cell does not name heigth" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    (["13"], "no notebook '13'; there are 11_line, 12_fails"),
    (["--profile", "big"], "there is no .*big.yml"),
])
def test_wrong_arguments_are_said_in_words(root, arguments, words):
    with pytest.raises(SystemExit, match=words):
        run(root, *arguments)


def test_another_python_behind_the_kernel_is_refused(root, tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere" / "kernels" / "python3"
    folder.mkdir(parents=True)
    spec = {"argv": ["other-python", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "other", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "elsewhere"))
    with pytest.raises(SystemExit, match="kernel python3 starts other-python"):
        run(root, "11")


def test_refreshing_renews_notebook_and_figures_with_the_same_bytes_each_time(root):
    path = root / "notebooks" / "11_line.ipynb"
    assert run(root, "11", "--refresh") == 0
    once = path.read_bytes()
    made = nbformat.read(path, as_version=4)
    assert reproduce.parameters(made)["figures"] == ""
    assert [cell.execution_count for cell in made.cells[1:]] == [1, 2]
    assert not any("execution" in cell.metadata for cell in made.cells)
    assert made.metadata.prodigy.sources == reproduce.source_hash(made)
    assert str(root).encode() not in once
    assert len(pd.read_csv(root / "figures" / "11_line.csv")) == 3
    assert (root / "figures" / "11_line.svg").is_file()
    assert run(root, "11", "--refresh") == 0
    assert path.read_bytes() == once


def test_a_widget_works_in_a_run_and_leaves_no_trace_in_the_committed_notebook(root):
    path = root / "notebooks" / "11_line.ipynb"
    slider = """from ipywidgets import interact
seen = []
interact(lambda beta: seen.append(beta), beta=(0.0, 1.0))
print("drawn at", seen)"""
    nbformat.write(notebook(TABLE, slider), path)
    assert run(root, "11", "--refresh") == 0
    once = path.read_bytes()
    made = nbformat.read(path, as_version=4)
    assert [output.text for output in made.cells[3].outputs] == ["drawn at [0.5]\n"]
    assert "widget" not in json.dumps([made.metadata, [cell.outputs for cell in made.cells[1:]]])
    assert run(root, "11", "--refresh") == 0
    assert path.read_bytes() == once
    assert run(root, "11") == 0
    assert b"widget-view" in (root / "build" / "notebooks" / "11_line.ipynb").read_bytes()


def test_a_failed_refresh_leaves_the_committed_files(root):
    before = {path: path.read_bytes() for path in root.glob("[nf]*/*")}
    assert run(root, "12", "--refresh") == 1
    assert {path: path.read_bytes() for path in root.glob("[nf]*/*")} == before


@pytest.mark.parametrize("source, words", [
    ("seed = 0\ntwice = 2 * seed", "computes 'twice = 2 \\* seed'"),
    ("seed: int = 0", "holds 'seed: int = 0'"),
    ("import math", "holds 'import math'"),
    ("a = b = 0", "holds 'a = b = 0'"),
])
def test_a_parameters_cell_that_computes_is_refused(source, words):
    with pytest.raises(ValueError, match=words):
        reproduce.parameters(notebook(parameters=source))


def test_there_is_one_parameters_cell():
    made = notebook()
    assert reproduce.parameters(made) == {"seed": 0, "height": 2.0, "steps": 3, "figures": ""}
    made.cells.append(made.cells[1])
    with pytest.raises(ValueError, match="2 cells are tagged"):
        reproduce.parameters(made)


def test_the_difference_table():
    old = pd.DataFrame({"k": [0, 1, 2], "f": [1.0, 2.0, np.nan], "name": ["a", "b", "c"],
                        "gone": [0, 0, 0]})
    new = pd.DataFrame({"k": [0, 1, 2], "f": [1.0, 2.5, np.nan], "name": ["a", "x", "c"],
                        "fresh": [0, 0, 0]})
    assert reproduce.compare_tables(new, old) == [
        "missing columns: gone",
        "extra columns: fresh",
        "k: equal",
        "f: max abs 5.0e-01, max rel 2.5e-01",
        "name: 1 of 3 texts differ",
    ]
    assert reproduce.compare_tables(new.iloc[:1], new)[0] == (
        "1 rows here, 3 committed; the first 1 are compared")


def test_a_number_that_turned_into_nan_or_left_zero_is_infinitely_far():
    lost = pd.Series([1.0, np.nan]), pd.Series([1.0, 1.0])
    assert reproduce.compare_columns(*lost) == "max abs inf, max rel inf"
    grown = pd.Series([0.5]), pd.Series([0.0])
    assert reproduce.compare_columns(*grown) == "max abs 5.0e-01, max rel inf"
    gaps = pd.Series(["a", None]), pd.Series(["a", None])
    assert reproduce.compare_columns(*gaps) == "same texts"


def test_the_report_names_tables_on_one_side_only():
    table = pd.DataFrame({"k": [1]})
    lines = reproduce.difference_report({"11_a.csv": table, "11_b.csv": table},
                                        {"11_b.csv": table, "11_c.csv": table})
    assert lines == ["11_a.csv: new, nothing is committed to compare with",
                     "11_b.csv: 1 rows", "    k: equal",
                     "11_c.csv: committed, but not written by this run"]
