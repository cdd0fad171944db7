"""The family tree of the states that a steering method weighed, as inline SVG; colours come from the page's CSS."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from markupsafe import Markup, escape

from diffalign.eval.charts import MINUS
from diffalign.eval.lineage_layout import SIDE, WIDTH, Family, Layout, drawn, layout

TONES = 7
SIZES = {"dead": 0.8, "alive": 1.0, "kept": 1.25}  # drawn in this order


@dataclass(frozen=True)
class Picture:
    svg: Markup
    text: str
    low: float | None  # lowest and highest reward that is drawn
    high: float | None


def style() -> Markup:
    """What a page with trees adds to its style sheet."""
    return Markup((files("diffalign.eval") / "lineage.css").read_text("utf-8"))


def unit(method: Mapping[str, Any]) -> str:
    """What runs from left to right, for a method of these settings."""
    rounds = method.get("name") == "noise_search" and method.get("algorithm") != "paths"
    return "round" if rounds else "step"


def picture(family: Family, leaf: int, unit: str = "step") -> Picture:
    """The tree with the line of the returned image, `leaf`, drawn bold; `unit` names what runs from left to right."""
    chosen = drawn(family, leaf)
    at = layout(family, leaf, chosen)
    ordered = sorted(r for n in chosen if (r := family.reward[n]) is not None)
    text = told(family, len(chosen), unit)
    svg = _svg(family, at, ordered, f"{text} {line(family, leaf, unit)}", unit)
    return Picture(svg, text, ordered[0] if ordered else None, ordered[-1] if ordered else None)


def told(family: Family, shown: int, unit: str) -> str:
    """What is to be seen, in words."""
    roots = {n for n, p in enumerate(family.parent) if p is None}
    end = max(family.step)
    left = {family.path(n)[-1] for n, s in enumerate(family.step) if s == end}
    states, steps = len(family.step), len(set(family.step))
    starts = f"{len(roots)} start{'s' * (len(roots) != 1)}"
    text = f"{starts}, {states:,} states at {steps} {unit}s"
    if len(roots) > 1:
        text += f"; {len(left)} of the {starts} reach{'es' * (len(left) == 1)} the last {unit}"
    cut = (
        f" Drawn: {shown:,} of the states, at each {unit} those on the way to the highest rewards."
        if shown < states
        else ""
    )
    return f"{text}.{cut}"


def line(family: Family, leaf: int, unit: str) -> str:
    rewards = [f"{unit} {family.step[n]}: {_number(family.reward[n])}" for n in reversed(family.path(leaf))]
    return f"Rewards on the line of the returned image: {', '.join(rewards)}."


def _tone(reward: float | None, ordered: Sequence[float]) -> str:
    """By rank, so that every tone has as many dots; early guesses and finished images differ too much for a scale."""
    if reward is None:
        return "unknown"
    rank = (bisect_left(ordered, reward) + bisect_right(ordered, reward)) / 2
    return f"tone{min(TONES - 1, int(TONES * rank / len(ordered)))}"


def _number(reward: float | None) -> str:
    return "no reward" if reward is None else f"{reward:.4g}".replace("-", MINUS)


def _svg(family: Family, at: Layout, ordered: Sequence[float], label: str, unit: str) -> Markup:
    parts = [f'<svg class="tree" viewBox="0 0 {WIDTH} {at.height:.0f}" role="img" aria-label="{escape(label)}">']
    parts += _axis(at, unit)
    for standing in SIZES:
        curves = [_curve(a, b) for s, a, b in at.lines if s == standing]
        parts.append(f'<path class="branch {standing}" d="{"".join(curves)}"/>' if curves else "")
    for standing in SIZES:
        for n, (x, y) in at.dots.items():
            if at.standing[n] == standing:
                radius = at.radius * SIZES[standing]
                title = f"{escape(unit)} {family.step[n]}, {_reward(family.reward[n])}"
                parts.append(
                    f'<circle class="{_tone(family.reward[n], ordered)} {standing}" cx="{x:.1f}" cy="{y:.1f}" '
                    f'r="{radius:.1f}"><title>{title}</title></circle>'
                )
    return Markup("".join(parts) + "</svg>")  # numbers of ours and escaped words only


def _reward(reward: float | None) -> str:
    return "not weighed" if reward is None else f"reward {_number(reward)}"


def _curve(a: tuple[float, float], b: tuple[float, float]) -> str:
    middle = (a[0] + b[0]) / 2
    return f"M{a[0]:.1f} {a[1]:.1f}C{middle:.1f} {a[1]:.1f} {middle:.1f} {b[1]:.1f} {b[0]:.1f} {b[1]:.1f}"


def _axis(at: Layout, unit: str) -> Iterator[str]:
    """The first step and the last, and of those between as many as have room."""
    places = list(at.columns.items())
    texts = [f"{unit} {places[0][0]}", *(str(step) for step, _ in places[1:])]
    used = SIDE + 7.0 * len(texts[0])
    for k, (text, (_, x)) in enumerate(zip(texts, places, strict=True)):
        last = k == len(places) - 1
        room = last or x + 4 * len(text) + 14 < WIDTH - SIDE - 7 * len(texts[-1])
        if k and not (room and x - 4 * len(text) > used + 8):
            continue
        used = max(used, x + 4 * len(text))
        anchor, edge = ("start", x - 4) if k == 0 else ("end", x + 6) if last else ("middle", x)
        yield f'<text x="{edge:.1f}" y="{at.height - 8:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
