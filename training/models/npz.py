"""Weights as .npz files, in the layouts that BiT was published in, both ways. models/layouts.py knows their keys.

Arrays pass one at a time from the zip into the network and back, so that memory holds the network and its largest array.
Pickled content is never read.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray

from training.errors import UserError
from training.models import layouts
from training.models.archs import ARCHS, Layout
from training.models.layouts import HEAD, STEM
from training.models.resnet import ResNet

Archive = np.lib.npyio.NpzFile
UNREADABLE = (ValueError, zipfile.BadZipFile, zlib.error, EOFError, OSError)


class WeightsError(UserError):
    """A weights file that does not fit; the message names the first key that is wrong and what was expected."""


def save(model: ResNet, path: str | Path, layout: Layout = "published") -> None:
    """Writes a network's parameters as float32 .npz: kernels HWIO, the head as a 1×1 convolution [1, 1, D, C] (published)."""

    def arrays() -> Iterator[tuple[str, NDArray[Any]]]:
        for key, parameter in layouts.parameters(model):
            array = parameter.detach().float().cpu().numpy()
            if key == HEAD[0]:
                array = array.T
            elif key.endswith("kernel"):
                array = array.transpose(2, 3, 1, 0)
            yield layouts.named(key, layout), array.reshape(layouts.shapes(key, parameter)[layout])

    write(path, arrays())


def write(path: str | Path, arrays: Iterator[tuple[str, NDArray[Any]]]) -> None:
    """An .npz from (key, array) pairs, one at a time; appears whole or not at all. The same arrays give the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for key, array in arrays:
                with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as file:
                    npy.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(model: ResNet, path: str | Path, head: bool = True) -> ResNet:
    """Fills `model` from a file in either layout; `head=False` leaves its own head as it is. Returns the model.

    Raises WeightsError when the file is not a readable .npz, a key is missing or unknown, a shape does not fit, or a value
    is not finite.
    """
    with opened(path) as archive, torch.no_grad():
        keys = checked_keys(path, archive, model, head)
        for key, parameter in layouts.parameters(model):
            if head or key not in HEAD:
                tensor = torch.from_numpy(array_of(path, archive, keys[key], key, parameter))
                if key == HEAD[0]:
                    tensor = tensor.reshape(tensor.shape[-2:]).T
                elif key.endswith("kernel"):
                    tensor = tensor.permute(3, 2, 0, 1)
                parameter.copy_(tensor.reshape(parameter.shape))
    return model


def num_classes(path: str | Path) -> int:
    """Outputs of the head that a weights file holds."""
    with opened(path) as archive:
        for key in archive.files:
            if layouts.canonical(key) == HEAD[1]:
                return int(_read(path, archive, key).size)
    raise WeightsError(f"{path} has no {HEAD[1]}: its head was dropped. Give the number of classes.")


def checked_keys(path: str | Path, archive: Archive, model: ResNet, head: bool) -> dict[str, str]:
    """Published key → the file's own key, after checking that the file holds the network's parameters and nothing else."""
    keys: dict[str, str] = {}
    for own in archive.files:
        key = layouts.canonical(own)
        if key in keys:
            raise WeightsError(f"{path}: {keys[key]} and {own} are both {key}; one of each is expected.")
        keys[key] = own
    wanted = [key for key, _ in layouts.parameters(model)]
    for key in wanted:
        if key not in keys and (head or key not in HEAD):
            raise WeightsError(f"{path} has no {key}, which the network wants. {_recognised(path, archive, keys)}")
    if unknown := sorted(set(keys) - set(wanted)):
        raise WeightsError(
            f"{path} holds {keys[unknown[0]]}, which the network does not have ({len(unknown)} such arrays). "
            f"{_recognised(path, archive, keys)}"
        )
    return keys


def array_of(path: str | Path, archive: Archive, own: str, key: str, parameter: torch.Tensor) -> NDArray[Any]:
    """One array of a file, in the file's own shape; a float of the expected shape with finite values, or WeightsError."""
    array = _read(path, archive, own)
    expected = layouts.shapes(key, parameter)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise WeightsError(f"{path}: {own} is of type {array.dtype}; float32 is expected.")
    if array.shape not in expected.values():
        wanted = " or ".join(sorted({str(shape) for shape in expected.values()}))
        hint = " Is `arch` the file's own? `bit weights show` tells." if key not in HEAD else ""
        raise WeightsError(f"{path}: {own} is {array.shape}, expected {wanted}.{hint}")
    if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):  # no temporary of the array's size
        raise WeightsError(f"{path}: {own} holds NaN or infinity; every value must be finite.")
    return array


def arch_of(path: str | Path) -> str | None:
    """The row of the zoo that a file belongs to, by its units and the width of its stem; None for no row."""
    with opened(path) as archive:
        return _arch(path, archive, {layouts.canonical(key): key for key in archive.files})


def _arch(path: str | Path, archive: Archive, keys: dict[str, str]) -> str | None:
    if STEM not in keys:
        return None
    found = layouts.units(keys), _read(path, archive, keys[STEM]).shape[-1:]
    return next((name for name, row in ARCHS.items() if (row.units, (row.width,)) == found), None)


def _recognised(path: str | Path, archive: Archive, keys: dict[str, str]) -> str:
    arch = _arch(path, archive, keys)
    return f"The file is of arch {arch}." if arch else f"It holds {len(keys)} arrays and fits no arch of `bit zoo`."


@contextmanager
def opened(path: str | Path) -> Iterator[Archive]:
    """The arrays of an .npz, read when asked for. Raises WeightsError for any other file."""
    if not Path(path).is_file():
        raise WeightsError(f"{path} is not there. Give a BiT weights file (.npz).")
    with Path(path).open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
        except UNREADABLE as error:
            raise WeightsError(f"{path} is not a BiT weights file (.npz), or it is cut short: {error}") from None
        if not isinstance(archive, Archive):
            raise WeightsError(f"{path} is not a BiT weights file (.npz) but a single array.")
        with archive:
            yield archive


def _read(path: str | Path, archive: Archive, key: str) -> NDArray[Any]:
    try:
        return archive[key]
    except UNREADABLE as error:
        if "pickle" in str(error).lower() or "Object arrays" in str(error):
            raise WeightsError(f"{path}: {key} is pickled, which is never read; plain float32 is expected.") from None
        raise WeightsError(f"{path}: {key} cannot be read ({error}). Fetch the file again.") from None
