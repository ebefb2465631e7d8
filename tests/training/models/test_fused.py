"""The fused GroupNorm-ReLU against torch's own, values and gradients."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from training.models import fused, zoo
from training.models.resnet import group_norm_relu, standardize

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the fused form needs a compiler; the eager one stays"
)


def gradients(function, x, gamma, beta, weights):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, gamma, beta)]
    y = function(*inputs, 32, 1e-5)
    (y.float() * weights).sum().backward()
    return y.detach(), *(tensor.grad for tensor in inputs)


@pytest.mark.parametrize("shape", [(3, 64, 7, 5), (2, 96, 9, 9), (1, 32, 1, 2), (5, 256, 4, 4)])
def test_values_and_gradients_equal_the_eager_ones_in_fp32(shape) -> None:
    torch.manual_seed(1)
    x = (torch.randn(shape) * 2 + 1).contiguous(memory_format=torch.channels_last)
    gamma, beta, weights = torch.randn(shape[1]), torch.randn(shape[1]), torch.randn(shape)
    for got, wanted in zip(
        gradients(fused.on_cpu, x, gamma, beta, weights),
        gradients(group_norm_relu, *(t.double() for t in (x, gamma, beta, weights))),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-4, atol=2e-4)


def test_bf16_is_as_near_to_the_truth_as_rounding_allows() -> None:
    torch.manual_seed(2)
    x = torch.randn(4, 64, 8, 8).bfloat16()
    gamma, beta = torch.rand(64) + 0.5, torch.rand(64) + 3.0  # far from the kink: one mask in every precision
    weights = torch.randn(4, 64, 8, 8)
    got = gradients(fused.on_cpu, x, gamma, beta, weights.bfloat16().float())
    wanted = gradients(group_norm_relu, *(t.double() for t in (x, gamma, beta, weights.bfloat16())))
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    for ours, truth in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(32, 3, 7, 7), (64, 16, 1, 1), (5, 512, 3, 3), (3, 1, 1, 2)])
def test_standardised_filters_and_their_gradients_equal_the_eager_ones(shape) -> None:
    torch.manual_seed(4)
    weight = (torch.randn(shape) + 0.3).contiguous(memory_format=torch.channels_last)
    up = torch.randn(shape)

    def both(function, given):
        given = given.detach().clone().requires_grad_()
        made = function(given)
        (made.double() * up.to(made.dtype).double()).sum().backward()
        return made.detach().double(), given.grad.double()

    for got, wanted in zip(both(fused.standardize_on_cpu, weight), both(standardize, weight.double()), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        made, gradient = both(fused.standardize_on_cpu, weight)
        assert fused.standardize_on_cpu(weight).dtype == torch.bfloat16
    wanted, wanted_gradient = both(standardize, weight.double())
    torch.testing.assert_close(made, wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=2e-2, atol=5e-2)


def test_a_nan_goes_through() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((1, 32, 2, 2), float("nan"), dtype=dtype)
        assert torch.isnan(fused.on_cpu(x, torch.ones(32), torch.zeros(32), 32, 1e-5)).all()


def test_the_number_of_threads_changes_no_bit() -> None:
    x, gamma, beta = torch.randn(5, 64, 6, 6), torch.randn(64), torch.randn(64)
    weights, before = torch.randn(5, 64, 6, 6), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradients(fused.on_cpu, x, gamma, beta, weights)
        torch.set_num_threads(2)
        two = gradients(fused.on_cpu, x, gamma, beta, weights)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_fused_network_gives_the_eager_gradients_with_and_without_activation_checkpointing() -> None:
    torch.manual_seed(3)
    model = zoo.create("R14x0.5", 5)
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 32, 32)

    def grads(call):
        model.zero_grad()
        call().square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    eager = grads(lambda: model(images))
    fused.fuse(model, torch.device("cpu"))
    direct = grads(lambda: model(images))
    again = grads(lambda: checkpoint(model, images, use_reentrant=False))
    for a, b, c in zip(eager, direct, again, strict=True):
        assert torch.equal(b, c)
        assert (a - b).norm() <= 1e-3 * a.norm() + 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on importing Dynamo
def test_every_shape_of_a_network_is_compiled() -> None:
    """Dynamo's own limit is 8, after which it runs a function eagerly without a word; the compiler here only counts."""
    shapes = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        shapes.append(inputs[0].shape)
        return graph.forward

    fused.kernels(torch.device("cuda"))
    compiled = torch.compile(group_norm_relu, backend=count, dynamic=False)
    for width in range(1, 13):
        compiled(torch.randn(2, 8 * width, 3, 3), torch.ones(8 * width), torch.zeros(8 * width), 4, 1e-5)
    assert len(shapes) == 12
