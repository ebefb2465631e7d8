"""Resumable checkpoints: model, optimizer, step and the fingerprint of what is trained; independent of the world's size.

A checkpoint is a folder `step-<n>` in the format of torch.distributed.checkpoint. It is written under a temporary name,
synced and renamed, so that a folder with the final name is complete, whenever the process died.
"""

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from training.engine.distributed import World
from training.errors import UserError

META = "meta.json"


class CheckpointError(UserError):
    """A checkpoint that belongs to another training; the message shows both fingerprints."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training in `folder`; the newest `keep` are kept.

    fingerprint: hash of all that decides the mathematics (config, data, upstream weights).
    """

    folder: Path
    fingerprint: str
    keep: int = 2

    def save(self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
        """Writes the state after `step` optimizer steps. Called by all ranks together."""
        final, temporary = self.folder / f"step-{step:08d}", self.folder / f".step-{step:08d}"
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        world.barrier()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a world of one is meant
            dcp.save(_state(model, optimizer), checkpoint_id=temporary, no_dist=world.size == 1)
        if world.is_main:
            (temporary / META).write_text(json.dumps({"step": step, "fingerprint": self.fingerprint}))
            for path in temporary.iterdir():
                _sync(path)
            shutil.rmtree(final, ignore_errors=True)  # an older attempt at the same step
            temporary.rename(final)
            _sync(self.folder)
            for old in self.complete()[: -self.keep]:
                shutil.rmtree(old)
        world.barrier()

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, world: World) -> int:
        """Loads the newest complete checkpoint; returns the number of steps done, 0 where there is none yet."""
        complete = self.complete()
        if not complete:
            return 0
        meta = json.loads((complete[-1] / META).read_text())
        if meta["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"{complete[-1]} is of another training (fingerprint {meta['fingerprint']}, this one's is "
                f"{self.fingerprint}). Remove the folder to start anew."
            )
        state = _state(model, optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(state, checkpoint_id=complete[-1], no_dist=world.size == 1)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return int(meta["step"])

    def complete(self) -> list[Path]:
        """All complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / META).is_file())

    def clear(self) -> None:
        """Removes all of them: the training has ended and its weights are written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
