"""The outlines of the shapes, written down independently of the renderer."""

from __future__ import annotations

import math

Points = list[tuple[float, float]]


def outline(shape: str, x: float, y: float, r: float) -> Points:
    if shape == "circle":
        return ngon(x, y, 0.88 * r, 90, 0)
    if shape == "square":
        return ngon(x, y, r, 4, math.pi / 4)
    if shape == "triangle":
        return ngon(x, y, r, 3, -math.pi / 2)
    tips, notches = ngon(x, y, r, 5, -math.pi / 2), ngon(x, y, 0.42 * r, 5, -math.pi / 2 + math.pi / 5)
    return [point for pair in zip(tips, notches, strict=True) for point in pair]


def ngon(x: float, y: float, r: float, n: int, start: float) -> Points:
    turns = [start + 2 * math.pi * i / n for i in range(n)]
    return [(x + r * math.cos(t), y + r * math.sin(t)) for t in turns]
