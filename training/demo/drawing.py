"""The demo's upstream pictures: glyphs in the fonts that matplotlib ships, and procedural textures. 40 × 40 pixels.

Everything a network must learn to ignore is drawn at random: colour, size, place, rotation, blur, low resolution, noise.
Clean, sharp glyphs alone teach nothing that transfers (measured), so nothing here is clean.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import cv2
import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE = 40
GLYPHS = [chr(code) for code in range(33, 127)]
FONTS = [
    *(
        f"DejaVu{family}{style}"
        for family in ("Sans", "SansMono")
        for style in ("", "-Bold", "-Oblique", "-BoldOblique")
    ),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    "cmtt10",
    "cmss10",
]
Picture = NDArray[np.uint8]
Rng = np.random.Generator


def glyph(character: str, font: str, rng: Rng) -> Picture:
    """One drawing of a character, uint8 [40, 40, 3]."""
    mask = _stroke(_mask(character, font), rng)
    scale = rng.uniform(0.75, 1.5) * SIDE / 64
    turn = cv2.getRotationMatrix2D((32, 32), rng.uniform(-18, 18), scale)
    turn[:, 2] += SIDE / 2 - 32 + rng.uniform(-4, 4, 2)
    turn[0, :2] *= rng.uniform(0.8, 1.2)
    coverage = cv2.warpAffine(mask, turn, (SIDE, SIDE), flags=cv2.INTER_AREA).astype(np.float32) / 255
    return _finish(_wobble(coverage, rng), 8, rng)


def texture(name: str, rng: Rng) -> Picture:
    """One drawing of a texture class, uint8 [40, 40, 3]."""
    angle, phase = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi, 2)
    zoom = rng.uniform(0.7, 1.4)
    y, x = (np.mgrid[:SIDE, :SIDE] - SIDE / 2).astype(np.float32) * zoom
    u, v = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    values = TEXTURES[name](u + phase[0] * 4, v + phase[1] * 4, rng)
    low, high = np.percentile(values, (2, 98))
    return _finish(np.clip((values - low) / max(high - low, 1e-6), 0, 1).astype(np.float32), 20, rng)


def _stroke(mask: Picture, rng: Rng) -> Picture:
    """The strokes of a glyph as they are, thinner or thicker, as pens are."""
    change = int(rng.integers(-1, 3))
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * abs(change) + 1, 2 * abs(change) + 1))
    return cv2.erode(mask, brush) if change < 0 else cv2.dilate(mask, brush)


def _wobble(coverage: NDArray[np.float32], rng: Rng) -> NDArray[np.float32]:
    """Bent by smooth random shifts of up to two pixels, as no hand writes a letter twice. Source: Simard et al., 2003."""
    shift = cv2.GaussianBlur(rng.normal(0, 1, (SIDE, SIDE, 2)).astype(np.float32), (0, 0), rng.uniform(4, 7))
    shift *= rng.uniform(0, 2.2) / max(float(shift.std()), 1e-6)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    return cv2.remap(coverage, x + shift[..., 0], y + shift[..., 1], cv2.INTER_LINEAR)


@lru_cache(maxsize=4096)
def _mask(character: str, font: str) -> Picture:
    path = Path(mpl.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    image = Image.new("L", (64, 64))
    face = ImageFont.truetype(str(path), 48)
    ImageDraw.Draw(image).text((32, 32), character, fill=255, font=face, anchor="mm")
    return np.asarray(image)


def _finish(coverage: NDArray[np.float32], coarsest: int, rng: Rng) -> Picture:
    """[40, 40] in [0, 1] → two colours, then low resolution (down to `coarsest`), blur, a change of light and noise."""
    ink, paper = _colours(rng)
    image = coverage[..., None] * ink + (1 - coverage[..., None]) * paper
    if rng.random() < 0.5:
        small = int(rng.integers(coarsest, 32))
        image = cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA)
        image = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.6))
    slope = np.linspace(-1, 1, SIDE, dtype=np.float32) * rng.uniform(-30, 30)
    image = image + (slope[:, None, None] if rng.random() < 0.5 else slope[None, :, None])
    image = image + rng.normal(0, rng.uniform(0, 20), image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def _colours(rng: Rng) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two colours [3] that can be told apart; in two of five pictures both are gray, as they often are at the tenants'."""
    gray = rng.random() < 0.4
    while True:
        ink, paper = rng.uniform(0, 255, (2, 1 if gray else 3)).astype(np.float32)
        if np.abs(ink - paper).mean() >= 60:
            return np.broadcast_to(ink, 3), np.broadcast_to(paper, 3)


