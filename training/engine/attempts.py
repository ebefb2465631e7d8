"""What the attempts of one training share, in `run.json` beside its checkpoints: the MLflow run, failures, time spent.

A training that is killed and started again is one training: its budgets are kept by itself, wherever it is started.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from training.config import Optimisation
from training.engine.checkpoint import CheckpointError
from training.engine.distributed import World
from training.engine.signals import Stopped, exit_on_sigterm
from training.engine.store import Store
from training.errors import UserError

FILE = "run.json"
State = Literal["running", "stopped", "failed"]
NOTE_LIMIT_S = 10.0  # how long a note that matters is waited for
log = logging.getLogger(__name__)


class BudgetError(UserError):
    """A training that failed too often or took too long; the message names the limit and the key."""


@dataclass(frozen=True)
class Record:
    """failures: attempts that ended neither well nor by SIGTERM; seconds: of all attempts; step of steps; who runs it.

    decides: hash of the values that decided the result when it was begun.
    """

    run_id: str | None = None
    state: State = "running"
    failures: int = 0
    attempts: int = 0
    seconds: float = 0.0
    step: int = 0
    steps: int = 0
    host: str = ""
    pid: int = 0
    since: str = ""
    decides: str = ""

    @property
    def is_elsewhere(self) -> bool:
        """Whether it was begun on another machine, whose processes can't be seen from here."""
        return self.host != platform.node()

    @property
    def is_alive(self) -> bool:
        """Whether its process can be seen to run: only on the machine that it runs on."""
        return self.state == "running" and not self.is_elsewhere and Path(f"/proc/{self.pid}").exists()


@dataclass
class Attempt:
    """One attempt, seen from any rank; rank 0 keeps the record."""

    store: Store
    stage: Optimisation
    writes: bool
    record: Record
    _began: float = field(default_factory=time.monotonic)
    first_step_at: float | None = None  # time.monotonic() when this attempt's first step was done
    note_every_s: float = 10.0
    _noted: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _unwritten: bytes | None = field(default=None, repr=False)  # the newest record, until the writer takes it
    _writer: threading.Thread | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        """A folder on this machine's disk for what must outlive the process."""
        return Path(self.store.root) if self.store.is_local else Path(".outbox", self.store.root.rpartition("/")[2])

    def seconds(self) -> float:
        """Spent by all attempts so far."""
        return self.record.seconds + time.monotonic() - self._began

    @property
    def is_over(self) -> bool:
        """Whether `max_hours` are spent."""
        return self.stage.max_hours is not None and self.seconds() >= self.stage.max_hours * 3600

    def over(self, step: int) -> BudgetError:
        return BudgetError(
            f"max_hours={self.stage.max_hours:g} are spent after step {step}, in {self.record.attempts} attempts; "
            f"the checkpoints in {self.store.url} stay. Raise max_hours to go on from there."
        )

    def bind(self, run_id: str) -> None:
        """This training's figures go to that MLflow run, also after a restart."""
        self.note(run_id=run_id)

    def reached(self, step: int, steps: int) -> None:
        """Tells where training stands; written every ten seconds at most, for a store may be far."""
        self.first_step_at = self.first_step_at or time.monotonic()
        self.record = replace(self.record, step=step, steps=steps)
        if time.monotonic() - self._noted >= self.note_every_s:
            self._put()

    def note(self, **changes: object) -> None:
        """Writes the record; a store that is full, away or hangs costs the note, not the training."""
        self.record = replace(self.record, **changes)  # type: ignore[arg-type]
        self._put()
        self.settle()

    def settle(self) -> None:
        """Waits until the record is written, but not for a store that hangs."""
        if writer := self._writer:
            writer.join(NOTE_LIMIT_S)

    def _put(self) -> None:
        """Hands the record to a thread, which writes the newest one only."""
        self._noted = time.monotonic()
        if not self.writes:
            return
        now = replace(self.record, seconds=round(self.seconds(), 3))
        with self._lock:
            self._unwritten = (json.dumps(asdict(now), indent=1) + "\n").encode()
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name=FILE, daemon=True)
                self._writer.start()

    def _write(self) -> None:
        while True:
            with self._lock:
                text, self._unwritten = self._unwritten, None
                if text is None:
                    self._writer = None
                    return
            try:
                self.store.write(FILE, text)
            except Exception as error:
                log.warning("%s of %s could not be written: %s", FILE, self.store.url, error)


def read(store: Store) -> Record | None:
    """The record of a training, None where none was begun. One that cannot be read counts as none: budgets begin anew."""
    try:
        return Record(**json.loads(store.read(FILE)))
    except (FileNotFoundError, ValueError, TypeError):
        return None


@contextmanager
def attempt(
    store: Store, stage: Optimisation, world: World, decides: Mapping[str, Any], fork: bool = False
) -> Iterator[Attempt]:
    """An attempt at the training whose checkpoints lie below `store`; with its good end they are removed.

    decides: name → value of all that decides the result; fork: where it differs, a new training, with budgets and an MLflow
    run of its own. SIGTERM ends it with status 143 wherever it stands. Raises BudgetError, on every rank, where `max_failures`
    are spent.
    """
    values = json.dumps({key: str(value) for key, value in decides.items()}, sort_keys=True)
    digest = hashlib.sha256(values.encode()).hexdigest()
    before = world.share(read(store) if world.is_main else None)
    died = before is not None and before.state in ("running", "failed")
    if before is None or (fork and before.decides != digest):
        before, died = Record(decides=digest), False
    record = replace(before, failures=before.failures + died)
    if stage.max_failures is not None and record.failures > stage.max_failures:
        raise BudgetError(
            f"this training failed {record.failures} times, max_failures is {stage.max_failures}; its checkpoints in "
            f"{store.url} stay. See why it failed, then raise max_failures or remove {store.url}/{FILE}."
        )
    me = Attempt(store, stage, world.is_main, record)
    try:
        with exit_on_sigterm():
            me.note(
                state="running",
                attempts=record.attempts + 1,
                host=platform.node(),
                pid=os.getpid(),
                since=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            yield me
    except Stopped as stopped:
        me.note(state="stopped")
        if world.is_main:
            print(stopped, file=sys.stderr, flush=True)  # nothing else would: it ends the process like any exit
        raise
    except (KeyboardInterrupt, BudgetError, CheckpointError):
        me.note(state="stopped")
        raise
    except BaseException:  # whatever ends it: the next attempt must know
        me.note(state="failed")
        raise
    if world.is_main:
        me.settle()  # or it would come back
        store.remove()
        shutil.rmtree(me.folder, ignore_errors=True)
