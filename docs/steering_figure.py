"""The charts of docs/steering.md: `python -m docs.steering_figure RUNS REWARD [TIMED]`.

RUNS is the --out of benchmarks/steering.py, TIMED that of a run on an idle machine, whose seconds are used. Reward, and
GenEval that steers nothing, of the best image against network forwards and against seconds. Best of N is the grey line,
an anytime search a red one, and every other method a point.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.steering import best_of
from diffalign.eval.charts import Series, chart
from docs.figures import FOLDER, styled

NAMES = {"bon_sde": "best of 16, SDE", "zero_order": "zero-order"}
HIDDEN = {"bon", "fk_8_untempered"}
FORWARDS = "network forwards"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def mean(records: Sequence[dict[str, Any]], key: str) -> float:
    """Of the best image of each prompt; of a cost otherwise."""
    return float(np.mean([r[key][0] if isinstance(r[key], list) else r[key] for r in records]))


Runs = dict[str, list[dict[str, Any]]]


def drawn(runs: Runs, key: str, label: str, costs: dict[str, float], x_label: str) -> str:
    """`key` of the best image against costs[row], that of 'bon' being of its largest N."""
    plain = runs["bon"]
    largest = len(plain[0]["rewards"])
    column = ("rewards", "geneval").index(key)
    line = [float(np.mean([best_of(r, n)[column] for r in plain])) for n in range(1, largest + 1)]
    most = max(cost for row, cost in costs.items() if row != "bon")
    shown = [n for n in range(1, largest + 1) if n * costs["bon"] / largest <= 1.05 * most]
    grey = Series([n * costs["bon"] / largest for n in shown], line[: len(shown)], "train")
    points = [
        Series([costs[row]], [mean(records, key)], "held", name=NAMES.get(row, row))
        for row, records in sorted(runs.items())
        if row in costs and row not in HIDDEN
    ]
    curves = [Series(*anytime(runs["dts_star"]), "held")] if key == "rewards" and x_label == FORWARDS else []
    return styled(str(chart([grey, *points, *curves], label=label, x_label=x_label, width=720, height=380)))


def anytime(records: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Mean best reward at each cost that every prompt has reached."""
    first = max(r["curve"][0][0] for r in records)
    last = max(r["curve"][-1][0] for r in records)
    costs = np.linspace(first, last, 24)
    best = [np.mean([[b for cost, b in r["curve"] if cost <= c][-1] for r in records]) for c in costs]
    return costs.tolist(), [float(b) for b in best]


def load(folder: Path, reward: str) -> Runs:
    return {p.stem.removeprefix(f"{reward}_"): read(p) for p in sorted(folder.glob(f"{reward}_*.jsonl"))}


if __name__ == "__main__":
    reward = sys.argv[2]
    found = load(Path(sys.argv[1]), reward)
    forwards = {row: mean(records, "nfe") for row, records in found.items()}
    best = f"{reward} of the best image"
    pages = {
        "": drawn(found, "rewards", best, forwards, FORWARDS),
        "_geneval": drawn(found, "geneval", "GenEval of that image", forwards, FORWARDS),
    }
    if len(sys.argv) > 3:
        timed = load(Path(sys.argv[3]), reward)
        seconds = {row: float(np.mean([r["seconds"]["total"] for r in records])) for row, records in timed.items()}
        seconds["bon"] *= len(found["bon"][0]["rewards"]) / len(timed["bon"][0]["rewards"])
        pages["_seconds"] = drawn(found, "rewards", best, seconds, "seconds a prompt")
    for name, page in pages.items():
        (FOLDER / f"steering_{reward}{name}.svg").write_text(page, "utf-8")
