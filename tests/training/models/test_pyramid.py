"""C3 to C5 carry a detector: a minimal RetinaNet-style head learns 16 pictures with boxes by heart."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models import zoo
from training.models.resnet import Level, ResNet

SIDE, CLASSES = 64, 2


def test_maps_have_the_stated_strides_and_channels() -> None:
    for arch, channels in (("R14x0.5", (256, 512, 1024)), ("R50x1", (512, 1024, 2048)), ("R152x4", (2048, 4096, 8192))):
        model = zoo.outline(arch, 5)
        maps = model.pyramid(torch.empty(2, 3, 96, 160, device="meta"))
        assert tuple(level.channels for level in model.pyramid_levels) == channels
        for level, out in zip(model.pyramid_levels, maps, strict=True):
            assert out.shape == (2, level.channels, 96 // level.stride, 160 // level.stride), level


def test_c5_is_the_map_that_pooling_averages() -> None:
    model = zoo.create("R14x0.5", 5).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model.pyramid(images)[-1], model.feature_map(images))


class Detector(nn.Module):
    """One anchor a cell, its side four strides: class scores and (dx, dy, log w, log h), shared over the levels."""

    def __init__(self, body: ResNet) -> None:
        super().__init__()
        self.body = body
        self.lateral = nn.ModuleList(nn.Conv2d(level.channels, 32, 1) for level in body.pyramid_levels)
        self.tower = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU())
        self.classes, self.boxes = nn.Conv2d(32, CLASSES, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)
        nn.init.constant_(self.classes.bias, -4.0)  # focal loss: nearly every anchor is background

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, S, S] → scores [N, A, classes], boxes [N, A, 4]."""
        towers = [self.tower(lateral(x)) for lateral, x in zip(self.lateral, self.body.pyramid(images), strict=True)]
        scores = [self.classes(x).flatten(2).transpose(1, 2) for x in towers]
        boxes = [self.boxes(x).flatten(2).transpose(1, 2) for x in towers]
        return torch.cat(scores, 1), torch.cat(boxes, 1)


def anchors(levels: tuple[Level, ...]) -> Tensor:
    """[A, 3]: centre x, y and side in pixels, in the order of the detector's outputs."""
    rows = []
    for level in levels:
        centres = (torch.arange(SIDE // level.stride) + 0.5) * level.stride
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        rows.append(torch.stack([x.flatten(), y.flatten(), torch.full((x.numel(),), 2.0 * level.stride)], 1))
    return torch.cat(rows)


def pictures() -> tuple[Tensor, Tensor, Tensor]:
    """16 pictures with one bright box of either of two colours: images, boxes (x, y, w, h), classes."""
    rng = torch.Generator().manual_seed(1)
    images = 0.1 * torch.randn(16, 3, SIDE, SIDE, generator=rng)
    sides = torch.randint(14, 40, (16, 2), generator=rng)
    corners = (torch.rand(16, 2, generator=rng) * (SIDE - sides)).long()
    labels = torch.arange(16) % CLASSES
    for image, (x, y), (w, h), label in zip(images, corners.tolist(), sides.tolist(), labels.tolist(), strict=True):
        image[2 * label, y : y + h, x : x + w] = 1.0
    return images, torch.cat([corners + sides / 2, sides.float()], 1), labels


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small layers: beside other work a second thread is waited for longer than it helps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_retinanet_style_head_learns_sixteen_pictures() -> None:
    torch.manual_seed(0)
    images, boxes, labels = pictures()
    model = Detector(zoo.create("R14x0.5", 1))
    grid = anchors(model.body.pyramid_levels)
    # Each box belongs to the anchors whose centre it holds and whose side is nearest its own.
    inside = ((grid[None, :, :2] - boxes[:, None, :2]).abs() < boxes[:, None, 2:] / 2).all(2)
    fit = (grid[None, :, 2] / boxes[:, None, 2:].prod(2).sqrt()).log().abs()
    positive = inside & (fit <= torch.where(inside, fit, torch.inf).min(1, keepdim=True).values + 1e-6)
    wanted_classes = positive[..., None] * F.one_hot(labels, CLASSES)[:, None].float()
    offsets = (boxes[:, None, :2] - grid[None, :, :2]) / grid[None, :, 2:]
    wanted_boxes = torch.cat([offsets, (boxes[:, None, 2:] / grid[None, :, 2:]).log()], 2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    images = images.contiguous(memory_format=torch.channels_last)
    for _ in range(70):
        optimizer.zero_grad()
        scores, answers = model(images)
        p = scores.sigmoid()
        focal = F.binary_cross_entropy_with_logits(scores, wanted_classes, reduction="none")
        focal = focal * torch.where(wanted_classes > 0, 0.25 * (1 - p) ** 2, 0.75 * p**2)
        distance = F.smooth_l1_loss(answers[positive], wanted_boxes[positive], beta=0.1)
        (focal.sum() / positive.sum() + distance).backward()
        optimizer.step()
    with torch.inference_mode():
        scores, answers = model.eval()(images)
    best = scores.amax(2).argmax(1)
    rows = torch.arange(16)
    assert torch.equal(scores[rows, best].argmax(1), labels)
    answer, anchor = answers[rows, best], grid[best]
    centre, size = anchor[:, :2] + answer[:, :2] * anchor[:, 2:], answer[:, 2:].exp() * anchor[:, 2:]
    low = torch.maximum(centre - size / 2, boxes[:, :2] - boxes[:, 2:] / 2)
    high = torch.minimum(centre + size / 2, boxes[:, :2] + boxes[:, 2:] / 2)
    shared = (high - low).clamp(min=0).prod(1)
    overlap = shared / (size.prod(1) + boxes[:, 2:].prod(1) - shared)
    assert overlap.min() > 0.5, overlap
    assert overlap.mean() > 0.75, overlap
