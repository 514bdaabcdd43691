"""The README says what the repository holds: its tables, links, code and citations."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
import zoo

import prodigy
from prodigy.lab import published

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FIGURES = ROOT / "figures"
NOTEBOOK_21 = "[21](notebooks/21_d_adaptation.ipynb)"
THEORY_21 = "[21](theory/21_d_adaptation.md)"


def table(first_cell):
    """The rows of the table whose heading starts with this cell, each a list of cells."""
    lines = README.splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith(f"| {first_cell} |")]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def figure_rows():
    """The row of Fig. 1, from the committed numbers and the published ones."""
    ours = pd.read_csv(FIGURES / "21_d_adaptation_fig1.csv")
    paper = published.curve("dadaptation_fig1_abs")
    largest = np.abs(ours[["d_k", "dhat_k"]].values - paper[["d_k", "dhat_k"]].values).max()
    yield ["D-Adaptation Fig. 1, both curves, 99 steps", NOTEBOOK_21, THEORY_21, "vector art",
           f"largest difference {largest:.1e}"]


def score_rows():
    """A row for each data set: published, here, and the difference in standard errors."""
    score = pd.read_csv(FIGURES / "41_convex_score.csv")
    methods = published.DADAPTATION_FIG2.methods + published.ROAD_FIG8.methods
    for name, rows in score.groupby("set", sort=False):
        rows = rows.set_index("method").loc[list(methods)]
        cells = [f"{row.published:.1f}, {row.here:.2f} ({row['in SE']:+.1f})"
                 for _, row in rows.iterrows()]
        yield [name, *cells]


def departure_rows():
    for d in zoo.DEPARTURES:
        cells = [d.classes, d.reference, d.theirs, d.ours, f"`{d.test}`"]
        yield [cell.replace("|", "\\|") for cell in cells]


def memory(name, dtype, **options):
    """Bytes of state for each weight, at the defaults but for the options."""
    p = torch.nn.Parameter(torch.ones(1000, 1000, dtype=dtype))
    p.grad = torch.ones_like(p)
    cls = zoo.by_name(name)
    wrapper = cls in (prodigy.ScheduleFreeWrapper, prodigy.Mechanic)
    optimizer = cls(prodigy.SGD([p], lr=0.1)) if wrapper else cls([p], **options)
    optimizer.step()
    state = optimizer.state[p].values()
    size = sum(t.numel() * t.element_size() for t in state if torch.is_tensor(t) and t.dim())
    return size / p.numel()


def test_the_figure_table_holds_the_committed_numbers():
    assert table("figure") == list(figure_rows())
    assert table("set") == list(score_rows())
    score = pd.read_csv(FIGURES / "41_convex_score.csv")
    within = (score["in SE"].abs() <= 2).sum()
    ceiling = ((score.published == 100) & (score.here == 100)).sum()
    assert (f"{within} of {len(score)} agree within two standard errors, of which {ceiling} at "
            "the ceiling of 100 on Wine and DNA") in README


def test_what_a_value_that_is_reached_at_some_rate_is_worth():
    curves, fig8 = pd.read_csv(FIGURES / "41_convex_road_fig8.csv"), published.ROAD_FIG8
    names = {key.lower(): key for key in fig8.values}
    at = [fig8.of(names[row.set], row.method) for row in curves.itertuples()]
    value, se = np.array([[mean, error or 0] for mean, error in at]).T
    se, below = np.sqrt(se**2 + curves.se**2 + 0.1**2 / 12), value < 100

    def near(moved):  # within two standard errors of the value; one of 100 stays where it is
        off = (curves["mean"] - value - moved * below) / se
        return pd.DataFrame(curves[["set", "method", "lr"]]).assign(near=off.abs() <= 2)

    def reached(moved):
        return near(moved)[below].groupby(["set", "method"]).near.any()

    def one_rate(moved):
        decay = near(moved).query("method == 'linear decay' and near")
        counts = decay.groupby("lr").set.nunique()
        return list(counts.index[counts == 6])

    true, lower = reached(0), reached(-1)
    assert (f"of the {len(true)} values of Fig. 8 below 100, {true.sum()} are reached, and were "
            f"all of them a point lower, {lower.sum()} would be") in README
    assert "one rate, 64, fits all six values of linear decay" in README and one_rate(0) == [64]
    assert one_rate(0.5) == one_rate(-0.5) == []


def test_the_course_table_lists_every_notebook_with_its_figure_and_theory():
    rows = {re.search(r"\[(\d\d_\w+)\]", row[0])[1]: row for row in table("notebook")}
    assert set(rows) == {path.stem for path in ROOT.glob("notebooks/*.ipynb")}
    for name, (_, figure, theory, paper, shows) in rows.items():
        assert f"(figures/{name}_" in figure and shows
        page = f"theory/{name}.md"
        assert theory == (f"[{name[:2]}]({page})" if (ROOT / page).is_file() else "")
        assert paper or name == "00_start_here"


def test_the_departures_are_those_of_the_zoo():
    assert table("class") == list(departure_rows())


def test_the_family_table_names_every_method_with_its_memory():
    rows = table("method")
    assert [row[0].strip("`") for row in rows] == prodigy.__all__
    for name, *_, words, bytes_ in [[row[0].strip("`"), *row[1:]] for row in rows]:
        base = "base + " if name in ("ScheduleFreeWrapper", "Mechanic") else ""
        assert words == f"{base}{memory(name, torch.float32) / 4:.4g}", name
        assert bytes_ == f"{base}{memory(name, torch.bfloat16):.4g}", name
    sliced = memory("Prodigy", torch.float32, slice_p=11) / 4
    both = memory("Prodigy", torch.float32, slice_p=11, betas=(0.0, 0.999)) / 4
    assert f"({sliced:.1f} words)" in README and round(sliced - both, 6) == 1


@pytest.mark.filterwarnings("ignore:.*tensorboardX")
@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_code_runs(code):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 12), torch.nn.BatchNorm1d(12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
    X, y = torch.randn(20, 4), torch.randint(3, (20,))
    names = dict(
        model=model, loader=[(X[:10], y[:10]), (X[10:], y[10:])], torch=torch, prodigy=prodigy,
        loss_of=torch.nn.functional.cross_entropy, evaluate=lambda model: model(X),
        params=list(model.parameters()),
    )
    names["optimizer"] = prodigy.AdamWScheduleFree(model.parameters())
    exec(code, names)


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)#\s]+)\)", README) + re.findall(r'(?:src|href)="([^"]+)"', README)
    inside = [link for link in links if not link.startswith("http")]
    assert len(inside) > 10
    assert not [link for link in inside if not (ROOT / link).exists()]


def test_commands_are_targets_of_the_makefile():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE)
    assert {"reproduce", "test", "lab", "figures"} <= set(commands) <= set(targets)


def test_the_first_screen_shows_the_figure_and_the_commands():
    top = README.split("\n## ")[0]
    assert "figures/21_d_adaptation_fig1.svg" in top
    assert "make reproduce" in top and "make test" in top


def test_bibtex_agrees_with_the_citation_file():
    entries = re.findall(r"^@\w+\{.*?^\}", README, re.DOTALL | re.MULTILINE)
    papers = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    assert len(entries) == len(papers)
    for entry, paper in zip(entries, papers):
        field = dict(re.findall(r"^  (\w+) = \{(.*)\},$", entry, re.MULTILINE))
        assert field["title"].replace("{", "").replace("}", "") == paper["title"]
        assert field["author"].split(" and ") == [
            f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
        assert field["year"] == str(paper["year"])
        assert field["url"] == paper["url"]
        assert paper.get("collection-title", paper.get("journal")) in (
            field.get("booktitle"), field.get("journal"))


def test_the_numbers_of_the_tour():
    tour = pd.read_csv(FIGURES / "00_start_here_accuracy.csv")
    tour = tour[tour.knob == "lr"].set_index(["method", "factor"])["mean"]
    below, above = tour["AdamW"].max() - tour["Prodigy", 1], tour["Prodigy", 1] - tour["AdamW", 1]
    assert f"ends {below:.1f} points below AdamW at the best of five rates" in README
    assert f"and {above:.1f} points above AdamW at its default" in README
    assert tour["DAdaptAdam", 10] < 50 < tour["DAdaptAdam", 1]


def test_the_speed_that_is_told_was_measured():
    measured = pd.concat(pd.read_csv(FIGURES / f"45_cost_{run}.csv") for run in ("full", "floor"))
    where = dict(index=["network", "method"], columns="mode")
    ratio, floor = (measured.pivot(**where, values=value) for value in ("ratio", "floor"))
    compiled = ratio.compiled.groupby("method").agg(["min", "max"])
    assert list(compiled.loc["Prodigy"].round()) == [2, 2]
    for name, told in (("Prodigy, slice_p 11", "`slice_p=11`: {:.1f} to {:.1f} times;"),
                       ("Schedule-Free AdamW", "Schedule-Free AdamW: {:.1f} to {:.1f};"),
                       ("Prodigy + Schedule-Free", "Prodigy + Schedule-Free: {:.1f} to {:.1f})")):
        assert told.format(*compiled.loc[name]) in README
    beside = (ratio.eager / ratio.reference).groupby("method").agg(["min", "max"]).dropna()
    apart = ["Prodigy + Schedule-Free", "Schedule-Free SGD"]
    least, most = beside["min"], beside["max"]
    rest = f"{least.drop(apart).min():.1f} to {most.drop(apart).max():.1f} times it"
    told = [f"{name} {least[name]:.1f} to {most[name]:.1f} times" for name in apart]
    assert f"from {rest}, {', '.join(told)};" in README
    above = (ratio.compiled / floor.compiled).groupby("method").agg(["min", "max"])
    above, claim = above.drop("The step alone"), (ROOT / "notebooks/45_cost.ipynb").read_text()
    plus = above.loc["Prodigy + Schedule-Free", "max"]
    above = above.drop("Prodigy + Schedule-Free")
    assert f"takes {above['min'].min():.1f} to {above['max'].max():.1f} times what" in claim
    assert f"walks five times, up to {plus:.1f} times)" in claim
