"""The exact detector of the shapes world: what a verifiable GenEval reward reads off a picture.

Colour. A pixel of an anti-aliased object of colour c lies on the line background -> c, at the fraction of the pixel that
the object covers. Each pixel goes to the nearest of the six lines; its place there is the coverage, and its distance from
the line says how impure it is.

Shape. Area and centroid of a component's coverage fix centre and radius of each candidate, since all four shapes have
their centroid at the centre. The candidate's ideal coverage is then compared with the one seen: the score is the soft
intersection over union, sum min / sum max. Ideal coverage at any place, size and blur comes from one summed-area table
per shape: the mean over a box around each pixel is four look-ups.

A component of imperfect shape has shape "", one of mixed or foreign colour has color "", so that callers can punish
rubbish. Orientation counts: a square on its corner or a triangle on its tip is no square or triangle of this world.
Specks that cover less than `MIN_AREA` pixels are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from diffalign.shapes.world import BACKGROUND, COLORS, SHAPES, _polygon

MIN_AREA = 12.0  # px of coverage
FOREGROUND = 70.0  # distance from the background in RGB; a pixel beyond it belongs to a component
COLOR_TOLERANCE = 36.0  # distance from a colour in RGB; the nearest two, orange and yellow, are 83 apart
PURITY = 0.85  # share of a component's pixels that must lie within the tolerance
MIN_IOU = {"circle": 0.94, "square": 0.91, "triangle": 0.88, "star": 0.82}  # blur eats corners, and a circle has none
MARGIN = 0.03  # over the second best shape
WIDTHS = (1.0, 1.6, 2.2, 3.0)  # px; blur as the width of a box, the pixel itself being 1

_NAMES = tuple(COLORS)
_LINES = np.array(list(COLORS.values()), np.float32) - np.array(BACKGROUND, np.float32)  # [6, 3]
_LENGTH = np.linalg.norm(_LINES, axis=1)
_UNIT = 240  # radius of the shape in its table, cells
_HALF = 256  # the table covers -_HALF .. _HALF around the centre


@dataclass(frozen=True)
class Detection:
    shape: str  # one of SHAPES, or "" when it is none of them clearly
    color: str  # one of COLORS, or "" when it is none of them purely
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in px
    score: float  # soft IoU with the best shape, in [0, 1]


@dataclass(frozen=True)
class _Template:
    table: np.ndarray  # [2 _HALF + 1, 2 _HALF + 1]; [i, j] = cells of the shape above row i and left of column j
    area: float  # at radius 1
    box: np.ndarray  # x0, y0, x1, y1 at radius 1


@cache
def _template(shape: str) -> _Template:
    image = Image.new("L", (2 * _HALF, 2 * _HALF))
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        r = 0.88 * _UNIT
        draw.ellipse((_HALF - r, _HALF - r, _HALF + r, _HALF + r), fill=1)
    else:
        draw.polygon(_polygon(shape, _HALF, _HALF, _UNIT), fill=1)
    mask = np.asarray(image)
    table = np.pad(mask.cumsum(0).cumsum(1), ((1, 0), (1, 0))).astype(np.float32)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return _Template(table, mask.sum() / _UNIT**2, (box - _HALF) / _UNIT)


def _ideal(template: _Template, height: int, width: int, x: float, y: float, r: float, blur: float) -> np.ndarray:
    """Coverage [height, width] by the shape of centre (x, y) and radius r, averaged over boxes of `blur` px."""
    cells = _UNIT / r

    def edges(n: int, centre: float) -> tuple[np.ndarray, np.ndarray]:
        start = (np.arange(n) + 0.5 - centre - blur / 2) * cells + _HALF
        return np.rint(start).astype(int), np.rint(start + blur * cells).astype(int)

    (y0, y1), (x0, x1) = edges(height, y), edges(width, x)
    size = (y1 - y0)[:, None] * (x1 - x0)
    rows, columns = np.concatenate([y0, y1]).clip(0, 2 * _HALF), np.concatenate([x0, x1]).clip(0, 2 * _HALF)
    s = template.table[rows[:, None], columns]
    s = s[height:] - s[:height]
    return (s[:, width:] - s[:, :width]) / size


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    both = np.minimum(a, b).sum()
    return float(both / (a.sum() + b.sum() - both))


def _lines(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance from the background [64, 64]; coverage if of colour k, and distance from its line [64, 64, 6]."""
    d = image.astype(np.float32) - np.array(BACKGROUND, np.float32)
    square = (d * d).sum(-1)
    along = d @ (_LINES / _LENGTH[:, None]).T
    foot = along.clip(0, _LENGTH)
    off = np.sqrt((square[..., None] - 2 * along * foot + foot * foot).clip(0))
    return np.sqrt(square), along / _LENGTH, off


