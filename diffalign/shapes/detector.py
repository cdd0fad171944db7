"""The exact detector of the shapes world: what a verifiable GenEval reward reads off a picture.

Colour. A pixel of an anti-aliased object of colour c lies on the line background -> c, at the fraction of the pixel
that the object covers. Each pixel goes to the nearest of the six lines; its place there is the coverage, and its
distance from the line says how impure it is.

Shape. Area and centroid of a component's coverage fix centre and radius of each candidate, since all four shapes have
their centroid at the centre. The candidate's ideal coverage is then compared with the one seen: the score is the soft
intersection over union, sum min / sum max. Ideal coverage at any place, size and blur comes from one summed-area table
per shape: the mean over a box around each pixel is four look-ups.

What counts as clean is a matter of `MIN_IOU`. Accepted: sides 5 % apart, every corner rounded by a tenth of the radius,
squares with corners rounded up to a quarter of the side. Rejected: pentagons, ellipses of 1.2, rings, halves, and
whatever two objects make together. Orientation counts: a square on its corner or a triangle on its tip is none of this
world. A triangle cut parallel to a side is a smaller triangle, and passes.

A component of imperfect shape has shape "", one of mixed or foreign colour has color "", so that callers can punish
rubbish. Specks that cover less than `MIN_AREA` pixels are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from diffalign.shapes.world import BACKGROUND, COLORS, SHAPES, polygon

MIN_AREA = 12.0  # px of coverage
FOREGROUND = 70.0  # distance from the background in RGB; a pixel beyond it belongs to a component
COLOR_TOLERANCE = 36.0  # distance from a colour in RGB; the nearest two, orange and yellow, are 83 apart
RIM_TOLERANCE = 60.0  # likewise, where the outline takes part
PURITY = 0.85  # share of a component's pixels that must lie within the tolerance
MIN_IOU = {"circle": 0.94, "square": 0.91, "triangle": 0.89, "star": 0.84}  # blur eats corners, and a circle has none
MARGIN = 0.03  # over the second best shape

_NAMES = tuple(COLORS)
_LINES = np.array(list(COLORS.values()), np.float32) - np.array(BACKGROUND, np.float32)  # [6, 3]
_LENGTH = np.linalg.norm(_LINES, axis=1)
_UNIT = 240  # radius of the shape in its table, cells
_BLUR, _OTHER_BLURS = 2.2, np.array([1.0, 1.6, 3.0])  # px: widths of a box, the pixel itself being 1
_HALF = 256  # the table covers -_HALF .. _HALF around the centre


@dataclass(frozen=True)
class Detection:
    shape: str  # one of SHAPES, or "" when it is none of them clearly
    color: str  # one of COLORS, or "" when it is none of them purely
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in px
    score: float  # soft IoU with the best shape, in [0, 1]


@cache
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tables [4, 513, 513], areas [4] and boxes [4, 4] at radius 1; entry (i, j) of a table counts the cells of the
    shape above row i and left of column j."""
    tables, areas, boxes = [], [], []
    for shape in SHAPES:
        image = Image.new("L", (2 * _HALF, 2 * _HALF))
        draw = ImageDraw.Draw(image)
        if shape == "circle":
            r = 0.88 * _UNIT  # as the renderer draws it
            draw.ellipse((_HALF - r, _HALF - r, _HALF + r, _HALF + r), fill=1)
        else:
            draw.polygon(polygon(shape, _HALF, _HALF, _UNIT), fill=1)
        mask = np.asarray(image)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        tables.append(np.pad(mask.cumsum(0).cumsum(1), ((1, 0), (1, 0))))
        areas.append(mask.sum() / _UNIT**2)
        boxes.append((np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) - _HALF) / _UNIT)
    return np.stack(tables).astype(np.float32), np.array(areas), np.stack(boxes)


