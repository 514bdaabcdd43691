"""The published numbers that the notebooks lay beside their own, each with its source.

Only numbers that were read in the source itself stand here. Tables are DataFrames with columns
set, method, mean, se: final accuracy in per cent, of training for the convex sets and of the test
for CIFAR-10, and its standard error over 10 seeds (missing where the source leaves it out). Curves
are the files in figures/published.
"""
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

__all__ = ["CURVES", "DADAPTATION_FIG2", "MNIST_LOGS", "NOT_RUN", "ROAD_CIFAR10", "ROAD_FIG8",
           "TUNING_FREE", "Source", "Table", "curve"]

FOLDER = Path(__file__).resolve().parents[2] / "figures" / "published"


@dataclass(frozen=True)
class Source:
    """Where a number was published; status says how it was read there."""

    title: str
    where: str
    figure: str
    status: str

    def __str__(self):
        return f"{self.title}, {self.where}, {self.figure} ({self.status})"


@dataclass(frozen=True)
class Table:
    """A published table: its source, and per data set the pairs (mean, se) in order of methods."""

    source: Source
    methods: tuple
    values: dict

    def frame(self):
        """The table in long form: one row for each set and method."""
        rows = [(name, method, mean, se) for name, pairs in self.values.items()
                for method, (mean, se) in zip(self.methods, pairs, strict=True)]
        return pd.DataFrame(rows, columns=["set", "method", "mean", "se"])

    def of(self, name, method):
        """The pair (mean, se) of one data set and method. Raises KeyError with the known names."""
        if name not in self.values or method not in self.methods:
            raise KeyError(f"no published number for {name!r}, {method!r}; sets are "
                           f"{', '.join(self.values)}, methods {', '.join(self.methods)}")
        return self.values[name][self.methods.index(method)]


_DADAPTATION = ("Learning-Rate-Free Learning by D-Adaptation", "arXiv 2301.07733 v5")
_ROAD = ("The Road Less Scheduled", "arXiv 2405.15682 v4")
_RIVER = ("Through the River", "arXiv 2507.09846")
_PACKAGES = ("MNIST example", "READMEs of schedule_free and prodigy-plus-schedule-free")

CURVES = {
    "dadaptation_fig1_abs": Source(*_DADAPTATION, "Fig. 1", "confirmed: read off the vector art"),
    "dadaptation_fig2_convex": Source(*_DADAPTATION, "Fig. 2",
                                      "confirmed: read off the vector art"),
    "mnist_convnet": Source(*_PACKAGES, "printed logs", "confirmed: printed; one seed each"),
    "river_table5": Source(*_RIVER, "Table 5", "confirmed: printed; one run each"),
}

DADAPTATION_FIG2 = Table(
    Source(*_DADAPTATION, "Fig. 2", "confirmed: legends of the figure"),
    ("Adam", "D-Adapt Adam"),
    {
        "Sensorless": ((89.5, 0.01), (90.0, 0.07)),
        "Aloi": ((94.1, 0.01), (97.1, 0.01)),
        "DNA": ((100.0, 0.00), (100.0, 0.00)),
        "Glass": ((72.0, 0.16), (72.3, 0.19)),
        "Iris": ((98.3, 0.11), (98.6, 0.00)),
        "Letter": ((77.8, 0.01), (77.7, 0.01)),
        "Pendigits": ((96.2, 0.02), (95.8, 0.02)),
        "smallNORB": ((92.9, 0.03), (95.8, 0.04)),
        "USPS": ((98.6, 0.01), (98.6, 0.01)),
        "Vehicle": ((82.1, 0.08), (81.9, 0.16)),
        "Vowel": ((77.4, 0.11), (77.4, 0.15)),
        "Wine": ((100.0, 0.00), (100.0, 0.00)),
    },
)

ROAD_FIG8 = Table(
    Source(*_ROAD, "Fig. 8", "confirmed: legends of the figure"),
    ("Polyak", "primal", "Schedule-Free AdamW", "linear decay"),
    {
        "Sensorless": ((85.5, 0.00), (83.0, 0.44), (89.7, 0.00), (89.2, 0.01)),
        "Aloi": ((95.7, 0.01), (95.4, 0.02), (97.2, 0.01), (95.8, 0.00)),
        "DNA": ((100.0, 0.01), (100.0, None), (100.0, None), (100.0, None)),
        "Glass": ((68.8, 0.10), (65.0, 0.61), (72.1, 0.14), (70.3, 0.14)),
        "Iris": ((98.3, 0.08), (98.5, 0.06), (98.6, 0.00), (98.6, 0.00)),
        "Letter": ((77.8, None), (77.8, 0.02), (77.8, None), (77.8, 0.01)),
        "Pendigits": ((95.8, 0.01), (94.0, 0.11), (96.0, 0.01), (96.0, 0.02)),
        "smallNORB": ((90.8, 0.01), (90.8, 0.64), (98.1, 0.00), (96.5, 0.01)),
        "USPS": ((98.0, 0.01), (98.1, 0.03), (99.5, 0.00), (98.9, 0.01)),
        "Vehicle": ((80.8, 0.04), (81.2, 0.16), (83.4, 0.04), (83.2, 0.14)),
        "Vowel": ((76.8, 0.10), (77.2, 0.18), (77.5, 0.03), (77.6, 0.10)),
        "Wine": ((100.0, None), (100.0, None), (100.0, None), (100.0, None)),
    },
)

