"""Pictures of the planted worlds' items, drawn with Pillow at three times their size and scaled down."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mmllmrec.data.atelier.words import Vocabulary

Box = tuple[float, float, float, float]


def draw(vocabulary: Vocabulary, row: dict[str, int], rng: np.random.Generator, *, size: int = 64) -> Image.Image:
    """One item: its kind's silhouette, filled with its hue and pattern, before its backdrop. Place, scale and the
    pattern's phase vary and mean nothing."""
    big = 3 * size
    v = vocabulary
    ground = np.clip(np.array(v.ground) + rng.integers(-6, 7, 3), 0, 255)
    picture = Image.new("RGB", (big, big), tuple(int(c) for c in ground))
    pen = ImageDraw.Draw(picture)
    edge = 0.06 * big
    if v.backdrops[row["backdrop"]] == "round":
        pen.ellipse((edge, edge, big - edge, big - edge), fill=v.panel)
    else:
        pen.rectangle((edge, edge, big - edge, big - edge), fill=v.panel)
    side = int(big * rng.uniform(0.58, 0.68))
    left = int((big - side) / 2 + big * rng.uniform(-0.04, 0.04))
    top = int((big - side) / 2 + big * rng.uniform(-0.03, 0.05))
    shape = silhouette(v.kinds[row["kind"]], side)
    shadow = Image.new("L", (big, big), 0)
    shadow.paste(shape.point(lambda p: int(p * 0.28)), (left + big // 40, top + big // 30))
    picture.paste((60, 50, 45), (0, 0), shadow.filter(ImageFilter.BoxBlur(big / 60)))
    colour = np.clip(np.array(list(v.hues.values())[row["hue"]]) + rng.integers(-9, 10, 3), 0, 255)
    cloth = pattern(v.patterns[row["pattern"]], side, colour, float(rng.random()))
    picture.paste(cloth, (left, top), shape)
    return picture.resize((size, size), Image.Resampling.BOX)


def encode(picture: Image.Image) -> bytes:
    """PNG bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def pattern(name: str, side: int, colour: np.ndarray, phase: float) -> Image.Image:
    """A square of cloth: the colour, with lighter marks."""
    y, x = np.mgrid[0:side, 0:side] / side + phase / 5
    if name == "plain":
        marks = np.zeros((side, side), dtype=bool)
    elif name == "striped":
        marks = (y * 5) % 1 < 0.42
    elif name == "dotted":
        marks = ((x * 5) % 1 - 0.5) ** 2 + ((y * 5) % 1 - 0.5) ** 2 < 0.085
    elif name == "checked":
        marks = ((x * 4) % 1 < 0.5) ^ ((y * 4) % 1 < 0.5)
    elif name == "ringed":
        middle = 0.5 + phase / 5
        marks = (np.hypot(x - middle, y - middle) * 9) % 1 < 0.42
    elif name == "slanted":
        marks = ((x + y) * 4) % 1 < 0.42
    else:
        raise ValueError(f"unknown pattern {name!r}")
    light = colour + (255 - colour) * 0.72
    cloth = np.where(marks[..., None], light, colour).astype(np.uint8)
    return Image.fromarray(cloth)


@cache
def silhouette(kind: str, side: int) -> Image.Image:
    """The outline of a kind of thing, filled: (side, side) mask."""
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)

    def at(*points: float) -> list[float]:
        return [p * (side - 1) for p in points]

    def box(*points: float) -> None:
        pen.rectangle(at(*points), fill=255)

    def oval(*points: float) -> None:
        pen.ellipse(at(*points), fill=255)

    def shape(*points: float) -> None:
        pen.polygon(at(*points), fill=255)

    if kind == "vase":
        oval(0.2, 0.35, 0.8, 1.0)
        box(0.38, 0.08, 0.62, 0.5)
        box(0.3, 0.0, 0.7, 0.1)
    elif kind == "lamp":
        shape(0.3, 0.0, 0.7, 0.0, 0.95, 0.5, 0.05, 0.5)
        box(0.45, 0.5, 0.55, 0.9)
        box(0.25, 0.88, 0.75, 1.0)
    elif kind == "bowl":
        pen.pieslice(at(0.0, -0.2, 1.0, 0.9), 0, 180, fill=255)
        box(0.3, 0.85, 0.7, 0.98)
    elif kind == "clock":
        oval(0.05, 0.05, 0.95, 0.95)
        pen.line(at(0.5, 0.5, 0.5, 0.18), fill=0, width=max(side // 16, 1))
        pen.line(at(0.5, 0.5, 0.74, 0.6), fill=0, width=max(side // 16, 1))
    elif kind == "bag":
        shape(0.12, 0.38, 0.88, 0.38, 1.0, 1.0, 0.0, 1.0)
        pen.arc(at(0.26, 0.02, 0.74, 0.74), 180, 360, fill=255, width=max(side // 12, 1))
    elif kind == "chair":
        box(0.15, 0.0, 0.28, 1.0)
        box(0.15, 0.05, 0.5, 0.4)
        box(0.15, 0.5, 0.85, 0.64)
        box(0.72, 0.5, 0.85, 1.0)
    elif kind == "bottle":
        box(0.3, 0.36, 0.7, 1.0)
        shape(0.3, 0.38, 0.7, 0.38, 0.58, 0.2, 0.42, 0.2)
        box(0.42, 0.0, 0.58, 0.22)
    elif kind == "box":
        box(0.05, 0.4, 0.95, 1.0)
        shape(0.05, 0.36, 0.95, 0.36, 0.8, 0.14, 0.2, 0.14)
    elif kind == "cup":
        shape(0.1, 0.15, 0.75, 0.15, 0.66, 0.95, 0.2, 0.95)
        pen.arc(at(0.55, 0.25, 1.0, 0.7), -100, 110, fill=255, width=max(side // 11, 1))
    else:
        raise ValueError(f"unknown kind {kind!r}")
    return mask
