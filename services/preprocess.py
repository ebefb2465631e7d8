"""Bytes → pixels: the one way, used by training, evaluation and serving, so that none of them sees another picture.

JPEG goes through libjpeg-turbo, decoded at a reduced scale where that is enough (the DCT does most of the shrinking); all else
through OpenCV. numpy only: neither torch nor the training package is imported.
"""

import contextlib
import struct
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

MAX_PIXELS = 100_000_000  # refused from the header on, before a decompression bomb is unpacked
MAX_SCANS = 100  # of a JPEG; encoders write about ten, an attacker thousands of empty ones over many pixels
MAX_MARKERS = 10_000  # before a JPEG's first scan; a camera writes dozens, an attacker one in every two bytes
STRIP_BYTES = (
    4 * 2**20
)  # of a picture whose colours are computed here: what its intermediate results are made from at once
FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # markers SOFn of a JPEG; C0 and C1 are sequential
SCAN = 0xDA  # marker SOS
SIGNATURES = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\x00": "tiff",
    b"MM\x00*": "tiff",
}

cv2.setNumThreads(0)  # every caller brings its own threads: one picture, one core
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # a damaged picture is told as PictureError


class PictureError(ValueError):
    """The bytes are not a picture that can be read; the message says what was found."""


def pixels(data: bytes, size: int, max_pixels: int = MAX_PIXELS) -> Pixels:
    """An encoded picture as uint8 [size, size, 3] RGB, squashed to a square (BiT, section 3.3). Raises PictureError."""
    return resize(decode(data, size, max_pixels), size)


