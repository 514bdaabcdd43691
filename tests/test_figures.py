"""Figures: the same bytes every time, one distinct colour per method, words for every picture."""
import ast
import json
import random
import re
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from pathlib import Path

import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from prodigy.lab import figures, published

ALT = 'A curve that falls from "one" to zero, with <d> & D marked.'


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """No figure folder, style or random state outlives a test."""
    monkeypatch.setattr(figures, "_folder", None)
    state = torch.get_rng_state()
    with plt.rc_context():
        yield
    torch.set_rng_state(state)
    plt.close("all")


def draw():
    x = np.linspace(0, 3, 50)
    fig, ax = plt.subplots()
    ax.plot(x, np.exp(-x), color=figures.colour("Prodigy"), label=r"$\hat d_k$")
    ax.fill_between(x, 0, np.exp(-x), alpha=0.3)
    ax.legend()
    return fig, {"x": x, "y": np.exp(-x), "name": ["a"] * 50}


def saved(folder):
    figures.setup(0, str(folder))
    fig, table = draw()
    figures.save(fig, "99_test_picture", table, ALT)
    return [(folder / f"99_test_picture.{kind}").read_bytes() for kind in ("svg", "csv")]


# ------------------------------------------------------------------ saving
def test_saves_are_byte_identical(tmp_path):
    first = saved(tmp_path / "one" / "deep")
    with plt.rc_context({"svg.hashsalt": None}):
        again = saved(tmp_path / "two")
    assert first == again
    assert b"\r" not in first[0] + first[1]


def test_svg_speaks_and_carries_no_date(tmp_path):
    svg = saved(tmp_path)[0].decode()
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    assert root.get("role") == "img"
    assert root.find(f"{space}title").text == "99_test_picture"
    assert root.find(f"{space}desc").text == ALT
    assert "<dc:date>" not in svg and "Matplotlib" not in svg


def test_alternative_text_may_hold_anything(tmp_path):
    figures.setup(0, str(tmp_path))
    figures.save(draw()[0], "99_back", {"x": [1]}, r"Backslashes \1 and \d in five words.")
    root = ElementTree.fromstring((tmp_path / "99_back.svg").read_text())
    assert root.find("{http://www.w3.org/2000/svg}desc").text.startswith(r"Backslashes \1")


def test_csv_holds_the_numbers(tmp_path):
    saved(tmp_path)
    table = pd.read_csv(tmp_path / "99_test_picture.csv")
    assert list(table) == ["x", "y", "name"]
    np.testing.assert_allclose(table["y"], draw()[1]["y"], rtol=1e-11)
    figures.save(draw()[0], "99_floats", {"a": [0.1 + 0.2, 1e-20], "b": [1, 2]}, ALT)
    assert (tmp_path / "99_floats.csv").read_text() == "a,b\n0.3,1\n1e-20,2\n"


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures.setup(0)
    fig, table = draw()
    figures.save(fig, "99_test_picture", table, ALT)
    assert list(tmp_path.iterdir()) == []
    assert not plt.fignum_exists(fig.number)


@pytest.mark.parametrize("change, message", [
    (dict(alt=""), "alt must say in words"),
    (dict(alt="a figure"), "alt must say in words"),
    (dict(alt=None), "alt must say in words"),
    (dict(name="fig1"), "name must look like"),
    (dict(name="../21_x"), "name must look like"),
    (dict(table={}), "columns of one length"),
    (dict(table={"a": [1], "b": [1, 2]}), "columns of one length"),
    (dict(table={"a": []}), "columns of one length"),
])
def test_bad_figures_are_refused(tmp_path, change, message):
    figures.setup(0, str(tmp_path))
    fig, table = draw()
    with pytest.raises(ValueError, match=message):
        figures.save(fig, **(dict(name="99_test_picture", table=table, alt=ALT) | change))
    assert list(tmp_path.iterdir()) == []


