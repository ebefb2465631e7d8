"""Open Inference Protocol v2 over REST: bytes ↔ arrays, JSON and the binary extension. No HTTP, no models: pure functions.

Specification: https://github.com/kserve/open-inference-protocol (REST) and Triton's binary data extension.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from services.inference import tensors
from services.inference.engine import OUTPUTS
from services.inference.errors import BadRequest, Unsupported
from services.inference.models import Served
from services.inference.tensors import short

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


def parse(
    body: bytes, json_length: int | None, resolution: int, most_pictures: int, most_json_bytes: int
) -> InferRequest:
    """An infer request's body; json_length is the header Inference-Header-Content-Length. Raises BadRequest, TooLarge.

    Length 0 is Triton's "raw binary request": the body is the single input, here one encoded picture.
    """
    if json_length == 0:
        return InferRequest(None, [body], ("probabilities",), frozenset(("probabilities",)), {})
    if json_length is not None and not 0 <= json_length <= len(body):
        raise BadRequest(f"Inference-Header-Content-Length {json_length} does not fit a body of {len(body)} bytes")
    request = tensors.loads(body if json_length is None else body[:json_length], most_json_bytes)
    if not isinstance(request, dict) or not isinstance(request.get("inputs"), list) or len(request["inputs"]) != 1:
        raise BadRequest("the body needs `inputs` with one tensor, `pixels` or `picture`")
    tensor, tail = request["inputs"][0], b"" if json_length is None else body[json_length:]
    if not isinstance(tensor, dict) or tensor.get("name") not in INPUTS:
        raise BadRequest("the one input is named `pixels` (UINT8) or `picture` (BYTES, encoded pictures)")
    wanted = request.get("outputs") or [{"name": "probabilities"}]
    if not isinstance(wanted, list) or not all(isinstance(output, dict) for output in wanted):
        raise BadRequest("`outputs` must be a list of objects with a `name`")
    if any("shared_memory_region" in tensors.parameters(holder) for holder in (tensor, *wanted)):
        raise Unsupported("this server has no shared memory: send and receive tensors in the body")
    if tensor["name"] == "pixels":
        data: NDArray[np.uint8] | list[bytes] = tensors.pixels(tensor, tail, resolution, most_pictures)
    else:
        data = tensors.pictures(tensor, tail, most_pictures)
    all_binary = bool(tensors.parameters(request).get("binary_data_output"))
    binary, classification = set(), {}
    for output in wanted:
        name, parameters = output.get("name"), tensors.parameters(output)
        if not isinstance(name, str) or name not in OUTPUTS:
            raise BadRequest(f"unknown output {short(name)}. Choices: {', '.join(OUTPUTS)}.")
        if parameters.get("binary_data", all_binary):
            binary.add(name)
        if count := parameters.get("classification", 0):
            if name != "probabilities" or not isinstance(count, int) or count < 0:
                raise BadRequest("`classification` is a number of classes, for the output `probabilities`")
            classification[name] = count
    identifier = request.get("id")
    if not isinstance(identifier, str | int | None):
        raise BadRequest(f"`id` must be a string, not {short(identifier)}")
    names = tuple(str(output["name"]) for output in wanted)
    if len(set(names)) < len(names):
        raise BadRequest(f"each output can be asked for once, not {', '.join(names[:8])}")
    return InferRequest(None if identifier is None else str(identifier), data, names, frozenset(binary), classification)


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


def metadata(served: Served, name: str, aliases: list[str], versions: list[str]) -> dict[str, Any]:
    """GET v2/models/{name}: the tensors, and beneath `parameters` what the version says of itself.

    versions: all that can be addressed under this name.
    """
    side, classes = served.session.card.resolution, len(served.session.card.classes)
    return {
        "name": name,
        "versions": versions,
        "platform": PLATFORM,
        "inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [-1, side, side, 3]}],
        "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, classes]}],
        "parameters": describe(served, aliases) | {"other_inputs": ["picture"], "other_outputs": list(OUTPUTS[1:])},
    }


def config(served: Served, name: str, max_pictures: int) -> dict[str, Any]:
    """GET v2/models/{name}/config: Triton's ModelConfig, as far as it applies."""
    side, classes = served.session.card.resolution, len(served.session.card.classes)
    return {
        "name": name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "version_policy": {"specific": {"versions": [int(served.version)] if served.version.isdigit() else []}},
        "max_batch_size": max_pictures,
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
    """One picture's answer: the `top` classes by probability, as JSON; unknown where the best stays below the threshold."""
    threshold, labels, values = served.session.card.threshold, served.labels, probabilities.tolist()
    written = orjson.dumps(probabilities, option=orjson.OPT_SERIALIZE_NUMPY)
    numbers = written[1:-1].split(
        b","
    )  # all at once: rounded one by one, in an object each, they took three times as long
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)[:top]
    told = b"},".join([labels[i] + numbers[i] for i in order])
    return {
        "predictions": orjson.Fragment(b"[" + told + b"}]"),
        "unknown": threshold is not None and values[order[0]] < threshold,
    }