def _noise(exponent: float) -> Callable[..., NDArray[np.float32]]:
    """Gaussian noise with the spectrum 1/f^exponent."""

    def draw(u: NDArray[np.float32], v: NDArray[np.float32], rng: Rng) -> NDArray[np.float32]:
        frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
        frequency[0, 0] = 1
        spectrum = np.fft.rfft2(rng.normal(size=(SIDE, SIDE))) / frequency**exponent
        return np.fft.irfft2(spectrum, s=(SIDE, SIDE)).astype(np.float32)

    return draw


def _cells(count: int, edges: bool) -> Callable[..., NDArray[np.float32]]:
    """Voronoi cells of `count` random points: a random gray per cell, or the distance to the cell's edge."""

    def draw(u: NDArray[np.float32], v: NDArray[np.float32], rng: Rng) -> NDArray[np.float32]:
        points = rng.uniform(0, SIDE, (count, 2))
        y, x = np.mgrid[:SIDE, :SIDE]
        distance = np.hypot(y[..., None] - points[:, 0], x[..., None] - points[:, 1])
        if not edges:
            return rng.random(count)[distance.argmin(-1)].astype(np.float32)
        nearest = np.partition(distance, 1, axis=-1)
        return np.minimum(nearest[..., 1] - nearest[..., 0], 2.0).astype(np.float32)

    return draw


def _bricks(width: float, height: float) -> Callable[..., NDArray[np.float32]]:
    def draw(u: NDArray[np.float32], v: NDArray[np.float32], rng: Rng) -> NDArray[np.float32]:
        row = np.floor(v / height)
        across, along = v % height, (u + (row % 2) * width / 2) % width
        tone = np.sin(row * 12.9 + np.floor((u + (row % 2) * width / 2) / width) * 78.2) * 0.25
        return np.where((across < 1.3) | (along < 1.3), 0.0, 0.75 + tone).astype(np.float32)

    return draw


def _strokes(length: float, width: float, count: int, spread: float) -> Callable[..., NDArray[np.float32]]:
    """Overlapping strokes, light on one edge, as grass, straw or hair. spread: of their directions, in radians."""

    def draw(u: NDArray[np.float32], v: NDArray[np.float32], rng: Rng) -> NDArray[np.float32]:
        canvas = np.full((2 * SIDE, 2 * SIDE), 0.1, np.float32)  # twice as large, so that edges come out soft
        main, zoom = rng.uniform(0, np.pi), rng.uniform(1.4, 3.2)
        for depth, start in enumerate(rng.uniform(-10, 2 * SIDE + 10, (int(count * 4 / zoom**2), 2))):
            angle, light = main + rng.normal(0, spread), rng.uniform(0.25, 0.6) + 0.3 * depth * zoom**2 / (4 * count)
            along = zoom * length * rng.uniform(0.5, 1.2) * np.array([np.cos(angle), np.sin(angle)])
            across = zoom * width * rng.uniform(0.6, 1.2) * np.array([-np.sin(angle), np.cos(angle)])
            blade = np.array([start - across, start + across, start + along])
            cv2.fillConvexPoly(canvas, blade.astype(np.int32), float(light), cv2.LINE_AA)
            cv2.line(
                canvas, blade[0].astype(int).tolist(), blade[2].astype(int).tolist(), float(light + 0.2), 1, cv2.LINE_AA
            )
        return cv2.resize(canvas, (SIDE, SIDE), interpolation=cv2.INTER_AREA)

    return draw


