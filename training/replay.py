"""Champion and challenger asked with the same pictures, by the engine that serves: where they agree, who is right, how fast.

The pictures are the tenant's packed test split, a folder that was given, or the golden pictures inside both exports. A given
folder's folders are labels where all are named like classes, as for `bit pack`.
"""

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services import preprocess
from services.inference.engine import Session
from services.inference.errors import Refused
from training import plots, receipt
from training.config import ConfigError
from training.data.dataset import Dataset
from training.data.sources import SPLITS, SUFFIXES

TIMED = 40  # each export is timed on at least so many pictures, taking them again where there are fewer
SHOWN = 32  # flips on the contact sheet
Answer = tuple[str, ...]  # names of the classes: one, or with several labels a picture all from 0.5 on


@dataclass(frozen=True)
class Example:
    """An encoded picture and, where somebody labelled it, the right answer."""

    name: str
    picture: bytes
    label: Answer | None = None


@dataclass(frozen=True)
class Replay:
    """What came out. Both lists of answers are in the order of the examples; latencies are medians of one picture, in ms."""

    examples: Sequence[Example]
    champion: list[Answer]
    challenger: list[Answer]
    champion_ms: float
    challenger_ms: float

    @property
    def flips(self) -> list[int]:
        """Where the two answer differently."""
        return [i for i, (a, b) in enumerate(zip(self.champion, self.challenger, strict=True)) if a != b]

    def figures(self) -> dict[str, float]:
        """Names as in MLflow. Accuracies only where every picture has a label."""
        told = {
            "pictures": float(len(self.examples)),
            "agreement": 1 - len(self.flips) / len(self.examples),
            "flips": float(len(self.flips)),
            "latency_ms.from": self.champion_ms,
            "latency_ms.to": self.challenger_ms,
            "latency_ratio": self.challenger_ms / self.champion_ms,
        }
        if all(example.label is not None for example in self.examples):
            told["accuracy.from"], told["accuracy.to"] = self._accuracy(self.champion), self._accuracy(self.challenger)
        return told

    def contact_sheet(self, path: Path) -> None:
        """The pictures that flipped, each with the old answer, the new one and the right one."""
        shown = [(self.examples[i], self.champion[i], self.challenger[i]) for i in self.flips[:SHOWN]]
        images = [preprocess.pixels(example.picture, 96) for example, _, _ in shown]
        captions = [
            f"{_text(old)} → {_text(new)}" + (f"\nright: {_text(example.label)}" if example.label is not None else "")
            for example, old, new in shown
        ]
        plots.contact_sheet(images, captions, path)

    def _accuracy(self, answers: list[Answer]) -> float:
        right = [answer == example.label for answer, example in zip(answers, self.examples, strict=True)]
        return float(np.mean(right))


def load(data: bytes, name: str) -> Session:
    """An export, checked as the service checks it. Raises ConfigError with the engine's reason."""
    try:
        session = Session(data)
        session.check_golden()
    except Refused as error:
        raise ConfigError(f"{name} cannot be asked: {error}. Export and register it again.") from error
    return session


def replay(champion: Session, challenger: Session, examples: Sequence[Example]) -> Replay:
    """Asks both with every picture, one at a time and in turns, so that both are timed under the same load of the machine.

    Raises ConfigError for a file that is no picture.
    """
    answers: tuple[list[Answer], list[Answer]] = ([], [])
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(max(TIMED, len(examples))):
        example = examples[number % len(examples)]
        for side in (0, 1) if number % 2 else (1, 0):
            session = (champion, challenger)[side]
            try:
                pixels = preprocess.pixels(example.picture, session.card.resolution)[None]
            except preprocess.PictureError as error:
                raise _unreadable(example.name, error) from error
            began = time.perf_counter()
            [row] = session.run(pixels)[0]
            seconds[side].append(time.perf_counter() - began)
            if number < len(examples):
                answers[side].append(_named(row, session))
    old_ms, new_ms = (float(np.median(taken)) * 1000 for taken in seconds)
    return Replay(examples, *answers, old_ms, new_ms)


def sample(tenant: str, count: int, pictures: Path | None, *sessions: Session) -> tuple[list[Example], str]:
    """At most `count` examples, spread evenly, and where they are from. Raises ConfigError for a folder without pictures."""
    if pictures is not None:
        paths = sorted(p for p in pictures.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())
        if not paths:
            raise ConfigError(f"{pictures} holds no pictures. Read are: {', '.join(sorted(SUFFIXES))}.")
        labels = _labels([path.relative_to(pictures) for path in paths], sessions)
        given = [Example(str(paths[i]), _read(paths[i]), labels[i]) for i in _spread(range(len(paths)), count)]
        return given, f"{len(given)} pictures of {pictures}" + (", labelled by their folders" if labels[0] else "")
    if (receipt.folder("pack", tenant) / receipt.FILE).is_file():
        data = Dataset.open(receipt.read("pack", tenant).outputs["dataset"].uri)
        if "test" in data.splits:
            split = data.split("test")
            chosen = _spread(range(len(split)), count)
            named = [tuple(sorted(data.classes[label] for label in split.labels[i])) for i in chosen]
            examples = [Example(split.keys[i], split.read(i), label) for i, label in zip(chosen, named, strict=True)]
            return examples, f"{len(examples)} of the {len(split)} test pictures"
    golden = {one["picture"] for session in sessions for one in session.card.golden}
    examples = [Example(f"golden {n}", base64.b64decode(picture)) for n, picture in enumerate(sorted(golden))]
    return examples, f"the {len(examples)} golden pictures of both exports (no packed test split here)"


def _labels(paths: Sequence[Path], sessions: Sequence[Session]) -> Sequence[Answer | None]:
    """The names of the folders, <class>/… or <split>/<class>/…, where all are classes of one of the two; else no label."""
    depth = 1 if all(path.parts[0] in SPLITS for path in paths) else 0
    names = [path.parts[depth] if len(path.parts) > depth + 1 else "" for path in paths]
    classes = {name for session in sessions for name in session.card.classes}
    if any(session.card.multi_label for session in sessions) or not classes.issuperset(names):
        return [None] * len(paths)
    return [(name,) for name in names]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(name: str | Path, error: Exception) -> ConfigError:
    return ConfigError(f"{name} cannot be asked about: {error}. Remove it, or give another folder: --pictures FOLDER.")


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def _named(row: Any, session: Session) -> Answer:
    classes = session.card.classes
    if session.card.multi_label:
        return tuple(sorted(name for name, probability in zip(classes, row, strict=True) if probability > 0.5))
    return (classes[int(row.argmax())],)


def _text(answer: Answer | None) -> str:
    return " + ".join(answer or ()) or "none"
