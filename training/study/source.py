"""What a reader of a dataset's files gives: its classes, and its examples one after the other."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Label = (
    str | Callable[[dict[str, Any]], int]
)  # the field of an example that is its label, or how it follows from its fields
# (split: train, validation, test or None where the source has none; label; encoded picture)
Sample = tuple[str | None, int, bytes]


@dataclass(frozen=True)
class Source:
    """answers: class → the classes, by name or number, of the dataset tuned on that are right for it (out-of-distribution)."""

    place: Path
    classes: list[str]
    samples: Iterable[Sample]
    answers: Mapping[str, list[int | str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What is asked about the pictures of a dataset."""

    label: Label
    classes: int

    def of(self, fields: dict[str, Any]) -> int:
        """The label of an example from its fields, single values or lists of one."""
        return int(np.ravel(fields[self.label])[0]) if isinstance(self.label, str) else self.label(fields)

    @property
    def numbers(self) -> list[str]:
        """Names of the classes where a dataset tells none."""
        return [str(number) for number in range(self.classes)]


# None where a folder does not hold the reader's layout. Raises SourceError where it does and is damaged.
Reader = Callable[[Path, Task], Source | None]


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels [h, w] or [h, w, 3] RGB as a PNG file."""
    image = pixels if pixels.ndim == 2 else pixels[..., ::-1]
    return bytes(cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1])