def _stones(size: float, corners: int, stretch: float) -> Callable[..., NDArray[np.float32]]:
    """Overlapping stones with a dark rim and light from one side, as gravel. corners: few for shards, many for pebbles."""

    def draw(u: NDArray[np.float32], v: NDArray[np.float32], rng: Rng) -> NDArray[np.float32]:
        canvas = np.full((2 * SIDE, 2 * SIDE), 0.05, np.float32)
        zoom, sun = rng.uniform(1.4, 3.2), rng.uniform(0, 2 * np.pi)
        for centre in rng.uniform(-5, 2 * SIDE + 5, (int(9_000 / (size * zoom) ** 2), 2)):
            turn, radius = rng.uniform(0, 2 * np.pi), zoom * size * rng.uniform(0.6, 1.2)
            angles = np.sort(rng.uniform(0, 2 * np.pi, corners)) if corners < 9 else np.linspace(0, 2 * np.pi, corners)
            outline = np.stack([np.cos(angles), np.sin(angles) * rng.uniform(1 / stretch, 1)], 1) * radius
            turned = outline @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
            light = rng.uniform(0.4, 0.85)
            cv2.fillConvexPoly(canvas, cv2.convexHull((centre + turned * 1.15).astype(np.int32)), 0.08, cv2.LINE_AA)
            cv2.fillConvexPoly(canvas, cv2.convexHull((centre + turned).astype(np.int32)), float(light), cv2.LINE_AA)
            lit = centre + turned * 0.55 + 0.25 * radius * np.array([np.cos(sun), np.sin(sun)])
            cv2.fillConvexPoly(canvas, cv2.convexHull(lit.astype(np.int32)), float(light + 0.12), cv2.LINE_AA)
        canvas += cv2.GaussianBlur(rng.normal(0, 0.12, canvas.shape).astype(np.float32), (0, 0), 0.8)
        return cv2.resize(canvas, (SIDE, SIDE), interpolation=cv2.INTER_AREA)

    return draw


def _dots(u: NDArray[np.float32], v: NDArray[np.float32], step: float) -> NDArray[np.float32]:
    return (np.hypot(u % step - step / 2, v % step - step / 2) < step * 0.3).astype(np.float32)


TEXTURES: dict[str, Callable[[NDArray[np.float32], NDArray[np.float32], Rng], NDArray[np.float32]]] = {
    "bricks-narrow": _bricks(8, 4.5),
    "bricks-wide": _bricks(15, 7),
    "cells-large": _cells(12, edges=False),
    "cells-small": _cells(60, edges=False),
    "checks-large": lambda u, v, rng: np.sign(np.sin(u / 2.4) * np.sin(v / 2.4)),
    "checks-small": lambda u, v, rng: np.sign(np.sin(u * 0.9) * np.sin(v * 0.9)),
    "cracks": _cells(14, edges=True),
    "dots-large": lambda u, v, rng: _dots(u, v, 10),
    "dots-small": lambda u, v, rng: _dots(u, v, 5),
    "fur": _strokes(7, 0.5, 320, 0.25),
    "grass": _strokes(14, 0.9, 150, 1.0),
    "gravel": _stones(5, 7, 1.6),
    "grating-coarse": lambda u, v, rng: np.sin(u / 2.2),
    "grating-fine": lambda u, v, rng: np.sin(u * 1.1),
    "marble": lambda u, v, rng: np.sin(u / 2.5 + 2.5 * cv2.GaussianBlur(_noise(1.5)(u, v, rng), (0, 0), 1) / 8),
    "noise-0": _noise(0),
    "noise-1": _noise(1),
    "noise-2": _noise(2),
    "hay": _strokes(22, 0.7, 120, 0.5),
    "leaves": _stones(6, 12, 4.0),
    "needles": _strokes(12, 0.5, 220, 2.0),
    "pebbles": _stones(4, 14, 1.3),
    "plaid": lambda u, v, rng: np.sin(u / 1.8) + np.sin(v / 1.8),
    "rays": lambda u, v, rng: np.sin(9 * np.arctan2(v, u)),
    "rings": lambda u, v, rng: np.sin(np.hypot(u, v) / 1.5),
    "sand": _stones(2.5, 6, 1.5),
    "shards": _stones(7, 3, 2.5),
    "spots": lambda u, v, rng: (_noise(1.6)(u, v, rng) > 0).astype(np.float32),
    "stubble": _strokes(5, 1.2, 260, 3.0),
    "weave": lambda u, v, rng: np.where(np.sin(u / 2) * np.sin(v / 2) > 0, np.sin(u * 1.5), np.sin(v * 1.5)),
}


def upstream_class(name: str, seed: int, count: int) -> Iterator[Picture]:
    """`count` pictures of one class: a texture by its name, a glyph as u<code point in hex>."""
    if name in TEXTURES:
        rng = np.random.default_rng((seed, sorted(TEXTURES).index(name), 1))
        for _ in range(count):
            yield texture(name, rng)
        return
    character = chr(int(name[1:], 16))
    fonts = [font for font in FONTS if font != "cmss10" or character.isalnum()]  # its punctuation is elsewhere
    rng = np.random.default_rng((seed, ord(character), 0))
    for number in range(count):
        yield glyph(character, fonts[number % len(fonts)], rng)


def upstream_classes() -> list[str]:
    """All classes; textures, which take ten times as long to draw as glyphs, come first."""
    return [*TEXTURES, *(f"u{ord(character):04x}" for character in GLYPHS)]
