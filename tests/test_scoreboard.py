"""The scoreboard holds what the committed figures hold, and the README shows the scoreboard."""

import shutil

import numpy as np
import pandas as pd
import pytest

from prodigy.lab import images, published, scoreboard

TABLE = scoreboard.committed()
README = (scoreboard.FIGURES.parent / "README.md").read_text()


def test_the_committed_file_is_what_the_figures_give():
    pd.testing.assert_frame_equal(TABLE, scoreboard.scoreboard(), check_dtype=False, rtol=1e-9)


def test_the_readme_shows_the_file():
    assert scoreboard.insert(README, TABLE) == README


def test_a_changed_figure_changes_the_scoreboard(tmp_path):
    for path in scoreboard.FIGURES.glob("*.csv"):
        shutil.copy(path, tmp_path)
    path = tmp_path / "41_convex_score.csv"
    table = pd.read_csv(path)
    table.loc[0, "here"] += 1
    table.to_csv(path, index=False)
    fresh = scoreboard.scoreboard(tmp_path)
    assert (fresh.here - TABLE.here).abs().sum() == pytest.approx(1)


def test_every_row_is_a_number_or_a_reason():
    missing = TABLE.here.isna()
    assert TABLE.note[missing].str.startswith(("not ", "no published")).all()
    far = TABLE.in_se.abs() > 2
    assert far.any() and TABLE.note[far].str.startswith(("reached at", "open, see")).all()
    assert TABLE.notebook[~missing].ne("").all() and TABLE.device[~missing].ne("").all()
    assert not TABLE.duplicated(["paper", "item", "what"]).any()


def test_what_cannot_be_compared_says_so():
    short = TABLE[TABLE.scale == "shortened"]
    assert len(short) == 8 and short.note.str.startswith("another ").all()
    drawn = pd.read_csv(scoreboard.FIGURES / "43_cifar10_methods.csv")
    weights = sum(p.numel() for p in images.NETWORKS[drawn.model[0]]().parameters())
    size = f"another network ({weights:,} weights, {drawn.rows[0]:,} images)"
    assert short.note[short.notebook == "43_cifar10"].str.startswith(size).sum() == 6
    wide = TABLE.what.str.contains("WRN-16-8")
    assert wide.sum() == 5 and TABLE.note[wide].str.endswith("WRN-16-8 is not implemented").all()
    assert not any(name.startswith("wrn") for name in images.NETWORKS)


def test_what_was_only_seen_in_a_picture_is_no_published_number():
    seen = TABLE[TABLE.item == "Fig. 7"]
    flat = (seen.paper == scoreboard.DADAPTATION) & seen.what.str.endswith("over d0")
    assert flat.sum() == 6 and seen.published[flat].isna().all()
    assert (seen.note[flat] == "published: flat lines").all()


def test_every_published_table_is_in_it_whole():
    names = set(TABLE.what.str.split(", ").str[0])
    assert set(published.ROAD_FIG8.values) <= names
    logs = TABLE[TABLE.paper == scoreboard.MNIST]
    assert set(published.MNIST_LOGS) == set(logs.what.str.rsplit(", ", n=1).str[0])


def test_numbers_read_as_they_are_written():
    assert scoreboard.with_error(98.611, 0.1123) == "98.61 (0.11)"
    assert scoreboard.with_error(0.000862, np.nan) == "0.000862"
    assert scoreboard.with_error(np.nan, np.nan) == "" and scoreboard.text(10.0) == "10"
