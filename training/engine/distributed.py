"""Which process this is among how many, and on what device. The one reader of torchrun's environment variables."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)  # a collective that waits longer has lost a rank: better an error than a hang


@dataclass(frozen=True)
class World:
    """rank: number of this process; size: number of processes; device: where its tensors live."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model with gradients averaged over all ranks; the model itself in a world of one."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank: all ranks get the same answer."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=self.device)))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def join() -> Iterator[World]:
    """The world that torchrun made (RANK, WORLD_SIZE, LOCAL_RANK), or a world of one without torchrun."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(rank, size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()
