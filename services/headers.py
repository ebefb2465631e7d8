"""What the header of an encoded picture tells, before anything is unpacked: kind, size, orientation, how many scans."""

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

MAX_MARKERS = 10_000  # before a JPEG's first scan; a camera writes dozens, an attacker one in every two bytes
FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # markers SOFn of a JPEG (ITU T.81, table B.1)
SEQUENTIAL = frozenset({0xC0, 0xC1})  # baseline and extended, by Huffman's codes
LOSSLESS = frozenset({0xC3, 0xC7, 0xCB, 0xCF})
SCAN = 0xDA  # marker SOS
SIGNATURES = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\x00": "tiff",
    b"MM\x00*": "tiff",
}


def sniff(data: bytes) -> str | None:
    """The kind of picture that the first bytes announce, None where they announce none."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((kind for signature, kind in SIGNATURES.items() if data.startswith(signature)), None)


class Header(NamedTuple):
    """What a picture says of itself before EXIF turns it. All but kind, width and height are told of JPEGs only.

    channels: components of the frame, 4 for inks. one_scan: a decoder stops after the first. lossless: not made by a DCT, which
    is what decoders shrink by. orientation: 1 to 8 (EXIF 2.32, tag 0x0112), 1 where nothing says otherwise.
    """

    kind: str
    width: int
    height: int
    channels: int = 3
    one_scan: bool = True
    lossless: bool = False
    orientation: int = 1


def header(data: bytes) -> Header | None:
    """None where the first bytes announce no picture, or the header does not tell its size."""
    kind = sniff(data)
    try:
        if kind == "jpeg":
            return _jpeg(data)
        size = SIZES[kind](data) if kind else None
    except (ValueError, KeyError, struct.error):
        return None
    return Header(kind, *size) if kind and size else None


def _jpeg(data: bytes) -> Header:
    """By the markers up to the first scan. Raises ValueError where no frame stands before it, struct.error where that is cut off.

    A decoder stops after a scan that holds all components of a frame that is not progressive (ITU T.81, B.2.3).
    """
    frames, scan = [], len(data)
    for code, at in _jpeg_markers(data):
        if code in FRAMES:
            frames.append((code, at))
        elif code == SCAN:
            scan = at
    if not frames:
        raise ValueError("no frame")
    code, at = frames[0]
    height, width, channels = struct.unpack_from(">HHB", data, at + 5)
    one_scan = len(frames) == 1 and code in SEQUENTIAL and data[scan + 4 : scan + 5] == bytes([channels])
    lossless = any(code in LOSSLESS for code, _ in frames)
    return Header("jpeg", width, height, channels, one_scan, lossless, _orientation(data, scan))


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


def _orientation(data: bytes, scan: int) -> int:
    """By the first EXIF block within 64 kB and before the scan: the scan is most of the file, and EXIF never that large."""
    start = data.find(b"Exif\x00\x00", 0, min(scan, 65_536))
    if start < 0:
        return 1
    try:
        orientation = _ifd(data[start + 6 : start + 65_536]).get(0x0112, 1)
    except (struct.error, ValueError):
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _png(data: bytes) -> tuple[int, int]:
    return struct.unpack_from(">II", data, 16)


def _gif(data: bytes) -> tuple[int, int]:
    return struct.unpack_from("<HH", data, 6)


def _bmp(data: bytes) -> tuple[int, int]:
    if data[14:18] == b"\x0c\0\0\0":  # the header of OS/2, whose sides are 16 bits long
        return struct.unpack_from("<HH", data, 18)
    width, height = struct.unpack_from("<ii", data, 18)
    return abs(width), abs(height)  # negative: upside down


def _tiff(data: bytes) -> tuple[int, int]:
    tags = _ifd(data)
    return tags[0x0100], tags[0x0101]


def _webp(data: bytes) -> tuple[int, int] | None:
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


SIZES: dict[str, Callable[[bytes], tuple[int, int] | None]] = {
    "png": _png,
    "gif": _gif,
    "bmp": _bmp,
    "webp": _webp,
    "tiff": _tiff,
}
