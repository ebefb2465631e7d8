"""Resumable checkpoints: model, optimizer, step and all that decides the mathematics; independent of the world's size.

A checkpoint is a folder `step-<n>` with `state.pt` and, written after it, `meta.json` with the state's sha256: without meta.json
it was never finished, with a hash that differs it was damaged. The state is copied when `save` is called and written by a
thread while training goes on. A write that fails is said and left at that: the checkpoint before it stays. When one is written,
later ones go: they are damaged, or of a training that this one is a fork of.
"""

import hashlib
import io
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from training.engine.distributed import World
from training.engine.store import Store
from training.errors import UserError

META, STATE = "meta.json", "state.pt"
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on rank 0 alone
log = logging.getLogger(__name__)


def forever() -> float:
    return math.inf


def within(seconds: float) -> Callable[[], float]:
    """What is left of so many seconds from now on."""
    end = time.monotonic() + seconds
    return lambda: end - time.monotonic()


class CheckpointError(UserError):
    """A checkpoint of another training; the message shows every value that differs."""


@dataclass
class Checkpoints:
    """The checkpoints of one training in `store`.

    decides: name → value of all that decides the mathematics (config, data, upstream weights); keep: how many of the newest
    are kept; keep_every: those of every so many steps are kept too (0: none); fork: where the values differ, start a new
    training from the weights instead of refusing; history: figure → (step, value), kept with each checkpoint and filled again;
    skipped: steps in a row, up to the last one, that changed nothing: likewise; patience_s: how long a save waits for the one
    before, less than ranks wait for each other; resumed: called on rank 0 when the history is filled again.
    """

    store: Store
    decides: Mapping[str, str]
    keep: int = 2
    keep_every: int = 0
    fork: bool = False
    history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    skipped: int = 0
    patience_s: float = 10.0
    resumed: Callable[[], None] = lambda: None
    written: str | None = field(default=None, init=False)  # name of the last one that was; known to rank 0
    _strange: list[str] = field(default_factory=list, init=False)  # names of those that the first one written replaces
    _left_out: int = field(default=0, init=False)  # since the last write began
    _writer: threading.Thread | None = field(default=None, init=False, repr=False)
    _serialized: threading.Event = field(default_factory=threading.Event, init=False, repr=False)  # by the last writer

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        last: bool = False,
        left_s: Callable[[], float] = forever,
    ) -> None:
        """Copies the state after `step` optimizer steps and begins to write it. Called by all ranks together.

        A store slower than the interval holds training up, for `patience_s`; one that hangs costs checkpoints, but for the
        `last`, which waits for the one before as long as `left_s` says.
        """
        model_state, optimizer_state = get_state_dict(model, optimizer, options=FULL)
        if not world.is_main:
            return
        if self._writer:
            self.wait(left_s if last else within(0 if self._left_out else self.patience_s))
            if self._writer.is_alive():
                self._left_out += 1
                log.warning("%s is slow: checkpoint %s is left out", self.url, name_of(step))
                return
        state = _copy({"model": model_state, "optimizer": optimizer_state})
        self._left_out = 0
        meta = {"step": step, "decides": dict(self.decides), "skipped": self.skipped, "history": self.history}
        self._serialized.clear()
        self._writer = threading.Thread(  # a daemon: a store that hangs must not keep the process from its end
            target=self._write, args=(step, state, json.dumps(meta)), name=f"checkpoint-{step}", daemon=True
        )
        self._writer.start()

    def wait(self, left_s: Callable[[], float] = forever) -> None:
        """Until the last write has ended, or as long as `left_s` says (seconds, asked again and again)."""
        if not self._writer:
            return
        self._serialized.wait()  # a process that ends within torch.save aborts
        while self._writer.is_alive() and (seconds := left_s()) > 0:
            self._writer.join(min(seconds, 1.0))

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, world: World) -> int:
        """Loads the newest complete, undamaged checkpoint; returns the number of steps done, 0 where there is none yet.

        Rank 0 reads it and sends it tensor by tensor. Raises CheckpointError, on every rank, where it is of another training.
        """
        meta, data, refusal = self._newest() if world.is_main else (None, b"", "")
        meta, refusal = world.share((meta, refusal))
        if refusal:
            raise CheckpointError(refusal)
        if meta is None:
            return 0
        state: dict[str, Any] = {"model": {}, "optimizer": {}}
        if world.is_main:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        sent = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world.size > 1)
        set_model_state_dict(model, state["model"], options=sent)
        if meta["decides"] != dict(self.decides):  # a fork
            self._strange = self.complete() if world.is_main else []
            return 0
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=sent)
        self.skipped = int(meta.get("skipped", 0))
        self.history.update(
            {figure: [(int(s), v) for s, v in points] for figure, points in meta.get("history", {}).items()}
        )
        if world.is_main:
            self.resumed()
        self.written = name_of(int(meta["step"]))
        return int(meta["step"])

    def complete(self) -> list[str]:
        """Names of all finished checkpoints, oldest first."""
        return [name for name in self.store.folders() if name.startswith("step-") and self.store.has(f"{name}/{META}")]

    def clear(self) -> None:
        """Removes all of them: the training has ended and its weights are written."""
        self.wait()
        self.store.remove()

    def _newest(self) -> tuple[dict[str, Any] | None, bytes, str]:
        """Meta and state of the newest good checkpoint, or why it is refused."""
        for name in reversed(self.complete()):
            try:
                meta, data = json.loads(self.store.read(f"{name}/{META}")), self.store.read(f"{name}/{STATE}")
            except (OSError, ValueError) as error:
                log.warning(
                    "checkpoint %s of %s cannot be read (%s); the one before it is taken", name, self.url, error
                )
                continue
            if hashlib.sha256(data).hexdigest() != meta["sha256"]:
                log.warning("checkpoint %s of %s is damaged (sha256); the one before it is taken", name, self.url)
                continue
            return meta, data, "" if self.fork else self._difference(name, meta["decides"])
        return None, b"", ""

    def _difference(self, name: str, theirs: Mapping[str, str]) -> str:
        lines = [
            f"  {key}: {theirs.get(key, 'not set')} in the checkpoint, {self.decides.get(key, 'not set')} now"
            for key in sorted({*theirs, *self.decides})
            if theirs.get(key) != self.decides.get(key)
        ]
        if not lines:
            return ""
        return (
            f"{self.url}/{name} is of another training:\n"
            + "\n".join(lines)
            + "\nSet the values back to go on with it, "
            f"use --fork to start a new training from its weights, or remove {self.url} to start anew."
        )

    @property
    def url(self) -> str:
        return self.store.url

    def _write(self, step: int, state: dict[str, Any], meta: str) -> None:
        name, buffer = name_of(step), io.BytesIO()
        try:
            try:
                torch.save(state, buffer)
            finally:
                self._serialized.set()
            data = buffer.getbuffer()
            whole = json.loads(meta) | {"sha256": hashlib.sha256(data).hexdigest()}
            self.store.remove(f"{name}/{META}")  # an older attempt at the same step is complete no longer
            self.store.write(f"{name}/{STATE}", data)
            self.store.write(f"{name}/{META}", json.dumps(whole).encode())
            self.written = name
            self._tidy(name)
        except Exception as error:  # a store's client raises its own; none of them may cost the training
            kept = self._last_name()
            log.warning(
                "checkpoint %s could not be written to %s (%s); training goes on, the last good one is %s",
                *(name, self.url, error, kept),
            )

    def _last_name(self) -> str:
        try:
            return (self.complete() or ["none yet"])[-1]
        except Exception:  # for a warning that the store failed: it may fail here too, in its client's own ways
            return "unknown"

    def _tidy(self, newest: str) -> None:
        complete = self.complete()
        for name in self.store.folders():  # half-written ones too
            if (
                name.startswith("step-")
                and name != newest
                and (name > newest or name in self._strange or name not in complete)
            ):
                self.store.remove(name)
        complete = [name for name in complete if name <= newest and name not in self._strange]
        self._strange = []
        for name in complete[: -self.keep]:
            if not self.keep_every or int(name.removeprefix("step-")) % self.keep_every:
                self.store.remove(name)


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def _copy(value: Any) -> Any:
    """The same nest of dicts and lists with every tensor copied to the host: training goes on changing the originals."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(inner) for inner in value)
    return value
