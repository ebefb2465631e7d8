"""C3 to C5, as detectors take them: strides, channels, and what C5 is."""

import torch

from training.models import zoo


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
