"""The data sets: built-in ones by value, the others by hash, from a folder and from a server."""

import bz2
import gzip
import hashlib
import os
import pickle
import shutil
import struct
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from sklearn import datasets

from prodigy.lab import data

TOY_TEXT = b"3 1:0.5 2:-1\n7 2:0.25\n3 1:-0.125\n"
TOY_X = np.array([[0.5, -1.0], [0.0, 0.25], [-0.125, 0.0]])
TOY_Y = np.array([0, 1, 0])
FOLDER = os.environ.get("PRODIGY_DATA")
needs_files = pytest.mark.skipif(not FOLDER, reason="PRODIGY_DATA is not set: no published files")


def toy_hash():
    content = b"3 2" + TOY_X.astype("<f8").tobytes() + TOY_Y.astype("<i8").tobytes()
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A registered set `toy`, an empty cache, no folder; returns the page folder to serve."""
    monkeypatch.delenv("PRODIGY_DATA", raising=False)
    monkeypatch.setattr(data, "_cache", lambda: tmp_path / "cache")
    monkeypatch.setitem(data.LIBSVM, "toy", ("page", 2, {"toy.scale": toy_hash()}))
    page = tmp_path / "served" / "page"
    page.mkdir(parents=True)
    return page


@pytest.fixture
def server(toy, monkeypatch):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = partial(Quiet, directory=str(toy.parent))
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setattr(data, "LIBSVM_PAGE", f"http://127.0.0.1:{running.server_address[1]}")
    yield toy
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("name, shape, classes", [
    ("iris", (150, 4), 3),
    ("wine", (178, 13), 3),
    ("digits", (1797, 64), 10),
    ("breast_cancer", (569, 30), 2),
])
def test_built_in_sets_need_no_file(name, shape, classes, monkeypatch):
    monkeypatch.delenv("PRODIGY_DATA", raising=False)
    got = data.load(name)
    assert (got.name, got.X.shape, got.X.dtype, got.classes) == (name, shape, "float64", classes)
    assert got.y.shape == shape[:1] and got.y.dtype == "int64"
    assert set(got.y) == set(range(classes))
    varying = got.X.min(0) < got.X.max(0)
    assert np.all(got.X[:, varying].min(0) == -1) and np.all(got.X[:, varying].max(0) == 1)
    assert np.all(got.X[:, ~varying] == 0)
    assert got.X_test is None and got.y_test is None


def test_unscaled_sets_are_the_measured_units():
    assert np.array_equal(data.load("wine", scaled=False).X, datasets.load_wine().data)
    assert np.array_equal(data.load("digits", scaled=False).X, datasets.load_digits().data)


def test_iris_is_the_uci_file_of_the_protocol():
    ours = data.load("iris", scaled=False).X
    fisher = datasets.load_iris().data
    assert np.flatnonzero((ours != fisher).any(axis=1)).tolist() == [34, 37]
    assert ours[34].tolist() == ours[37].tolist() == [4.9, 3.1, 1.5, 0.1]


def test_scale_maps_to_the_unit_interval_and_constants_to_zero():
    X = np.array([[1.0, 5.0], [2.0, 5.0], [5.0, 5.0]])
    assert np.array_equal(data.scale(X), [[-1, 0], [-0.5, 0], [1, 0]])


def test_fingerprint_is_the_documented_hash():
    assert data.fingerprint(TOY_X, TOY_Y) == toy_hash()
    assert data.fingerprint(np.where(TOY_X == 0, -0.0, TOY_X), TOY_Y) == toy_hash()
    moved = TOY_X.copy()
    moved[1, 1] = np.nextafter(moved[1, 1], 1)
    assert data.fingerprint(moved, TOY_Y) != toy_hash()
    assert data.fingerprint(TOY_X, 1 - TOY_Y) != toy_hash()
    assert data.fingerprint(TOY_X.reshape(2, 3), TOY_Y) != toy_hash()


@pytest.mark.parametrize("suffix, write", [("", bytes), (".bz2", bz2.compress)])
def test_a_set_is_read_from_the_folder(toy, tmp_path, monkeypatch, suffix, write):
    monkeypatch.setenv("PRODIGY_DATA", str(tmp_path))
    (tmp_path / "libsvm").mkdir()
    (tmp_path / "libsvm" / f"toy.scale{suffix}").write_bytes(write(TOY_TEXT))
    got = data.load("toy")
    assert np.array_equal(got.X, TOY_X) and np.array_equal(got.y, TOY_Y) and got.classes == 2


def test_other_spacing_of_the_same_numbers_is_the_same_set(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("PRODIGY_DATA", str(tmp_path))
    (tmp_path / "libsvm").mkdir()
    text = b"3   1:0.50 2:-1.0\n7 1:0 2:2.5e-1 \n3 1:-0.125\n"
    (tmp_path / "libsvm" / "toy.scale").write_bytes(text)
    assert np.array_equal(data.load("toy").X, TOY_X)


@pytest.mark.parametrize("content", [
    TOY_TEXT.replace(b"0.25", b"0.26"),
    TOY_TEXT.replace(b"7 ", b"3 "),
    TOY_TEXT[:-16],
    bz2.compress(TOY_TEXT)[:-8],
    TOY_TEXT.replace(b"2:-1", b"9:-1"),
    b"<html>moved</html>",
    b"",
], ids=["value", "label", "cut", "archive", "feature", "page", "empty"])
def test_a_damaged_file_is_an_error(toy, tmp_path, monkeypatch, content):
    monkeypatch.setenv("PRODIGY_DATA", str(tmp_path))
    file = tmp_path / "libsvm" / "toy.scale"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(ValueError, match="toy.scale is damaged.*PRODIGY_DATA"):
        data.load("toy")
    assert file.exists()


def test_a_download_is_checked_and_cached(server):
    (server / "toy.scale").write_bytes(TOY_TEXT)
    assert np.array_equal(data.load("toy").X, TOY_X)
    (server / "toy.scale").unlink()
    assert np.array_equal(data.load("toy").X, TOY_X)


def test_a_damaged_download_is_an_error_and_not_kept(server):
    (server / "toy.scale").write_bytes(TOY_TEXT[:-16])
    with pytest.raises(ValueError, match="toy.scale is damaged.*removed"):
        data.load("toy")
    (server / "toy.scale").write_bytes(TOY_TEXT)
    assert np.array_equal(data.load("toy").X, TOY_X)


@pytest.mark.parametrize("folder, state", [
    (None, "PRODIGY_DATA is not set"),
    ("empty", "not in PRODIGY_DATA=empty"),
])
def test_no_network_and_no_folder_names_file_place_and_variable(toy, monkeypatch, folder, state):
    monkeypatch.setattr(data, "LIBSVM_PAGE", "http://127.0.0.1:9")
    if folder:
        monkeypatch.setenv("PRODIGY_DATA", folder)
    with pytest.raises(FileNotFoundError) as error:
        data.load("toy")
    for words in ("libsvm/toy.scale", "http://127.0.0.1:9/page/toy.scale", state,
                  "set PRODIGY_DATA to a folder"):
        assert words in str(error.value)


def test_a_set_published_nowhere_says_so(toy):
    with pytest.raises(FileNotFoundError, match="sensorless.*published nowhere.*PRODIGY_DATA"):
        data.load("sensorless-subset")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "tinyshakespeare"])
def test_bytes_of_the_other_sets_are_hashed(toy, tmp_path, monkeypatch, name):
    monkeypatch.setenv("PRODIGY_DATA", str(tmp_path))
    for file in ("mnist/train-images-idx3-ubyte.gz", "tinyshakespeare/input.txt",
                 "cifar-10-batches-py/data_batch_1"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_bytes(b"not the published bytes")
    with pytest.raises(ValueError, match="is damaged: its (sha256|md5) is"):
        data.load(name)


def test_idx_files_become_arrays(toy, tmp_path, monkeypatch):
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    labels = np.array([9, 4], dtype=np.uint8)
    hashes = {}
    (tmp_path / "mnist").mkdir()
    for file, array in zip(data.MNIST, (images, labels, images + 1, labels - 1)):
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
        content = gzip.compress(header + array.tobytes())
        (tmp_path / "mnist" / file).write_bytes(content)
        hashes[file] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(data, "MNIST", hashes)
    monkeypatch.setenv("PRODIGY_DATA", str(tmp_path))
    got = data.load("mnist")
    assert np.array_equal(got.X, images) and np.array_equal(got.X_test, images + 1)
    assert got.y.tolist() == [9, 4] and got.y_test.tolist() == [8, 3] and got.y.dtype == "int64"
    assert got.X.dtype == np.uint8 and got.X.flags.writeable


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_cifar_batches_become_arrays(toy, tmp_path, monkeypatch, form):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    hashes = {}
    for k, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        pixels = np.full((2, 3072), k, dtype=np.uint8)
        pixels[:, 1024] = 7
        content = pickle.dumps({b"data": pixels, b"labels": [k, 9]})
        (folder / name).write_bytes(content)
        hashes[name] = hashlib.md5(content).hexdigest()
    if form == "archive":
        archive = tmp_path / "cifar-10-python.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder, folder.name)
        shutil.rmtree(folder)
        monkeypatch.setattr(data, "CIFAR10_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(data, "CIFAR10", hashes)
    monkeypatch.setenv("PRODIGY_DATA", str(tmp_path))
    got = data.load("cifar10")
    assert got.X.shape == (4, 3, 32, 32) and got.X_test.shape == (2, 3, 32, 32)
    assert np.all(got.X[:, 1, 0, 0] == 7) and np.all(got.X[2:, 0] == 1)
    assert got.y.tolist() == [0, 9, 1, 9] and got.y_test.tolist() == [2, 9]


def test_unknown_names_and_misplaced_options_are_errors():
    with pytest.raises(ValueError, match="no data set 'irsi'.*iris"):
        data.load("irsi")
    with pytest.raises(ValueError, match="scaled=False.*'glass'"):
        data.load("glass", scaled=False)


@needs_files
@pytest.mark.parametrize("name", ["iris", "wine"])
def test_built_in_sets_equal_the_published_files(name):
    file = data.load(f"{name}.scale")
    ours = data.load(name)
    assert np.array_equal(ours.y, file.y)
    assert np.abs(ours.X - file.X).max() < 1.01e-6


@needs_files
@pytest.mark.parametrize("name", data.LIBSVM)
def test_every_libsvm_file_has_its_fingerprint(name):
    got = data.load(name)
    assert got.X.shape == (len(got.y), data.LIBSVM[name][1])
    assert set(got.y) == set(range(got.classes))
    assert (got.X_test is None) == (len(data.LIBSVM[name][2]) == 1)


@needs_files
def test_mnist_and_the_text_are_the_published_ones():
    mnist = data.load("mnist")
    assert mnist.X.shape == (60000, 28, 28) and mnist.X_test.shape == (10000, 28, 28)
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.y_test).tolist() == counts
    text = data.load("tinyshakespeare")
    assert len(text) == 1115394 and len(set(text)) == 65 and text.startswith("First Citizen:")


@needs_files
def test_a_changed_byte_of_a_real_file_is_found(tmp_path, monkeypatch):
    text = bz2.decompress((Path(FOLDER) / "libsvm" / "glass.scale.bz2").read_bytes())
    place = text.index(b"0.", len(text) // 2) + 2
    changed = text[:place] + (b"1" if text[place:place + 1] != b"1" else b"2") + text[place + 1:]
    (tmp_path / "libsvm").mkdir()
    (tmp_path / "libsvm" / "glass.scale").write_bytes(changed)
    monkeypatch.setenv("PRODIGY_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="glass.scale is damaged"):
        data.load("glass")