def test_notebook_output_has_alternative_text(monkeypatch):
    """What a notebook stores becomes <img alt="..."> or words beside it when exported to HTML."""
    nbformat = pytest.importorskip("nbformat")
    nbconvert = pytest.importorskip("nbconvert")
    shown = []
    monkeypatch.setattr("IPython.get_ipython", lambda: object())
    monkeypatch.setattr("IPython.display.display", lambda data, raw, metadata=None: shown.append(
        nbformat.v4.new_output("display_data", data=data, metadata=metadata or {})))
    figures.setup(0)
    fig, table = draw()
    figures.save(fig, "99_test_picture", table, "Five plain words for this.")
    assert [list(output["data"])[0] for output in shown] == ["image/png", "text/html"]
    assert shown[0]["data"]["text/plain"] == "Five plain words for this."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=shown)])
    classic = nbconvert.HTMLExporter(template_name="classic").from_notebook_node(notebook)[0]
    assert 'alt="Five plain words for this."' in classic
    lab = nbconvert.HTMLExporter().from_notebook_node(notebook)[0]
    assert "Five plain words for this.</details>" in lab


# ------------------------------------------------------------------ set-up and colours
def test_setup_seeds_everything_and_chooses_the_device():
    def numbers():
        device = figures.setup(7)
        return random.random(), np.random.rand(), torch.rand(()).item(), device

    assert numbers() == numbers()
    assert figures.setup(0, device="cpu") == torch.device("cpu")
    assert figures.setup(0).type == ("cuda" if torch.cuda.is_available() else "cpu")


# Machado, Oliveira and Fernandes (2009), severity 1, for linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopic": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopic": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                [0.0193339, 0.1191920, 0.9503041]])


