"""Decoding: every kind of picture, upright and in RGB; anything else is a clear error and never a crash."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from services.preprocess import (
    MAX_PIXELS,
    SCRATCH,
    STRIP_BYTES,
    PictureError,
    decode,
    header,
    pixels,
    resize,
    sniff,
    upright_size,
)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(width: int = 64, height: int = 48) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    stacked = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 90)], -1)
    return Image.fromarray(stacked.astype(np.uint8))


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return float(np.abs(a.astype(float) - b.astype(float)).mean()) < tolerance


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "gif", "webp", "jpeg"])
def test_every_kind_decodes_to_the_same_rgb(kind: str) -> None:
    data = saved(
        gradient(), kind, **({"lossless": True} if kind == "webp" else {"quality": 95} if kind == "jpeg" else {})
    )
    image = decode(data)
    assert image.shape == (48, 64, 3)
    assert close(image, np.asarray(gradient()), 6)
    assert sniff(data) == kind
    told = header(data)
    assert told is not None
    assert (told.kind, told.width, told.height) == (kind, 64, 48)


def test_pixels_are_a_square_of_uint8() -> None:
    made = pixels(saved(gradient(500, 375), "jpeg"), 128)
    assert (made.shape, made.dtype) == ((128, 128, 3), np.uint8)
    assert close(made, np.asarray(gradient(500, 375).resize((128, 128), Image.Resampling.BOX)), 4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("colours", ["RGB", "L", "RGBA"])
def test_exif_orientation_is_applied_as_pillow_does(colours: str, kind: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    image = gradient().convert(colours if kind != "jpeg" else "RGB")
    data = saved(image, kind, exif=exif, **{} if kind == "tiff" else {"quality": 95})
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert decode(data).shape == expected.shape
    assert close(decode(data), expected, 3)
    assert upright_size(data) == expected.shape[:2]


def test_the_orientation_of_a_tiff_is_known_where_its_tags_come_last() -> None:
    exif, noise = Image.Exif(), np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    exif[0x0112] = 6
    data = saved(Image.fromarray(noise), "tiff", exif=exif, compression="tiff_lzw")
    assert upright_size(data) == decode(data).shape[:2] == (500, 300)


def test_gray_palette_alpha_and_sixteen_bits_become_rgb() -> None:
    gray = gradient().convert("L")
    assert close(decode(saved(gray, "png")), np.asarray(gray.convert("RGB")), 1)
    palette = gradient().convert("P")
    assert close(decode(saved(palette, "png")), np.asarray(palette.convert("RGB")), 1)
    clear = gradient().convert("RGBA")
    clear.putalpha(0)
    for kind in ("png", "webp", "tiff", "gif"):
        assert (decode(saved(clear, kind)) == 255).all()  # transparent is white
    deep = (np.asarray(gray).astype(np.uint16) << 8) + 77
    encoded = cv2.imencode(".png", deep)[1].tobytes()
    assert close(decode(encoded), np.asarray(gray.convert("RGB")), 1)


def test_cmyk_jpeg_becomes_rgb() -> None:
    cmyk = gradient().convert("CMYK")
    assert close(decode(saved(cmyk, "jpeg", quality=95)), np.asarray(cmyk.convert("RGB")), 12)


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "0 bytes"), (b"<html>", "<html>"), (saved(gradient(), "png")[:60], "cannot be decoded")],
)
def test_what_is_no_picture_is_named(data: bytes, said: str) -> None:
    with pytest.raises(PictureError, match=said):
        decode(data)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    header = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">II", 60_000, 60_000) + b"\x08\x02\0\0\0"
    )
    with pytest.raises(PictureError, match=f"60000 × 60000 pixels; at most {MAX_PIXELS:,}"):
        decode(header)


@pytest.mark.parametrize(
    ("kind", "unusual"),
    [("jpeg", "sampling"), ("bmp", "header of OS/2"), ("bmp", "negative width"), ("tiff", "two widths")],
)
def test_a_bomb_whose_header_is_unusual_is_refused_too(kind: str, unusual: str) -> None:
    small = saved(gradient(300, 200), kind)
    if unusual == "sampling":  # factors that libjpeg reads and simplejpeg has no name for
        at = next(n for n in range(len(small)) if small[n : n + 2] == b"\xff\xc0")
        small = small[: at + 11] + b"\x31" + small[at + 12 :]
        with pytest.raises(ValueError, match="subsampling"):
            simplejpeg.decode_jpeg_header(small)
    elif unusual == "header of OS/2":
        core = struct.pack("<IHHHH", 12, 300, 0x9000, 1, 24)
        small = b"BM" + struct.pack("<IHHI", 0, 0, 0, 26) + core
    elif unusual == "negative width":
        small = small[:18] + struct.pack("<i", -300) + small[22:]
    else:
        entry = next(n for n in range(len(small)) if small[n : n + 8] == struct.pack("<HHI", 0x100, 4, 1))
        second = entry + 12
        small = small[:second] + small[entry : entry + 8] + struct.pack("<I", 1) + small[second + 12 :]
        small = small[: second + 12] + struct.pack("<HHII", 0x101, 4, 1, 200) + small[second + 24 :]
    told = header(small)
    assert told is not None
    assert told.width == 300
    with pytest.raises(PictureError, match=r"at most 50,000 pixels"):
        decode(small, max_pixels=50_000)


@pytest.mark.parametrize("data", [b"\xff\xd8\xff\xd9", b"GIF89a\x01", b"BM", b"II*\x00\x08\0\0\0\0\0"])
def test_a_picture_that_does_not_tell_its_size_is_refused(data: bytes) -> None:
    with pytest.raises(PictureError, match=rf"of {len(data)} bytes whose header does not tell its size"):
        decode(data)


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    """Each scan goes over all pixels: a small file that takes minutes."""
    whole = saved(gradient(), "jpeg", progressive=True)
    assert decode(whole).shape[2] == 3
    last = whole.rindex(b"\xff\xda")
    scan, end = whole[last:-2], whole[-2:]
    with pytest.raises(PictureError, match=r"a jpeg of 10\d\d scans; at most 50"):
        decode(whole[:-2] + 1000 * scan + end)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["png", "jpeg", "webp", "bmp", "gif"]), st.data())
def test_damaged_pictures_never_crash(kind: str, data: st.DataObject) -> None:
    whole = bytearray(saved(gradient(24, 24), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with contextlib.suppress(PictureError):
        assert pixels(cut, 16).shape == (16, 16, 3)


SEGMENTS = st.sampled_from(
    [b"", b"\xff", b"\0\0", b"\0\1", b"\0\3\7", b"\0\x0b\x08\0\x09\0\x09\1\1\x11\0"]  # the last one: a frame of 9 × 9
)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(["RGB", "L", "CMYK"]), st.booleans(), st.data())
def test_a_header_tells_what_libjpeg_reads(colours: str, progressive: bool, data: st.DataObject) -> None:
    """A picture whose size were told smaller than it is would pass the limit and fill the memory."""
    made = saved(gradient().convert(colours), "jpeg", progressive=progressive)
    scan = made.index(b"\xff\xda")
    codes = st.sampled_from(b"\0\1\xff\xc0\xc2\xc4\xd0\xd8\xe1\xfe") | st.integers(0, 255)
    places = st.sampled_from([n for n in range(3, scan + 1) if made[n] == 0xFF]) | st.integers(3, scan + 4)
    for _ in range(data.draw(st.integers(1, 4))):
        at, code = data.draw(places), data.draw(codes)
        made = made[:at] + b"\xff" + bytes([code]) + data.draw(SEGMENTS) + made[at + data.draw(st.integers(0, 3)) :]
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(made, strict=False)
    except (ValueError, KeyError):
        return
    told = header(made)
    assert told is not None
    assert (told.width, told.height, told.channels == 4) == (width, height, space in ("CMYK", "YCCK"))


def segment(code: int, data: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", len(data) + 2) + data


def lossless(width: int, height: int) -> bytes:
    """A gray area in three colours, each difference to the pixel before coded as 0 (ITU T.81, annex H)."""
    frame = struct.pack(">BHHB", 8, height, width, 3) + b"".join(bytes([n, 0x11, 0]) for n in (1, 2, 3))
    codes = bytes([0, 0, 0, 0, 12, *[0] * 12, *range(12)])
    first = bytes([3, 1, 0, 2, 0, 3, 0, 1, 0, 0])
    body = segment(0xC3, frame) + segment(0xC4, codes) + segment(0xDA, first) + bytes(-(-width * height * 3 // 2))
    return b"\xff\xd8" + body + b"\xff\xd9"


LOSSLESS = """
import sys
from services.preprocess import PictureError, decode, pixels
data = open(sys.argv[1], "rb").read()
for picture in (data, data[:600]):
    for read in (lambda: pixels(picture, 224), lambda: decode(picture, 64), lambda: decode(picture, shrink=4)):
        try:
            print(read().mean())
        except PictureError as error:
            print(error)
