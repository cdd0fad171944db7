"""Pictures drawn once from `tiny-sd3`, for the recipes that learn from its mistakes; `prompted` chooses the prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffalign.shapes import prompts, world
from diffalign.shapes.fitting import atomic_save
from diffalign.shapes.prompts import Metadata

if TYPE_CHECKING:
    from diffalign.sections import Kernel

# (kernel, steps, eta, guidance) of each picture of a prompt: from those that evaluation looks at to poor ones, and the
# stochastic ones that training sees.
SETTINGS: tuple[tuple[Kernel, int, float, float], ...] = (
    ("ode", 20, 0.0, 1.0),
    ("ode", 10, 0.0, 1.0),
    ("ode", 6, 0.0, 1.0),
    ("cps", 10, 0.7, 1.0),
    ("cps", 10, 0.7, 1.0),
    ("ode", 6, 0.0, 3.0),
)
TRAIN_PROMPTS = 640


def prompted(n: int = TRAIN_PROMPTS, seed: int = 1) -> list[Metadata]:
    """n random prompts, repeats included, none from `test_prompts()` and none with a combination held out there."""
    rng, catalogue = random.Random(seed), prompts.catalogue()
    held = {m["prompt"] for m in prompts.test_prompts()}
    found: list[Metadata] = []
    while len(found) < n:
        meta, _ = prompts.sample(rng, catalogue)
        if meta["prompt"] not in held and not prompts.is_held_out(meta):
            found.append(meta)
    return found


def draw(metas: Sequence[Metadata], path: Path, seed: int, model: str = "tiny-sd3") -> Tensor:
    """uint8 [P, len(SETTINGS), 3, 64, 64]: one picture of each prompt under each setting, stored at `path`.

    Found there complete, they are read; each finished setting is stored, so an interrupted run continues.
    """
    from diffalign import pipelines
    from diffalign.rollout import collect, sample_seed
    from diffalign.sections import Sampling

    done: list[Tensor] = torch.load(path, weights_only=True) if path.exists() else []
    pipe = pipelines.load(model, device="cpu") if len(done) < len(SETTINGS) else None
    for k in range(len(done), len(SETTINGS)):
        assert pipe is not None
        kernel, steps, eta, guidance = SETTINGS[k]
        sampling = Sampling(
            kernel=kernel, steps=steps, eta=eta, guidance=guidance, height=world.SIZE, width=world.SIZE
        )  # fmt: skip
        seeds = torch.tensor([sample_seed(seed, 0, p, k) for p in range(len(metas))])
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast; the pictures need not be exact
            rollout = collect(pipe, list(metas), torch.arange(len(metas)), seeds, sampling, (), 64)
        assert rollout.images is not None
        done.append((rollout.images.float() * 255).round().clamp(0, 255).to(torch.uint8))
        atomic_save(done, path)
    return torch.stack(done, 1)
