"""Open Inference Protocol v2 over REST: bytes ↔ arrays, JSON and the binary extension. No HTTP, no models: pure functions.

Specification: https://github.com/kserve/open-inference-protocol (REST) and Triton's binary data extension.
"""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from services.inference.engine import OUTPUTS
from services.inference.errors import BadRequest, Unsupported
from services.inference.models import Served

INPUTS = ("pixels", "picture")
PLATFORM = "onnxruntime_onnx"
LARGEST_JSON = (
    4 * 2**20
)  # bytes of tensors as float32; as text they are five times that, written while nobody else is answered


@dataclass(frozen=True)
class InferRequest:
    """A parsed request. data: pixels uint8 [n, S, S, 3], or n encoded pictures; binary: names of the outputs wanted as binary;
    classification: output → how many classes, for outputs wanted as "value:index:label".
    """

    id: str | None
    data: NDArray[np.uint8] | list[bytes]
    outputs: tuple[str, ...]
    binary: frozenset[str]
    classification: dict[str, int]


def parse(body: bytes, json_length: int | None, resolution: int) -> InferRequest:
    """An infer request's body; json_length is the header Inference-Header-Content-Length. Raises BadRequest.

    Length 0 is Triton's "raw binary request": the body is the single input, here one encoded picture.
    """
    if json_length == 0:
        return InferRequest(None, [body], ("probabilities",), frozenset(("probabilities",)), {})
    if json_length is not None and not 0 <= json_length <= len(body):
        raise BadRequest(f"Inference-Header-Content-Length {json_length} does not fit a body of {len(body)} bytes")
    try:
        request = orjson.loads(body if json_length is None else body[:json_length])
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(request, dict) or not isinstance(request.get("inputs"), list) or len(request["inputs"]) != 1:
        raise BadRequest("the body needs `inputs` with one tensor, `pixels` or `picture`")
    tensor, tail = request["inputs"][0], b"" if json_length is None else body[json_length:]
    if not isinstance(tensor, dict) or tensor.get("name") not in INPUTS:
        raise BadRequest("the one input is named `pixels` (UINT8) or `picture` (BYTES, encoded pictures)")
    wanted = request.get("outputs") or [{"name": "probabilities"}]
    if not isinstance(wanted, list) or not all(isinstance(output, dict) for output in wanted):
        raise BadRequest("`outputs` must be a list of objects with a `name`")
    if any("shared_memory_region" in _parameters(holder) for holder in (tensor, *wanted)):
        raise Unsupported("this server has no shared memory: send and receive tensors in the body")
    data = _pixels(tensor, tail, resolution) if tensor["name"] == "pixels" else _pictures(tensor, tail)
    all_binary = bool(_parameters(request).get("binary_data_output"))
    binary, classification = set(), {}
    for output in wanted:
        name, parameters = str(output.get("name")), _parameters(output)
        if name not in OUTPUTS:
            raise BadRequest(f"unknown output {name!r}. Choices: {', '.join(OUTPUTS)}.")
        if parameters.get("binary_data", all_binary):
            binary.add(name)
        if count := parameters.get("classification", 0):
            if name != "probabilities" or not isinstance(count, int) or count < 0:
                raise BadRequest("`classification` is a number of classes, for the output `probabilities`")
            classification[name] = count
    identifier = request.get("id")
    names = tuple(str(output["name"]) for output in wanted)
    if len(set(names)) < len(names):
        raise BadRequest(f"each output can be asked for once, not {', '.join(names[:8])}")
    return InferRequest(None if identifier is None else str(identifier), data, names, frozenset(binary), classification)


def _parameters(holder: dict[str, Any]) -> dict[str, Any]:
    parameters = holder.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadRequest("`parameters` must be an object")
    return parameters


