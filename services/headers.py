"""What the header of an encoded picture tells, before anything is unpacked: kind, size, orientation, how many scans."""

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

MAX_MARKERS = 10_000  # before a JPEG's first scan; a camera writes dozens, an attacker one in every two bytes
FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # markers SOFn of a JPEG (ITU T.81, table B.1)
SEQUENTIAL = frozenset({0xC0, 0xC1})  # baseline and extended, by Huffman's codes
LOSSLESS = frozenset({0xC3, 0xC7, 0xCB, 0xCF})
SCAN = 0xDA  # marker SOS
EXIF = b"Exif\0\0"
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
    """What a picture says of itself before EXIF turns it.

    orientation: 1 to 8 (EXIF 2.32, tag 0x0112). Of JPEGs only: channels: components of the frame, 4 for inks. one_scan: a
    decoder stops after the first. lossless: not made by a DCT, which is what decoders shrink by.
    """

    kind: str
    width: int
    height: int
    orientation: int = 1
    channels: int = 3
    one_scan: bool = True
    lossless: bool = False


def header(data: bytes) -> Header | None:
    """None where the first bytes announce no picture, or the header does not tell its size."""
    try:
        return READERS[sniff(data) or ""](data)
    except (ValueError, KeyError, struct.error):
        return None


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
    orientation = _orientation(data, _behind(EXIF, data, 0, min(scan, 65_536)))
    return Header("jpeg", width, height, orientation, channels, one_scan, lossless)


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


def _png(data: bytes) -> Header:
    """Its EXIF may stand before or behind the pixels (PNG, third edition, 11.3.3.6)."""
    width, height = struct.unpack_from(">II", data, 16)
    return Header("png", width, height, _orientation(data, _behind(b"eXIf", data)))


def _gif(data: bytes) -> Header:
    return Header("gif", *struct.unpack_from("<HH", data, 6))


def _bmp(data: bytes) -> Header:
    if data[14:18] == b"\x0c\0\0\0":  # the header of OS/2, whose sides are 16 bits long
        return Header("bmp", *struct.unpack_from("<HH", data, 18))
    width, height = struct.unpack_from("<ii", data, 18)
    return Header("bmp", abs(width), abs(height))  # negative: upside down


def _tiff(data: bytes) -> Header:
    tags = _ifd(data)
    return Header("tiff", tags[0x0100], tags[0x0101], _known(tags))


def _webp(data: bytes) -> Header:
    """RFC 9649: the lossy, lossless and extended form keep the canvas in three different ways; the last may have EXIF.

    Raises ValueError for another form.
    """
    form = data[12:16]
    if form == b"VP8X":
        sides = 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        exif = _behind(b"EXIF", data, 30) + 4  # the chunk's size
        return Header("webp", *sides, _orientation(data, exif + len(EXIF) * data.startswith(EXIF, exif)))
    if form == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("webp", width & 0x3FFF, height & 0x3FFF)
    if form == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header("webp", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    raise ValueError("another form")


def _behind(mark: bytes, data: bytes, start: int = 0, end: int | None = None) -> int:
    """Where the first mark ends, the end of the data where there is none."""
    found = data.find(mark, start, end)
    return found + len(mark) if found >= 0 else len(data)


def _orientation(data: bytes, start: int) -> int:
    """Of the TIFF directory that begins there, 1 where none does. Not read further than 64 kB: EXIF is never that large."""
    try:
        return _known(_ifd(data[start : start + 65_536]))
    except (struct.error, ValueError):
        return 1


def _known(tags: dict[int, int]) -> int:
    """The orientation that a directory tells, 1 for one that EXIF does not know."""
    return orientation if 1 <= (orientation := tags.get(0x0112, 1)) <= 8 else 1


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


READERS: dict[str, Callable[[bytes], Header]] = {
    "jpeg": _jpeg,
    "png": _png,
    "gif": _gif,
    "bmp": _bmp,
    "webp": _webp,
    "tiff": _tiff,
}
