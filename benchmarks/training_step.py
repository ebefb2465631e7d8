"""Speed of one training step of R50x1: ours, fused and eager, beside the plain form, timm's and the BatchNorm twin, in one run.

    make bench          (2 minutes on 2 cores; python -m benchmarks.training_step --help)

plain: standardisation by var_mean, NCHW, as in the authors' PyTorch code. twin: the same convolutions with BatchNorm and no
standardisation, channels_last: what GroupNorm and standardisation cost is the distance to it. timm: its own form, eager, where
timm is installed (on a GPU compiled too: --device cuda). fused: ours with `fused: true`. Steps of all, in both precisions, are
timed in turn, so that a machine that slows down slows them all; the ratios are medians over the rounds.
"""

import argparse
import importlib.util
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from training.engine import backends
from training.models import fused, zoo
from training.models.archs import ARCHS
from training.models.resnet import GroupNormReLU, StdConv2d

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
PRECISIONS = ("fp32", "bf16")


class PlainStdConv2d(StdConv2d):
    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-10)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class BatchNormReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


def timm_network(arch: str) -> nn.Module | None:
    """timm's own form of an architecture; None where timm is not installed or lacks it."""
    if importlib.util.find_spec("timm") is None:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")  # timm asks for it when torchvision cannot be imported
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    import timm

    name = f"resnetv2_{arch.removeprefix('R')}_bit"
    return timm.create_model(name, num_classes=1_000) if name in timm.list_models() else None


def variants(arch: str, device: torch.device) -> dict[str, tuple[nn.Module, torch.memory_format]]:
    """name → (network with 1,000 classes, memory format of its pictures)."""
    ours, quick, plain, twin = (zoo.create(arch, 1_000) for _ in range(4))
    fused.fuse(quick, device)
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
    chosen: dict[str, tuple[nn.Module, torch.memory_format]] = {
        "ours": (ours, torch.channels_last),
        "fused": (quick, torch.channels_last),
        "plain": (plain, torch.contiguous_format),
        "twin": (twin, torch.channels_last),
    }
    if (peer := timm_network(arch)) is not None:
        chosen["timm"] = (peer, torch.contiguous_format)
        if device.type == "cuda":
            compiled = timm_network(arch)
            chosen["timm compiled"] = (torch.compile(compiled), torch.contiguous_format)  # type: ignore[assignment]
    return {name: (network.to(device), layout) for name, (network, layout) in chosen.items()}


def measure(
    arch: str, batch: int, side: int, rounds: int, device: torch.device, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every step for each `<precision> <variant>`, round by round; and on a GPU the peak of memory in GB."""
    torch.manual_seed(0)
    networks = variants(arch, device)
    images = torch.randn(batch, 3, side, side, device=device)
    labels = torch.randint(0, 1_000, (batch,), device=device)
    optimizers = {
        name: torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, fused=True)
        for name, (network, _) in networks.items()
    }
    took: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, (network, memory_format) in networks.items():
            pictures = images.contiguous(memory_format=memory_format)
            for precision in PRECISIONS:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                began = clock()
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    logits = network(pictures)
                F.cross_entropy(logits.float(), labels).backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    peaks[f"{precision} {name}"] = torch.cuda.max_memory_allocated(device) / 1e9
                if number:  # the first round warms up
                    took[f"{precision} {name}"].append(clock() - began)
    return took, peaks


def largest_batch(network: nn.Module, layout: torch.memory_format, side: int, device: torch.device) -> int:
    """The largest batch in steps of an eighth that a bf16 step of a network takes on a GPU."""

    def fits(batch: int) -> bool:
        try:
            pictures = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=layout)
            with torch.autocast(device.type, torch.bfloat16):
                loss = network(pictures).float().sum()
            loss.backward()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            network.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    good = 8
    while fits(good * 2):
        good *= 2
    return next((good * part // 8 for part in range(15, 8, -1) if fits(good * part // 8)), good)


def ratio(took: dict[str, list[float]], slow: str, quick: str) -> float:
    """How many times quicker one variant is than another: the median over the rounds."""
    return round(statistics.median(a / b for a, b in zip(took[slow], took[quick], strict=True)), 3)


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 peak of the card by its maker's data sheet, None where the table lacks it."""
    if device.type != "cuda":
        return None
    peaks = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 3090": 71.0}
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in peaks.items() if part in name), None)


def macs_of(arch: str, side: int) -> float:
    """Multiply-accumulates of one picture's forward pass, counted without computing."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        zoo.create(arch, 1_000)(torch.empty(1, 3, side, side))
    return counter.get_total_flops() / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="R50x1", choices=list(ARCHS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="of the processor; default: all")
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu: processor seconds, where others use the machine too"
    )
    parser.add_argument("--largest", action="store_true", help="on a GPU: each variant's largest batch too")
    arguments = parser.parse_args()
    device: torch.device = arguments.device
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    backends.of(device)  # memory as the engine sets it up, for all of them
    clock = CLOCKS[arguments.clock]
    described = machine.describe("torch", *(["timm"] if importlib.util.find_spec("timm") else []))
    described |= {"threads": torch.get_num_threads()}
    if device.type == "cuda":
        described["card"] = torch.cuda.get_device_name(device)
    took, peaks = measure(arguments.arch, arguments.batch, arguments.side, arguments.rounds, device, clock)
    figures: dict[str, Any] = {}
    for key, seconds in took.items():
        precision, name = key.split(" ", 1)
        speed = arguments.batch / statistics.median(seconds)
        figures[key] = {
            "pictures_per_s": round(speed, 2),
            "times_plain_fp32": ratio(took, "fp32 plain", key),
            "times_plain": ratio(took, f"{precision} plain", key),
            "share_of_twin": ratio(took, f"{precision} twin", key),
        }
        if f"{precision} timm" in took:
            figures[key]["times_timm"] = ratio(took, f"{precision} timm", key)
        if key in peaks:
            figures[key]["memory_gb"] = round(peaks[key], 2)
        if (peak := peak_tflops(device)) and precision == "bf16":  # forward and backward: 3 × 2 operations a MAC
            macs = macs_of(arguments.arch, arguments.side)
            figures[key]["flop_utilisation"] = round(6 * macs * speed / (peak * 1e12), 3)
        print(f"{key:>20}: " + "  ".join(f"{name} {value}" for name, value in figures[key].items()), flush=True)
    if arguments.largest and device.type == "cuda":
        for name, (network, layout) in variants(arguments.arch, device).items():
            figures[f"bf16 {name}"]["largest_batch"] = largest_batch(network, layout, arguments.side, device)
            print(f"{name}: largest batch {figures[f'bf16 {name}']['largest_batch']}", flush=True)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    name = f"training_step-{device.type}-{arguments.arch}-{arguments.side}"
    machine.write(name, described, {"settings": settings, **figures})


if __name__ == "__main__":
    main()