def resize(image: Pixels, size: int) -> Pixels:
    """uint8 [h, w, 3] → [size, size, 3]: by area where the picture shrinks, linearly where it grows."""
    height, width = image.shape[:2]
    if height == width == size:
        return image
    shrinks = height >= size and width >= size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def decode(
    data: bytes, min_side: int | None = None, max_pixels: int = MAX_PIXELS, shrink: int = 1, fast: bool = False
) -> Pixels:
    """An encoded picture as uint8 [h, w, 3] RGB, upright (EXIF applied), transparency on white, of an animation the first frame.

    min_side: a JPEG may come back smaller than it is, but with no side below this. shrink: 1, 2, 4 or 8, a JPEG comes back so
    many times smaller, which costs less than the whole (libjpeg-turbo has SIMD for these four). fast: the colour of a JPEG, which
    is kept at half the size, is repeated instead of interpolated. Raises PictureError.
    """
    kind, (width, height) = _announced(data, max_pixels)
    least = (-(-height // shrink), -(-width // shrink)) if shrink > 1 else (min_side or 0, min_side or 0)
    image = _decode_jpeg(data, *least, fast) if kind == "jpeg" else None
    return image if image is not None else _decode_any(data, kind)


def upright_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) that `decode` gives to the whole picture, from its header. Raises PictureError."""
    kind, (width, height) = _announced(data, max_pixels)
    turned = kind == "jpeg" and _exif_orientation(data) >= 5
    return (width, height) if turned else (height, width)


def _announced(data: bytes, max_pixels: int) -> tuple[str, tuple[int, int]]:
    """The kind and (width, height) that the header tells. Raises PictureError where that is not to be unpacked."""
    kind = sniff(data)
    if kind is None:
        raise PictureError(
            f"not a picture: {len(data)} bytes that begin with {data[:8]!r}. Send JPEG, PNG, WebP, GIF, BMP or TIFF."
        )
    size = dimensions(data)
    if size is None:  # what cannot be held against the limit is not unpacked
        raise PictureError(f"a {kind} of {len(data)} bytes whose header does not tell its size.")
    if size[0] * size[1] > max_pixels:
        raise PictureError(f"a {kind} of {size[0]} × {size[1]} pixels; at most {max_pixels:,} pixels are read.")
    if kind == "jpeg" and not _has_one_scan(data) and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise PictureError(f"a jpeg of {scans} scans; at most {MAX_SCANS} are read.")
    return kind, size


def sniff(data: bytes) -> str | None:
    """The kind of picture that the first bytes announce, None where they announce none."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((kind for signature, kind in SIGNATURES.items() if data.startswith(signature)), None)


def dimensions(data: bytes) -> tuple[int, int] | None:
    """(width, height) as the header says, before EXIF turns it; None where the header cannot be read."""
    kind = sniff(data)
    try:
        if kind == "jpeg":
            return _jpeg_dimensions(data)
        if kind == "png":
            return struct.unpack(">II", data[16:24])
        if kind == "gif":
            return struct.unpack("<HH", data[6:10])
        if kind == "bmp":
            if data[14:18] == b"\x0c\0\0\0":  # the header of OS/2, whose sides are 16 bits long
                return struct.unpack("<HH", data[18:22])
            width, height = struct.unpack("<ii", data[18:26])
            return abs(width), abs(height)  # negative: upside down
        if kind == "webp":
            return _webp_dimensions(data)
        if kind == "tiff":
            tags = _ifd(data)
            return tags[0x0100], tags[0x0101]
    except (ValueError, KeyError, struct.error):
        return None
    return None


def _jpeg_dimensions(data: bytes) -> tuple[int, int] | None:
    """simplejpeg has no name for unusual sampling factors or colours, which OpenCV reads: then from the frame's own marker."""
    with contextlib.suppress(ValueError, KeyError):
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        return width, height
    frame = next((at for code, at in _jpeg_markers(data) if code in FRAMES), None)
    if frame is None:
        return None
    height, width = struct.unpack(">HH", data[frame + 5 : frame + 9])
    return width, height


def _jpeg_markers(data: bytes) -> Iterator[tuple[int, int]]:
    """(code, place) of each marker up to the first scan, in order; none beyond MAX_MARKERS.

    ITU T.81, B.1.1 and B.2.2: markers are FF and a code, the segment's length behind most of them; SOFn holds the size.
    """
    at = 2
    for _ in range(MAX_MARKERS):
        at = data.find(b"\xff", at)
        if at < 0 or at + 1 >= len(data):
            return
        code = data[at + 1]
        if code in (0x00, 0x01, 0xFF) or 0xD0 <= code <= 0xD8:  # stuffing, or a marker without a segment
            at += 1 if code == 0xFF else 2
            continue
        yield code, at
        if code == SCAN:
            return
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def _has_one_scan(data: bytes) -> bool:
    """Whether a decoder stops after the first scan: it holds all components of a frame that is not progressive (B.2.3)."""
    frames, components = [], 0
    for code, at in _jpeg_markers(data):
        if code in FRAMES:
            frames.append(code)
            components = data[at + 9] if at + 9 < len(data) else 0
        elif code == SCAN:
            return frames in ([0xC0], [0xC1]) and data[at + 4 : at + 5] == bytes([components])
    return False


def _webp_dimensions(data: bytes) -> tuple[int, int] | None:
    """RFC 9649: the lossy, lossless and extended form keep the canvas in three different ways."""
    form = data[12:16]
    if form == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if form == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if form == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None


def _decode_jpeg(data: bytes, min_height: int, min_width: int, fast: bool) -> Pixels | None:
    """None where libjpeg-turbo refuses what OpenCV may still read. The least sides are of the file, before EXIF turns it."""
    try:
        _, _, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        if colorspace in ("CMYK", "YCCK"):
            image = _in_strips(simplejpeg.decode_jpeg(data, "CMYK", strict=False), _rgb_of_cmyk)
        else:
            image = simplejpeg.decode_jpeg(
                data, "RGB", fastupsample=fast, min_height=min_height, min_width=min_width, strict=False
            )
    except (ValueError, KeyError):  # KeyError: a colour space that simplejpeg has no name for
        return None
    return _upright(image, _exif_orientation(data))


def _decode_any(data: bytes, kind: str) -> Pixels:
    flags = cv2.IMREAD_UNCHANGED if kind in ("png", "webp", "tiff") else cv2.IMREAD_COLOR
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise PictureError(f"a {kind} of {len(data)} bytes that cannot be decoded: {error.err}.") from None
    if image is None:
        raise PictureError(f"a {kind} of {len(data)} bytes that cannot be decoded: it is damaged or cut off.")
    if image.dtype not in (np.uint8, np.uint16):
        raise PictureError(f"a {kind} with {image.dtype} values; 8 or 16 bits per channel are read.")
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
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _exif_orientation(data: bytes) -> int:
    """1 to 8; 1 where no EXIF block says otherwise. Looked for before the first scan, which is most of the file."""
    scan = next((at for code, at in _jpeg_markers(data) if code == SCAN), len(data))
    start = data.find(b"Exif\x00\x00", 0, min(scan, 65_536))
    if start < 0:
        return 1
    try:
        orientation = _ifd(data[start + 6 : start + 65_536]).get(0x0112, 1)
    except (struct.error, ValueError):
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _ifd(tiff: bytes) -> dict[int, int]:
    """The whole numbers of a TIFF's first directory, tag → value (TIFF 6.0, section 2). Raises ValueError, struct.error."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        raise ValueError("no TIFF")
    (offset,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, offset)
    found: dict[int, int] = {}
    seen = (
        set()
    )  # of a tag that comes twice the first counts, as for libtiff: the size must be the one that is unpacked
    for entry in range(min(count, 512)):
        at = offset + 2 + 12 * entry
        tag, kind = struct.unpack_from(order + "HH", tiff, at)
        if kind in (3, 4) and tag not in seen:  # SHORT and LONG; a single one stands in the entry itself
            (found[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), tiff, at + 8)
        seen.add(tag)
    return found