def cielab(colour, vision):
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(VISION[vision] @ linear, 0, 1)
    x, y, z = np.cbrt(XYZ @ seen / np.array([0.95047, 1.0, 1.08883]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_distinct(vision):
    colours = figures.METHOD_COLOURS
    assert len(set(colours.values())) == len(colours)
    seen = {name: cielab(value, vision) for name, value in colours.items()}
    for one, two in combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[two]) > 10, (one, two)
    for name, value in seen.items():
        assert 10 < value[0] < 85, name


def test_every_method_has_a_colour():
    for name in ("SGD", "momentum", "Adagrad", "RMSprop", "Adam", "AdamW", "D-Adapt SGD",
                 "D-Adapt AdaGrad", "D-Adapt Adam", "Prodigy", "Schedule-Free SGD",
                 "Schedule-Free AdamW", "Schedule-Free RAdam", "Prodigy + Schedule-Free",
                 "Polyak", "primal", "linear decay"):
        assert matplotlib.colors.is_color_like(figures.colour(name))
    with pytest.raises(ValueError, match="no colour for method 'Lion'"):
        figures.colour("Lion")


# ------------------------------------------------------------------ committed tables
COMMITTED = Path(__file__).resolve().parents[1] / "figures"


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.csv")), ids=lambda path: path.stem)
def test_an_axis_that_counts_counts(path):
    """A column of the same name, such as that of the schedule "step", can take an axis's place."""
    axis = pd.read_csv(path).iloc[:, 0]
    if {"step", "round", "epoch", "age", "t", "T"} & set(axis.name.split()):
        assert axis.is_monotonic_increasing and axis.is_unique, axis.name


def test_the_tour_quotes_its_table():
    """To the digits given, where the notebook's own check, on any processor, is by the errors."""
    path = COMMITTED.parent / "notebooks" / "00_start_here.ipynb"
    cells = {cell["id"]: cell for cell in json.loads(path.read_text())["cells"]}
    prose = "".join(line for cell in cells.values() for line in cell["source"]
                    if cell["cell_type"] == "markdown")
    mean = pd.read_csv(COMMITTED / "00_start_here_accuracy.csv").set_index(
        ["knob", "method", "factor"]).sort_index()["mean"]
    assigned = {node.targets[0].id: node.value
                for node in ast.parse("".join(cells["tour17"]["source"])).body
                if isinstance(node, ast.Assign)}
    quoted = ast.literal_eval(assigned["quoted"])
    for method, factor, number, *knob in quoted:
        digits = len(str(number).partition(".")[2]) - (number == 30)
        assert round(mean[(*knob, "lr")[0], method, factor], digits) == number, method
    assert set(re.findall(r"([\d.]+) %", prose)) == {str(row[2]) for row in quoted}

    spread = max(np.ptp(mean["d0", name]) for name in ("Prodigy", "DAdaptAdam", "DAdaptSGD"))
    assert round(spread) == 1 and "move by about one point at most" in prose
    near = np.ptp(mean["lr", "Prodigy"][[0.1, 1, 10]])
    assert near < 2 and "Prodigy stays within two points" in prose
    best = mean["lr"].groupby("method").idxmax()
    at_the_end = {method for method, factor in best if factor == 100}
    assert at_the_end == {"SGD", "RAdamScheduleFree"}
    assert "SGD and Schedule-Free RAdam are best at a hundred times their defaults" in prose
    printed = "".join(cells["tour17"]["outputs"][0]["text"])
    times = {name: round(float(number)) for name, number in
             re.findall(r"(\w+): .* d is (\S+) times d", printed)}
    assert (f"Prodigy's $d$ ends {times['Prodigy']} times larger, "
            f"D-Adapt Adam's {times['DAdaptAdam']} times") in prose


# ------------------------------------------------------------------ published numbers
def test_published_curves_have_sources_and_files(tmp_path, monkeypatch):
    assert {path.stem for path in published.FOLDER.glob("*.csv")} == set(published.CURVES)
    monkeypatch.chdir(tmp_path)
    assert len(published.curve("dadaptation_fig1_abs")) == 99
    convex = published.curve("dadaptation_fig2_convex")
    assert convex.groupby(["dataset", "optimizer"]).size().tolist() == [100] * 24
    for source in published.CURVES.values():
        assert source.status.startswith("confirmed") and source.where and source.figure


def test_published_final_points_meet_the_published_legend():
    convex = published.curve("dadaptation_fig2_convex")
    final = convex[convex["epoch_index"] == 99].set_index(["dataset", "optimizer"])
    for row in published.DADAPTATION_FIG2.frame().itertuples():
        drawn = final.loc[(row.set, row.method), "mean_train_accuracy_pct"]
        assert drawn == pytest.approx(row.mean, abs=0.0501), row


def test_published_tables():
    for table in (published.DADAPTATION_FIG2, published.ROAD_FIG8):
        frame = table.frame()
        assert len(frame) == 12 * len(table.methods)
        assert frame["mean"].between(50, 100).all()
        assert (frame["se"].dropna() >= 0).all()
        assert table.source.status.startswith("confirmed")
    assert published.DADAPTATION_FIG2.of("Iris", "D-Adapt Adam") == (98.6, 0.0)
    assert published.ROAD_FIG8.of("Iris", "Polyak") == (98.3, 0.08)
    assert published.ROAD_CIFAR10.of("WRN-16-8", "primal") == (92.09, 0.07)
    assert published.TUNING_FREE.of("ResNet-18", "Prodigy") == (91.50, None)
    for table in (published.ROAD_CIFAR10, published.TUNING_FREE):
        assert len(table.frame()) == len(table.values) * len(table.methods)
        assert table.frame()["mean"].between(60, 97).all()
        assert table.source.status.startswith("confirmed")
    assert "2301.07733" in str(published.DADAPTATION_FIG2.source)
    with pytest.raises(KeyError, match="no published number"):
        published.ROAD_FIG8.of("MNIST", "Polyak")


def test_missing_curves_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no published curve 'fig9'"):
        published.curve("fig9")
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="run from a checkout"):
        published.curve("dadaptation_fig1_abs")
