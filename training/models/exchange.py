"""Weight files in and out: fetched from anywhere, checked against an architecture, written in another layout or as timm's.

npz → npz    array by array: nothing is lost, keys and types stay as they were unless a layout is asked for
.pth, .pt    timm's state dict of the same network, both ways
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import numpy as np
import torch
from numpy.typing import NDArray

from training.models import layouts, npz, timm_state, zoo
from training.models.archs import HeadChoice, Layout
from training.models.layouts import HEAD
from training.models.npz import WeightsError

TORCH = (".pth", ".pt")
PATIENT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)  # gigabytes outlast the default of 5 minutes


def fetch(source: str, target: Path, sha256: str | None = None) -> str:
    """Copies any fsspec URL (https, gs, s3, file, a path) to a local file; returns its sha256.

    Raises WeightsError when it cannot be fetched or hashes to something other than `sha256`; nothing is left behind then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    options = {"client_kwargs": {"timeout": PATIENT}} if source.startswith(("http://", "https://")) else {}
    try:
        system, path = fsspec.url_to_fs(source, **options)
        system.get_file(path, str(target))
    except (OSError, ValueError, ImportError, aiohttp.ClientError) as error:
        target.unlink(missing_ok=True)
        raise WeightsError(f"weights {source!r} cannot be fetched: {error}") from error
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 is not None and digest != sha256:
        target.unlink(missing_ok=True)
        raise WeightsError(f"weights {source!r} hash to sha256 {digest}, expected {sha256}.")
    return digest


def convert(
    source: Path,
    target: Path,
    arch: str,
    layout: Layout | None = None,
    head: HeadChoice = "keep",
    num_classes: int | None = None,
) -> None:
    """Checks a weights file against `arch` and writes it to `target`; the suffix of each says what it is.

    layout: of an .npz that is written; None keeps the source's own keys. head: kept, dropped, or replaced by a zero head
    of `num_classes`. Raises WeightsError for a file that does not fit.
    """
    if head == "replace" and num_classes is None:
        raise WeightsError("a replaced head needs its number of classes (--classes).")
    if source.suffix in TORCH or target.suffix in TORCH:
        _by_network(source, target, arch, layout or "published", head, num_classes)
    else:
        with npz.opened(source) as archive:
            npz.write(target, _arrays(source, archive, arch, layout, head, num_classes))


def _arrays(
    source: Path, archive: npz.Archive, arch: str, layout: Layout | None, head: HeadChoice, num_classes: int | None
) -> Iterator[tuple[str, NDArray[Any]]]:
    """(key, array) of the file that is written, in the order of the file that is read where its keys are kept."""
    keep = head == "keep"
    model = zoo.outline(arch, npz.num_classes(source) if keep else 1)
    keys = npz.checked_keys(source, archive, model, keep)
    parameters = dict(layouts.parameters(model))
    order = list(parameters) if layout else [layouts.canonical(own) for own in archive.files]
    for key in order:
        if key in HEAD and not keep:
            continue
        array = npz.array_of(source, archive, keys[key], key, parameters[key])
        if layout:
            yield layouts.named(key, layout), array.reshape(layouts.shapes(key, parameters[key])[layout])
        else:
            yield keys[key], array
    if head == "replace":
        assert num_classes is not None
        wanted = layout or layouts.layout_of(archive.files)
        for key, parameter in layouts.parameters(zoo.outline(arch, num_classes)):
            if key in HEAD:
                yield layouts.named(key, wanted), np.zeros(layouts.shapes(key, parameter)[wanted], np.float32)


def _by_network(
    source: Path, target: Path, arch: str, layout: Layout, head: HeadChoice, num_classes: int | None
) -> None:
    """Through a network in memory, where one side is a timm state dict."""
    if head == "drop":
        raise WeightsError("a timm state dict has a head; drop it in an .npz, or replace it (--head replace).")
    keep = head == "keep"
    state = read_state(source) if source.suffix in TORCH else None
    if keep:
        num_classes = timm_state.num_classes(state) if state is not None else npz.num_classes(source)
    assert num_classes is not None
    model = zoo.create(arch, num_classes)
    if state is not None:
        timm_state.load(model, state, head=keep)
    else:
        npz.load(model, source, head=keep)
    if target.suffix in TORCH:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(timm_state.dump(model), target)
    else:
        npz.save(model, target, layout)


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from a file of torch, read without unpickling anything but tensors."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged or a pickled file
        raise WeightsError(f"{path} is not a state dict of tensors: {str(error).splitlines()[0]}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{path} is not a state dict: a mapping of names to tensors is expected.")
    return state
