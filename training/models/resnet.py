"""ResNet-v2 as BiT defines it: pre-activation, GroupNorm(32), weight standardisation; for any depth and width.

Source: BiT, section 3.2 and the authors' published code. All pictures and activations are NCHW in shape and channels_last in
memory: there, standardising a filter is one `layer_norm` over contiguous memory (measured 1.3x a plain training step).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

EPS = 1e-10  # of the standardisation


def standardize(weight: Tensor) -> Tensor:
    """Every filter of [out, in, kh, kw] to mean 0, variance 1 (biased), by torch's own operations. Paper: section 3.2."""
    ohwi = weight.permute(0, 2, 3, 1)  # a view of contiguous memory in channels_last
    return F.layer_norm(ohwi, ohwi.shape[1:], eps=EPS).permute(0, 3, 1, 2)


class StdConv2d(nn.Conv2d):
    """Convolution whose every filter is standardised. kernel: what does so; models/fused.py has a faster one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernel: Callable[[Tensor], Tensor] = standardize

    def standardized(self) -> Tensor:
        """The weights as the convolution sees them, [out, in, kh, kw]."""
        return self.kernel(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.standardized(), self.bias, self.stride, self.padding, self.dilation, self.groups)


def conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> StdConv2d:
    return StdConv2d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, bias=False)


def group_norm_relu(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> Tensor:
    """[N, C, H, W] → the same, by torch's own operations."""
    return F.relu(F.group_norm(x, groups, gamma, beta, eps), inplace=True)


class GroupNormReLU(nn.GroupNorm):
    """GroupNorm with 32 groups, then ReLU: in a pre-activation network the one never comes without the other.

    kernel: what computes it; models/fused.py has a faster one.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-5)
        self.kernel: Callable[..., Tensor] = group_norm_relu

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight, self.bias, self.num_groups, self.eps)


class Bottleneck(nn.Module):
    """norm-relu-1×1, norm-relu-3×3 (stride), norm-relu-1×1, plus the shortcut. Paper: He et al. 2016, figure 4e."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        middle = channels_out // 4
        self.norm1, self.conv1 = GroupNormReLU(channels_in), conv(channels_in, middle, 1)
        self.norm2, self.conv2 = GroupNormReLU(middle), conv(middle, middle, 3, stride)
        self.norm3, self.conv3 = GroupNormReLU(middle), conv(middle, channels_out, 1)
        changes = stride != 1 or channels_in != channels_out
        self.downsample = conv(channels_in, channels_out, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(active)
        y = self.conv1(active)
        y = self.conv2(self.norm2(y))
        return self.conv3(self.norm3(y)) + shortcut


class Level(NamedTuple):
    """One map of a feature pyramid: a cell covers stride × stride pixels."""

    name: str
    stride: int
    channels: int


class ResNet(nn.Module):
    """A BiT network.

    units: number of units in each of the four blocks; width: channels of the stem (64 for the factor x1);
    num_classes: outputs of the head. The head starts at zero, as fine-tuning wants it (paper: section 3.3).
    """

    def __init__(self, units: tuple[int, int, int, int], width: int, num_classes: int) -> None:
        super().__init__()
        self.units, self.width, self.num_classes = units, width, num_classes
        self.recompute = False  # in training: keep the input of every unit alone, compute the rest again in backward
        self.stem = conv(3, width, 7, stride=2)
        channels, blocks = width, []
        for index, count in enumerate(units):
            out = width * 4 * 2**index
            strides = [1 if index == 0 else 2] + [1] * (count - 1)
            block = []
            for stride in strides:
                block.append(Bottleneck(channels, out, stride))
                channels = out
            blocks.append(nn.Sequential(*block))
        self.blocks = nn.ModuleList(blocks)
        self.norm = GroupNormReLU(channels)
        self.head = nn.Linear(channels, num_classes)
        self.reset_parameters()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def num_features(self) -> int:
        """D, the channels of the last feature map."""
        return self.head.in_features

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """He initialisation of the filters, zero head. Standardisation undoes the filters' scale, not their direction."""
        for module in self.modules():
            if isinstance(module, StdConv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def pyramid(self, images_nchw: Tensor) -> list[Tensor]:
        """[N, 3, H, W] in [-1, 1] → the maps C3, C4, C5 that detectors are built on: see `pyramid_levels`.

        C3 and C4 are the sums of blocks 2 and 3, not activated; C5 went through the last norm and ReLU.
        """
        x = F.max_pool2d(F.pad(self.stem(images_nchw), (1, 1, 1, 1)), 3, stride=2)
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return [*maps[1:3], self.norm(maps[3])]

    @property
    def pyramid_levels(self) -> tuple[Level, Level, Level]:
        """Name, stride in pixels and channels of each map of `pyramid`."""
        c3, c4, c5 = (self.width * 4 * 2**index for index in (1, 2, 3))
        return Level("C3", 8, c3), Level("C4", 16, c4), Level("C5", 32, c5)

    def feature_map(self, images_nchw: Tensor) -> Tensor:
        """[N, 3, H, W] in [-1, 1] → the activated map [N, D, H/32, W/32] that pooling averages."""
        x = self.stem(images_nchw)
        x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=2)  # zero padding: the authors' own, unlike torch's -inf
        for block in self.blocks:
            for unit in units_of(block):
                kept = self.recompute and torch.is_grad_enabled()
                x = checkpoint(unit, x, use_reentrant=False) if kept else unit(x)
        return self.norm(x)

    def forward(self, images_nchw: Tensor) -> Tensor:
        """[N, 3, H, W] in [-1, 1] → logits [N, num_classes]."""
        return self.head(self.feature_map(images_nchw).mean((2, 3)))


def units_of(block: nn.Module) -> list[Bottleneck]:
    """The units of one of a network's blocks."""
    return [unit for unit in block.children() if isinstance(unit, Bottleneck)]


def normalize(pixels_nhwc: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] → float32 [N, 3, H, W] in [-1, 1], channels_last: the one input range of every BiT network."""
    return pixels_nhwc.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)
