"""Datasets that their authors publish as arrays: CIFAR, SVHN, dSprites, smallNORB. Pictures become PNG."""

import gzip
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from training.data.sources import SourceError
from training.study.source import Sample, Source, Task, png

SPLITS = ("train", "test")
# Files of CIFAR's binary version: (split, path), and of its Python version, which torchvision keeps.
BINARY_10 = (*(("train", f"data_batch_{i}.bin") for i in range(1, 6)), ("test", "test_batch.bin"))
PYTHON_10 = (*(("train", f"data_batch_{i}") for i in range(1, 6)), ("test", "test_batch"))
BINARY_100, PYTHON_100 = (("train", "train.bin"), ("test", "test.bin")), (("train", "train"), ("test", "test"))


def cifar10(folder: Path, task: Task) -> Source | None:
    if place := _place(folder, "cifar-10-batches-bin", "test_batch.bin"):
        names = (place / "batches.meta.txt").read_text().split()
        return Source(place, names, _binary(place, BINARY_10, label_bytes=1))
    if place := _place(folder, "cifar-10-batches-py", "test_batch"):
        names = [name.decode() for name in _unpickled(place / "batches.meta")[b"label_names"]]
        return Source(place, names, _pickled(place, PYTHON_10, b"labels"))
    return None


def cifar100(folder: Path, task: Task) -> Source | None:
    if place := _place(folder, "cifar-100-binary", "test.bin"):
        names = (place / "fine_label_names.txt").read_text().split()
        return Source(place, names, _binary(place, BINARY_100, label_bytes=2))
    if place := _place(folder, "cifar-100-python", "test"):
        names = [name.decode() for name in _unpickled(place / "meta")[b"fine_label_names"]]
        return Source(place, names, _pickled(place, PYTHON_100, b"fine_labels"))
    return None


def _place(folder: Path, inner: str, marker: str) -> Path | None:
    """Where a file of the layout is: in the folder, or in the one that the archive unpacks to."""
    return next((place for place in (folder / inner, folder) if (place / marker).is_file()), None)


def _binary(place: Path, files: tuple[tuple[str, str], ...], label_bytes: int) -> Iterator[Sample]:
    """Rows of label bytes (the last is the fine one) and 3 × 32 × 32 pixels."""
    size = label_bytes + 3072
    for split, name in files:
        data = (place / name).read_bytes()
        if len(data) % size:
            raise SourceError(f"{place / name} is {len(data)} bytes, no multiple of {size}: it is cut short.")
        for row in np.frombuffer(data, np.uint8).reshape(-1, size):
            yield split, int(row[label_bytes - 1]), png(row[label_bytes:].reshape(3, 32, 32).transpose(1, 2, 0))


def _pickled(place: Path, files: tuple[tuple[str, str], ...], labels: bytes) -> Iterator[Sample]:
    for split, name in files:
        told = _unpickled(place / name)
        for row, label in zip(told[b"data"], told[labels], strict=True):
            yield split, int(label), png(row.reshape(3, 32, 32).transpose(1, 2, 0))


class ArraysOnly(pickle.Unpickler):
    """Reads mappings, lists, texts, numbers and numpy's arrays; a pickle that asks for anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, only arrays are read")


def _unpickled(path: Path) -> dict[bytes, Any]:
    with path.open("rb") as file:
        try:
            told = ArraysOnly(file, encoding="bytes").load()
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError) as error:
            raise SourceError(f"{path} cannot be read: {error}. Get the binary version.") from None
    assert isinstance(told, dict)
    return told


def svhn(folder: Path, task: Task) -> Source | None:
    """train_32x32.mat and test_32x32.mat: X [32, 32, 3, n], y [n, 1] with 10 for the digit 0."""
    if not (folder / "test_32x32.mat").is_file():
        return None

    def samples() -> Iterator[Sample]:
        from scipy.io import loadmat

        for split in SPLITS:
            told = loadmat(folder / f"{split}_32x32.mat")
            for number, label in enumerate(told["y"].ravel()):
                yield split, int(label) % 10, png(np.ascontiguousarray(told["X"][..., number]))

    return Source(folder, task.numbers, samples())


def dsprites(folder: Path, task: Task) -> Source | None:
    """The .npz of its authors: imgs [n, 64, 64] of 0 and 1, latents_classes [n, 6]. No splits."""
    path = next(iter(sorted(folder.glob("dsprites_ndarray_*.npz"))), None)
    if path is None:
        return None

    def samples() -> Iterator[Sample]:
        with np.load(path, allow_pickle=False) as told:
            pictures, latents = told["imgs"], told["latents_classes"]
        for picture, (_, _, _, angle, x, _) in zip(pictures, latents, strict=True):
            yield None, task.of({"label_orientation": angle, "label_x_position": x}), png(picture)

    return Source(path, task.numbers, samples())


def smallnorb(folder: Path, task: Task) -> Source | None:
    """Its authors' matrices, plain or gzipped: *-training-{dat,info}.mat and *-testing-…; the left picture of each pair."""
    files = {
        (split, kind): path
        for split, name in zip(SPLITS, ("training", "testing"), strict=True)
        for kind in ("dat", "info")
        for path in sorted(folder.glob(f"smallnorb-*-{name}-{kind}.mat*"))[:1]
    }
    if len(files) < 4:
        return None

    def samples() -> Iterator[Sample]:
        for split in SPLITS:
            pictures, told = _matrix(files[split, "dat"]), _matrix(files[split, "info"])
            for pair, (_, elevation, azimuth, _) in zip(pictures, told, strict=True):
                # Azimuths are 0, 2, … 34 (times 10 degrees).
                yield split, task.of({"label_elevation": elevation, "label_azimuth": azimuth // 2}), png(pair[0])

    return Source(folder, task.numbers, samples())


def _matrix(path: Path) -> NDArray[Any]:
    """A file of the NORB format: a magic number, the number of dimensions, at least three sizes, the values."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        stream: IO[bytes] = file  # type: ignore[assignment]
        magic, dimensions = struct.unpack("<2i", stream.read(8))
        sizes = struct.unpack(f"<{max(3, dimensions)}i", stream.read(4 * max(3, dimensions)))[:dimensions]
        kinds = {0x1E3D4C55: np.uint8, 0x1E3D4C54: np.int32}
        if magic not in kinds:
            raise SourceError(f"{path} is no matrix of smallNORB (magic {magic:#x}).")
        values = np.frombuffer(stream.read(), kinds[magic])
    if values.size != np.prod(sizes):
        raise SourceError(f"{path} holds {values.size} values, its head says {sizes}: it is cut short.")
    return values.reshape(sizes)
