"""The keys of BiT weight files: the two layouts that they were published in, and the way between them.

published    resnet/block1/unit01/a/standardized_conv2d/kernel (some files number it: standardized_conv2d_17)
big_vision   block1/unit01/conv1/kernel, norms as scale and bias of shape (1, 1, 1, C), the head as (D, C)

Kernels are HWIO in both. The published key without a number is the one by which this code speaks of a parameter.
"""

import re
from collections.abc import Iterable, Iterator

import torch

from training.models.archs import Layout
from training.models.resnet import ResNet, units_of

HEAD = ("resnet/head/conv2d/kernel", "resnet/head/conv2d/bias")
STEM = "resnet/root_block/standardized_conv2d/kernel"


def parameters(model: ResNet) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (published key, parameter) of a network, from the stem to the head."""
    yield STEM, model.stem.weight
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


def shapes(key: str, parameter: torch.Tensor) -> dict[Layout, tuple[int, ...]]:
    """The shape of a parameter's array in each layout; `key` is the published one."""
    size = tuple(parameter.shape)
    if key == HEAD[0]:
        return {"published": (1, 1, size[1], size[0]), "big_vision": (size[1], size[0])}
    if key.endswith("kernel"):
        size = (size[2], size[3], size[1], size[0])
    elif key != HEAD[1]:
        return {"published": size, "big_vision": (1, 1, 1, *size)}
    return {"published": size, "big_vision": size}


def canonical(key: str) -> str:
    """A key of either layout → the published key, without layer numbers."""
    key = re.sub(r"(standardized_conv2d|group_norm|conv2d)_\d+", r"\1", key.removesuffix(":0"))
    if key.startswith("resnet/"):
        return key
    key = key.removeprefix("params/").replace("root_block/conv_root/", "root_block/standardized_conv2d/")
    key = key.replace("conv_proj/", "a/proj/standardized_conv2d/")
    for number, letter in enumerate("abc", 1):
        key = key.replace(f"/conv{number}/", f"/{letter}/standardized_conv2d/")
        key = key.replace(f"/gn{number}/", f"/{letter}/group_norm/")
    key = key.replace("norm-pre-head/", "group_norm/")
    key = re.sub(r"group_norm/scale$", "group_norm/gamma", re.sub(r"group_norm/bias$", "group_norm/beta", key))
    return "resnet/" + re.sub(r"^head/", "head/conv2d/", key)


def big_vision(key: str) -> str:
    """A published key → big_vision's."""
    key = key.removeprefix("resnet/").replace("root_block/standardized_conv2d", "root_block/conv_root")
    key = key.replace("a/proj/standardized_conv2d", "conv_proj").replace("head/conv2d", "head")
    for number, letter in enumerate("abc", 1):
        key = key.replace(f"/{letter}/standardized_conv2d", f"/conv{number}")
        key = key.replace(f"/{letter}/group_norm", f"/gn{number}")
    return re.sub(r"^group_norm/", "norm-pre-head/", key).replace("gamma", "scale").replace("beta", "bias")


def named(key: str, layout: Layout) -> str:
    """A published key → the key in `layout`."""
    return big_vision(key) if layout == "big_vision" else key


def layout_of(keys: Iterable[str]) -> Layout:
    """The layout that a file's keys are in."""
    return "published" if any(key.startswith("resnet/") for key in keys) else "big_vision"


def units(keys: Iterable[str]) -> tuple[int, ...]:
    """Units per block that a set of published keys speaks of: what an architecture is recognised by."""
    seen = {(int(m[1]), int(m[2])) for key in keys if (m := re.match(r"resnet/block(\d+)/unit(\d+)/", key))}
    return tuple(sum(block == b for block, _ in seen) for b in sorted({block for block, _ in seen}))
