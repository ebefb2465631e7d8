"""Bytes → pixels: the one way, used by training, evaluation and serving, so that none of them sees another picture.

JPEG goes through libjpeg-turbo, decoded at a reduced scale where that is enough (the DCT does most of the shrinking); all else
through OpenCV. numpy only: neither torch nor the training package is imported.
"""

import threading
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from services.headers import Header, header, sniff

Pixels = NDArray[np.uint8]

MAX_PIXELS = 100_000_000  # refused from the header on, before a decompression bomb is unpacked
MAX_SCANS = 50  # of a JPEG; encoders write about ten, an attacker thousands of empty ones over many pixels
STRIP_BYTES = (
    4 * 2**20
)  # of a picture whose colours are computed here: what its intermediate results are made from at once
SCRATCH_BYTES = 4 * 2**20  # for a decoded JPEG before it is resized; untouched memory costs nothing

cv2.setNumThreads(0)  # every caller brings its own threads: one picture, one core
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # a damaged picture is told as PictureError


class PictureError(ValueError):
    """The bytes are not a picture that can be read; the message says what was found."""


class Scratch(threading.local):
    """Memory that each thread decodes into, again and again: new memory for each picture is new pages from the system."""

    def __init__(self) -> None:
        self.memory: Pixels = np.empty(SCRATCH_BYTES, np.uint8)


SCRATCH = Scratch()


def pixels(data: bytes, size: int, max_pixels: int = MAX_PIXELS, into: Pixels | None = None) -> Pixels:
    """An encoded picture as uint8 [size, size, 3] RGB, squashed to a square (BiT, section 3.3). Raises PictureError.

    into: where to write it, a new array by default.
    """
    told = _announced(data, max_pixels)
    image = _decode_jpeg(data, told, size, size, False, SCRATCH.memory) if told.kind == "jpeg" else None
    return resize(image if image is not None else _decode_any(data, told), size, into)


