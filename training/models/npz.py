"""Weights as .npz files, in the layout that the authors published BiT in, both ways.

Two dialects are read: the published one (`resnet/block1/unit01/a/standardized_conv2d/kernel`, where some files number
their layers `standardized_conv2d_<n>`) and big_vision's (`block1/unit01/conv1/kernel`). The first is written.
Pickled content is never read.
"""

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from training.errors import UserError
from training.models.resnet import ResNet, units_of

HEAD = ("resnet/head/conv2d/kernel", "resnet/head/conv2d/bias")


class WeightsError(UserError):
    """A weights file that does not fit; the message names the first key that is wrong and what was expected."""


def layout(model: ResNet) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (published key, parameter) of a network, from the stem to the head."""
    yield "resnet/root_block/standardized_conv2d/kernel", model.stem.weight
    for b, block in enumerate(model.blocks, 1):
        for u, unit in enumerate(units_of(block), 1):
            prefix = f"resnet/block{b}/unit{u:02d}"
            if unit.downsample is not None:
                yield f"{prefix}/a/proj/standardized_conv2d/kernel", unit.downsample.weight
            parts = (("a", unit.norm1, unit.conv1), ("b", unit.norm2, unit.conv2), ("c", unit.norm3, unit.conv3))
            for letter, norm, convolution in parts:
                yield f"{prefix}/{letter}/group_norm/gamma", norm.weight
                yield f"{prefix}/{letter}/group_norm/beta", norm.bias
                yield f"{prefix}/{letter}/standardized_conv2d/kernel", convolution.weight
    yield "resnet/group_norm/gamma", model.norm.weight
    yield "resnet/group_norm/beta", model.norm.bias
    yield HEAD[0], model.head.weight
    yield HEAD[1], model.head.bias


def save(model: ResNet, path: str | Path) -> None:
    """Writes a network's parameters as float32 .npz: kernels HWIO, the head as a 1×1 convolution [1, 1, D, C]."""
    arrays = {}
    for key, parameter in layout(model):
        array = parameter.detach().float().cpu().numpy()
        if key == HEAD[0]:
            array = array.T[None, None]
        elif key.endswith("kernel"):
            array = array.transpose(2, 3, 1, 0)
        arrays[key] = np.ascontiguousarray(array)
    with Path(path).open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load(model: ResNet, path: str | Path, head: bool = True) -> ResNet:
    """Fills `model` from a file in either dialect; `head=False` leaves its own head as it is. Returns the model.

    Raises WeightsError when the file is not a readable .npz, a key or shape does not fit, or a value is not finite.
    """
    with _open(path) as archive, torch.no_grad():
        keys = {canonical(key): key for key in archive.files}
        for key, parameter in layout(model):
            if key in HEAD and not head:
                continue
            if key not in keys:
                raise WeightsError(f"{path} has no {key}; it holds {len(keys)} arrays. Is `arch` the file's own?")
            parameter.copy_(_fitted(path, key, _read(path, archive, keys[key]), parameter))
    return model


def num_classes(path: str | Path) -> int:
    """Outputs of the head that a weights file holds."""
    with _open(path) as archive:
        for key in archive.files:
            if canonical(key) == HEAD[1]:
                return int(archive[key].size)
    raise WeightsError(f"{path} has no {HEAD[1]}.")


def canonical(key: str) -> str:
    """A key of either dialect → the published key, without layer numbers."""
    key = re.sub(r"(standardized_conv2d|group_norm|conv2d)_\d+", r"\1", key.removesuffix(":0"))
    if key.startswith("resnet/"):
        return key
    key = key.replace("root_block/conv_root/", "root_block/standardized_conv2d/")
    key = key.replace("conv_proj/", "a/proj/standardized_conv2d/")
    for number, letter in enumerate("abc", 1):
        key = key.replace(f"/conv{number}/", f"/{letter}/standardized_conv2d/")
        key = key.replace(f"/gn{number}/", f"/{letter}/group_norm/")
    key = key.replace("norm-pre-head/", "group_norm/").removeprefix("params/")
    key = re.sub(r"group_norm/scale$", "group_norm/gamma", re.sub(r"group_norm/bias$", "group_norm/beta", key))
    return "resnet/" + re.sub(r"^head/", "head/conv2d/", key)


@contextmanager
def _open(path: str | Path) -> Iterator[np.lib.npyio.NpzFile]:
    with Path(path).open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise WeightsError(f"{path} is not a BiT weights file (.npz): {error}") from None
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise WeightsError(f"{path} is not a BiT weights file (.npz) but a single array.")
        with archive:
            yield archive


def _read(path: str | Path, archive: np.lib.npyio.NpzFile, key: str) -> NDArray[np.float32]:
    try:
        return archive[key]
    except (ValueError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise WeightsError(f"{path}: {key} cannot be read ({error}). Fetch the file again.") from None


def _fitted(path: str | Path, key: str, array: NDArray[np.float32], parameter: torch.Tensor) -> torch.Tensor:
    """The array in the parameter's own order of axes."""
    tensor = torch.from_numpy(np.asarray(array, dtype=np.float32))
    if key == HEAD[0]:
        tensor = tensor.reshape(tensor.shape[-2:]).T
    elif key.endswith("kernel") and tensor.ndim == 4:
        tensor = tensor.permute(3, 2, 0, 1)
    elif key.endswith(("gamma", "beta")):
        tensor = tensor.reshape(-1)  # big_vision keeps them as (1, 1, 1, C)
    if tensor.shape != parameter.shape:
        raise WeightsError(f"{path}: {key} is {tuple(tensor.shape)}, the network wants {tuple(parameter.shape)}.")
    if not torch.isfinite(tensor).all():
        raise WeightsError(f"{path}: {key} holds NaN or infinity.")
    return tensor
