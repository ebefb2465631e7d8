"""Open Inference Protocol v2 over REST: bytes ↔ arrays, JSON and the binary extension. No HTTP, no models: pure functions.

Specification: https://github.com/kserve/open-inference-protocol (REST) and Triton's binary data extension.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from services.inference.engine import OUTPUTS
from services.inference.errors import BadRequest
from services.inference.models import Served

DATATYPES = {"UINT8": np.uint8, "FP32": np.float32, "INT32": np.int32, "INT64": np.int64}


@dataclass(frozen=True)
class InferRequest:
    """A parsed request. pixels: uint8 [n, S, S, 3]; binary: names of the outputs wanted as binary."""

    id: str | None
    pixels: NDArray[np.uint8]
    outputs: tuple[str, ...]
    binary: frozenset[str]


def parse(body: bytes, json_length: int | None, resolution: int) -> InferRequest:
    """An infer request's body; json_length is the header Inference-Header-Content-Length. Raises BadRequest."""
    if json_length is not None and not 0 <= json_length <= len(body):
        raise BadRequest(f"Inference-Header-Content-Length {json_length} does not fit a body of {len(body)} bytes")
    try:
        request = orjson.loads(body if json_length is None else body[:json_length])
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(request, dict) or not isinstance(request.get("inputs"), list) or len(request["inputs"]) != 1:
        raise BadRequest("the body needs `inputs` with one tensor, `pixels`")
    pixels = _tensor(request["inputs"][0], b"" if json_length is None else body[json_length:], resolution)
    parameters = request.get("parameters") or {}
    wanted = request.get("outputs") or [{"name": "probabilities"}]
    if not isinstance(wanted, list) or not all(isinstance(output, dict) for output in wanted):
        raise BadRequest("`outputs` must be a list of objects with a `name`")
    names = tuple(str(output.get("name")) for output in wanted)
    for name in names:
        if name not in OUTPUTS:
            raise BadRequest(f"unknown output {name!r}. Choices: {', '.join(OUTPUTS)}.")
    all_binary = bool(parameters.get("binary_data_output"))
    binary = {
        n for n, o in zip(names, wanted, strict=True) if (o.get("parameters") or {}).get("binary_data", all_binary)
    }
    identifier = request.get("id")
    return InferRequest(None if identifier is None else str(identifier), pixels, names, frozenset(binary))


def _tensor(tensor: Any, raw: bytes, resolution: int) -> NDArray[np.uint8]:
    if not isinstance(tensor, dict) or tensor.get("name") != "pixels":
        raise BadRequest("the one input is named `pixels`")
    if tensor.get("datatype") != "UINT8":
        raise BadRequest(f"`pixels` has the datatype UINT8, not {tensor.get('datatype')!r}")
    shape = tensor.get("shape")
    expected = [resolution, resolution, 3]
    if not isinstance(shape, list) or shape[1:] != expected or not isinstance(shape[0], int) or shape[0] < 1:
        raise BadRequest(f"`pixels` has the shape [n, {resolution}, {resolution}, 3], not {shape}")
    size = (tensor.get("parameters") or {}).get("binary_data_size")
    count = shape[0] * resolution * resolution * 3
    if size is not None:
        if size != count or len(raw) != count:
            raise BadRequest(f"shape {shape} is {count} bytes; binary_data_size is {size}, {len(raw)} bytes came")
        return np.frombuffer(raw, np.uint8).reshape(shape)
    try:
        values = np.asarray(tensor.get("data"))
    except ValueError:
        raise BadRequest("`data` is ragged: its rows differ in length") from None
    if values.size != count or values.dtype.kind not in "iu":
        raise BadRequest(f"`data` must hold {count} integers for the shape {shape}")
    if values.min() < 0 or values.max() > 255:
        raise BadRequest("`data` must hold values from 0 to 255")
    return values.astype(np.uint8).reshape(shape)


def render(
    served: Served, name: str, request: InferRequest, rows: list[NDArray[np.float32]]
) -> tuple[bytes, int | None]:
    """The response's body and, where it ends in binary tensors, the length of its JSON part."""
    outputs, tail = [], []
    for output, array in zip(request.outputs, rows, strict=True):
        told: dict[str, Any] = {"name": output, "shape": list(array.shape), "datatype": "FP32"}
        if output in request.binary:
            data = np.ascontiguousarray(array, np.float32).tobytes()
            told["parameters"] = {"binary_data_size": len(data)}
            tail.append(data)
        else:
            told["data"] = np.ascontiguousarray(array).ravel()
        outputs.append(told)
    answer: dict[str, Any] = {"model_name": name, "model_version": served.version, "outputs": outputs}
    if request.id is not None:
        answer["id"] = request.id
    header = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return header + b"".join(tail), len(header) if tail else None


def metadata(served: Served, name: str) -> dict[str, Any]:
    """GET v2/models/{name}: the tensors, and beneath `parameters` what the version says of itself."""
    card = served.session.card
    side, classes = card.resolution, len(card.classes)
    return {
        "name": name,
        "versions": [served.version],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [-1, side, side, 3]}],
        "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, classes]}],
        "parameters": describe(served),
    }


def describe(served: Served) -> dict[str, Any]:
    """A version's card, as the API and the playground show it."""
    card = served.session.card
    return {
        "tenant": served.tenant,
        "version": served.version,
        "alias": served.alias,
        "sha256": served.sha256,
        "since": served.since,
        "classes": card.classes,
        "multi_label": card.multi_label,
        "resolution": card.resolution,
        "threshold": card.threshold,
        "metrics": card.metrics,
        "lineage": card.lineage,
        "golden_difference": served.golden_difference,
    }


def classification(served: Served, probabilities: NDArray[np.float32], top: int) -> dict[str, Any]:
    """One picture's answer: the `top` classes by probability; unknown where the best stays below the threshold."""
    card = served.session.card
    order = np.argsort(-probabilities, kind="stable")[:top]
    best = float(probabilities[order[0]])
    return {
        "predictions": [
            {"class": card.classes[i], "index": int(i), "probability": round(float(probabilities[i]), 6)} for i in order
        ],
        "unknown": card.threshold is not None and best < card.threshold,
    }
