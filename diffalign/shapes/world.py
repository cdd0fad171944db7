"""Scenes of flat shapes and their anti-aliased 64x64 pictures."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
BACKGROUND = (245, 243, 238)
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (245, 210, 40),
    "purple": (150, 60, 190),
    "orange": (242, 128, 25),
}
SHAPES = ("circle", "square", "triangle", "star")
RELATIONS = ("left of", "right of", "above", "below")
RADIUS = {1: (11.0, 20.0), 2: (9.0, 13.5), 3: (8.0, 11.0), 4: (7.5, 9.5)}  # by number of objects; px
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Object:
    shape: str
    color: str
    x: float  # centre of the circumscribed circle, px from the left
    y: float  # px from the top
    r: float  # its radius, px


def polygon(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    if shape == "square":
        k = r * math.sqrt(0.5)
        return [(x - k, y - k), (x + k, y - k), (x + k, y + k), (x - k, y + k)]
    corners, inner = (3, None) if shape == "triangle" else (5, 0.42)
    points = []
    for i in range(corners):
        for offset, radius in ((0.0, r), (0.5, r * inner if inner else None)):
            if radius is not None:
                a = 2 * math.pi * (i + offset) / corners - math.pi / 2
                points.append((x + radius * math.cos(a), y + radius * math.sin(a)))
    return points


def render(objects: Sequence[Object]) -> np.ndarray:
    """Objects -> uint8 [64, 64, 3], anti-aliased by area averaging."""
    k = _SUPERSAMPLE
    image = Image.new("RGB", (SIZE * k, SIZE * k), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for o in objects:
        x, y, r = o.x * k, o.y * k, o.r * k
        if o.shape == "circle":
            r *= 0.88  # about the area of the other shapes of this radius
            draw.ellipse((x - r, y - r, x + r, y + r), fill=COLORS[o.color])
        else:
            draw.polygon(polygon(o.shape, x, y, r), fill=COLORS[o.color])
    return np.asarray(image.reduce(k))


def place(rng: random.Random, n: int, relation: str | None = None) -> list[tuple[float, float, float]]:
    """n non-overlapping (x, y, r); with two objects, `relation` is that of the first to the second."""
    while True:
        spots: list[tuple[float, float, float]] = []
        for _ in range(n * 30):
            r = rng.uniform(*RADIUS[n])
            x, y = rng.uniform(r + 1, SIZE - r - 1), rng.uniform(r + 1, SIZE - r - 1)
            if all(math.hypot(x - a, y - b) > r + c + 2 for a, b, c in spots):
                spots.append((x, y, r))
            if len(spots) == n:
                break
        if len(spots) == n and (relation is None or _holds(relation, spots)):
            return spots


def _holds(relation: str, spots: list[tuple[float, float, float]]) -> bool:
    (x1, y1, _), (x2, y2, _) = spots
    dx, dy = x2 - x1, y2 - y1
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > abs(across) + 4  # clearly so, not on the diagonal