ROAD_CIFAR10 = Table(
    Source(*_ROAD, "Figs. 5 and 11", "confirmed: legends of the figures"),
    ("Schedule-Free SGD", "SGD with cosine", "SGD with step decay", "Polyak", "primal"),
    {"WRN-16-8": ((96.03, 0.04), (95.73, 0.04), (95.59, 0.03), (95.56, 0.05), (92.09, 0.07))},
)

# An independent benchmark, not the methods' authors': CIFAR-10, 200 epochs of batches of 256, one
# seed, no schedule and no decay but SGD's cosine; DoG and L-DoG at their last iterate,
# Schedule-Free without new BatchNorm statistics, its warm-up over 30 steps. The last epoch's test
# accuracy.
TUNING_FREE = Table(
    Source("benchmark-tuningfree", "github.com/edawu11/benchmark-tuningfree", "logs",
           "confirmed: printed; one seed each"),
    ("SGD with cosine", "Adam", "COCOB", "Prodigy", "D-Adapt SGD", "D-Adapt Adam", "DoG", "L-DoG",
     "Schedule-Free SGD", "Schedule-Free SGD, warm-up"),
    {name: tuple((mean, None) for mean in means) for name, means in {
        "VGG11": (90.49, 89.83, 89.01, 87.63, 87.08, 86.42, 85.00, 84.06, 83.63, 89.64),
        "ResNet-18": (93.10, 92.74, 92.55, 91.50, 91.78, 91.02, 91.17, 87.59, 86.71, 91.38),
        "ResNet-50": (93.04, 92.26, 91.31, 90.78, 89.49, 88.02, 65.48, 66.80, 80.70, 90.95),
    }.items()},
)

# The MNIST example: our name of the method -> (its log in mnist_convnet, the log's last d or None)
MNIST_LOGS = {
    "Schedule-Free AdamW": ("AdamWScheduleFree lr 0.0025", None),
    "Prodigy + Schedule-Free": ("prodigy-plus-schedule-free 2.0 default", 0.000862),
    "Prodigy + Schedule-Free, use_speed": ("prodigy-plus-schedule-free 2.0 use_speed", 0.002582),
    "Adadelta": ("Adadelta lr 1, StepLR gamma 0.7 (PyTorch example)", None),
}

_LARGE = "not run: days on many GPUs"
_NONE = "no published number could be confirmed"
# Figures and tables of the papers that no notebook runs: (arXiv number, which, what, why)
NOT_RUN = [
    ("2301.07733", "Fig. 3, Table 2", "CIFAR-10, CIFAR-100, ImageNet", _LARGE),
    ("2301.07733", "Fig. 4, Table 2", "IWSLT14, RoBERTa, GPT on BookWiki", _LARGE),
    ("2301.07733", "Fig. 5, Table 2", "ViT on ImageNet, COCO, fastMRI", _LARGE),
    ("2301.07733", "Fig. 6, Table 2", "DLRM on Criteo", _LARGE),
    ("2301.07733", "Table 1", "final learning rates of Figs. 3 to 6", _LARGE),
    ("2306.06101", "Fig. 1", "CIFAR-10; its setting is notebook 43", _NONE),
    ("2306.06101", "Fig. 2", "12 convex problems; the theorems are in 22", _NONE),
    ("2306.06101", "Fig. 3", "nanoGPT on Shakespeare; its setting is notebook 44", _NONE),
    ("2306.06101", "Figs. 4, 5", "large Adam runs, ViT", _NONE),
    ("2405.15682", "Figs. 1, 10", "ImageNet and OpenWebText against many horizons", _LARGE),
    ("2405.15682", "Fig. 2", "IWSLT14", _LARGE),
    ("2405.15682", "Figs. 3, 4", "drawn in notebook 32: no number is printed", _NONE),
    ("2405.15682", "Figs. 5, 11", "eight more deep-learning problems than CIFAR-10", _LARGE),
    ("2405.15682", "Fig. 7", "AlgoPerf", _LARGE),
    ("2405.15682", "Figs. 6, 9, 12", "gradient norms; rates on CIFAR, SVHN, ImageNet", _LARGE),
    ("2507.09846", "Tables 1 to 4, 6", "124M parameters on SlimPajama", _LARGE),
]


def curve(name):
    """A published curve as a DataFrame; name is a key of CURVES.

    Raises ValueError for another name, FileNotFoundError where the repository's figures are not
    beside the package (an installed wheel has none).
    """
    if name not in CURVES:
        raise ValueError(f"no published curve {name!r}; there are {', '.join(CURVES)}")
    path = FOLDER / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. The published curves lie in figures/published of the repository: "
            "run from a checkout, with the package installed by `pip install -e .`")
    return pd.read_csv(path)
