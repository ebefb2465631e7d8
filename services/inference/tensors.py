"""The tensors of an infer request: JSON or binary → pictures. Nothing here trusts what the caller says of sizes and types."""

import base64
from itertools import chain
from reprlib import repr as short  # of a caller's values: neither their size nor their depth is ours to choose
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from services.inference.errors import BadRequest, TooLarge

MOST_BRACKETS = 300_000  # of a request's JSON: each becomes an object of 70 bytes while nobody else is answered


def loads(text: bytes, most_bytes: int) -> Any:
    """Nobody else is answered while JSON is read: neither long texts nor very many lists are."""
    if len(text) > most_bytes or text.count(b"[") + text.count(b"{") > MOST_BRACKETS:
        raise TooLarge(
            f"JSON of {len(text):,} bytes; at most {most_bytes:,} bytes and {MOST_BRACKETS:,} lists are read. "
            "Send binary tensors (Inference-Header-Content-Length), or pictures to /v1/…/classify."
        )
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None


def parameters(holder: dict[str, Any]) -> dict[str, Any]:
    parameters = holder.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadRequest("`parameters` must be an object")
    return parameters


def pictures(tensor: dict[str, Any], raw: bytes, most: int) -> list[bytes]:
    """Encoded pictures: a BYTES tensor [n], each element 4 bytes of length (little-endian) and the bytes; in JSON, base64."""
    shape, size = tensor.get("shape"), parameters(tensor).get("binary_data_size")
    if tensor.get("datatype") != "BYTES" or not isinstance(shape, list) or len(shape) not in (1, 2):
        raise BadRequest("`picture` has the datatype BYTES and the shape [n]")
    if size is None:
        found = _from_base64(tensor.get("data"), most)
    elif size == len(raw):
        found = _elements_of(raw, most)
    else:
        raise BadRequest(f"`picture` has the binary_data_size {short(size)}, {len(raw)} bytes came")
    if not found or len(found) != shape[0] or shape[1:] not in ([], [1]):
        raise BadRequest(f"`picture` has the shape {short(shape)}, but {len(found)} elements came")
    return found


def _elements_of(raw: bytes, most: int) -> list[bytes]:
    found: list[bytes] = []
    at = 0
    while at < len(raw):
        length = int.from_bytes(raw[at : at + 4], "little")
        if at + 4 + length > len(raw):
            raise BadRequest(f"element {len(found)} of `picture` is {length} bytes long, more than came")
        if len(found) == most:
            raise _too_many(most)
        found.append(raw[at + 4 : at + 4 + length])
        at += 4 + length
    return found


def _from_base64(data: Any, most: int) -> list[bytes]:
    """Flat ["…", "…"] or as a column [["…"], ["…"]]."""
    if isinstance(data, list) and len(data) > most:
        raise _too_many(most)
    flat = (
        [one[0] if isinstance(one, list) and len(one) == 1 else one for one in data] if isinstance(data, list) else []
    )
    try:
        return [base64.b64decode(text, validate=True) for text in flat]
    except (TypeError, ValueError):
        raise BadRequest("`picture` in JSON needs `data` with each picture's bytes as base64") from None


def pixels(tensor: dict[str, Any], raw: bytes, resolution: int, most: int) -> NDArray[np.uint8]:
    if tensor.get("datatype") != "UINT8":
        raise BadRequest(f"`pixels` has the datatype UINT8, not {short(tensor.get('datatype'))}")
    shape = tensor.get("shape")
    if not isinstance(shape, list) or any(type(side) is not int for side in shape):  # True and 4.0 equal integers
        raise BadRequest(f"`pixels` has the shape [n, {resolution}, {resolution}, 3] of integers, not {short(shape)}")
    if shape[1:] != [resolution, resolution, 3] or shape[0] < 1:
        raise BadRequest(f"`pixels` has the shape [n, {resolution}, {resolution}, 3], not {short(shape)}")
    if shape[0] > most:
        raise _too_many(most)
    size = parameters(tensor).get("binary_data_size")
    count = shape[0] * resolution * resolution * 3
    if size is not None:
        if size != count or len(raw) != count:
            raise BadRequest(
                f"shape {shape} is {count} bytes; binary_data_size is {short(size)}, {len(raw)} bytes came"
            )
        return np.frombuffer(raw, np.uint8).reshape(shape)
    return _integers(tensor.get("data"), count).reshape(shape)


def _integers(data: Any, count: int) -> NDArray[np.uint8]:
    """Flat or nested lists of integers. numpy isn't asked what they hold: of strings it makes arrays 4,000 times their size."""
    wrong = BadRequest(f"`data` must hold {count} integers, flat or in rows")
    while isinstance(data, list) and data and all(type(row) is list for row in data):
        if len({len(row) for row in data}) > 1:
            raise BadRequest("`data` is ragged: its rows differ in length")
        if len(data) * len(data[0]) > count:
            raise wrong
        data = list(chain.from_iterable(data))
    if not isinstance(data, list) or len(data) != count or set(map(type, data)) != {int}:
        raise wrong
    try:
        return np.frombuffer(bytes(data), np.uint8)
    except ValueError:
        raise BadRequest("`data` must hold values from 0 to 255") from None


def _too_many(most: int) -> BadRequest:
    return BadRequest(f"at most {most} pictures are answered at once; send fewer, or several requests")
