"""What the page of an evaluation says, made from its numbers: rows, charts and sentences for the template."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.eval import gallery_charts as drawn
from diffalign.eval import gallery_tables, run_facts
from diffalign.eval.charts import MINUS
from diffalign.eval.curves import curves
from diffalign.eval.definitions import definition
from diffalign.eval.gallery import Gallery
from diffalign.eval.gallery_tables import counted
from diffalign.eval.report import number, signed
from diffalign.eval.tables import DISTANCE

LOOKS = {
    "saturation": "Saturation", "contrast": "Contrast", "sharpness": "Sharpness", "clipped": "Clipped values",
    "high_frequency": "Fine detail", "jpeg_bytes": "Size as JPEG", "border": "Energy of the border",
}  # fmt: skip
LEVELS = {
    "red": ("\N{BLACK SQUARE}", "warning"),
    "amber": ("\N{BLACK UP-POINTING TRIANGLE}", "look closer"),
    "green": ("\N{CHECK MARK}", "nothing seen"),
    "unknown": ("?", "unknown"),
}
SHADES = 5  # of a heat cell, each way from even


def view(gallery: Gallery, numbers: Mapping[str, Any], signs: Sequence[Any]) -> dict[str, Any]:
    """The variables of gallery_page.html, but for the wall, styles and scripts."""
    order = [row["name"] for row in numbers["contestants"]]
    return {
        "title": gallery.folder.resolve().name,
        "subtitle": subtitle(numbers),
        "verdict": [
            verdict(numbers, name) for name in order if name not in (numbers["asked"]["baseline"], *numbers["noise"])
        ],
        "n": numbers,
        "base": numbers["asked"]["baseline"],
        "order": order,
        "keys": {name: drawn.key(k) for k, name in enumerate(order)},
        "contestants": [_about(row, numbers["cost"][row["name"]]["nfe"]) for row in numbers["contestants"]],
        "strip": strip(signs),
        "signs": [_sign(sign) for sign in signs],
        "levels": LEVELS,
        "csv": gallery_tables.comma_separated(numbers),
        "matrices": matrices(numbers, order),
        "pairs": pairs(numbers, order),
        "runs": curves(gallery),
        "varied": varied(numbers, order),
        "drifts": drifts(numbers, order),
        "definitions": [definition(key, settings) for key, settings in numbers["asked"]["rewards"].items()],
        "versions": run_facts.versions(),
        "commands": list(dict.fromkeys(row["command"] for row in numbers["contestants"] if row["command"])),
        "environments": _environments(numbers),
    }


def subtitle(numbers: Mapping[str, Any]) -> str:
    asked, rows = numbers["asked"], numbers["contestants"]
    days = sorted({row["date"][:10] for row in rows if row["date"]})
    parts = [
        f"{counted(numbers['prompts'], 'prompt')} of {asked['prompts']}",
        f"{counted(asked['images_per_prompt'], 'image')} each",
        f"{asked['width']} by {asked['height']} pixels",
        f"seed {asked['seed']}",
        " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "",
    ]
    return "; ".join(part for part in parts if part)


def verdict(numbers: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One sentence on a contestant: on which rewards it differs from the baseline, after correction."""
    ways: dict[str, list[str]] = {"up": [], "down": [], "open": []}
    for reward, found in numbers["rewards"].items():
        own = found["models"][name]
        if own["delta"] is not None:
            way = own["delta"]["direction"] if own["delta"]["holds"] else "open"
            ways[way].append(f"{reward} ({'trained on, ' if own['trained'] else ''}{signed(own['delta']['mean'])})")
    base = numbers["asked"]["baseline"]
    if not any(ways.values()):
        return {"name": name, "kind": "open", "text": f"has no prompt scored together with {base}."}
    words = {"up": "better", "down": "worse"}
    parts = [f"{words[way]} than {base} on {_listed(found)}" for way, found in ways.items() if found and way in words]
    if not parts:
        return {"name": name, "kind": "open", "text": f"cannot be told from {base} on any reward with these prompts."}
    rest = f"; no clear difference on {_listed([w.split(' (')[0] for w in ways['open']])}" if ways["open"] else ""
    kind = "open" if ways["up"] and ways["down"] else "up" if ways["up"] else "down"
    return {"name": name, "kind": kind, "text": f"is {' and '.join(parts)}{rest}."}


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _about(row: Mapping[str, Any], forwards: float) -> dict[str, Any]:
    """What its files say of how its images were made, and no more."""
    steering = row["steering"] or {}
    told = {k: v for k, v in steering.items() if k != "name" and v is not None and not isinstance(v, dict | list)}
    guidance = row["guidance"]
    way = [
        f"sampler chosen by {steering['name']}" if steering else row["kernel"],  # whatever the evaluation's kernel is
        *([f"eta {row['eta']:g}"] if row["eta"] else []),
        counted(row["steps"], "step")
        + (f" ({'/'.join(f'{t:g}' for t in row['timesteps'])})" if row["timesteps"] else ""),
        "the pipeline's own guidance"
        if guidance is None
        else f"guidance {guidance:g}"
        if guidance != 1
        else "no guidance",
        row["dtype"] or "precision not recorded",
    ]
    parts = [text.split(", ") for text in row["versions"].split(" and later ")]
    software = [", ".join(p for p in some if p.startswith(("diffalign ", "torch ", "diffusers "))) for some in parts]
    return {
        **row,
        "how": ", ".join(dict.fromkeys(part for part in (row["method"], steering.get("name")) if part)) or row["kind"],
        "options": ", ".join(f"{key} {value}" for key, value in told.items()),
        "way": ", ".join(way),
        "forwards": f"{forwards:,.4g}" if row["images"] else "\N{EN DASH}",
        "software": " and later ".join(filter(None, software)) or "versions not recorded",
    }


