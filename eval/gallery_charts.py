"""Charts of an evaluation as inline SVG. Contestant k has the CSS class c{k} and the k-th symbol."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from diffalign.eval.charts import tick_labels, ticks
from diffalign.eval.gallery_tables import counted

STYLES = 8  # colours and symbols; a ninth contestant gets the first again, and every mark has its name beside it
SYMBOLS = (  # paths around the origin, of equal weight to the eye
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "M-4 -4h8v8h-8z",
    "M0 -5.2L5 3.8H-5z",
    "M0 -5.6L5.6 0L0 5.6L-5.6 0z",
    "M0 5.2L5 -3.8H-5z",
    "M-1.7 -5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
    "M0 -5.8L1.6 -1.9L5.6 -1.6L2.5 1L3.5 5L0 2.8L-3.5 5L-2.5 1L-5.6 -1.6L-1.6 -1.9z",
    "M-5 -2.4L0 -5.2L5 -2.4V2.4L0 5.2L-5 2.4z",
)
NINETY_FIVE = math.sqrt(5.991)  # radius of the 95 % ellipse of a Gaussian in two dimensions, in deviations


def symbol(k: int, x: float = 0.0, y: float = 0.0, style: str = "") -> Markup:
    place = f' transform="translate({x:.1f} {y:.1f})"' if x or y else ""
    return Markup(f'<path class="mark c{k % STYLES} {style}" d="{SYMBOLS[k % len(SYMBOLS)]}"{place}/>')


def key(k: int) -> Markup:
    """The symbol of contestant k, as big as text."""
    return Markup(f'<svg class="key" viewBox="-7 -7 14 14" aria-hidden="true">{symbol(k)}</svg>')


def scale(values: Sequence[float], about: int = 4) -> tuple[list[float], list[str]]:
    """Round ticks that enclose the values, and their labels."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-6):
        room = max(abs(low), 1e-6) * 0.05
        low, high = low - room, high + room
    places = ticks(low, high, about)
    return places, tick_labels(places)


def rows(
    names: Sequence[str], values: Sequence[float], about: int, middle: float, width: int, label: str
) -> tuple[list[str], Callable[[float], float], list[float]]:
    """The frame of a chart with a row a name around a line at `middle`: (its opening, value -> x, y of each row)."""
    places, labels = scale(values, about)
    left, step, foot = 14 + 7.2 * max(map(len, names)), 25, 28
    height = step * len(names) + foot
    end = height - foot + 5

    def px(v: float) -> float:
        return left + (v - places[0]) / (places[-1] - places[0]) * (width - left - 16)

    parts = [_open(width, height, label)]
    for v, text in zip(places, labels, strict=True):
        parts.append(f'<line class="grid" x1="{px(v):.1f}" x2="{px(v):.1f}" y1="0" y2="{end}"/>')
        parts.append(_text(px(v), height - 7, text, "middle"))
    parts.append(f'<line class="reference" x1="{px(middle):.1f}" x2="{px(middle):.1f}" y1="0" y2="{end}"/>')
    ys = [step * i + 14.0 for i in range(len(names))]
    parts += [_text(left - 8, y + 4, name, "end") for name, y in zip(names, ys, strict=True)]
    return parts, px, ys


def strengths(found: Sequence[Mapping[str, Any]], order: Sequence[str], label: str) -> Markup:
    """Bars of Elo from 1000 on, the strength of the average contestant, with their intervals; best first."""
    known = sorted((row for row in found if row["elo"] is not None), key=lambda row: -row["elo"])
    if not known:
        return Markup("")
    every = [v for row in known for v in (row["elo"], row["elo_low"], row["elo_high"], 1000.0) if v is not None]
    parts, px, ys = rows([row["name"] for row in known], every, 5, 1000.0, 400, label)
    for row, y in zip(known, ys, strict=True):
        k = order.index(row["name"])
        x0, x1 = sorted((px(1000), px(row["elo"])))
        parts.append(f'<rect class="bar c{k % STYLES}" x="{x0:.1f}" y="{y - 6}" width="{x1 - x0:.1f}" height="12"/>')
        if row["elo_low"] is not None:
            a, b = px(row["elo_low"]), px(row["elo_high"])
            parts.append(f'<path class="whisk" d="M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 4}v8M{b:.1f} {y - 4}v8"/>')
        parts.append(symbol(k, px(row["elo"]), y, "edged"))
    return Markup("".join(parts) + "</svg>")