def _edges(n: int, centre: float, r: np.ndarray, blur: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Table positions [k, 2 n] where the boxes around n pixels begin, then where they end; and their lengths [k, n]."""
    cells = _UNIT / r[:, None]
    start = (np.arange(n) + 0.5 - centre - blur[:, None] / 2) * cells + _HALF
    at = np.rint(np.concatenate([start, start + blur[:, None] * cells], 1)).astype(np.intp)
    return np.minimum(np.maximum(at, 0), 2 * _HALF), at[:, n:] - at[:, :n]


def _ideal(shape: np.ndarray, size: tuple[int, int], x: float, y: float, r: np.ndarray, blur: np.ndarray) -> np.ndarray:
    """Coverage [k, height, width] by k shapes (indices) of centre (x, y) and radii r [k], averaged over boxes of
    `blur` [k] px."""
    height, width = size
    rows, tall = _edges(height, y, r, blur)
    columns, wide = _edges(width, x, r, blur)
    s = _templates()[0][shape[:, None, None], rows[:, :, None], columns[:, None]]
    s = s[:, height:] - s[:, :height]
    ideal: np.ndarray = (s[:, :, width:] - s[:, :, :width]) / (tall[:, :, None] * wide[:, None]).astype(np.float32)
    return ideal


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Soft intersection over union of a [h, w] with each of b [k, h, w]."""
    both = np.minimum(a, b).sum((1, 2))
    iou: np.ndarray = both / (a.sum() + b.sum((1, 2)) - both)
    return iou


def _lines(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For pixels less the background, d [n, 3]: coverage if of colour k, and distance from its line, both [n, 6]."""
    along = d @ (_LINES / _LENGTH[:, None]).T
    foot = np.minimum(np.maximum(along, 0), _LENGTH)
    off = (d * d).sum(1, keepdims=True) - (2 * along - foot) * foot
    return along / _LENGTH, np.sqrt(np.maximum(off, 0))


def _color(coverage: np.ndarray, off: np.ndarray, core: np.ndarray) -> str:
    """The pure colour of a component's pixels or "", from coverage [n, 6] and distance from the lines [n, 6].

    `core` [n] marks pixels off the outline, where colours bleed (in JPEG above all); those must be pure. The others
    may be farther off.
    """
    k = np.bincount(off[core].argmin(1), minlength=len(_NAMES)).argmax()
    strength = np.median(coverage[core, k])  # 1 for the colour itself, less when pale
    pure = (off[core, k] < COLOR_TOLERANCE).mean() >= PURITY and (off[:, k] < RIM_TOLERANCE).mean() >= PURITY
    return _NAMES[k] if pure and abs(strength - 1) * _LENGTH[k] < COLOR_TOLERANCE else ""


def _shape(a: np.ndarray) -> tuple[str, float, np.ndarray | None]:
    """The clean shape of a coverage map or "", the best soft IoU, and the fitted box in the map's pixels."""
    _, areas, boxes = _templates()
    area = a.sum()
    y = float(a.sum(1) @ (np.arange(a.shape[0]) + 0.5) / area)
    x = float(a.sum(0) @ (np.arange(a.shape[1]) + 0.5) / area)
    r = np.sqrt(area / areas)
    every = np.arange(len(SHAPES))
    scores = _iou(a, _ideal(every, a.shape, x, y, r, np.full(len(every), _BLUR)))
    best = int(scores.argmax())
    others = np.delete(scores, best).max()
    same = np.full(len(_OTHER_BLURS), best)
    score = max(scores[best], _iou(a, _ideal(same, a.shape, x, y, r[same], _OTHER_BLURS)).max())
    if score < MIN_IOU[SHAPES[best]] or score < others + MARGIN:
        return "", float(score), None
    return SHAPES[best], float(score), boxes[best] * r[best] + np.array([x, y, x, y])


def detect(image: np.ndarray) -> list[Detection]:
    """Objects of a picture uint8 [64, 64, 3], best first."""
    d = image.astype(np.float32) - np.array(BACKGROUND, np.float32)
    labels, _ = ndimage.label((d * d).sum(-1) > FOREGROUND**2, np.ones((3, 3)))
    rim = np.where(labels > 0, labels, ndimage.maximum_filter(labels, 5))  # the faint outer pixels belong to it too
    found = []
    for k, where in enumerate(ndimage.find_objects(labels), 1):
        y0, x0 = (max(s.start - 2, 0) for s in where)
        window = slice(y0, where[0].stop + 2), slice(x0, where[1].stop + 2)
        whole, inside = rim[window] == k, labels[window] == k
        coverage, off = _lines(d[window][whole])
        nearest = coverage[np.arange(len(off)), off.argmin(1)]
        solid = inside[whole]
        a = np.zeros(whole.shape, np.float32)
        a[whole] = (nearest / np.median(nearest[solid])).clip(0, 1)
        if a.sum() < MIN_AREA:
            continue
        shape, score, box = _shape(a)
        if box is None:
            box = np.array([where[1].start, where[0].start, where[1].stop, where[0].stop], float)
        else:
            box = box + np.array([x0, y0, x0, y0])
        core = ndimage.binary_erosion(inside, np.ones((3, 3)))[whole][solid]
        color = _color(coverage[solid], off[solid], core if core.sum() >= 6 else np.ones_like(core))
        found.append(Detection(shape, color, tuple(box.tolist()), score))
    return sorted(found, key=lambda d: -d.score)
