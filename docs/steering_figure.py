"""The charts of docs/steering.md: `python -m docs.steering_figure RUNS REWARD`, RUNS being the --out of the benchmark.

Reward, and GenEval that steers nothing, of the best image against network forwards. Best of N is the grey line, an
anytime search a red one, and every other method a point.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.steering import STEPS, best_of
from diffalign.eval.charts import Series, chart
from docs.figures import FOLDER, styled

NAMES = {"bon_sde": "best of 16, SDE", "zero_order": "zero-order", "fk_8_untempered": "fk_8, untempered"}
HIDDEN = {"bon"}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def mean(records: Sequence[dict[str, Any]], key: str) -> float:
    """Of the best image of each prompt; of a cost otherwise."""
    return float(np.mean([r[key][0] if isinstance(r[key], list) else r[key] for r in records]))


def drawn(runs: dict[str, list[dict[str, Any]]], key: str, label: str) -> str:
    plain = runs["bon"]
    sizes = range(1, len(plain[0]["rewards"]) + 1)
    column = ("rewards", "geneval").index(key)
    line = [float(np.mean([best_of(r, n)[column] for r in plain])) for n in sizes]
    series = [Series([n * STEPS for n in sizes], line, "train", name="best of N")]
    for row, records in sorted(runs.items()):
        if row in HIDDEN:
            continue
        point = Series([mean(records, "nfe")], [mean(records, key)], "held", name=NAMES.get(row, row))
        series.append(point)
        if row == "dts_star" and key == "rewards":
            series.append(Series(*anytime(records), "held"))
    return styled(str(chart(series, label=label, x_label="network forwards", width=720, height=380)))


def anytime(records: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Mean best reward at each cost that every prompt has reached."""
    first = max(r["curve"][0][0] for r in records)
    last = max(r["curve"][-1][0] for r in records)
    costs = np.linspace(first, last, 24)
    best = [np.mean([[b for cost, b in r["curve"] if cost <= c][-1] for r in records]) for c in costs]
    return costs.tolist(), [float(b) for b in best]


if __name__ == "__main__":
    folder, reward = Path(sys.argv[1]), sys.argv[2]
    found = {p.stem.removeprefix(f"{reward}_"): read(p) for p in sorted(folder.glob(f"{reward}_*.jsonl"))}
    (FOLDER / f"steering_{reward}.svg").write_text(drawn(found, "rewards", f"{reward} of the best image"), "utf-8")
    judged = drawn(found, "geneval", "GenEval of that image")
    (FOLDER / f"steering_{reward}_geneval.svg").write_text(judged, "utf-8")
