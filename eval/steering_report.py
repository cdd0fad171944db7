"""Pages of a steering run: report.html, one file without scripts or outside references, and a contact sheet."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from diffalign.eval import charts, lineage, run_facts
from diffalign.eval.charts import Series
from diffalign.eval.comparison import direction
from diffalign.eval.report import number, signed
from diffalign.eval.steering_folder import REWARD, Arm, Compared, Line, SteeringRun, compared, read, verdict
from diffalign.eval.steering_pictures import contact_sheet, embedded, png
from diffalign.writing import put

SHOWN, LISTED = 24, 400  # prompts with pictures, and prompts in the table after them
LARGE, SMALL, SMALLS = 384, 128, 15  # px of a picture, and of the further ones of an arm, and their number
PHASES = ("model", "decode", "reward", "other")
NAMES = {"base": "plain image", "bon": "best of N"}


def write(folder: Path | str) -> Path:
    """Write `report.html` and `contact.png` into the folder of a steering run, which may be under way.

    Returns the report's path. Raises UserError when the folder is no steering run or one of its files is damaged.
    """
    run = read(folder)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "signed": signed, "arm": arm_name}
    template = environment.from_string((files("diffalign.eval") / "steering_report.html").read_text("utf-8"))
    put(run.path / "contact.png", png(contact_sheet(run)))
    put(run.path / "report.html", template.render(page(run)))
    return run.path / "report.html"


def arm_name(arm: str) -> str:
    return NAMES.get(arm, arm)


def page(run: SteeringRun) -> dict[str, Any]:
    results = compared(run)
    kind, sentences = verdict(run, results, signed)
    yes_no = {j for j in run.judges if all(s in (0, 1, None) for line in run.lines for s in _scores(line, j))}
    return {
        "style": _style(),
        "title": run.path.resolve().name,
        "subtitle": _subtitle(run),
        "kind": kind,
        "verdict": sentences,
        "method": run.method,
        "judges": run.judges,
        "reward": run.reward,
        "arms": [_arm(run, arm) for arm in run.arms if run.of(arm)],
        "differences": _differences(run, results),
        "facts": _facts(run),
        "versions": run_facts.versions(),
        "settings": run.settings_text,
        "warnings": _warnings(run),
        "charts": _charts(run),
        "prompts": [_prompt(run, line, yes_no) for line in run.lines[:SHOWN]],
        "rest": _rest(run),
        "tones": range(lineage.TONES),
    }


def _style() -> str:
    """Both reports look alike: the style sheet of the training report; and that of the trees."""
    text = (files("diffalign.eval") / "report.html").read_text("utf-8")
    return Markup(text.partition("<style>")[2].partition("</style>")[0] + lineage.style())


def _scores(line: Line, judge: str) -> list[float | None]:
    return [s for arm in line.arms.values() for s in arm.judges.get(judge, [])]


def _subtitle(run: SteeringRun) -> str:
    n, model = len(run.lines), run.settings.get("model")
    on = f" on {model}" if model else ""
    return f"{run.method} towards {run.reward}{on}, {n} prompt{'s' * (n != 1)}"


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan


def _arm(run: SteeringRun, name: str) -> dict[str, Any]:
    """A row of the table: means over prompts."""
    arms = run.of(name)
    total = _mean([a.seconds.get("total", math.nan) for a in arms])
    spent = {phase: _mean([a.seconds.get(phase, 0.0) for a in arms]) for phase in PHASES[:-1]}
    spent["other"] = max(0.0, total - sum(spent.values()))
    shares = {phase: 100 * s / sum(spent.values()) for phase, s in spent.items()} if sum(spent.values()) > 0 else {}
    return {
        "name": name,
        "scores": [_mean([a.score(s) for a in arms]) for s in (REWARD, *run.judges)],
        "nfe": _mean([a.nfe for a in arms]),
        "reward_calls": _mean([a.reward_calls for a in arms]),
        "seconds": total,
        "shares": shares,
    }


def _differences(run: SteeringRun, results: Compared) -> list[dict[str, Any]]:
    """The method against each other arm, score by score; the marks of one score share a scale."""
    rows = []
    for (other, score), p in results.items():
        if p is None:
            continue
        together = [q for (_, s), q in results.items() if q and s == score]
        ends = [v for q in together for v in (q.low, q.high, q.mean, 0.0) if math.isfinite(v)]
        rows.append({
            "label": run.reward if score is REWARD else score,
            "note": "steers" if score is REWARD else "judge",
            "other": other, "n": p.n, "p": p, "kind": direction(p),
            "mark": charts.interval_mark(p.mean, p.low, p.high, (min(ends), max(ends))),
        })  # fmt: skip
    return rows


def _facts(run: SteeringRun) -> list[tuple[str, str]]:
    own = run.settings
    found = [("Method", run.method)]
    found += [(k, _text(v)) for k, v in own["method"].items() if k != "name" and v is not None]
    if "lam" in own:
        found += [("lam found", number(own["lam"])), ("Forwards for lam, once", f"{own.get('lam_nfe', 0):,}")]
    plain = ("model", "revision", "dtype", "lora", "kernel", "window", "steps", "seed")
    found += [(k, _text(own[k])) for k in plain if own.get(k) is not None]
    for word in ("rewards", "judges"):
        found += [(word[:-1], _entry(entry)) for entry in own.get(word) or []]
    found += [(k, _text(v)) for k, v in (own.get("arguments") or {}).items()]
    seconds = sum(a.seconds.get("total", 0.0) for line in run.lines for a in line.arms.values())
    return [*found, ("Time, all arms", run_facts.duration(seconds))]


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _entry(entry: Mapping[str, Any]) -> str:
    weight = "" if entry.get("weight") in (None, 1) else f" {charts.TIMES} {entry['weight']:g}"
    model = f" ({entry['model']})" if entry.get("model") and str(entry.get("name")) != "geneval" else ""
    return f"{entry.get('name')}{model}{weight}"


def _warnings(run: SteeringRun) -> list[dict[str, Any]]:
    """Warnings that differ in nothing but the step are one, with the number of prompts that had it."""
    found: dict[tuple[str, str], Counter[int]] = {}
    prompts: Counter[tuple[str, str]] = Counter()
    for name in run.arms:
        for arm in run.of(name):
            told = {(name, re.sub(r"\bstep \d+", "step {}", said)): said for said in arm.warnings}
            prompts.update(told.keys())
            for key, said in told.items():
                found.setdefault(key, Counter()).update(int(s) for s in re.findall(r"\bstep (\d+)", said))
    rows = []
    for (name, said), steps in found.items():
        between = f"steps {min(steps)} to {max(steps)}" if len(steps) > 1 else f"step {min(steps, default=0)}"
        rows.append({
            "arm": name, "text": said.replace("step {}", between), "n": prompts[name, said], "of": len(run.of(name)),
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["n"])


def _charts(run: SteeringRun) -> list[dict[str, Any]]:
    arms = run.of(run.method)
    along = "step" if any("step" in row for a in arms for row in a.history) else "visits"
    label = lineage.unit(run.settings["method"]) if along == "step" else along
    threshold = run.settings["method"].get("ess")
    line = threshold if _is_number(threshold) and 0 < threshold < 1 else None

    def drawn(title: str, reference: float | None = None, **keys: str) -> dict[str, Any]:
        """A chart of numbers of the histories, `keys` by the style of their lines."""
        curves = {style: _curve(arms, along, key) for style, key in keys.items()}
        series = [Series(x, y, style) for style, (x, y) in curves.items() if x]
        words = f"{title} by {label}"
        chart = charts.chart(series, label=words, x_label=label, reference=reference, width=340, height=200)
        legend = {style: keys[style] for style, (x, _) in curves.items() if x} if len(keys) > 1 else {}
        note = "" if reference is None else f"dashed: particles are resampled below {reference:g}"
        return {"title": title, "chart": chart, "legend": legend, "note": note}

    found = [
        drawn("Effective particles, share of all", line, held="ess"),
        drawn("Starts that still have descendants", held="roots"),
        drawn("Rewards seen", held="best", train="mean"),
    ]
    return [entry for entry in found if entry["chart"]]


def _curve(arms: Sequence[Arm], along: str, key: str) -> tuple[list[float], list[float]]:
    """Mean over prompts of a number in the histories, at each step; of `ess` as a share of the particles.

    Trees tell of their best image when there is a better one, so what they told last counts in between.
    """
    each: list[dict[float, float]] = []
    for arm in arms:
        seen: dict[float, list[float]] = {}
        scale = 1 / float(arm.method.get("particles") or 1) if key == "ess" else 1.0
        for row in arm.history:
            if _is_number(row.get(along)) and _is_number(row.get(key)):
                seen.setdefault(row[along], []).append(scale * row[key])
        each.append({x: _mean(values) for x, values in seen.items()})
    xs = sorted({x for seen in each for x in seen})

    def at(seen: dict[float, float], x: float) -> float:
        before = [s for s in seen if s <= x] if along == "visits" else [s for s in seen if s == x]
        return seen[max(before)] if before else math.nan

    return xs, [_mean([at(seen, x) for seen in each]) for x in xs]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _prompt(run: SteeringRun, line: Line, yes_no: set[str]) -> dict[str, Any]:
    """Pictures of all arms, and the family tree of the method's."""
    arms = [(name, line.arms[name]) for name in run.arms if name in line.arms]
    method = line.arms.get(run.method)
    further = range(1, min(len(method.images), SMALLS + 1) if method else 1)
    along = lineage.unit(run.settings["method"])
    return {
        "index": line.index,
        "prompt": line.prompt,
        "pictures": [{"arm": name, **_picture(run, arm, 0, LARGE, yes_no)} for name, arm in arms],
        "further": [_picture(run, method, k, SMALL, yes_no) for k in further] if method else [],
        "left_out": max(0, len(method.images) - 1 - SMALLS) if method else 0,
        "tree": lineage.picture(method.lineage, method.leaves[0], along) if method else None,
    }


def _picture(run: SteeringRun, arm: Arm, k: int, side: int, yes_no: set[str]) -> dict[str, Any]:
    judged = [_mark(judge, arm.score(judge, k), judge in yes_no) for judge in run.judges]
    return {"src": embedded(run.path, arm.images[k], side), "reward": arm.score(REWARD, k), "marks": judged}


def _mark(judge: str, score: float, yes_no: bool) -> dict[str, str]:
    if yes_no and math.isfinite(score):
        kind, text = ("yes", "\N{CHECK MARK}") if score else ("no", "\N{BALLOT X}")
    else:
        kind, text = "", number(score)
    return {"name": judge, "kind": kind, "text": text, "title": f"{judge} = {number(score)}"}


def _rest(run: SteeringRun) -> dict[str, Any]:
    """The prompts without pictures, in numbers."""
    lines = run.lines[SHOWN:]
    columns = [(arm, score) for score in (REWARD, *run.judges) for arm in run.arms]
    rows = [
        (line, [line.arms[arm].score(score) if arm in line.arms else math.nan for arm, score in columns])
        for line in lines[:LISTED]
    ]
    return {"n": len(lines), "columns": [(arm, s or "reward") for arm, s in columns], "rows": rows}