def _pictures(tensor: dict[str, Any], raw: bytes) -> list[bytes]:
    """Encoded pictures: a BYTES tensor [n], each element 4 bytes of length (little-endian) and the bytes; in JSON, base64."""
    shape, size = tensor.get("shape"), _parameters(tensor).get("binary_data_size")
    if tensor.get("datatype") != "BYTES" or not isinstance(shape, list) or len(shape) not in (1, 2):
        raise BadRequest("`picture` has the datatype BYTES and the shape [n]")
    if size is None:
        found = _from_base64(tensor.get("data"))
    elif size == len(raw):
        found = _elements_of(raw)
    else:
        raise BadRequest(f"`picture` has the binary_data_size {size}, {len(raw)} bytes came")
    if not found or len(found) != shape[0] or shape[1:] not in ([], [1]):
        raise BadRequest(f"`picture` has the shape {shape}, but {len(found)} elements came")
    return found


def _elements_of(raw: bytes) -> list[bytes]:
    found: list[bytes] = []
    at = 0
    while at < len(raw):
        length = int.from_bytes(raw[at : at + 4], "little")
        if at + 4 + length > len(raw):
            raise BadRequest(f"element {len(found)} of `picture` is {length} bytes long, more than came")
        found.append(raw[at + 4 : at + 4 + length])
        at += 4 + length
    return found


def _from_base64(data: Any) -> list[bytes]:
    """Flat ["…", "…"] or as a column [["…"], ["…"]]."""
    flat = (
        [one[0] if isinstance(one, list) and len(one) == 1 else one for one in data] if isinstance(data, list) else []
    )
    try:
        return [base64.b64decode(text, validate=True) for text in flat]
    except (TypeError, ValueError):
        raise BadRequest("`picture` in JSON needs `data` with each picture's bytes as base64") from None


def _pixels(tensor: dict[str, Any], raw: bytes, resolution: int) -> NDArray[np.uint8]:
    if tensor.get("datatype") != "UINT8":
        raise BadRequest(f"`pixels` has the datatype UINT8, not {tensor.get('datatype')!r}")
    shape = tensor.get("shape")
    expected = [resolution, resolution, 3]
    if not isinstance(shape, list) or shape[1:] != expected or not isinstance(shape[0], int) or shape[0] < 1:
        raise BadRequest(f"`pixels` has the shape [n, {resolution}, {resolution}, 3], not {shape}")
    size = _parameters(tensor).get("binary_data_size")
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
    """The response's body and, where it ends in binary tensors, the length of its JSON part. Raises BadRequest."""
    as_text = [
        (output, array.nbytes)
        for output, array in zip(request.outputs, rows, strict=True)
        if output not in request.binary and output not in request.classification
    ]
    if (size := sum(nbytes for _, nbytes in as_text)) > LARGEST_JSON:
        raise BadRequest(
            f"{', '.join(name for name, _ in as_text)}: {size:,} bytes of numbers, of which JSON holds {LARGEST_JSON:,}. "
            'Ask for binary output ("parameters": {"binary_data": true}), or send fewer pictures.'
        )
    outputs, tail = [], []
    for output, array in zip(request.outputs, rows, strict=True):
        told: dict[str, Any] = {"name": output, "shape": list(array.shape), "datatype": "FP32"}
        texts = None
        if output in request.classification:
            texts = _classified(array, served.session.card.classes, request.classification[output])
            told |= {"datatype": "BYTES", "shape": [len(texts), len(texts[0])]}
        if output in request.binary:
            data = _elements(texts) if texts else np.ascontiguousarray(array, np.float32).tobytes()
            told["parameters"] = {"binary_data_size": len(data)}
            tail.append(data)
        else:
            told["data"] = [text for row in texts for text in row] if texts else np.ascontiguousarray(array).ravel()
        outputs.append(told)
    answer: dict[str, Any] = {
        "model_name": name,
        "model_version": served.version,
        "parameters": {"sha256": served.sha256},
        "outputs": outputs,
    }
    if request.id is not None:
        answer["id"] = request.id
    header = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return header + b"".join(tail), len(header) if tail else None


