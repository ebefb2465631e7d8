"""Weights in the published layout: lossless both ways, both dialects read, every misfit named."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training.models import layouts, npz, zoo
from training.models.npz import WeightsError
from training.models.resnet import ResNet


def network(classes: int = 5, seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    model = zoo.create("R14x0.5", classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    npz.save(network(), tmp_path / "weights.npz")
    return tmp_path / "weights.npz"


def test_weights_survive_the_round_trip_bit_by_bit(saved: Path, tmp_path: Path) -> None:
    loaded = npz.load(zoo.create("R14x0.5", 5), saved)
    for (name, a), b in zip(network().named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
    npz.save(loaded, tmp_path / "again.npz")
    with np.load(saved) as first, np.load(tmp_path / "again.npz") as second:
        assert first.files == second.files
        assert all(np.array_equal(first[key], second[key]) for key in first.files)


def test_keys_and_shapes_are_the_published_ones(saved: Path) -> None:
    with np.load(saved) as archive:
        assert archive["resnet/root_block/standardized_conv2d/kernel"].shape == (7, 7, 3, 32)
        assert archive["resnet/block2/unit01/a/proj/standardized_conv2d/kernel"].shape == (1, 1, 128, 256)
        assert archive["resnet/block1/unit01/b/standardized_conv2d/kernel"].shape == (3, 3, 32, 32)
        assert archive["resnet/head/conv2d/kernel"].shape == (1, 1, 1024, 5)


@pytest.mark.parametrize(("arch", "arrays"), [("R50x1", 153), ("R101x1", 306)])
def test_the_number_of_arrays_is_the_published_one(arch: str, arrays: int) -> None:
    with torch.device("meta"):
        model = zoo.create(arch, 1000)
    assert len(list(layouts.parameters(model))) == arrays


def test_numbered_layers_and_the_other_dialect_are_read(saved: Path, tmp_path: Path) -> None:
    with np.load(saved) as archive:
        arrays = {key: archive[key] for key in archive.files}
    numbered = {
        key.replace("standardized_conv2d", f"standardized_conv2d_{n}"): array
        for n, (key, array) in enumerate(arrays.items())
    }
    np.savez(tmp_path / "numbered.npz", **numbered)
    npz.save(network(), tmp_path / "other.npz", "big_vision")
    with np.load(tmp_path / "other.npz") as archive:
        assert archive["block2/unit01/conv_proj/kernel"].shape == (1, 1, 128, 256)
        assert archive["block1/unit01/gn2/scale"].shape == (1, 1, 1, 32)
        assert {"root_block/conv_root/kernel", "norm-pre-head/bias", "head/kernel"} < set(archive.files)
        assert archive["head/kernel"].shape == (1024, 5)
    for name in ("numbered.npz", "other.npz"):
        loaded = npz.load(zoo.create("R14x0.5", 5), tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(network().parameters(), loaded.parameters(), strict=True)), name


def test_another_head_is_kept_when_asked(saved: Path) -> None:
    model = npz.load(zoo.create("R14x0.5", 9), saved, head=False)
    assert not model.head.weight.any()
    assert torch.equal(model.stem.weight, network().stem.weight)


def test_misfits_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"head/conv2d/kernel is \(1, 1, 1024, 5\), expected \(1, 1, 1024, 9\)"):
        npz.load(zoo.create("R14x0.5", 9), saved)
    with pytest.raises(WeightsError, match=r"has no .*block1/unit02.* The file is of arch R14x0.5"):
        npz.load(zoo.create("R50x1", 5), saved)
    with np.load(saved) as archive:
        arrays = {key: archive[key].copy() for key in archive.files}
    np.savez(tmp_path / "less.npz", **{key: arrays[key] for key in arrays if "block3" not in key})
    with pytest.raises(WeightsError, match="has no resnet/block3/unit01"):
        npz.load(zoo.create("R14x0.5", 5), tmp_path / "less.npz")
    extra = arrays | {"resnet/block4/unit02/a/group_norm/gamma": np.ones(1024, np.float32)}
    np.savez(tmp_path / "more.npz", **extra)  # a deeper network holds all of a shallower one
    with pytest.raises(WeightsError, match="holds resnet/block4/unit02/a/group_norm/gamma, which the network does not"):
        npz.load(zoo.create("R14x0.5", 5), tmp_path / "more.npz")
    arrays["resnet/group_norm/gamma"][0] = np.nan
    np.savez(tmp_path / "nan.npz", **arrays)
    with pytest.raises(WeightsError, match="group_norm/gamma holds NaN"):
        npz.load(zoo.create("R14x0.5", 5), tmp_path / "nan.npz")


def test_truncated_and_pickled_files_are_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.npz").write_bytes(saved.read_bytes()[:100_000])
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "pickled.npz", **{"resnet/root_block/standardized_conv2d/kernel": np.array([{}], dtype=object)})
    with pytest.raises(WeightsError, match="is pickled, which is never read"):
        npz.load(zoo.create("R14x0.5", 5), tmp_path / "pickled.npz", head=False)
    for name in ("cut.npz", "pickled.npy"):
        with pytest.raises(WeightsError, match="not a BiT weights file"):
            npz.load(zoo.create("R14x0.5", 5), tmp_path / name)
