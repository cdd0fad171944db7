"""Images of prompts on disk: PNGs named by index, their prompts in metadata.jsonl, and one grid of them all."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffalign.images import grid, save_png
from diffalign.rollout import collect, sample_seed
from diffalign.sections import Sampling
from diffalign.types import Pipeline, UserError

GRID_ROWS = 32  # prompts in the grid; it has to stay an image one can open


def generate(
    pipeline: Pipeline,
    prompts: Sequence[dict[str, Any]],
    folder: Path,
    sampling: Sampling,
    images: int = 1,
    seed: int = 0,
    micro_batch: int = 8,
) -> Path:
    """Sample `images` of each prompt by the steps of `sampling`; image j of prompt p is PPPP_JJ.png.

    Seeds are those of :func:`diffalign.rollout.sample_seed` with epoch 0, so an image depends on nothing but the model,
    its prompt's index and j. `metadata.jsonl` has a line for each file with its prompt, seed and the prompt's own
    metadata. Returns the grid, one row a prompt, of the first 32. Raises UserError for a folder that is not empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"'{folder}' is not empty; name a new folder, so that no older image stays among the new ones")
    jobs = [(p, j) for p in range(len(prompts)) for j in range(images)]
    shown: list[Tensor] = []
    quiet = not sys.stderr.isatty()
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as lines, tqdm(total=len(jobs), disable=quiet) as bar:
        for start in range(0, len(jobs), micro_batch):
            part = jobs[start : start + micro_batch]
            seeds = torch.tensor([sample_seed(seed, 0, p, j) for p, j in part])
            group = torch.tensor([p for p, _ in part])
            entries, noisy = [prompts[p] for p, _ in part], range(sampling.steps)
            made = collect(pipeline, entries, group, seeds, sampling, (), micro_batch, stochastic=noisy)
            assert made.images is not None
            for (p, j), image, one in zip(part, made.images, seeds.tolist(), strict=True):
                name = f"{p:04d}_{j:02d}.png"
                save_png(image, folder / name)
                lines.write(json.dumps({**prompts[p], "file_name": name, "seed": one}, ensure_ascii=False) + "\n")
                if p < GRID_ROWS:
                    shown.append(image.cpu())
            lines.flush()
            bar.update(len(part))
    path = folder / "grid.png"
    save_png(grid(torch.stack(shown), images if len(prompts) > 1 else round(images**0.5)), path)
    return path


def native_size(pipe: Any) -> int:
    """Side in pixels that a diffusers pipeline was trained at."""
    return int(pipe.default_sample_size * pipe.vae_scale_factor)