"""


@pytest.mark.parametrize("side", [300, 1300])
def test_a_lossless_jpeg_stays_within_its_memory(side: int, tmp_path: Path) -> None:
    """It cannot be decoded at a reduced size; libjpeg-turbo wrote it whole into memory of the reduced one."""
    (tmp_path / "picture").write_bytes(lossless(side, side))
    command = [sys.executable, "-c", LOSSLESS, str(tmp_path / "picture")]
    done = subprocess.run(command, env=os.environ | {"MALLOC_CHECK_": "3"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:3] == ["128.0"] * 3


def quarter_high(height: int, width: int) -> bytes:
    """A JPEG whose colours are kept at a quarter of the height: simplejpeg's reading of the header has no name for that."""
    data = bytearray(saved(gradient(width, height), "jpeg", subsampling=0))
    at = data.index(b"\xff\xc0")
    data[at + 11] = 0x14
    return bytes(data)


@pytest.mark.parametrize("size", [(160, 120), (1600, 1200)], ids=["small", "larger than the memory kept"])
def test_an_unusual_sampling_decodes_alike_at_every_size(size: tuple[int, int]) -> None:
    data = quarter_high(*size)
    with pytest.raises(KeyError):
        simplejpeg.decode_jpeg_header(data)
    reduced = decode(data, 64)
    assert min(reduced.shape[:2]) < min(size)
    np.testing.assert_array_equal(pixels(data, 64), resize(reduced, 64))


