"""Data sets for the experiments: every set is checked against a recorded hash.

Three kinds, one function `load(name)`:

* `iris`, `wine`, `digits`, `breast_cancer` ship with scikit-learn: no file, no network.
* the LIBSVM sets (`LIBSVM` below lists them), `mnist`, `cifar10` and `tinyshakespeare` are read
  from the folder named by the environment variable PRODIGY_DATA, or downloaded from their
  published place into pooch's cache folder.
* `sensorless-subset` is read from that folder only: it is 2200 of the 58509 rows of Sensorless,
  and no number obtained on it is a number of the full set.

Layout of the folder PRODIGY_DATA: `libsvm/NAME` or `libsvm/NAME.bz2` under the names of the
LIBSVM pages, `mnist/*.gz`, `tinyshakespeare/input.txt`, and `cifar-10-batches-py/*` or
`cifar-10-python.tar.gz`.

A LIBSVM file is checked by `fingerprint`, a hash of the numbers that were parsed, because the same
numbers are in circulation with different spacing and compression. The image and text files are
checked byte for byte.

The protocol of D-Adaptation's Fig. 2 and of The Road Less Scheduled's Fig. 8 uses the LIBSVM files
iris.scale and wine.scale, whose features are mapped linearly to [-1, 1]. `load("iris")` and
`load("wine")` return these sets from scikit-learn's copy: the same rows in the same order, equal
to the six digits printed in the files (largest difference 1e-6, their rounding). For iris this
needs one correction: scikit-learn follows Fisher's article in samples 35 and 38, LIBSVM the
older UCI file, where both read 4.9, 3.1, 1.5, 0.1. The protocol's file is the latter.
"""

import bz2
import gzip
import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
from sklearn import datasets

VARIABLE = "PRODIGY_DATA"
BUILT_IN = ("iris", "wine", "digits", "breast_cancer")
LIBSVM_PAGE = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets"
MNIST_PAGE = "https://ossci-datasets.s3.amazonaws.com/mnist"
CIFAR10_ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
SHAKESPEARE_PAGE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data"

UCI_IRIS_SAMPLE = (4.9, 3.1, 1.5, 0.1)
UCI_IRIS_ROWS = (34, 37)

# name: (page, number of features, {file: fingerprint}); the first file is the training set
LIBSVM = {
    "iris.scale": ("multiclass", 4, {
        "iris.scale": "b8a427737de7d4e1db2632d8d4fe75b11b839f2040c1dce655c6b5c0406e2bac",
    }),
    "wine.scale": ("multiclass", 13, {
        "wine.scale": "634cc3cd8b078531d6be41451ee560bad3aea495d010bf9e40557b5251372ae6",
    }),
    "glass": ("multiclass", 9, {
        "glass.scale": "d630ddcecc46921a601781d8a23b67782d3142859e52fef007ebb3d4df87bae0",
    }),
    "vehicle": ("multiclass", 18, {
        "vehicle.scale": "6fd3b5c938353e1f1d70b0edb7f50652ff3f0c69d10d19129309692cba3baa43",
    }),
    "vowel": ("multiclass", 10, {
        "vowel.scale": "adc89b5348a286391764aa218434dc246938a98592d7d5335bf08ec7e71d248e",
        "vowel.scale.t": "807c1d16f7adce367d8d81ec7e3ca9e280e4489da4fa2e7b88d18e713f79f6ef",
    }),
    "segment": ("multiclass", 19, {
        "segment.scale": "4b9a8b6be96cab3826171218efca7439c240c4359f46dfa6058135e30271a328",
    }),
    "satimage": ("multiclass", 36, {
        "satimage.scale": "2433a1d82aaff8cf7eefc32047c38afe6613e2d47b0e0b91f5d16c1abe659159",
        "satimage.scale.t": "e26cba46ca1e03c1ef059283e0723d7a2bcf30811ec986b9cc294d35ce9517c5",
    }),
    "dna": ("multiclass", 180, {
        "dna.scale": "609b5515fd5437eaff416cc14dd069589c3ae2c2e3dd096f1aa943193333d2ed",
        "dna.scale.t": "94d89727e40bb389a742a7d3e1b7f12733885150856d59a22a3bf97ee9cd28be",
    }),
    "letter": ("multiclass", 16, {
        "letter.scale": "c5cc63508e33524a0225556bfeab9ba0f1b87f151c544dfa5a4e32a003d65bb3",
        "letter.scale.t": "c1fd81a420e242d06e4f80d00476c332c97f5f4bfac7dce24f9636c8e9b456ec",
    }),
    "pendigits": ("multiclass", 16, {
        "pendigits": "f3b2470a1dcd6923fe3cc9159800abaf40108788ff111fd2a34a4c1d6356b0b7",
        "pendigits.t": "3521fa95e7b33dd70d8bf19214c96777780503dff5ba48b3940f92d911c80225",
    }),
    "sensorless-subset": (None, 48, {
        "sensorless.subset2200":
            "e2880999cebaf5c005a01fda1b18e8235ddb8239afa2c3a461b55e153320d373",
    }),
    "splice": ("binary", 60, {
        "splice": "2ae2f8f6bd8835bf4e2371ba90398cfabd039df8dfb50f468a07f5b0a7a96661",
        "splice.t": "fdf1a6e3a8e93e882335632f997a562ce3b73026ac46e7636f932ae4cb1cd291",
    }),
    "a9a": ("binary", 123, {
        "a9a": "2f95d2c4e2d5e583de51d28cd3491a4628106ec7434d84b8cd57ae5aeb86e866",
        "a9a.t": "df35a99a9c11b8eb1d637dd57b1932b9632334967656770ba78812eb4e902cac",
    }),
    "w8a": ("binary", 300, {
        "w8a": "b0a8c26a4cdb2787850339efd68ad2dce8d0063bd6e3320433f4399b1291ceda",
    }),
    "mushrooms": ("binary", 112, {
        "mushrooms": "999196ad4a974edce5b8c3fcba5e4de0349bf0925d67baded7423c4bf819a5a2",
    }),
    "phishing": ("binary", 68, {
        "phishing": "e25189fbfe5315664b0478f39bb89f1499ec5e50da66e899836b1b8dae7faa1d",
    }),
    "australian": ("binary", 14, {
        "australian": "0c6d8875726bdf1a11cc2e93ad60c5db9826a5d6c6d240efb652409bfa63fd10",
    }),
    "breast-cancer": ("binary", 10, {
        "breast-cancer": "49d89361e519322e08b9f3b6d143b883e928c940691f6f6626132a3952102228",
    }),
    "ijcnn1": ("binary", 22, {
        "ijcnn1.bz2": "2756655859361e11c2118281ea0cb3b239457106ff8a8eeb1a9f4592575d492e",
        "ijcnn1.t.bz2": "455f5539654ad10055ae05837999f8f6813e669ea74f45609ef98b8a57b709ae",
    }),
}

