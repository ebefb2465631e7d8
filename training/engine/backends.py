"""What training asks of a kind of device. One small class each; the loop knows none of them by name.

cpu: gloo; cuda: NCCL; xla: TPUs by torch_xla (PJRT_DEVICE says which), where every step is a graph that must not change.
"""

import ctypes
import os
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.optim import SGD

LIBC = ctypes.CDLL(None)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as malloc.h numbers them


@cache
def _keep_memory() -> None:
    """glibc gives large freed blocks back to the system, which then clears new pages for the same activations in every step:
    tens of thousands, 1 to 8 % of a step (measured).
    """
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(M_MMAP_MAX, 0)
        LIBC.mallopt(M_TRIM_THRESHOLD, -1)


class Backend:
    """The processor, and what holds for every device unless it says otherwise.

    device: where this rank's tensors live; group: how ranks talk (None: one rank only).
    """

    group: ClassVar[str] = "gloo"
    evaluated: ClassVar[int] = 2  # micro-batches that an evaluation takes at once: nothing is kept for backward

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cpu":
            _keep_memory()

    def scalar(self, value: float) -> Any:
        """A figure that changes from step to step, as operations take it best."""
        return value

    def optimizer(
        self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float, whole: bool
    ) -> SGD:
        """SGD as the paper uses it. whole: no parameter is sharded; the fused update knows no shards."""
        return SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay, fused=whole)

    def finish_step(self) -> None:
        """The end of an optimizer step: what is collected is handed to the device."""

    def compilations(self) -> int:
        """Graphs compiled so far; none where every operation is run as it comes."""
        return 0

    def peak_bytes(self) -> int:
        """The most memory that this process held on its device so far."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)

    def busy(self) -> dict[str, float]:
        """Figures of an accelerator, by name; none of a processor."""
        return {}

    def give_back(self) -> None:
        """Lets the system have what this process keeps free, so that `free_bytes` counts it."""
        if hasattr(LIBC, "malloc_trim"):
            LIBC.malloc_trim(0)

    def free_bytes(self) -> int:
        """Memory that can still be had: here of the machine and of the container that this runs in."""
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
        if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
            free = min(free, int(text) - int(used.read_text()))
        return max(0, free)


class Cuda(Backend):
    group = "nccl"
    evaluated = 8  # halved where that is too much

    def busy(self) -> dict[str, float]:
        return {"memory_peak_gb": self.peak_bytes() / 1e9, "memory_free_gb": self.free_bytes() / 1e9}

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]


class Xla(Backend):
    group = "xla"

    def scalar(self, value: float) -> Any:
        """A tensor: as a number it would become part of the graph, and every step would be compiled anew."""
        return torch.tensor(value, dtype=torch.float32).to(self.device)

    def optimizer(
        self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float, whole: bool
    ) -> SGD:
        return GraphSGD(parameters, lr, momentum=momentum, weight_decay=weight_decay, foreach=False)

    def finish_step(self) -> None:
        import_module("torch_xla").sync()

    def compilations(self) -> int:
        told = import_module("torch_xla.debug.metrics").metric_data("CompileTime")
        return int(told[0]) if told else 0


class GraphSGD(SGD):
    """SGD whose learning rate enters as data. Its state is SGD's own, so that checkpoints go from one to the other."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            lr = torch.tensor(group["lr"], dtype=torch.float32).to(parameters[0].device)
            for parameter in parameters:
                gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
                state = self.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = gradient
                else:
                    state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                parameter.sub_(lr * state["momentum_buffer"])


def of(device: torch.device) -> Backend:
    """The backend of a device."""
    kinds: dict[str, type[Backend]] = {"cpu": Backend, "cuda": Cuda, "xla": Xla}
    return kinds[device.type](device)


def here() -> Backend:
    """The backend of this process: XLA where PJRT_DEVICE asks for it, the rank's GPU where there is one, else the processor."""
    if os.environ.get("PJRT_DEVICE"):
        import_module("torch_xla.distributed.xla_backend")
        return Xla(import_module("torch_xla").device())
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return Cuda(device)
    return Backend(torch.device("cpu"))