def test_decoding_a_small_jpeg_for_a_small_size_keeps_enough_pixels(picture: Callable[..., bytes]) -> None:
    image = decode(picture(800, 600, ".jpg"), 128)
    assert min(image.shape[:2]) >= 128
    assert image.shape[0] < 600


def test_a_jpeg_can_be_had_at_a_half_a_quarter_and_an_eighth() -> None:
    whole, exif = saved(gradient(500, 375), "jpeg"), Image.Exif()
    exif[0x0112] = 6
    turned = saved(gradient(375, 500), "jpeg", exif=exif)
    for data in (whole, turned):
        assert upright_size(data) == decode(data).shape[:2] == (375, 500)
        assert [decode(data, shrink=shrink).shape[:2] for shrink in (2, 4, 8)] == [(188, 250), (94, 125), (47, 63)]
    assert close(decode(whole, shrink=2), np.asarray(gradient(250, 188)), 5)


@pytest.mark.parametrize("first", [b"\x01", b"\x03"], ids=["a component", "all components"])
def test_scans_count_wherever_a_decoder_goes_on_after_the_first(first: bytes) -> None:
    """A baseline JPEG whose first scan holds one component of three is unpacked scan by scan, as a progressive one."""
    whole = saved(gradient(), "jpeg")
    at = whole.index(b"\xff\xda")
    bomb = whole[: at + 4] + first + whole[at + 5 : -2] + 1000 * whole[at:-2] + whole[-2:]
    if first == b"\x03":
        assert decode(bomb).shape == (48, 64, 3)  # all after the first scan is ignored
    else:
        with pytest.raises(PictureError, match="a jpeg of 1001 scans"):
            decode(bomb)


