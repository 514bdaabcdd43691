"""Every published number beside the one made here: figures/scoreboard.csv and the README's table.

    python -m prodigy.lab.scoreboard        writes both, from the tables in figures/ alone

A row is one published number, or one figure that was not run, with the reason. What is here comes
from the CSV that the notebook left in `figures/`; from its full-scale run where there is one.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from . import published

FIGURES = published.FOLDER.parent
START, END = "<!-- scoreboard: start -->", "<!-- scoreboard: end -->"
COLUMNS = ["paper", "item", "what", "published", "published_se", "here", "se", "in_se", "seeds",
           "scale", "device", "notebook", "note"]
BLANK = dict.fromkeys(["scale", "device", "notebook", "note"], "")  # what may be left out
DADAPTATION, ROAD, RIVER = "2301.07733", "2405.15682", "2507.09846"
MNIST = "MNIST example"
NO_DATA = "not run: the data set is not at hand"
SUBSET = "not run: only a subset is at hand, which cannot be compared"
LATER = "not yet run: an hour or so on a processor"
ANOTHER = "another network (94,762 weights, 4,000 images)"
RESNET = f"{ANOTHER}; gpu.yml has the ResNet-18 run, not yet made for want of a GPU"
NO_WRN = f"{ANOTHER}, the trend alone; WRN-16-8 is not implemented"
GPT = ("another model and text, the trend alone; gpu.yml has a larger model, not yet run for want "
       "of a GPU")


def scoreboard(figures=FIGURES):
    """The table, one row for each published number, with the columns of COLUMNS.

    Args:
        figures: the folder that holds the notebooks' tables.
    """
    rows = [row for part in (toy, theorem, convex, mnist, cifar, gpt, elsewhere)
            for row in part(Path(figures))]
    return pd.DataFrame(rows).reindex(columns=COLUMNS).fillna(BLANK)


def read(figures, name):
    """A table of a notebook, or None where it has not been made."""
    path = figures / f"{name}.csv"
    return pd.read_csv(path) if path.is_file() else None


def row(paper, item, what, notebook="", **values):
    return dict(paper=paper, item=item, what=what, notebook=notebook, **values)


def toy(figures):
    """D-Adaptation's Fig. 1: the plateau of d, and the largest distance between the curves."""
    ours = read(figures, "21_d_adaptation_fig1")
    paper = published.curve("dadaptation_fig1_abs")
    exact = dict(scale="full", device="cpu", notebook="21_d_adaptation")
    yield row(DADAPTATION, "Fig. 1", "d after 98 steps", published=paper.d_k.iloc[-1],
              here=ours.d_k.iloc[-1], **exact)
    largest = np.abs(ours[["d_k", "dhat_k"]] - paper[["d_k", "dhat_k"]]).max(axis=None)
    yield row(DADAPTATION, "Fig. 1", "largest distance between the curves, 99 steps", published=0,
              here=largest, **exact)


def theorem(figures):
    """Theorem 1 of The Road Less Scheduled, as a worst case computed exactly."""
    table = read(figures, "35_worst_cases_horizon").set_index("T")
    free = [name for name in table if name.startswith("Schedule-Free")]
    T = table.index[-1]
    yield row(ROAD, "Theorem 1", f"worst F(x_T) - F* at T = {T}, largest over beta",
              published=table.loc[T, "D G / sqrt T"], here=table.loc[T, free].max(), scale="full",
              device="cpu", notebook="35_worst_cases")


