"""The network: counts against the published table, standardisation and padding against plain formulas."""

import pytest
import torch

from training.models import archs, zoo
from training.models.resnet import GroupNormReLU, conv, normalize

# Parameters with 21,843 and 1,000 classes: FACTS of the published models.
PUBLISHED = {
    "R50x1": (68_256_659, 25_549_352),
    "R101x1": (87_248_787, 44_541_480),
    "R50x3": (345_399_315, 217_319_080),
    "R101x3": (516_015_123, 387_934_888),
    "R152x2": (321_728_979, 236_335_208),
    "R152x4": (1_107_299_923, 936_533_224),
}


@pytest.mark.parametrize("arch", PUBLISHED)
def test_parameter_counts_are_the_published_ones(arch: str) -> None:
    assert (archs.num_parameters(arch, 21_843), archs.num_parameters(arch, 1_000)) == PUBLISHED[arch]


def test_filters_are_standardized_as_in_the_paper() -> None:
    layer = conv(5, 7, 3)
    variance, mean = torch.var_mean(layer.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
    expected = (layer.weight - mean) / torch.sqrt(variance + 1e-10)
    torch.testing.assert_close(layer.standardized(), expected, rtol=1e-5, atol=1e-6)


def test_channels_last_changes_no_answer() -> None:
    torch.manual_seed(0)
    model = zoo.create("R14x0.5", 3)
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 40, 40)
    expected = model(images)
    plain = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    torch.testing.assert_close(plain(images), expected, rtol=1e-4, atol=1e-4)


def test_a_new_head_answers_zero_and_gets_gradients() -> None:
    model = zoo.create("R14x0.5", 3)
    logits = model(torch.randn(2, 3, 32, 32))
    assert not logits.any()
    logits[:, 0].sum().backward()
    assert model.head.weight.grad is not None
    assert model.head.weight.grad.any()


def test_norm_is_group_norm_then_relu() -> None:
    layer = GroupNormReLU(64)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 64, 4, 4)
    expected = torch.relu(torch.nn.functional.group_norm(x, 32, layer.weight, layer.bias, 1e-5))
    torch.testing.assert_close(layer(x), expected)


def test_pixels_are_normalized_to_minus_one_to_one() -> None:
    pixels = torch.tensor([[[[0, 128, 255]]]], dtype=torch.uint8)
    torch.testing.assert_close(normalize(pixels).flatten(), torch.tensor([-1.0, 128 / 127.5 - 1, 1.0]))


def test_an_unknown_arch_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'R50x.'.*R152x4"):
        zoo.create("R50", 3)