@pytest.mark.parametrize("filling", [b"\xff", b"\xff\x00", b"\xff\xe1\x00\x02"], ids=["fill", "stuffing", "segments"])
def test_millions_of_markers_take_no_time(filling: bytes) -> None:
    whole = saved(gradient(), "jpeg", progressive=True)
    last = whole.rindex(b"\xff\xda")
    bomb = whole[:2] + filling * (4_000_000 // len(filling)) + whole[2:-2] + 1000 * whole[last:-2] + whole[-2:]
    began = time.process_time()
    with pytest.raises(PictureError):
        decode(bomb)
    assert time.process_time() - began < 0.2


def cmyk_and_its_rgb() -> tuple[bytes, np.ndarray]:
    data = saved(gradient(1500, 2000).convert("CMYK"), "jpeg", quality=95)
    ink = simplejpeg.decode_jpeg(data, "CMYK").astype(np.uint16)
    return data, ink[..., :3] * ink[..., 3:] // 255


def clear_and_its_rgb() -> tuple[bytes, np.ndarray]:
    deep = np.zeros((2000, 1500, 4), np.uint16)
    deep[...] = np.arange(2000)[:, None, None] * 32 + np.array([5, 600, 7000, 300])
    narrow = deep >> 8
    bgr = (narrow[..., :3] * narrow[..., 3:] + 255 * (255 - narrow[..., 3:])) // 255
    return cv2.imencode(".png", deep)[1].tobytes(), bgr[..., ::-1]


@pytest.mark.parametrize("drawn", [cmyk_and_its_rgb, clear_and_its_rgb])
def test_colours_are_computed_in_little_more_memory_than_the_picture(
    drawn: Callable[[], tuple[bytes, np.ndarray]],
) -> None:
    data, expected = drawn()
    unpacked = 2000 * 1500 * (4 if drawn is cmyk_and_its_rgb else 8)
    tracemalloc.start()
    try:
        made = decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(made, expected)
    assert peak < unpacked + made.nbytes + 6 * STRIP_BYTES


def test_memory_that_is_used_again_shows_nothing_of_the_picture_before() -> None:
    """Of a JPEG that is cut off or damaged, too, every pixel is its own: the picture before may be another tenant's."""
    whole, rng = saved(gradient(300, 200), "jpeg", quality=90), np.random.default_rng(0)
    progressive = saved(gradient(300, 200), "jpeg", quality=90, progressive=True)
    for data in (whole, progressive):
        cuts = [data[: int(n)] for n in rng.integers(200, len(data), 60)]
        for at in rng.integers(200, len(data), 60):
            cuts.append(data[:at] + bytes(rng.integers(0, 256, 8, dtype=np.uint8)) + data[at + 8 :])
        for damaged in cuts:
            seen = []
            for before in (0, 255):
                SCRATCH.memory[:] = before
                with contextlib.suppress(PictureError):
                    seen.append(pixels(damaged, 64))
            assert len(seen) in (0, 2)
            assert all(np.array_equal(one, seen[0]) for one in seen)


PERTURBED = """
import contextlib, sys, zlib
from pathlib import Path
from services.preprocess import PictureError, decode
for file in sorted(Path(sys.argv[1]).iterdir()):
    with contextlib.suppress(PictureError):
        print(file.name, zlib.crc32(decode(file.read_bytes()).tobytes()))
"""


def test_new_memory_shows_nothing_either(tmp_path: Path) -> None:
    """Of explanations, whose overlay is the picture itself: the same whatever malloc's memory was filled with."""
    whole, rng = saved(gradient(300, 200), "jpeg", quality=90, progressive=True), np.random.default_rng(1)
    for number, at in enumerate(rng.integers(200, len(whole), 120)):
        noise = bytes(rng.integers(0, 256, 8, dtype=np.uint8))
        (tmp_path / f"{number:03d}").write_bytes(whole[:at] + noise + whole[at + 8 :])

    def decoded(perturb: str) -> str:
        command = [sys.executable, "-c", PERTURBED, str(tmp_path)]
        environ = os.environ | {"MALLOC_PERTURB_": perturb, "MALLOC_MMAP_MAX_": "0"}
        return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout

    assert decoded("1") == decoded("200") != ""


def test_a_picture_is_its_own_also_when_nothing_is_resized() -> None:
    first, second = (saved(Image.new("RGB", (64, 64), colour), "jpeg") for colour in ("white", "black"))
    made = pixels(first, 64)
    pixels(second, 64)
    assert made.min() > 250


def test_pictures_are_written_where_they_are_wanted() -> None:
    batch = np.zeros((3, 128, 128, 3), np.uint8)
    for size, row in ((500, batch[0]), (128, batch[1])):
        data = saved(gradient(size, size), "jpeg")
        assert np.shares_memory(pixels(data, 128, into=row), batch)
        assert np.array_equal(row, pixels(data, 128))
    assert not batch[2].any()