MNIST = {
    "train-images-idx3-ubyte.gz":
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz":
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz":
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz":
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CIFAR10 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification set in file order.

    X is float64 (n, p) for tables and uint8 (n, 28, 28) or (n, 3, 32, 32) for images; y is int64
    (n,) with values 0..classes-1, the original labels in ascending order. X_test and y_test hold
    the published test part where there is one, else None.
    """

    name: str
    X: np.ndarray
    y: np.ndarray
    classes: int
    X_test: np.ndarray | None = None
    y_test: np.ndarray | None = None


def load(name, scaled=True):
    """The set `name` as a `Dataset`; `tinyshakespeare` as one str of 1115394 characters.

    scaled applies to the four built-in sets: True maps every feature linearly to [-1, 1] (see
    `scale`), False leaves the measured units. The other sets come as they were published.
    Raises ValueError for an unknown name or a damaged file, FileNotFoundError where a file is
    neither in the folder nor can be downloaded.
    """
    if name in BUILT_IN:
        return _built_in(name, scaled)
    if not scaled:
        raise ValueError(f"scaled=False is for {', '.join(BUILT_IN)}; {name!r} is as published")
    if name in LIBSVM:
        return _libsvm(name)
    if name in _OTHERS:
        return _OTHERS[name]()
    known = sorted([*BUILT_IN, *LIBSVM, *_OTHERS])
    raise ValueError(f"name: no data set {name!r}; known are {', '.join(known)}")


def scale(X):
    """Each column of X (n, p) mapped linearly to [-1, 1]; a constant column becomes 0."""
    low, high = X.min(axis=0), X.max(axis=0)
    width = high - low
    safe = np.where(width > 0, width, 1.0)
    return np.where(width > 0, 2 * (X - low) / safe - 1, 0.0)


def fingerprint(X, y):
    """sha256 of a parsed table: the text "n p", X row by row as little-endian float64, y as int64.

    A negative zero counts as zero. Two files with the same numbers have the same fingerprint.
    """
    digest = hashlib.sha256(f"{X.shape[0]} {X.shape[1]}".encode())
    digest.update((X + 0.0).astype("<f8").tobytes())
    digest.update(y.astype("<i8").tobytes())
    return digest.hexdigest()


def _built_in(name, scaled):
    raw = getattr(datasets, f"load_{name}")()
    X = raw.data.astype(np.float64)
    if name == "iris":
        X[list(UCI_IRIS_ROWS)] = UCI_IRIS_SAMPLE
    y = raw.target.astype(np.int64)
    return Dataset(name, scale(X) if scaled else X, y, len(raw.target_names))


def _libsvm(name):
    page, features, files = LIBSVM[name]
    tables = []
    labels = None
    for file, expected in files.items():
        url = page and f"{LIBSVM_PAGE}/{page}/{file}"
        source, content = _read(f"libsvm/{file}", url)
        try:
            if content.startswith(b"BZh"):
                content = bz2.decompress(content)
            X, y = datasets.load_svmlight_file(io.BytesIO(content), n_features=features)
        except (OSError, EOFError, ValueError) as error:
            raise _damaged(source, f"it cannot be parsed ({error})") from error
        X = X.toarray()
        labels = np.unique(y) if labels is None else labels
        y = np.searchsorted(labels, y).astype(np.int64)
        found = fingerprint(X, y)
        if found != expected:
            raise _damaged(source, f"its numbers hash to {found}, expected {expected}")
        tables += [X, y]
    return Dataset(name, tables[0], tables[1], len(labels), *tables[2:])


def _mnist():
    arrays = []
    for file, sha256 in MNIST.items():
        _, content = _read(f"mnist/{file}", f"{MNIST_PAGE}/{file}", sha256)
        raw = gzip.decompress(content)
        shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
        arrays.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())
    X, y, X_test, y_test = arrays
    return Dataset("mnist", X, y.astype(np.int64), 10, X_test, y_test.astype(np.int64))


def _cifar10():
    folder = os.environ.get(VARIABLE)
    if folder and (Path(folder) / "cifar-10-batches-py").is_dir():
        contents = [_read(f"cifar-10-batches-py/{file}", None, md5, "md5")[1]
                    for file, md5 in CIFAR10.items()]
    else:
        _, archive = _read("cifar-10-python.tar.gz", CIFAR10_ARCHIVE, CIFAR10_MD5, "md5")
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            contents = [tar.extractfile(f"cifar-10-batches-py/{file}").read() for file in CIFAR10]
    batches = [pickle.loads(content, encoding="bytes") for content in contents]
    X = [batch[b"data"].reshape(-1, 3, 32, 32) for batch in batches]
    y = [np.array(batch[b"labels"], dtype=np.int64) for batch in batches]
    return Dataset("cifar10", np.concatenate(X[:-1]), np.concatenate(y[:-1]), 10, X[-1], y[-1])


def _tinyshakespeare():
    file = "tinyshakespeare/input.txt"
    _, content = _read(file, f"{SHAKESPEARE_PAGE}/{file}", SHAKESPEARE_SHA256)
    return content.decode()


_OTHERS = {"mnist": _mnist, "cifar10": _cifar10, "tinyshakespeare": _tinyshakespeare}


def _read(file, url, expected=None, algorithm="sha256"):
    """(path, content) of a file: from the folder PRODIGY_DATA, else from the cache or url.

    expected is the hash of the bytes, or None where the caller checks the parsed numbers.
    """
    folder = os.environ.get(VARIABLE)
    path = _inside(folder, file) if folder else None
    if path is None:
        path = _download(file, url)
    content = path.read_bytes()
    found = hashlib.new(algorithm, content).hexdigest()
    if expected not in (None, found):
        raise _damaged(path, f"its {algorithm} is {found}, expected {expected}")
    return path, content


def _inside(folder, file):
    for path in (Path(folder) / file, Path(folder) / f"{file}.bz2"):
        if path.is_file():
            return path
    return None


def _cache():
    return Path(pooch.os_cache("prodigy-lab"))


def _download(file, url):
    folder = os.environ.get(VARIABLE)
    place = f"not in {VARIABLE}={folder}" if folder else f"{VARIABLE} is not set"
    way_out = f"set {VARIABLE} to a folder that holds {file}"
    if url is None:
        raise FileNotFoundError(f"{file}: {place}, and it is published nowhere; {way_out}")
    pooch.get_logger().setLevel("WARNING")
    path = _cache() / file
    try:
        return Path(pooch.retrieve(url, None, fname=path.name, path=path.parent))
    except (OSError, ValueError) as error:
        message = f"{file}: {place}, and {url} cannot be downloaded ({error}); {way_out}"
        raise FileNotFoundError(message) from error


def _damaged(path, reason):
    """The error for a file that is not what was published; a cached download is removed."""
    if _cache() in path.parents:
        path.unlink()
        return ValueError(f"{path} is damaged: {reason}; it was removed, so try once more")
    return ValueError(f"{path} is damaged: {reason}; replace the file, or unset {VARIABLE}")