def convex(figures):
    """The convex problems: Fig. 2 and 7 of D-Adaptation, Fig. 8 of The Road Less Scheduled."""
    tables = [read(figures, f"41_convex_{name}") for name in ("score", "full")]
    ran = dict(seeds=10, scale="full", device="cpu", notebook="41_convex")
    names = {name.lower(): name for name in published.ROAD_FIG8.values}
    score = pd.concat([t for t in tables if t is not None], ignore_index=True)
    for r in score.to_dict("records"):
        off, there = r["in SE"], r["in SE there"]
        close = f"reached at rate {r['nearest lr']:g}" if abs(there) <= 2 else "open, see 41"
        paper = DADAPTATION if r["figure"] == "Fig. 2" else ROAD
        yield row(paper, r["figure"], f"{names[r['set']]}, {r['method']}", here=r["here"],
                  published=r["published"], published_se=r["SE published"], se=r["SE"], in_se=off,
                  note="" if abs(off) <= 2 else close, **ran)
    guesses = read(figures, "41_convex_dadaptation_fig7")
    for name, part in guesses.groupby("set", sort=False):
        yield row(DADAPTATION, "Fig. 7", f"{names[name]}, largest move over d0",
                  here=np.ptp(part["mean"]), note="published: flat lines", **ran)
    here = set(zip(score["set"], score["method"]))
    both = published.DADAPTATION_FIG2, published.ROAD_FIG8
    for name, source in itertools.product(names, both):
        paper = DADAPTATION if source is published.DADAPTATION_FIG2 else ROAD
        missing = [m for m in source.methods if (name, m) not in here]
        if len(missing) == len(source.methods):
            yield row(paper, source.source.figure, names[name], "41_convex",
                      note=SUBSET if name == "sensorless" else NO_DATA)
            continue
        for method in missing:
            value, error = source.of(names[name], method)
            yield row(paper, source.source.figure, f"{names[name]}, {method}", "41_convex",
                      published=value, published_se=error, note=LATER)


def mnist(figures):
    """The 14-epoch MNIST example: test accuracy, test loss and d at the end of each log."""
    logs = published.curve("mnist_convnet").set_index(["method", "epoch"])
    full = read(figures, "42_mnist_full")
    for method, (log, d) in published.MNIST_LOGS.items():
        last = logs.loc[log].iloc[-1]
        epochs = int(logs.loc[log].index[-1])
        mine = full[(full.method == method) & (full.epochs == epochs)]
        ran = dict(notebook="42_mnist", scale="full", note="one run there")
        if len(mine):
            ran |= dict(seeds=mine.seed.nunique(), device=mine.device.iloc[0])
        else:
            ran |= dict(note=LATER)
        final = mine[mine.epoch == epochs]
        wanted = {"test accuracy in %": (last.test_accuracy_pct, final.test_accuracy),
                  "test loss": (last.test_loss, final.test_loss), "d": (d, final.d)}
        for what, (value, here) in wanted.items():
            if value is not None:
                yield row(MNIST, "printed log", f"{method}, {what}", published=value,
                          **summary(here), **ran)


def cifar(figures):
    """CIFAR-10: ResNet-18 with Prodigy, and the Schedule-Free panel; a small network so far."""
    full = read(figures, "43_cifar10_full")
    full = pd.DataFrame(columns=["model", "method", "epoch", "epochs"]) if full is None else full
    toy = full[(full.model == "resnet18") & (full.method == "Prodigy")]
    toy = toy[(toy.epoch == 20) & (toy.epochs == 20)]
    small = ends(read(figures, "43_cifar10_methods"))
    made = toy if len(toy) else small[small.method == "Prodigy"]
    yield row("prodigyopt", "README", "CIFAR-10, ResNet-18, Prodigy, 20 epochs, about",
              published=80, scale="full" if len(toy) else "shortened",
              note="" if len(toy) else RESNET, **accuracy(made))
    road, small = published.ROAD_CIFAR10, ends(read(figures, "43_cifar10_schedule_free"))
    for method in road.methods:
        value, error = road.of("WRN-16-8", method)
        mine = small[small.method.str.split(",").str[0] == method]
        best = mine.groupby("method").test_accuracy.mean().idxmax()
        yield row(ROAD, "Figs. 5, 11", f"CIFAR-10, WRN-16-8, {method}", published=value,
                  published_se=error, scale="shortened", note=NO_WRN,
                  **accuracy(mine[mine.method == best]))