def strip(signs: Sequence[Any]) -> dict[str, Any]:
    """The signs of reward hacking as a table: a row a sign, a column a contestant."""
    names = list(dict.fromkeys(sign.contestant for sign in signs))
    titles = dict.fromkeys((sign.key, sign.title) for sign in signs)
    place = {(sign.key, sign.contestant): i for i, sign in enumerate(signs)}
    rows = [
        {
            "title": title,
            "cells": [(place[key, name], signs[place[key, name]]) if (key, name) in place else None for name in names],
        }
        for key, title in titles
    ]
    return {"names": names, "rows": rows}


def _sign(sign: Any) -> dict[str, Any]:
    more = {k: v for k, v in sign.evidence.items() if k not in ("rows", "prompts")}
    return {
        "level": sign.level, "contestant": sign.contestant, "title": sign.title, "sentence": sign.sentence,
        "rows": sign.evidence.get("rows", []), "prompts": sign.evidence.get("prompts", []),
        "more": [(k.replace("_", " "), evidence(v)) for k, v in more.items() if v not in ([], {}, "", None)],
    }  # fmt: skip


def evidence(value: Any) -> str:
    """A number of a sign in words; whatever is more than that as JSON, shortened."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "\N{EN DASH}"}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else number(value)
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {evidence(v)}" for k, v in list(value.items())[:24])
    if isinstance(value, list | tuple):
        return ", ".join(evidence(v) for v in value[:24]) + (" and more" if len(value) > 24 else "")
    return json.dumps(value, default=str)


def matrices(numbers: Mapping[str, Any], order: Sequence[str]) -> list[dict[str, Any]]:
    """Win rates of every reward, and of people where they voted: A of the row beats B of the column."""
    judges = dict(numbers["wins"])
    if numbers["people"]:
        judges = {"people": numbers["people"], **judges}
    found = []
    for judge, m in judges.items():
        rows = []
        for i, a in enumerate(order):
            cells = [
                None if i == j else heat(m["wins"][i][j], m["ties"][i][j], m["wins"][j][i]) for j in range(len(order))
            ]
            rows.append((a, cells))
        chart = drawn.strengths(m["strengths"], order, f"Strengths by {judge}")
        if any(cell for _, cells in rows for cell in cells):
            found.append({"judge": judge, "people": m is numbers["people"], "rows": rows, "chart": chart})
    return found


def heat(wins: float, ties: float, losses: float) -> dict[str, Any] | None:
    n = wins + ties + losses
    if not n:
        return None
    rate = (wins + ties / 2) / n
    shade = round((rate - 0.5) * 2 * SHADES)
    return {
        "rate": f"{100 * rate:.0f} %", "told": f"{wins:g} / {ties:g} / {losses:g}",
        "style": f"h{shade}" if shade >= 0 else f"l{-shade}",
    }  # fmt: skip


def pairs(numbers: Mapping[str, Any], order: Sequence[str]) -> list[dict[str, Any]]:
    lines, found = numbers["tradeoffs"]["lines"], []
    for pair in numbers["tradeoffs"]["pairs"]:
        if len(pair["points"]) > 1:
            named = {**pair, "x": axis(pair["x"]), "y": axis(pair["y"])}
            chart = drawn.scatter(named, order, lines, f"{named['y']} against {named['x']}")
            front = [p["name"] for p in pair["points"] if p["front"]]
            found.append({"x": named["x"], "y": named["y"], "front": front, "chart": chart})
    return found


def axis(name: str) -> str:
    return "distance within a prompt" if name == DISTANCE else name


def varied(numbers: Mapping[str, Any], order: Sequence[str]) -> list[dict[str, Any]]:
    """A row a contestant: its diversity, and for all but the baseline a chart of the Vendi score prompt by prompt."""
    if not numbers["diversity"]:
        return []
    models, base = numbers["diversity"]["models"], numbers["asked"]["baseline"]
    rows = []
    for k, name in enumerate(order):
        found, chart = models[name], None
        if name != base:
            before, after = (models[n]["vendi"]["per_prompt"] for n in (base, name))
            chart = drawn.paired_dots(before, after, k, f"Vendi score of {name} and {base} by prompt")
        rows.append({"name": name, **found, "chart": chart})
    return rows


def percent(x: float | None) -> str:
    return "\N{EN DASH}" if x is None else f"{100 * x:+.1f} %".replace("-", MINUS)


def drifts(numbers: Mapping[str, Any], order: Sequence[str]) -> list[dict[str, Any]]:
    """A small chart a look; all share one scale, so that a large drift looks large."""
    looks, base = numbers["looks"] or {}, numbers["asked"]["baseline"]
    others = [(k, name) for k, name in enumerate(order) if name != base]
    ends = [
        v for look in looks.values() for _, n in others for v in look["models"][n]["drift"].values() if v is not None
    ]
    if not ends:
        return []
    span = (min(-0.5, *ends), max(0.5, *ends))
    return [
        {
            "title": LOOKS.get(look, look.replace("_", " ").capitalize()),
            "base": look_number(found["models"][base]["mean"]),
            "chart": drawn.drifts([(n, k, found["models"][n]["drift"]) for k, n in others], span, f"Drift of {look}"),
        }
        for look, found in looks.items()
    ]


def look_number(x: float | None) -> str:
    return number(math.nan if x is None else x)


def _environments(numbers: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Versions of packages, with the contestants that were made with them."""
    found: dict[str, list[str]] = {}
    for row in numbers["contestants"]:
        found.setdefault(row["versions"] or "versions not recorded", []).append(row["name"])
    return list(found.items())
