"""The scenes of the shapes world drawn in other styles: what an adversarial reward may move a model towards.

outline: only the rims of the shapes are drawn, which the exact detector does not accept as shapes at all.
deep: darker colours. The detector still reads them, so that it can tell whether a model that has taken on this style
    still draws what the prompt asks for.
dusk: the same on a cool ground, which no sample of tiny-sd3 has.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from diffalign.shapes.prompts import scene
from diffalign.shapes.world import BACKGROUND, COLORS, SIZE, Object, polygon

RGB = tuple[int, int, int]

VARIATIONS = 8  # pictures of one prompt, as in Adv-GRPO
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Style:
    """How a scene is drawn; `stroke` is the width of the outlines in px, None fills the shapes."""

    ground: RGB
    colors: Mapping[str, RGB]
    stroke: float | None = None


_DARKER = {
    "red": (198, 30, 50),
    "green": (28, 148, 78),
    "blue": (40, 64, 200),
    "yellow": (226, 190, 44),
    "purple": (132, 48, 174),
    "orange": (220, 110, 24),
}
STYLES = {
    "outline": Style(BACKGROUND, COLORS, 3.0),
    "deep": Style(BACKGROUND, _DARKER),
    "dusk": Style((237, 239, 244), _DARKER),
}


def render(objects: Sequence[Object], style: Style) -> np.ndarray:
    """Objects -> uint8 [64, 64, 3], anti-aliased by area averaging."""
    k = _SUPERSAMPLE
    image = Image.new("RGB", (SIZE * k, SIZE * k), style.ground)
    draw = ImageDraw.Draw(image)
    for o in objects:
        _fill(draw, o, 1.0, style.colors[o.color])
        if style.stroke is not None:
            _fill(draw, o, max(1 - style.stroke / _inradius(o), 0.0), style.ground)
    return np.asarray(image.reduce(k))


def picture(style: str, metadata: Mapping[str, Any], number: int) -> np.ndarray:
    """Variation `number` of a prompt in GenEval's form: uint8 [64, 64, 3], a function of the arguments alone."""
    rng = random.Random(f"{style} {metadata['prompt']} {number}")
    return render(scene(rng, metadata["include"]), STYLES[style])


def _fill(draw: ImageDraw.ImageDraw, o: Object, scale: float, color: RGB) -> None:
    x, y, r = o.x * _SUPERSAMPLE, o.y * _SUPERSAMPLE, o.r * scale * _SUPERSAMPLE
    if o.shape == "circle":
        r *= 0.88  # as `world.render` draws it
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
    else:
        draw.polygon(polygon(o.shape, x, y, r), fill=color)


def _inradius(o: Object) -> float:
    """Distance from the centre to each side: shrinking a shape about its centre moves them all in alike."""
    if o.shape == "circle":
        return 0.88 * o.r
    (x0, y0), (x1, y1) = polygon(o.shape, 0.0, 0.0, o.r)[:2]
    return abs(x0 * y1 - x1 * y0) / math.hypot(x1 - x0, y1 - y0)
