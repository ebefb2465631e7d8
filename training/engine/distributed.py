"""Which process this is among how many, and on what device. Read from torchrun's environment variables."""

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from training.config import Sharding
from training.engine import backends
from training.engine.signals import stop_on_sigterm

SILENCE_S = 5.0  # how long a rank waits for the others to say why they fail
TIMEOUT_S = 600  # a collective that waits longer has lost a rank: better an error than a hang


# How gloo and NCCL word that a peer is gone or silent: they raise plain RuntimeErrors.
LOST = ("gloo", "nccl", "timed out", "timeout", "connection closed", "connection reset", "peer")


class LostError(RuntimeError):
    """A collective failed."""


class RankError(RuntimeError):
    """Ranks could not agree any more; names the rank that says so, the step and the cause. The launcher starts them anew.

    silent: whether a rank is gone without a word, rather than failed by an error of its own.
    """

    def __init__(self, said: str, silent: bool) -> None:
        super().__init__(said)
        self.silent = silent


@dataclass(frozen=True)
class World:
    """rank: number of this process; size: number of processes; device: where its tensors live."""

    rank: int
    size: int
    device: torch.device

    @property
    def backend(self) -> backends.Backend:
        return backends.of(self.device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, model: torch.nn.Module, sharding: Sharding) -> torch.nn.Module:
        """What is trained: with `full` sharding a copy of which every rank holds a part (FSDP2), else the model itself."""
        if self.size == 1 or sharding == "none":
            return model
        sharded = copy.deepcopy(model)
        for parameter in sharded.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP2 shards no other layout
        mesh = init_device_mesh(self.device.type, (self.size,))
        for unit in (unit for block in sharded.get_submodule("blocks").children() for unit in block.children()):
            fully_shard(unit, mesh=mesh)  # gathered one after the other
        fully_shard(sharded, mesh=mesh)
        return sharded

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model with gradients averaged over all ranks; the model itself in a world of one or where it is sharded."""
        if self.size == 1 or isinstance(model, FSDPModule):
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)

    def gather(self, trained: torch.nn.Module, model: torch.nn.Module) -> None:
        """Brings the weights of a sharded network into the whole one, on every rank."""
        if trained is not model:
            model.load_state_dict(get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True)))

    @contextmanager
    def exchange(self, wrapped: torch.nn.Module, now: bool) -> Iterator[None]:
        """Whether gradients are averaged in the backward passes inside: only in a step's last micro-batch."""
        if isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(now)
        skip = isinstance(wrapped, DistributedDataParallel) and not now
        with wrapped.no_sync() if skip else contextlib.nullcontext():  # type: ignore[operator]
            yield

    @contextmanager
    def at(self, step: Callable[[], int] | None = None) -> Iterator[None]:
        """Names rank, step and cause where a rank fails inside: RankError on the others, its own error on the rank itself.

        step: tells the current one, counted from 0; None: this is before or after the steps.
        """
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            if self.size == 1:
                raise
            lost = isinstance(error, dist.DistError | LostError) or (
                isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST)
            )
            where = f"in step {step() + 1}" if step else "before or after the steps"
            if not lost:
                _tell(self.rank, f"{type(error).__name__} {where}: {error}")
                raise
            with stop_on_sigterm():  # the launcher, which ends all ranks, lets this one say why
                said, silent = _causes(self.rank, self.size)
            raise RankError(
                f"rank {self.rank} of {self.size} lost another rank {where}: {said} ({error})", silent
            ) from error

    def share(self, value: Any) -> Any:
        """Rank 0's value (anything that can be pickled), on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, in place."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def max(self, number: int) -> int:
        """The largest of all ranks' numbers: all ranks get the same answer."""
        if self.size == 1:
            return number
        return int(self._reduced(torch.tensor(number, device=self.device), dist.ReduceOp.MAX))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return bool(self.max(int(flag)))

    def _reduced(self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if self.size > 1:
            try:
                dist.all_reduce(tensor, operation)
            except RuntimeError as error:  # nothing but the other ranks can be wrong here
                raise LostError(str(error)) from error
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def join(timeout_s: int = TIMEOUT_S) -> Iterator[World]:
    """The world that torchrun made (RANK, WORLD_SIZE, LOCAL_RANK), or a world of one without torchrun.

    timeout_s: how long a rank waits for the others before it gives up with an error.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    backend = backends.here()
    world, wait = World(rank, size, backend.device), timedelta(seconds=timeout_s)
    try:
        with world.at():
            if size > 1 and backend.group == "xla":
                dist.init_process_group("xla", init_method="xla://", timeout=wait)
            elif size > 1:
                # A prefix of its own: under the first world's names a second one would find the first one's addresses.
                store = dist.PrefixStore(f"world-{next(_worlds)}", _store(wait))
                dist.init_process_group(backend.group, store=store, rank=rank, world_size=size, timeout=wait)
            yield world
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


_worlds = count()  # all ranks join equally often
_stores: list[dist.Store] = []


def _store(timeout: timedelta) -> dist.Store:
    """The store by which the ranks find each other: one for all worlds of this process, for rank 0 may hold it."""
    if not _stores:
        _stores.append(next(iter(dist.rendezvous("env://", timeout=timeout)))[0])
    _stores[0].set_timeout(timeout)
    return _stores[0]


def _tell(rank: int, cause: str) -> None:
    """Leaves why this rank fails where the others look for it; the first word counts."""
    with contextlib.suppress(Exception):  # the rank's own error is what counts
        store = dist.distributed_c10d._get_default_store()
        if not store.check([f"failed/{rank}"]):
            store.set(f"failed/{rank}", cause[:2_000])


def _causes(rank: int, size: int) -> tuple[str, bool]:
    """What the other ranks told, after a moment's wait, and whether any of them told nothing."""
    words: dict[int, str] = {}
    others = [other for other in range(size) if other != rank]
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"lost/{rank}", "1")
        end = time.monotonic() + SILENCE_S
        while len(words) < len(others) and time.monotonic() < end:
            for other in others:
                if other not in words and store.check([f"failed/{other}"]):
                    words[other] = f"rank {other} failed with {store.get(f'failed/{other}').decode()}"
                elif other not in words and store.check([f"lost/{other}"]):
                    words[other] = ""
            time.sleep(0.05)
    except Exception:  # the store went with the rank that held it
        return "the ranks' common store is gone with it", True
    silent = [f"rank {other} is silent (killed, or its machine is gone)" for other in others if other not in words]
    return "; ".join([*filter(None, words.values()), *silent]) or "no rank says why", bool(silent)
