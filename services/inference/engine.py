"""ONNX Runtime behind one class: an export in, probabilities out. The only importer of onnxruntime in the service."""

import base64
import json
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from services import preprocess
from services.inference.errors import Refused

FORMAT = 1
TOLERANCE = 1e-3  # how far a golden answer may be off, in probability
OUTPUTS = ("probabilities", "features", "feature_map", "head_weight")


@dataclass(frozen=True)
class Card:
    """What an export says of itself; the fields are those of its metadata."""

    classes: list[str]
    multi_label: bool
    resolution: int
    threshold: float | None
    hyperrule: dict[str, Any]
    metrics: dict[str, float]
    lineage: dict[str, Any]
    golden: list[dict[str, Any]]

    @classmethod
    def of(cls, properties: dict[str, str]) -> Self:
        """Raises Refused for a file that isn't an export or is of another format."""
        try:
            values = {key: json.loads(value) for key, value in properties.items()}
            if values.pop("format") != FORMAT or values.pop("resize") != "squash":
                raise Refused(f"the export's format or resize rule is not known; this service reads format {FORMAT}")
            return cls(**{name: values[name] for name in cls.__dataclass_fields__})
        except (KeyError, ValueError) as error:
            raise Refused(f"not an export of this project: its metadata lack {error}") from None


class Session:
    """A loaded export. One thread computes one batch, so that several threads share the cores without fighting.

    picture_s: seconds of a worker that a picture takes, as the scheduler learnt; 0 before it did.
    """

    picture_s = 0.0

    def __init__(self, data: bytes) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises bare C++ exceptions of many kinds
            raise Refused("ONNX Runtime cannot load the file: it is damaged or of an unknown operator set") from error
        self.card = Card.of(self._session.get_modelmeta().custom_metadata_map)
        self.size_bytes = len(data)

    def run(
        self, pixels: NDArray[np.uint8], outputs: tuple[str, ...] = ("probabilities",)
    ) -> list[NDArray[np.float32]]:
        """uint8 [N, S, S, 3] → the named outputs."""
        return self._session.run(list(outputs), {"pixels": pixels})

    def check_golden(self) -> float:
        """Answers the pictures inside the export; returns the largest difference. Raises Refused above the tolerance."""
        if not self.card.golden:
            raise Refused(
                "the export has no golden pictures, so nobody can tell whether it answers as it did in training"
            )
        worst = 0.0
        for golden in self.card.golden:
            pixels = preprocess.pixels(base64.b64decode(golden["picture"]), self.card.resolution)
            answered = self.run(pixels[None])[0][0]
            expected = np.asarray(golden["probabilities"], np.float32)
            if answered.shape != expected.shape:
                raise Refused(f"golden answer has {expected.size} classes, the network {answered.size}")
            if answered.size != len(self.card.classes):
                raise Refused(f"the export names {len(self.card.classes)} classes, the network answers {answered.size}")
            difference = float(np.abs(answered - expected).max())
            if not difference <= TOLERANCE:  # NaN is not, and larger than nothing either
                raise Refused(f"golden answers are off by {difference:.3g} (at most {TOLERANCE:g} is allowed)")
            worst = max(worst, difference)
        return worst

    def warm_up(self, max_batch: int) -> None:
        """Runs every batch size once, so that no request pays for the first time."""
        side = self.card.resolution
        for count in range(1, max_batch + 1):
            self.run(np.zeros((count, side, side, 3), np.uint8))
