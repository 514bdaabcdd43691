"""What the repository promises about itself: pins, metadata, imports, nothing of the machine."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import prodigy

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [line for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")]
PINS = {canonicalize_name(Requirement(line.partition("#")[0]).name): line for line in LOCK}
MODULES = sorted((ROOT / "prodigy").glob("*.py"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]

every_module = pytest.mark.parametrize("path", MODULES, ids=[path.stem for path in MODULES])


def text_files():
    """The files that are or will be committed, as (path, text); binary files are left out."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file():
            try:
                yield path, path.read_text()
            except UnicodeDecodeError:
                continue


def test_every_pin_is_exact():
    pin = re.compile(r"[a-z0-9.-]+==\d[\da-z.]*( ; [^#]+)?( +# \w+)?")
    for line in LOCK:
        assert pin.fullmatch(line), line
    assert len(PINS) == len(LOCK)
    assert PINS["torch"].startswith("torch==2.13.0 ")
    assert not [name for name in PINS if re.match("nvidia|cuda|triton", name)]


def test_the_lock_covers_all_that_is_installed_for_the_extras():
    todo = [Requirement(text) for part in EXTRAS.values() for text in part]
    todo += [Requirement(text) for text in PYPROJECT["project"]["dependencies"]]
    todo += [Requirement(text) for text in PYPROJECT["build-system"]["requires"]]
    seen = set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        key = (name, *sorted(wanted.extras))
        if key in seen or re.match("nvidia|cuda|triton", name):
            continue
        seen.add(key)
        assert name in PINS, f"{name} is not in requirements.txt"
        for text in metadata.requires(name) or []:
            child = Requirement(text)
            extras = wanted.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
                todo.append(child)


def test_environment_names_python_pip_and_the_lock():
    content = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert content["dependencies"] == ["python=3.11", "pip", {"pip": ["-r requirements.txt"]}]
    assert PYPROJECT["project"]["requires-python"] == ">=3.11"


def test_citation_is_valid_and_names_the_papers():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema",
               "vendor.citation-file-format", "CITATION.cff"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert content["license"] == PYPROJECT["project"]["license"] == "Apache-2.0"
    urls = " ".join(reference["url"] for reference in content["references"])
    for paper in ("2301.07733", "2306.06101", "2405.15682", "2507.09846", "1412.6980",
                  "1711.05101", "duchi11a", "1908.03265"):
        assert paper in urls


def test_the_version_stands_in_one_place_and_is_read_without_torch():
    assert "version" not in PYPROJECT["project"]
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())
    script = ("import sys; from setuptools.config.expand import read_attr; "
              "print(read_attr('prodigy.__version__', {'': '.'}), 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    assert done.stdout.split() == [prodigy.__version__, "False"]


def test_the_wheel_needs_torch_alone_and_is_typed(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "prodigy", source / "prodigy",
                    ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
               "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    names = set(wheel.namelist())
    assert {"prodigy/__init__.py", "prodigy/py.typed", "prodigy/lab/data.py"} <= names
    assert {f"prodigy/{path.name}" for path in MODULES} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"prodigy"}
    facts = next(name for name in names if name.endswith(".dist-info/METADATA"))
    facts = message_from_bytes(wheel.read(facts))
    assert facts["Version"] == prodigy.__version__
    needs = [Requirement(text) for text in facts.get_all("Requires-Dist")]
    assert [str(need) for need in needs if "extra" not in str(need.marker)] == ["torch>=2.11"]


@every_module
def test_the_package_imports_torch_and_the_standard_library_only(path):
    allowed = {"torch", "prodigy", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots = [node.module.split(".")[0]]
        else:
            continue
        assert set(roots) <= allowed, ast.unparse(node)


@every_module
def test_the_package_does_not_print(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.Call) and ast.unparse(node.func) == "print")


def test_importing_the_package_leaves_lab_and_frameworks_out():
    script = ("import sys, prodigy; print(*({'matplotlib', 'sklearn', 'pandas', 'papermill', "
              "'prodigy.lab', 'prodigy.lightning', 'lightning', 'pytorch_lightning', "
              "'accelerate', 'transformers'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    assert done.stdout.split() == []


def test_no_file_carries_a_path_of_somebodys_machine():
    folders = "|".join(("home", "root", "Users", "tmp", "opt", "mnt", "work", "private"))
    pattern = re.compile(rf"(?<![\w.:/*)}}])/(?:{folders})/\w")
    found = [f"{path.relative_to(ROOT)}: {match.group()}"
             for path, text in text_files() if (match := pattern.search(text))]
    assert not found


def test_code_lines_are_under_100_characters():
    long = [f"{path.relative_to(ROOT)}:{number}"
            for path, text in text_files() if path.suffix == ".py"
            for number, line in enumerate(text.splitlines(), 1) if len(line) >= 100]
    assert not long


@pytest.mark.parametrize("python, words", [
    ("no-such-python", "is not installed"),
    ("./old", "Python 3.10.4 is too old; this needs 3.11 or newer"),
])
def test_make_says_which_python_it_needs(tmp_path, python, words):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old"
    script = "import sys; sys.version_info = (3, 10, 4); exec(sys.argv[1])"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.4" && exit 0\n'
                   f'exec "{sys.executable}" -c "{script}" "$2"\n')
    old.chmod(0o755)
    done = subprocess.run(["make", "test", f"PYTHON={python}"], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
    assert not (tmp_path / ".venv").exists()