def _classified(array: NDArray[np.float32], classes: list[str], count: int) -> list[list[str]]:
    """Triton's classification extension: the best classes of each row as "value:index:label"."""
    best = np.argsort(-array, axis=1, kind="stable")[:, :count]
    return [[f"{row[i]:.6f}:{i}:{classes[i]}" for i in order] for row, order in zip(array, best, strict=True)]


def _elements(texts: list[list[str]]) -> bytes:
    encoded = [text.encode() for row in texts for text in row]
    return b"".join(len(text).to_bytes(4, "little") + text for text in encoded)


def metadata(served: Served, name: str, aliases: list[str]) -> dict[str, Any]:
    """GET v2/models/{name}: the tensors, and beneath `parameters` what the version says of itself."""
    side, classes = served.session.card.resolution, len(served.session.card.classes)
    return {
        "name": name,
        "versions": [served.version],
        "platform": PLATFORM,
        "inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [-1, side, side, 3]}],
        "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, classes]}],
        "parameters": describe(served, aliases) | {"other_inputs": ["picture"], "other_outputs": list(OUTPUTS[1:])},
    }


def config(served: Served, name: str, max_batch: int) -> dict[str, Any]:
    """GET v2/models/{name}/config: Triton's ModelConfig, as far as it applies."""
    side, classes = served.session.card.resolution, len(served.session.card.classes)
    return {
        "name": name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "version_policy": {"specific": {"versions": [int(served.version)] if served.version.isdigit() else []}},
        "max_batch_size": max_batch,
        "input": [{"name": "pixels", "data_type": "TYPE_UINT8", "format": "FORMAT_NHWC", "dims": [side, side, 3]}],
        "output": [{"name": "probabilities", "data_type": "TYPE_FP32", "dims": [classes]}],
        "instance_group": [{"name": name, "kind": "KIND_CPU"}],
        "parameters": {"sha256": {"string_value": served.sha256}},
    }


def statistics(served: Served, name: str) -> dict[str, Any]:
    """One element of `model_stats` in GET v2/models/{name}/stats (Triton's statistics extension)."""
    stats = served.stats
    timed = {key: {"count": count, "ns": int(seconds * 1e9)} for key, (count, seconds) in stats.stages.items()}
    none = {"count": 0, "ns": 0}
    keys = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
    return {
        "name": name,
        "version": served.version,
        "last_inference": int(stats.last * 1000),
        "inference_count": stats.pictures,
        "execution_count": stats.executions,
        "inference_stats": {key: timed.get(key, none) for key in keys},
        "batch_stats": [],
        "memory_usage": [{"type": "CPU", "id": 0, "byte_size": served.size_bytes}],
    }


def describe(served: Served, aliases: list[str]) -> dict[str, Any]:
    """A version's card, as the API and the playground show it."""
    card = served.session.card
    return {
        "tenant": served.tenant,
        "version": served.version,
        "aliases": aliases,
        "sha256": served.sha256,
        "since": served.since,
        "classes": card.classes,
        "multi_label": card.multi_label,
        "resolution": card.resolution,
        "threshold": card.threshold,
        "metrics": card.metrics,
        "hyperrule": card.hyperrule,
        "lineage": card.lineage,
        "golden_difference": served.golden_difference,
        "size_bytes": served.size_bytes,
    }


def classification(served: Served, probabilities: NDArray[np.float32], top: int) -> dict[str, Any]:
    """One picture's answer: the `top` classes by probability; unknown where the best stays below the threshold."""
    card = served.session.card
    values = probabilities.tolist()
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)[:top]
    return {
        "predictions": [{"class": card.classes[i], "index": i, "probability": round(values[i], 6)} for i in order],
        "unknown": card.threshold is not None and values[order[0]] < card.threshold,
    }
