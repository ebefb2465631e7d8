"""Speed of one training step of R50x1: ours beside the plain form and beside the BatchNorm twin, in one run.

    make bench          (2 minutes on 2 cores; python -m benchmarks.training_step --help)

plain: standardisation by var_mean, NCHW, as in the authors' PyTorch code. twin: the same convolutions with BatchNorm and no
standardisation, channels_last: what GroupNorm and standardisation cost is the distance to it. Steps of all three are timed in
turn, so that a machine that slows down slows them all; the ratios are medians over the rounds.
"""

import argparse
import json
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models import zoo
from training.models.resnet import GroupNormReLU, StdConv2d

RESULTS = Path(__file__).with_name("results")


class PlainStdConv2d(StdConv2d):
    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-10)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class BatchNormReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


def variants(arch: str) -> dict[str, tuple[nn.Module, torch.memory_format]]:
    """name → (network with 1,000 classes, memory format of its pictures)."""
    ours, plain, twin = (zoo.create(arch, 1_000) for _ in range(3))
    plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in plain.modules():
        if isinstance(module, StdConv2d):
            module.__class__ = PlainStdConv2d
    for module in list(twin.modules()):
        if isinstance(module, StdConv2d):
            module.__class__ = nn.Conv2d
        for name, child in list(module.named_children()):
            if isinstance(child, GroupNormReLU):
                setattr(module, name, BatchNormReLU(child.num_channels))
    return {
        "ours": (ours, torch.channels_last),
        "plain": (plain, torch.contiguous_format),
        "twin": (twin, torch.channels_last),
    }


def measure(arch: str, batch: int, side: int, rounds: int, bf16: bool) -> dict[str, float]:
    """Median seconds of a step for each variant."""
    torch.manual_seed(0)
    networks = variants(arch)
    images, labels = torch.randn(batch, 3, side, side), torch.randint(0, 1_000, (batch,))
    optimizers = {
        name: torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, fused=True)
        for name, (network, _) in networks.items()
    }
    took: dict[str, list[float]] = {name: [] for name in networks}
    for number in range(rounds + 1):
        for name, (network, memory_format) in networks.items():
            pictures = images.contiguous(memory_format=memory_format)
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = network(pictures)
            F.cross_entropy(logits.float(), labels).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if number:  # the first round warms up
                took[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="R50x1", choices=list(zoo.ARCHS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    figures = {}
    for precision in ("fp32", "bf16"):
        seconds = measure(arguments.arch, arguments.batch, arguments.side, arguments.rounds, precision == "bf16")
        figures[precision] = {
            "pictures_per_s": round(arguments.batch / seconds["ours"], 2),
            "times_plain": round(seconds["plain"] / seconds["ours"], 3),
            "share_of_twin": round(seconds["twin"] / seconds["ours"], 3),
        }
        print(f"{arguments.arch} {precision}: {figures[precision]}", flush=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"training_step-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps({"arguments": vars(arguments), "machine": machine, "figures": figures}, indent=2) + "\n")
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