def _color(coverage: np.ndarray, off: np.ndarray) -> str:
    """The pure colour of a component's pixels, coverage [n, 6] and distance from the lines [n, 6], or ""."""
    k = np.bincount(off.argmin(1), minlength=len(_NAMES)).argmax()
    strength = np.median(coverage[:, k])  # 1 for the colour itself, less when pale
    pure = (off[:, k] < COLOR_TOLERANCE).mean() >= PURITY and abs(strength - 1) * _LENGTH[k] < COLOR_TOLERANCE
    return _NAMES[k] if pure else ""


def _shape(a: np.ndarray) -> tuple[str, float, np.ndarray | None]:
    """The clean shape of a coverage map or "", the best soft IoU, and the fitted box in the map's pixels."""
    area = a.sum()
    y = float(a.sum(1) @ (np.arange(a.shape[0]) + 0.5) / area)
    x = float(a.sum(0) @ (np.arange(a.shape[1]) + 0.5) / area)
    radii = {s: float(np.sqrt(area / _template(s).area)) for s in SHAPES}
    scores = {s: _iou(a, _ideal(_template(s), *a.shape, x, y, radii[s], WIDTHS[2])) for s in SHAPES}
    best = max(scores, key=scores.__getitem__)
    others = max(v for s, v in scores.items() if s != best)
    score = max(scores[best], *(_iou(a, _ideal(_template(best), *a.shape, x, y, radii[best], w)) for w in WIDTHS))
    if score < MIN_IOU[best] or score < others + MARGIN:
        return "", score, None
    return best, score, _template(best).box * radii[best] + np.array([x, y, x, y])


def detect(image: np.ndarray) -> list[Detection]:
    """Objects of a picture uint8 [64, 64, 3], best first."""
    distance, coverage, off = _lines(image)
    nearest = np.take_along_axis(coverage, off.argmin(-1)[..., None], -1)[..., 0]
    labels, _ = ndimage.label(distance > FOREGROUND, np.ones((3, 3)))
    rim = np.where(labels > 0, labels, ndimage.maximum_filter(labels, 5))  # the faint outer pixels belong to it too
    found = []
    for k, where in enumerate(ndimage.find_objects(labels), 1):
        inside = labels[where] == k
        y0, x0 = (max(s.start - 2, 0) for s in where)
        window = slice(y0, where[0].stop + 2), slice(x0, where[1].stop + 2)
        a = np.where(rim[window] == k, nearest[window], 0).clip(0, None)
        if a.sum() < MIN_AREA:
            continue
        a = (a / np.median(nearest[where][inside])).clip(0, 1)
        shape, score, box = _shape(a)
        if box is None:
            box = np.array([where[1].start, where[0].start, where[1].stop, where[0].stop], float)
        else:
            box = box + np.array([x0, y0, x0, y0])
        core = ndimage.binary_erosion(inside)  # colours bleed at the outline, in JPEG above all
        core = core if core.sum() >= 6 else inside
        found.append(Detection(shape, _color(coverage[where][core], off[where][core]), tuple(box.tolist()), score))
    return sorted(found, key=lambda d: -d.score)
