"""Curves of the training runs behind the contestants, from the copies of their metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from diffalign.eval.charts import Series, chart, running_mean
from diffalign.eval.gallery import Gallery
from diffalign.eval.records import METRICS

REWARD, INVALID = "reward/", "invalid/"
HEALTH = {"kl": "KL to the reference", "zero_advantage_groups": "Prompts whose images all score alike"}


def curves(gallery: Gallery) -> list[dict[str, Any]]:
    """One entry a run: its rewards with held-out evaluations, then KL, invalid shares and groups without a signal."""
    found: list[dict[str, Any]] = []
    for name, entry in gallery.entries.items():
        lines = entry.lines(METRICS)
        if not lines:
            continue
        same = next((run for run in found if run["lines"] == lines), None)
        if same:  # checkpoints of one run bring the same copy
            same["names"].append(name)
        else:
            found.append({"names": [name], "lines": lines})
    return [{"names": run["names"], **_run(run["lines"])} for run in found]


def _run(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    phases = {phase: _by_epoch(lines, phase) for phase in ("train", "eval")}
    train, held = phases["train"], phases["eval"]
    keys = list(dict.fromkeys(key for line in (*held, *train) for key in line))
    window = len(train) // 8 | 1 if len(train) >= 20 else 1
    rewards = [k for k in keys if k.startswith(REWARD) and not k.endswith("_std")]
    health = {
        **HEALTH,
        **{k: f"{k.removeprefix(INVALID)}: images it could not score" for k in keys if k.startswith(INVALID)},
    }
    return {
        "window": window,
        "rewards": [(k.removeprefix(REWARD), c) for k in rewards if (c := _reward(train, held, k, window))],
        "health": [
            (title, chart([_line(train, key)], label=f"{title} by epoch", width=340, height=190))
            for key, title in health.items()
            if key in keys
        ],
        "epochs": len(train),
    }


def _by_epoch(lines: Sequence[Mapping[str, Any]], phase: str) -> list[Mapping[str, Any]]:
    """In order; of an epoch that appears twice, after a resume, the later line counts."""
    found = {line["epoch"]: line for line in lines if line.get("phase") == phase and isinstance(line.get("epoch"), int)}
    return [found[epoch] for epoch in sorted(found)]


def _line(lines: Sequence[Mapping[str, Any]], key: str, style: str = "train") -> Series:
    return Series([line["epoch"] for line in lines], [_number(line.get(key)) for line in lines], style)


def _reward(train: Sequence[Mapping[str, Any]], held: Sequence[Mapping[str, Any]], key: str, window: int) -> Markup:
    line, series = _line(train, key), []
    if window > 1:
        series += [Series(line.x, line.y, "faint"), Series(line.x, running_mean(line.y, window), "train")]
    else:
        series.append(line)
    held_out = _line(held, key, "held")
    if any(map(math.isfinite, held_out.y)):
        series.append(Series(held_out.x, held_out.y, "held", held_out.y, held_out.y))  # with a dot at each evaluation
    return chart(series, label=f"{key.removeprefix(REWARD)} by epoch", width=340, height=190)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
