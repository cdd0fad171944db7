"""What is drawn over a picture: its difference from another, the faults a reward sees, the words that it leaves out."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageChops

BRIGHTEST = 64  # difference of channel values, of 255, at which the map is brightest
SIDE = 192  # px of a difference map at most
MAP_SIDE = 32  # px to which a map of a reward is enlarged, smoothly; the page enlarges it further
STOPS = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
EDGES = (-7.0, -4.0, -2.0, -1.0, -0.3, -0.1)  # nats per token between the seven tones, the least likely first
GAIN_EDGES = (-1.0, -0.25, 0.0, 0.25, 1.0, 2.5)  # nats that the picture adds


@dataclass(frozen=True)
class Echo:
    """A prompt's tokens and for each a tone, 0 for the least expected of the picture to 6."""

    tokens: tuple[str, ...]
    tones: str
    edges: tuple[float, ...]


def colours(values: np.ndarray) -> np.ndarray:
    """[H, W] in [0, 1] -> [H, W, 3] uint8, from black over violet and orange to a pale yellow, brighter throughout."""
    at = np.linspace(0, 1, len(STOPS))
    channels = [np.interp(values, at, [stop[c] for stop in STOPS]) for c in range(3)]
    drawn: np.ndarray = np.stack(channels, axis=-1).round().astype(np.uint8)
    return drawn


TABLE = colours(np.arange(256) / 255)  # of all channel values


def difference(a: Image.Image, b: Image.Image, side: int = SIDE) -> Image.Image:
    """Map of mean_c |a - b| for RGB pictures of one size; neither side longer than `side`."""
    apart = ImageChops.difference(a, b).convert("L", matrix=(1 / 3, 1 / 3, 1 / 3, 0))
    if max(apart.size) > side:
        apart.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=1.0)
    scaled = np.minimum(np.arange(256) * (255 / BRIGHTEST), 255).astype(np.uint8)
    return Image.fromarray(TABLE[scaled[np.asarray(apart)]])


def heat(details: Mapping[str, Any]) -> np.ndarray | None:
    """The `map` [h][w] in [0, 1] that a reward gave of one picture, as colours of `MAP_SIDE` px; None: it gave none."""
    try:
        values = np.array(details.get("map"), dtype=np.float32)
    except (TypeError, ValueError):
        return None
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        return None
    smooth = Image.fromarray(np.clip(values, 0, 1)).resize((MAP_SIDE, MAP_SIDE), Image.Resampling.BILINEAR)
    return colours(np.asarray(smooth))


def echo(details: Mapping[str, Any], of: str) -> Echo | None:
    """`of` is log_probs or gain: how likely each token of the prompt is, or how much likelier the picture makes it."""
    tokens, values = details.get("tokens"), details.get(of)
    if not (isinstance(tokens, list) and isinstance(values, list)) or len(tokens) != len(values) or not tokens:
        return None
    if not all(isinstance(t, str) for t in tokens) or not all(isinstance(v, float | int) for v in values):
        return None
    edges = GAIN_EDGES if of == "gain" else EDGES
    return Echo(tuple(tokens), "".join(str(bisect_right(edges, value)) for value in values), edges)