def scatter(pair: Mapping[str, Any], order: Sequence[str], lines: Sequence[Sequence[str]], label: str) -> Markup:
    """Contestants by two means with 95 % ellipses; steps along those that nobody beats on both."""
    points = {p["name"]: p for p in pair["points"]}
    if not points:
        return Markup("")
    reach = {
        n: [NINETY_FIVE * math.sqrt(max(0.0, p["covariance"][i][i] or 0.0)) for i in (0, 1)] for n, p in points.items()
    }
    spans = [[p["at"][i] + s * reach[n][i] for n, p in points.items() for s in (-1, 1)] for i in (0, 1)]
    (xs, x_labels), (ys, y_labels) = scale(spans[0], 5), scale(spans[1], 5)
    width, height, bottom = 540, 400, 44
    left = 22 + 7 * max(map(len, y_labels))

    def px(x: float) -> float:
        return left + (x - xs[0]) / (xs[-1] - xs[0]) * (width - left - 14)

    def py(y: float) -> float:
        return height - bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (height - bottom - 12)

    parts = [_open(width, height, label, "scatter")]
    for x, text in zip(xs, x_labels, strict=True):
        parts.append(f'<line class="grid" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="12" y2="{height - bottom}"/>')
        parts.append(_text(px(x), height - bottom + 17, text, "middle"))
    for y, text in zip(ys, y_labels, strict=True):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 14}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(_text(left - 7, py(y) + 4, text, "end"))
    parts.append(_text(width - 14, height - 6, pair["x"], "end", "name"))
    parts.append(
        f'<text class="tick name" transform="translate(11 12) rotate(-90)" text-anchor="end">{escape(pair["y"])}</text>'
    )
    for name, p in points.items():
        parts.append(_ellipse(p, order.index(name), (px, py), reach[name]))
    parts.append(_front([(p["at"][0], p["at"][1]) for p in points.values() if p["front"]], px, py, (xs[0], ys[0])))
    for line in lines:
        path = [f"{px(points[n]['at'][0]):.1f} {py(points[n]['at'][1]):.1f}" for n in line if n in points]
        parts.append(f'<path class="training" d="M{"L".join(path)}"/>' if len(path) > 1 else "")
    taken: list[tuple[float, float]] = []
    for name, p in points.items():
        x, y = px(p["at"][0]), py(p["at"][1])
        parts.append(symbol(order.index(name), x, y, "edged"))
        end = x > width - 20 - 7.2 * len(name)
        down = next((d for d in (-9, 17, -22, 30) if all(abs(y + d - b) > 12 or abs(x - a) > 90 for a, b in taken)), -9)
        taken.append((x, y + down))
        parts.append(_text(x + (-8 if end else 8), y + down, name, "end" if end else "start", "name"))
    return Markup("".join(parts) + "</svg>")


def _ellipse(point: Mapping[str, Any], k: int, to: tuple[Any, Any], reach: Sequence[float]) -> str:
    """The 95 % ellipse as a polygon, since the axes are scaled differently."""
    if not all(reach):
        return ""
    covariance = np.array(point["covariance"], dtype=np.float64)
    values, vectors = np.linalg.eigh(covariance)
    angle = np.linspace(0, 2 * np.pi, 49)[:-1]
    circle = np.stack([np.cos(angle), np.sin(angle)])
    edge = np.array(point["at"])[:, None] + NINETY_FIVE * (vectors * np.sqrt(np.maximum(values, 0))) @ circle
    path = "L".join(f"{to[0](x):.1f} {to[1](y):.1f}" for x, y in edge.T)
    return f'<path class="ellipse c{k % STYLES}" d="M{path}z"/>'


def _front(points: Sequence[tuple[float, float]], px: Any, py: Any, corner: tuple[float, float]) -> str:
    if not points:
        return ""
    ordered = sorted(points)
    path = f"M{px(corner[0]):.1f} {py(ordered[0][1]):.1f}H{px(ordered[0][0]):.1f}"
    for (_, _), (x, y) in zip(ordered, ordered[1:], strict=False):
        path += f"V{py(y):.1f}H{px(x):.1f}"
    return f'<path class="front" d="{path}V{py(corner[1]):.1f}"/>'


def paired_dots(base: Sequence[float | None], own: Sequence[float | None], k: int, label: str) -> Markup:
    """A line a prompt from the baseline's value to the contestant's, prompts in the order of the baseline's."""
    both = sorted((b, o) for b, o in zip(base, own, strict=True) if b is not None and o is not None)
    if not both:
        return Markup("")
    places, labels = scale([v for pair in both for v in pair], 3)
    width, height, left = 460, 190, 14 + 7 * max(map(len, labels))

    def py(y: float) -> float:
        return height - 26 - (y - places[0]) / (places[-1] - places[0]) * (height - 36)

    x = [left + (i + 0.5) / len(both) * (width - left - 10) for i in range(len(both))]
    parts = [_open(width, height, label)]
    for y, text in zip(places, labels, strict=True):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 10}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(_text(left - 7, py(y) + 4, text, "end"))
    parts.append(
        _text(width - 10, height - 6, f"{counted(len(both), 'prompt')}, those most alike at the baseline first", "end")
    )
    rods = "".join(f"M{a:.1f} {py(b):.1f}V{py(o):.1f}" for a, (b, o) in zip(x, both, strict=True))
    parts.append(f'<path class="rods c{k % STYLES}" d="{rods}"/>')
    for style, values in (("c0", [b for b, _ in both]), (f"c{k % STYLES}", [o for _, o in both])):
        dots = "".join(f"M{a:.1f} {py(v):.1f}h0" for a, v in zip(x, values, strict=True))
        parts.append(f'<path class="dots {style}" d="{dots}"/>')
    return Markup("".join(parts) + "</svg>")


def drifts(
    found: Sequence[tuple[str, int, Mapping[str, float | None]]], span: tuple[float, float], label: str
) -> Markup:
    """A row (name, number of the contestant, mean with interval) each, around a line at zero; `span` is shared."""
    parts, px, ys = rows([name for name, _, _ in found], span, 3, 0.0, 340, label)
    for (_, k, drift), y in zip(found, ys, strict=True):
        middle, low, high = drift["mean"], drift["low"], drift["high"]
        if middle is None:
            continue
        if low is not None and high is not None:
            parts.append(f'<path class="whisk c{k % STYLES}" d="M{px(low):.1f} {y}H{px(high):.1f}"/>')
        parts.append(symbol(k, px(middle), y))
    return Markup("".join(parts) + "</svg>")


def _open(width: float, height: float, label: str, style: str = "") -> str:
    return f'<svg class="chart {style}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    return f'<text class="tick {style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