def resize(image: Pixels, size: int, into: Pixels | None = None) -> Pixels:
    """uint8 [h, w, 3] → [size, size, 3], never the picture itself: by area where it shrinks, linearly where it grows."""
    height, width = image.shape[:2]
    made = np.empty((size, size, 3), np.uint8) if into is None else into
    if height == width == size:
        np.copyto(made, image)
        return made
    shrinks = height >= size and width >= size
    return cv2.resize(image, (size, size), dst=made, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def decode(
    data: bytes, min_side: int | None = None, max_pixels: int = MAX_PIXELS, shrink: int = 1, fast: bool = False
) -> Pixels:
    """An encoded picture as uint8 [h, w, 3] RGB, upright (EXIF applied), transparency on white, of an animation the first frame.

    min_side: a JPEG may come back smaller than it is, but with no side below this. shrink: 1, 2, 4 or 8, a JPEG comes back so
    many times smaller, which costs less than the whole (libjpeg-turbo has SIMD for these four). fast: the colour of a JPEG, which
    is kept at half the size, is repeated instead of interpolated. Raises PictureError.
    """
    told = _announced(data, max_pixels)
    least = (-(-told.height // shrink), -(-told.width // shrink)) if shrink > 1 else (min_side or 0, min_side or 0)
    image = _decode_jpeg(data, told, *least, fast) if told.kind == "jpeg" else None
    return image if image is not None else _decode_any(data, told)


def upright_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) that `decode` gives to the whole picture, from its header. Raises PictureError."""
    told = _announced(data, max_pixels)
    return (told.width, told.height) if told.orientation >= 5 else (told.height, told.width)


def _announced(data: bytes, max_pixels: int) -> Header:
    """What the header tells. Raises PictureError for what is not to be unpacked."""
    told = header(data)
    if told is None and sniff(data) is None:
        raise PictureError(
            f"not a picture: {len(data)} bytes that begin with {data[:8]!r}. Send JPEG, PNG, WebP, GIF, BMP or TIFF."
        )
    if told is None:  # what cannot be held against the limit is not unpacked
        raise PictureError(f"a {sniff(data)} of {len(data)} bytes whose header does not tell its size.")
    if told.width * told.height > max_pixels:
        raise PictureError(
            f"a {told.kind} of {told.width} × {told.height} pixels; at most {max_pixels:,} pixels are read."
        )
    if not told.one_scan and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise PictureError(f"a jpeg of {scans} scans; at most {MAX_SCANS} are read.")
    return told


def _decode_jpeg(
    data: bytes, told: Header, min_height: int, min_width: int, fast: bool, scratch: Pixels | None = None
) -> Pixels | None:
    """None where libjpeg-turbo refuses what OpenCV may still read. The least sides are of the file, before EXIF turns it.

    scratch: memory that the picture may come back in, if it is large enough.
    """
    if told.lossless:  # libjpeg-turbo writes these whole, past the end of memory of the reduced size
        return None
    sides, colours = {"min_height": min_height, "min_width": min_width}, "RGB"
    if told.channels == 4:  # at its full size: RGB is a product of two inks, and the product of means is another
        sides, colours = {"min_height": 0, "min_width": 0}, "CMYK"
    height, width = _scaled(told, **sides)
    size = height * width * len(colours)
    read = partial(simplejpeg.decode_jpeg, data, colours, fastupsample=fast, **sides)
    try:
        try:
            image = read(buffer=scratch if scratch is not None and size <= len(scratch) else None)
        except ValueError:
            image = _damaged(read, size)
    except ValueError:
        return None
    if image is None:
        return None
    return _upright(_in_strips(image, _rgb_of_cmyk) if colours == "CMYK" else image, told.orientation)


def _scaled(told: Header, min_height: int, min_width: int) -> tuple[int, int]:
    """(height, width) that a picture is decoded to: the fewest eighths with no side below its least, all where none is set.

    Reckoned here, for each call of simplejpeg gives the interpreter's lock up and waits to get it back. Where a side is below its
    least already, simplejpeg may decode to less than this.
    """
    for eighths in range(1 if min_height > 0 or min_width > 0 else 8, 8):
        height, width = -(-told.height * eighths // 8), -(-told.width * eighths // 8)
        if height >= min_height and width >= min_width:
            return height, width
    return told.height, told.width


def _damaged(read: Callable[..., Pixels], size: int) -> Pixels | None:
    """A picture with an error in it, `size` bytes when decoded, as far as it can be read: over white and over black. None where
    the two differ, for what isn't written would show the memory, another tenant's picture maybe. Raises ValueError.
    """
    memory, sums = np.empty(size, np.uint8), set()
    for before in (255, 0):
        memory[:] = before
        image = read(strict=False, buffer=memory)
        sums.add(zlib.crc32(image.data))
    return image if len(sums) == 1 else None


def _decode_any(data: bytes, told: Header) -> Pixels:
    """By OpenCV, which turns JPEG and TIFF upright itself."""
    kind = told.kind
    flags = cv2.IMREAD_UNCHANGED if kind in ("png", "webp", "tiff", "gif") else cv2.IMREAD_COLOR
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise PictureError(f"a {kind} of {len(data)} bytes that cannot be decoded: {error.err}.") from None
    if image is None:
        raise PictureError(f"a {kind} of {len(data)} bytes that cannot be decoded: it is damaged or cut off.")
    if image.dtype not in (np.uint8, np.uint16):
        raise PictureError(f"a {kind} with {image.dtype} values; 8 or 16 bits per channel are read.")
    if kind in ("png", "webp"):
        image = _upright(image, told.orientation)
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return _in_strips(image, _rgb_of_any)


def _in_strips(image: NDArray[Any], convert: Callable[[NDArray[Any]], Pixels]) -> Pixels:
    """`convert` of a picture, so many rows at a time that its intermediate results stay small: uint8 [h, w, 3]."""
    made = np.empty((*image.shape[:2], 3), np.uint8)
    rows = max(1, STRIP_BYTES // image[0].nbytes)
    for start in range(0, len(image), rows):
        made[start : start + rows] = convert(image[start : start + rows])
    return made


def _rgb_of_cmyk(cmyk: Pixels) -> Pixels:
    """Adobe writes CMYK inverted, so that 255 is no ink: RGB is then the ink left over times the black left over."""
    left = cmyk.astype(np.uint16)
    return (left[..., :3] * left[..., 3:] // 255).astype(np.uint8)


def _rgb_of_any(image: NDArray[Any]) -> Pixels:
    """Gray, BGR or BGRA of 8 or 16 bits, as OpenCV reads it; transparency becomes white."""
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if image.shape[2] == 4:
        alpha = image[..., 3:].astype(np.uint16)
        image = ((image[..., :3] * alpha + 255 * (255 - alpha)) // 255).astype(np.uint8)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _upright(image: Pixels, orientation: int) -> Pixels:
    """Undoes the eight EXIF orientations (EXIF 2.32, tag 0x0112)."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)
