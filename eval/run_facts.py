"""What a run was and what it cost, in a few lines for the report."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from diffalign import __version__
from diffalign.eval.charts import TIMES
from diffalign.eval.run_folder import Run

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def subtitle(run: Run) -> str:
    def named(key: str, inner: str) -> str:
        value = run.config.get(key) or ""
        return str(value.get(inner, "") if isinstance(value, Mapping) else value)

    algorithm, model = named("algorithm", "name"), named("model", "path")
    what = " on ".join(part for part in (algorithm, model) if part)
    done, planned = len(run.train), (run.config.get("trainer") or {}).get("epochs")
    progress = (
        f"{done} epoch{'s' * (done != 1)}" if planned in (None, done) else f"{done} of {planned} epochs, unfinished"
    )
    return f"{what}, {progress}" if what else progress


def seconds_spent(run: Run) -> float | None:
    seconds = [s for s in run.column("seconds") if math.isfinite(s)]
    return sum(seconds) if seconds else None


def images_sampled(run: Run) -> int | None:
    trainer = run.config.get("trainer") or {}
    if "prompts" not in trainer or "images_per_prompt" not in trainer:
        return None
    return int(trainer["prompts"]) * int(trainer["images_per_prompt"]) * len(run.train)


def duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{seconds:.1f} s"


def facts(run: Run) -> list[tuple[str, str]]:
    trainer = run.config.get("trainer") or {}
    found: list[tuple[str, str]] = []
    seconds, images = seconds_spent(run), images_sampled(run)
    if seconds is not None:
        found.append(("Training time", duration(seconds)))
    for part in dict.fromkeys(key for line in run.train for key in line if key.startswith("seconds/")):
        share = sum(v for v in run.column(part) if math.isfinite(v))
        found.append((f"of it {part.removeprefix('seconds/')}", duration(share)))
    spent = [e.seconds for e in run.evaluations if e.seconds is not None]
    if spent:
        found.append((f"Evaluation time, {len(spent)} times", duration(sum(spent))))
    if images:
        per = f"{trainer['prompts']} prompts {TIMES} {trainer['images_per_prompt']} images"
        found += [("Images sampled and scored", f"{images:,}"), ("Each epoch", per)]
    if images and seconds:
        found.append(("Training throughput", f"{images / seconds:.1f} images/s"))
    if run.base:
        prompts, samples = len({s.prompt for s in run.base.samples}), len(run.base.samples)
        steps = f", {run.base.steps} steps" if run.base.steps is not None else ""
        found.append(("Each evaluation", f"{prompts} prompts, {samples} images{steps}"))
    if "seed" in run.config:
        found.append(("Seed", str(run.config["seed"])))
    return found


def versions() -> str:
    """Versions where this page is written, which are those of the run unless the page was made elsewhere."""
    found = [f"Python {platform.python_version()}", f"diffalign {__version__}{commit()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:  # a page made elsewhere
            continue
    return ", ".join(found)


@cache
def commit() -> str:
    """ " at 1a2b3c4" in a git checkout, with "-dirty" when its files were changed; nothing elsewhere."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        return f" at {subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()}"
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of another user
        return ""
