"""Held-out evaluation during training: the same prompts and the same seeds each time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from diffalign import rewards, validity
from diffalign.images import grid, save_png
from diffalign.rollout import collect, sample_seed
from diffalign.types import Pipeline, RewardOutput
from diffalign.writing import put

if TYPE_CHECKING:
    from diffalign.sections import Sampling

SEED_EPOCH = 2**32 - 1  # an epoch number that training never reaches
SHOWN = 24  # images stored for the report


def evaluate(
    pipeline: Pipeline,
    prompts: Sequence[Mapping[str, Any]],
    images_per_prompt: int,
    sampling: Sampling,
    scorers: Mapping[str, rewards.Scorer],
    seed: int,
    micro_batch: int,
    accelerator: Accelerator,
) -> tuple[list[dict[str, Any]], list[Tensor], dict[str, float]]:
    """(samples, images, invalid), on every process: one entry per prompt and image in order; images of the first ones
    shown; shares of images that a reward could not score, see :func:`validity.invalid`."""
    pairs = [(p, j) for p in range(len(prompts)) for j in range(images_per_prompt)]
    mine = torch.arange(len(pairs)).tensor_split(accelerator.num_processes)[accelerator.process_index].tolist()
    samples: list[dict[str, Any]] = []
    shown: list[tuple[int, Tensor]] = []
    outputs: dict[str, list[RewardOutput]] = {name: [] for name in scorers}
    for start in range(0, len(mine), micro_batch):
        rows = mine[start : start + micro_batch]
        metadata = [dict(prompts[pairs[i][0]]) for i in rows]
        seeds = torch.tensor([sample_seed(seed, SEED_EPOCH, *pairs[i]) for i in rows])
        group = torch.tensor([pairs[i][0] for i in rows])
        batch = collect(pipeline, metadata, group, seeds, sampling, (), micro_batch, stochastic=range(sampling.steps))
        assert batch.images is not None
        with torch.no_grad():
            found = {n: scorer(batch.images, batch.prompts, metadata) for n, scorer in scorers.items()}
        for n, output in found.items():
            outputs[n].append(RewardOutput(output.scores, {"error": validity.reasons(output)}, output.valid))
        scores = {n: output.scores.tolist() for n, output in found.items()}
        for k, i in enumerate(rows):
            samples.append({
                "index": i,
                "prompt": batch.prompts[k],
                "tag": metadata[k].get("tag", ""),
                "seed": int(seeds[k]),
                "scores": {n: None if math.isnan(values[k]) else values[k] for n, values in scores.items()},
                "errors": {n: o[-1].extra["error"][k] for n, o in outputs.items() if o[-1].extra["error"][k]},
            })  # fmt: skip
            if i < SHOWN * images_per_prompt and i % images_per_prompt == 0:
                shown.append((i, batch.images[k].cpu()))
    nothing = RewardOutput(torch.empty(0), {"error": []}, torch.empty(0, dtype=torch.bool))
    invalid = validity.invalid({n: rewards.joined([nothing, *o]) for n, o in outputs.items()}, "the evaluation")
    every = sorted(gather_object(samples), key=lambda s: s["index"])
    pictures = sorted(gather_object(shown), key=lambda s: s[0])
    return every, [image for _, image in pictures], invalid


def write(
    folder: Path, epoch: int, samples: list[dict[str, Any]], images: list[Tensor], steps: int, began: float
) -> None:
    """`eval/NNNN.json`, `images/eval_NNNN.png` and the single images, each whole or not at all."""
    singles = folder / "images" / f"eval_{epoch:04d}"
    singles.mkdir(parents=True, exist_ok=True)
    (folder / "eval").mkdir(exist_ok=True)
    for i, image in enumerate(images):
        save_png(image, singles / f"{i:03d}.png")
    save_png(grid(torch.stack(images), 6), folder / "images" / f"eval_{epoch:04d}.png")
    stored = {"epoch": epoch, "steps": steps, "seconds": round(time.monotonic() - began, 3), "samples": samples}
    path = folder / "eval" / f"{epoch:04d}.json"
    put(path, json.dumps(stored, indent=1))


def means(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """'reward/NAME': mean over the samples that it applies to; a reward that applies to none is left out."""
    valid = {n: [s["scores"][n] for s in samples if s["scores"][n] is not None] for n in samples[0]["scores"]}
    return {f"reward/{name}": sum(scores) / len(scores) for name, scores in valid.items() if scores}
