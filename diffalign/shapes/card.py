"""README.md of the embedded weights, from the files and the log beside them; every recipe writes it anew."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffalign.shapes.publish import LOG
from diffalign.writing import put

RECIPES = ("pretrain", "vlm", "dino", "preference", "image_reward", "aesthetic", "artifact")  # in the order to run them


def write(folder: Path) -> None:
    """What the models are made by, how large they are, how long each stage took, what was measured in the end."""
    log = [json.loads(line) for line in (folder / LOG).read_text("utf-8").splitlines()]
    last = {line["stage"]: line for line in log if "step" in line}
    measured = {line["stage"]: line["held_out"] for line in log if "held_out" in line}
    files = sorted(folder.rglob("*.safetensors"))
    put(
        folder / "README.md",
        "\n".join(
            [
                "# Embedded models",
                "",
                "Made from nothing, on procedural pictures only, by `python -m diffalign.shapes.NAME` for NAME in this "
                f"order: {', '.join(RECIPES)}. Apache-2.0.",
                "",
                "| file | parameters | MB |",
                "|---|---|---|",
                *(f"| {p.relative_to(folder)} | {_count(p):,} | {p.stat().st_size / 1e6:.1f} |" for p in files),
                f"| all | | {sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) / 1e6:.1f} |",
                "",
                "| stage | steps | last loss | seconds |",
                "|---|---|---|---|",
                *(f"| {k} | {line['step']} | {line['loss']} | {line['seconds']:.0f} |" for k, line in last.items()),
                *(part for stage, values in measured.items() for part in _measured(stage, values)),
                "",
                f"Written {time.strftime('%Y-%m-%d')} with torch {version('torch')}, diffusers {version('diffusers')}, "
                f"transformers {version('transformers')} on {platform.machine()}.",
                "",
            ]
        ),
    )


def _measured(stage: str, values: Mapping[str, Any]) -> list[str]:
    """A table of what was measured, one row for each group of values."""
    rows = values if all(isinstance(v, dict) for v in values.values()) else {"": values}
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    return [
        "",
        f"## {stage}, held out",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
        *(f"| {name} | " + " | ".join(_told(row.get(c)) for c in columns) + " |" for name, row in rows.items()),
    ]


def _told(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _count(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys())  # noqa: SIM118
