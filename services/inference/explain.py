"""Why this class: the exact class activation map of an answer.

BiT's head is linear over an average of the feature map, so that a class's logit is the mean of `feature_map · head_weight` plus a
constant: the map shows what every place added, not an approximation (Zhou et al., 2016, section 2).
"""

import base64
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from services import preprocess
from services.inference.errors import DeadlineExceeded
from services.inference.priority import give_way

LONGEST_SIDE = 512  # of an overlay
NICENESS = 10  # explaining gives way to answering


def explainers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "explain", give_way, (NICENESS,))


def explain(
    answers: list[dict[str, Any]],
    classes: list[str],
    pictures: list[bytes],
    rows: list[NDArray[np.float32]],
    as_overlay: bool,
    max_pixels: int,
    deadline: float,
) -> None:
    """Adds `explanation` to each answer; rows: probabilities, feature maps, head_weight. Raises DeadlineExceeded."""
    best_of = rows[0].argmax(axis=1).tolist()
    for answer, picture, best, feature_map in zip(answers, pictures, best_of, rows[1], strict=True):
        if time.monotonic() > deadline:
            raise DeadlineExceeded("the deadline passed before every picture was explained")
        heat = activation_map(feature_map, rows[2], best)
        told: dict[str, Any] = {"class": classes[best]}
        if as_overlay:
            told["overlay"] = overlay(picture, heat, max_pixels)
        else:
            told["map"] = [[round(float(value), 4) for value in row] for row in heat]
        answer["explanation"] = told


def activation_map(
    feature_map: NDArray[np.float32], head_weight: NDArray[np.float32], index: int
) -> NDArray[np.float32]:
    """feature_map [D, h, w], head_weight [D, C] → [h, w], whose mean is the logit of class `index` less its bias."""
    return np.tensordot(head_weight[:, index], feature_map, axes=1)


def overlay(picture: bytes, heat: NDArray[np.float32], max_pixels: int) -> str:
    """The picture with the map laid over it, as a PNG in a data: URL. What spoke against the class stays uncoloured."""
    image = preprocess.decode(picture, LONGEST_SIDE, max_pixels)
    scale = min(1.0, LONGEST_SIDE / max(image.shape[:2]))
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    spoke_for = np.clip(heat, 0, None)
    share = cv2.resize(spoke_for / max(float(spoke_for.max()), 1e-12), size, interpolation=cv2.INTER_CUBIC).clip(0, 1)
    colours = cv2.applyColorMap((share * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    opacity = 0.65 * share[..., None]
    blended = (small * (1 - opacity) + colours * opacity).astype(np.uint8)
    _, data = cv2.imencode(".png", blended[..., ::-1])
    return "data:image/png;base64," + base64.b64encode(data.tobytes()).decode()
