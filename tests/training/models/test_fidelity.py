"""The network against two witnesses that share no code with it: timm's BiT networks and a forward pass in plain numpy."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from training.models import npz, timm_state, zoo
from training.models.resnet import ResNet


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    """timm, beside a torch whose build torchvision's binaries do not know: their operators are declared by hand."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    timm.keep_alive = library  # type: ignore[attr-defined]
    return timm


def network(arch: str, classes: int = 7) -> ResNet:
    """Fresh filters, but norms and head away from their starting values, as in a trained network."""
    torch.manual_seed(3)
    model = zoo.create(arch, classes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "head" in name:
                parameter.normal_(0, 0.05)
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("arch", "name"), [("R50x1", "resnetv2_50x1_bit"), ("R101x1", "resnetv2_101x1_bit")])
def test_logits_and_gradients_equal_timms(timm: ModuleType, tmp_path: Path, arch: str, name: str) -> None:
    ours = network(arch)
    npz.save(ours, tmp_path / "weights.npz")
    theirs = timm.create_model(name, pretrained=False, num_classes=7)
    theirs.load_pretrained(str(tmp_path / "weights.npz"))  # timm's own reader of the published layout
    for side in (64, 96, 128):
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side))
        with torch.inference_mode():
            assert relative(ours(images), theirs(images)) < 1e-4, side
    # Gradients in double: in single, rounding alone moves those of the first layers by a percent in either network.
    images = images[..., :64, :64].double()
    ours.double()(images).square().sum().backward()
    for module in theirs.modules():
        if hasattr(module, "eps") and isinstance(module, torch.nn.Conv2d):
            module.eps = 1e-10  # the authors' value; timm takes 1e-8
    theirs.double()(images).square().sum().backward()
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        gradient = gradients[timm_state.to_timm(key)].grad
        assert parameter.grad is not None
        assert relative(parameter.grad, gradient.reshape(parameter.shape)) < 1e-4, key


def test_timms_state_dict_is_read_and_written(timm: ModuleType) -> None:
    ours = network("R50x1")
    theirs = timm.create_model("resnetv2_50x1_bit", pretrained=False, num_classes=7)
    theirs.load_state_dict(timm_state.dump(ours), strict=True)
    again = timm_state.load(zoo.create("R50x1", 7), theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
    headless = timm_state.load(zoo.create("R50x1", 3), theirs.state_dict(), head=False)
    assert not headless.head.weight.any()
    with pytest.raises(npz.WeightsError, match=r"head\.fc\.weight is \(7, 2048\)"):
        timm_state.load(zoo.create("R50x1", 3), theirs.state_dict())


def numpy_conv(x: np.ndarray, kernel: np.ndarray, stride: int, standardize: bool = True) -> np.ndarray:
    """x [N, H, W, C], kernel HWIO as in the published files."""
    if standardize:
        kernel = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + 1e-10)
    size = kernel.shape[0]
    pad = size // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("nhwcij,ijco->nhwo", windows, kernel, optimize=True)


def numpy_norm_relu(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    n, h, w, c = x.shape
    grouped = x.reshape(n, h, w, 32, c // 32)
    mean, variance = grouped.mean((1, 2, 4), keepdims=True), grouped.var((1, 2, 4), keepdims=True)
    normal = ((grouped - mean) / np.sqrt(variance + 1e-5)).reshape(n, h, w, c)
    return np.maximum(normal * gamma + beta, 0)


def numpy_forward(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The published network from its published arrays alone, in float64; x [N, H, W, 3] → logits."""

    def norm_relu(x: np.ndarray, key: str) -> np.ndarray:
        return numpy_norm_relu(x, weights[f"{key}/group_norm/gamma"], weights[f"{key}/group_norm/beta"])

    def conv(x: np.ndarray, key: str, stride: int = 1) -> np.ndarray:
        return numpy_conv(x, weights[f"{key}/standardized_conv2d/kernel"], stride)

    x = conv(x, "resnet/root_block", 2)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max((-1, -2))
    for block in range(1, 5):
        unit = 1
        while f"resnet/block{block}/unit{unit:02d}/a/group_norm/gamma" in weights:
            key, stride = f"resnet/block{block}/unit{unit:02d}", 2 if unit == 1 and block > 1 else 1
            active = norm_relu(x, f"{key}/a")
            shortcut = conv(active, f"{key}/a/proj", stride) if unit == 1 else x
            y = norm_relu(conv(active, f"{key}/a"), f"{key}/b")
            y = norm_relu(conv(y, f"{key}/b", stride), f"{key}/c")
            x = conv(y, f"{key}/c") + shortcut
            unit += 1
    pooled = norm_relu(x, "resnet").mean((1, 2))
    return pooled @ weights["resnet/head/conv2d/kernel"][0, 0] + weights["resnet/head/conv2d/bias"]


def test_logits_equal_a_forward_pass_in_plain_numpy(tmp_path: Path) -> None:
    model = network("R14x0.5", 5)
    npz.save(model, tmp_path / "weights.npz")
    with np.load(tmp_path / "weights.npz") as archive:
        weights = {key: archive[key].astype(np.float64) for key in archive.files}
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    expected = numpy_forward(weights, images.permute(0, 2, 3, 1).double().numpy())
    with torch.inference_mode():
        assert relative(model(images).double(), torch.from_numpy(expected)) < 1e-4
