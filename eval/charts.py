"""Line charts and interval marks as inline SVG. Colours come from the page's CSS, so that dark mode and print work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

RIGHT, TOP, BOTTOM = 12, 10, 34  # margins in px of the unscaled drawing; the left one fits the labels
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
SUPERSCRIPT = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


@dataclass(frozen=True)
class Series:
    """Points joined by a line; NaN breaks it. `style` is the CSS class of the line: train, held or smooth."""

    x: Sequence[float]
    y: Sequence[float]
    style: str
    low: Sequence[float] = ()  # whiskers and markers are drawn when given
    high: Sequence[float] = ()
    name: str = ""  # written beside the last point


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def running_mean(y: Sequence[float], window: int) -> list[float]:
    """Centred mean over up to `window` finite neighbours; the window shrinks symmetrically at the ends."""
    smooth = []
    for i in range(len(y)):
        half = min(window // 2, i, len(y) - 1 - i)
        near = [v for v in y[i - half : i + half + 1] if math.isfinite(v)]
        smooth.append(sum(near) / len(near) if near else math.nan)
    return smooth


def chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "epoch",
    reference: float | None = None,
    width: int = 460,
    height: int = 250,
) -> Markup:
    """All series in one frame with axes; `reference` draws a dashed horizontal line. Empty when nothing is finite."""
    xs = [v for s in series for v, y in zip(s.x, s.y, strict=True) if math.isfinite(y)]
    ys = [v for s in series for v in (*s.y, *s.low, *s.high) if math.isfinite(v)]
    ys += [reference] if reference is not None and ys else []
    if not ys:
        return Markup("")
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    y_low, y_high = min(ys), max(ys)
    # A flat curve, or one that moves in the last digits only, gets a frame of visible size around it.
    if y_high - y_low < 1e-9 * max(abs(y_low), abs(y_high), 1e-6):
        room = max(abs(y_low), 1e-6) * 0.05
        y_low, y_high = y_low - room, y_high + room
    y_ticks = ticks(y_low, y_high, 4)
    y_low, y_high = y_ticks[0], y_ticks[-1]
    labels = tick_labels(y_ticks)
    left = 12 + 7 * max(4, *map(len, labels))

    def px(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - RIGHT)

    def py(y: float) -> float:
        return height - BOTTOM - (y - y_low) / (y_high - y_low) * (height - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    for y, text in zip(y_ticks, labels, strict=True):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 7}" y="{py(y) + 4:.1f}" text-anchor="end">{text}</text>')
    whole = [x for x in ticks(x_low, x_high, 6) if x == round(x) and x_low <= x <= x_high]
    for x in whole:
        parts.append(
            f'<line class="axis" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{height - BOTTOM}" y2="{height - BOTTOM + 4}"/>'
        )
        parts.append(f'<text class="tick" x="{px(x):.1f}" y="{height - BOTTOM + 17}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{width - RIGHT}" y1="{height - BOTTOM}" y2="{height - BOTTOM}"/>')
    parts.append(f'<text class="tick" x="{width - RIGHT}" y="{height - 3}" text-anchor="end">{escape(x_label)}</text>')
    if reference is not None:
        y = py(reference)
        parts.append(f'<line class="reference" x1="{left}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for s in series:
        parts += _draw(
            s,
            [(px(x), py(y)) for x, y in zip(s.x, s.y, strict=True)],
            [(py(a), py(b)) for a, b in zip(s.low, s.high, strict=True)],
        )
    ends = [
        (px(x), py(y), s.name)
        for s in series
        for x, y in [(x, y) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)][-1:]
        if s.name
    ]
    parts += _names(ends, width)
    return Markup("".join(parts) + "</svg>")  # numbers of ours and escaped labels only


def _names(ends: Sequence[tuple[float, float, str]], width: float) -> list[str]:
    """Names beside their points, each where it covers no other name or point if there is such a place."""
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y, _ in ends]
    parts = []
    for x, y, name in sorted(ends, reverse=True):
        long = 6.2 * len(name)
        sides = [(left, y + down) for down in (-6, 15, -19, 28, -32) for left in (x + 7, x - 7 - long)]
        inside = [(left, base) for left, base in sides if 0 < left < width - long]
        boxes = {(left, base): (left, base - 9, left + long, base + 2) for left, base in inside}
        free = [place for place, box in boxes.items() if not any(_overlap(box, other) for other in taken)]
        left, base = (free or inside or sides)[0]
        taken.append((left, base - 9, left + long, base + 2))
        parts.append(f'<text class="tick" x="{left:.1f}" y="{base:.1f}">{escape(name)}</text>')
    return parts


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _draw(s: Series, points: list[tuple[float, float]], whiskers: list[tuple[float, float]]) -> list[str]:
    parts, command = [], "M"
    path = []
    for x, y in points:
        if math.isfinite(y):
            path.append(f"{command}{x:.1f} {y:.1f}")
        command = "L" if math.isfinite(y) else "M"
    parts.append(f'<path class="line {s.style}" d="{"".join(path)}"/>')
    for (x, _), (low, high) in zip(points, whiskers, strict=False):
        if math.isfinite(low) and math.isfinite(high):
            parts.append(f'<line class="whisker {s.style}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
    if whiskers or sum(math.isfinite(y) for _, y in points) == 1:
        parts += [
            f'<circle class="dot {s.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points if math.isfinite(y)
        ]
    return parts


def tick_labels(values: Sequence[float]) -> list[str]:
    """The labels of evenly spaced ticks, with just the digits that tell neighbours apart."""
    step, largest = values[1] - values[0], max(map(abs, values))
    place = math.floor(math.log10(step) + 1e-9)  # of the last digit that matters
    if 1e-3 <= largest < 1e5:
        return [f"{v:.{max(0, -place)}f}".replace("-", MINUS) if abs(v) > step / 2 else "0" for v in values]
    return [scientific(v, math.floor(math.log10(abs(v)) + 1e-9) - place) if abs(v) > step / 2 else "0" for v in values]


def scientific(value: float, digits: int) -> str:
    """1.5e-06 as 1.5\u00d710\u207b\u2076."""
    mantissa, _, exponent = f"{value:.{max(0, digits)}e}".partition("e")
    return f"{mantissa}{TIMES}10{str(int(exponent)).translate(SUPERSCRIPT)}".replace("-", MINUS)


def interval_mark(mean: float, low: float, high: float, span: tuple[float, float]) -> Markup:
    """A row of a forest plot: a dot at the mean on its interval, with a tick at zero; `span` is shared by the rows."""
    width, height = 180, 18

    def px(v: float) -> float:
        return 6 + (v - span[0]) / ((span[1] - span[0]) or 1) * (width - 12)

    bar = ""
    if math.isfinite(low) and math.isfinite(high):
        bar = f'<line class="bar" x1="{px(low):.1f}" x2="{px(high):.1f}" y1="{height / 2}" y2="{height / 2}"/>'
    return Markup(
        f'<svg class="forest" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<line class="zero" x1="{px(0):.1f}" x2="{px(0):.1f}" y1="0" y2="{height}"/>{bar}'
        f'<circle cx="{px(mean):.1f}" cy="{height / 2}" r="3.6"/></svg>'
    )