def accuracy(made):
    """What a row tells of the last epochs of some runs of notebook 43."""
    return dict(**summary(made.test_accuracy), seeds=made.seed.nunique(),
                device=made.device.iloc[0], notebook="43_cifar10")


def gpt(figures):
    """Table 5 of Through the River: by how much its best C lowers the released one's loss."""
    table, paper = read(figures, "44_gpt_shakespeare_averaging"), published.curve("river_table5")
    lowest = table[table.lr == 0.002].groupby(["beta", "C", "seed"]).validation_loss.min()
    for beta in (0.5, 0.95):
        losses, printed = lowest[beta].unstack("seed"), paper[paper.beta == beta]
        best = losses.loc[losses.mean(axis=1).idxmin()]
        gain = losses.loc[round(1 / (1 - beta), 6)] - best
        fall = np.log(printed.perplexity[printed.released].item() / printed.perplexity.min())
        yield row(RIVER, "Table 5", f"beta {beta:g}, nats gained by the best C",
                  "44_gpt_shakespeare", published=fall, **summary(gain), seeds=len(gain),
                  scale="shortened", device=table.device.iloc[0],
                  note=GPT)


def ends(table):
    """The rows after the last epoch of every run."""
    return table[table.epoch == table.epochs]


def summary(values):
    """{here, se} of one number from every seed."""
    if len(values) == 0:
        return {}
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return dict(here=values.mean(), se=error)


def elsewhere(figures):
    """Figures and tables that were not run, each with the reason."""
    for paper, item, what, why in published.NOT_RUN:
        yield row(paper, item, what, note=why)


# the README's table --------------------------------------------------------------------------


def markdown(table):
    """The scoreboard as a Markdown table, as it stands in the README."""
    lines = ["| paper | item | what | published | here (SE) | seeds | scale | device | notebook "
             "| note |", "|---" * 10 + "|"]
    for r in table.to_dict("records"):
        where = (f"[{r['notebook'][:2]}](notebooks/{r['notebook']}.ipynb)" if r["notebook"]
                 else "")
        cells = [paper_link(r["paper"]), r["item"], r["what"],
                 with_error(r["published"], r["published_se"]), with_error(r["here"], r["se"]),
                 r["seeds"], r["scale"], r["device"], where, r["note"]]
        lines.append("| " + " | ".join(text(cell) for cell in cells) + " |")
    return "\n".join(lines)


def paper_link(paper):
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper[0].isdigit() else paper


def text(cell):
    """A cell; an empty one where there is no value, a whole number where it is one."""
    if isinstance(cell, float):
        return "" if np.isnan(cell) else f"{cell:.6g}"
    return str(cell)


def with_error(value, error):
    """"98.61 (0.11)": the value and, where there is one, its standard error."""
    if np.isnan(value):
        return ""
    shown = f"{value:.4g}"
    return shown if np.isnan(error) else f"{shown} ({error:.2g})"


def insert(readme, table):
    """The README's text with its table between the two markers replaced."""
    before, rest = readme.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n\n{markdown(table)}\n\n{END}{after}"


def main(arguments=None):
    """Write figures/scoreboard.csv and the README's table; returns the exit code."""
    argparse.ArgumentParser(description=main.__doc__.split(";")[0]).parse_args(arguments)
    path, readme = FIGURES / "scoreboard.csv", FIGURES.parent / "README.md"
    scoreboard().to_csv(path, index=False, float_format="%.12g", lineterminator="\n")
    table = committed()
    readme.write_text(insert(readme.read_text(), table))
    print(f"{path.name}: {len(table)} rows")
    return 0


def committed(figures=FIGURES):
    """The table as it stands in figures/scoreboard.csv."""
    return pd.read_csv(figures / "scoreboard.csv").fillna(BLANK)


if __name__ == "__main__":
    sys.exit(main())
