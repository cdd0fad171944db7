"""Scores of images on the disk: a table to read, and a JSONL file with a line for each image."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffalign.image_lists import Listed, batches, read
from diffalign.rewards import Scorer
from diffalign.types import RewardOutput, UserError
from diffalign.validity import INVALID
from diffalign.writing import put

LARGEST = 4096  # numbers of a map in a text file; 37 x 37 patches are DINOv2's


@dataclass(frozen=True)
class Scored:
    """What the rewards said of one image; every dict is by reward. NaN = does not apply, or not valid."""

    image: Listed
    scores: dict[str, float] = field(default_factory=dict)
    valid: dict[str, bool] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)  # what of `extra` JSON can say


@torch.no_grad()
def score(results: Sequence[Scored], scorers: Mapping[str, Scorer], batch: int) -> None:
    """Fill in what is empty; up to `batch` images of one size are taken at once, and none is kept."""
    images = [r.image for r in results]
    with tqdm(total=len(images), disable=not sys.stderr.isatty()) as bar:
        for part in batches(images, batch):
            pixels = torch.stack([read(images[i]) for i in part])
            metadata = [images[i].metadata for i in part]
            texts = [m.get("prompt", "") for m in metadata]
            for name, scorer in scorers.items():
                output = scorer(pixels, texts, metadata)
                for k, i in enumerate(part):
                    _note(results[i], name, output, k)
            bar.update(len(part))


def kept(results: Sequence[Scored], path: Path, rewards: int) -> str:
    """Write the images that all `rewards` have scored, when the others cannot be; says how many."""
    done = [r for r in results if len(r.scores) == rewards]
    if not done:
        return "no image was scored before"
    try:
        write(done, path)
    except UserError as error:
        return str(error)
    return f"{len(done)} of {len(results)} images are in {path}"


def _note(result: Scored, name: str, output: RewardOutput, k: int) -> None:
    result.scores[name] = output.scores[k].item()
    result.valid[name] = output.valid is None or bool(output.valid[k])
    details = {key: plain(values[k]) for key, values in output.extra.items()}
    kept = {key: value for key, value in details.items() if value is not None}
    if kept:
        result.details[name] = kept


def plain(value: Any) -> Any:
    """The value as JSON holds it, maps in 4 digits; None for what it cannot hold, and for large tensors."""
    if isinstance(value, torch.Tensor):
        if value.numel() > LARGEST:
            return None
        return plain(value.item() if value.numel() == 1 else value.double().round(decimals=4).tolist())
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return None
    return value


def write(results: Sequence[Scored], path: Path) -> None:
    """One JSON object a line: image, prompt, scores (null = none), valid, details. Whole or not at all."""
    lines = [
        json.dumps(
            {
                "image": r.image.name,
                "prompt": r.image.metadata.get("prompt"),
                "scores": {name: None if math.isnan(s) else s for name, s in r.scores.items()},
                "valid": r.valid,
                "details": r.details,
            },
            ensure_ascii=False,
        )
        for r in results
    ]
    try:
        # the escapes are JSON's as well: what a head says may hold half of a surrogate pair
        put(path, ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"could not write '{path}': {error.strerror}; give another --output") from error


def table(results: Sequence[Scored]) -> str:
    """A row for each reward: images scored, their mean, deviation and range, and how many have no score and why."""
    rows = [["reward", "images", "mean", "std", "min", "max", "n/a", "invalid"]]
    for name in results[0].scores:
        found = [r.scores[name] for r in results if not math.isnan(r.scores[name])]
        invalid = sum(not r.valid[name] for r in results)
        std = statistics.stdev(found) if len(found) > 1 else math.nan
        numbers = (statistics.fmean(found), std, min(found), max(found)) if found else (math.nan,) * 4
        digits = [f"{v:.4g}" if not math.isnan(v) else "-" for v in numbers]
        rows.append([name, str(len(found)), *digits, str(len(results) - len(found) - invalid), str(invalid)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([*lines, *failures(results)])


def failures(results: Sequence[Scored]) -> list[str]:
    """For every reward that failed somewhere, what it said of the first such image."""
    said: dict[str, str] = {}
    for r in results:
        for name, fine in r.valid.items():
            if not fine:
                said.setdefault(name, f"{name}: {r.image.name!r}: {r.details.get(name, {}).get('error', 'not valid')}")
    return list(said.values())


def refuse_invalid(results: Sequence[Scored]) -> None:
    """Raises UserError when a reward could not score more than `INVALID` of the images that it applies to."""
    for name in results[0].scores:
        failed = sum(not r.valid[name] for r in results)
        applies = failed + sum(not math.isnan(r.scores[name]) for r in results)
        if failed > INVALID * applies:
            raise UserError(
                f"'{name}' could not score {failed} of the {applies} images that it applies to, more than "
                f"{INVALID:.0%}; the table says why"
            )
