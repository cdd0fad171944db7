"""A family's own adapter, bound to one prompt, as steering sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.listing import nearest
from diffalign.samplers import randn
from diffalign.schedules import Schedule
from diffalign.types import Denoiser, UserError

ARGUMENTS = ("height", "width", "guidance_scale", "negative_prompt")


class Native:
    """An :class:`diffalign.steering.Oracle` over `encode`, `denoiser` and `decode` of a pipeline.

    grid: number of steps, or the timesteps of a few-step generator.
    arguments: of `ARGUMENTS`, named as in diffusers; height and width by default what the model was trained at, and
    guidance_scale 1, which is none and costs one forward a step instead of two.
    """

    def __init__(self, pipeline: Any, prompt: str, grid: int | Sequence[float], arguments: Mapping[str, Any]) -> None:
        unknown = [a for a in arguments if a not in ARGUMENTS]
        if unknown:
            raise UserError(f"there is no argument '{unknown[0]}'; {nearest(unknown[0], list(ARGUMENTS))}")
        from diffalign.generate import native_size

        side = native_size(pipeline.pipe) if not {"height", "width"} <= arguments.keys() else 0
        height, width = (int(arguments.get(name, side)) for name in ("height", "width"))
        self.pipeline = pipeline
        self.schedule: Schedule = pipeline.schedule
        self.sigmas: Tensor = pipeline.sigmas(grid, height, width)
        self.guidance = float(arguments.get("guidance_scale", 1.0))
        self.cost = 1 if self.guidance == 1 else 2
        if self.cost == 1 and arguments.get("negative_prompt"):
            raise UserError("negative_prompt has no effect at guidance 1; raise guidance_scale or leave it out")
        self.shape = pipeline.latent_shape(height, width)
        with torch.no_grad():
            self.cond = pipeline.encode([prompt])
            negative = str(arguments.get("negative_prompt", ""))
            self.negative = pipeline.encode([negative]) if self.cost == 2 else None
        self._denoisers: dict[int, Denoiser] = {}  # by batch size, of which micro-batches have one or two

    def start(self, generators: Sequence[torch.Generator]) -> Tensor:
        return randn((len(generators), *self.shape), generators, self.pipeline.device)

    def predict(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        if len(x) not in self._denoisers:  # each holds the prompt once a sample, which is not gathered at every step
            rows = self.cond[torch.zeros(len(x), dtype=torch.long)]
            self._denoisers[len(x)] = self.pipeline.denoiser(rows, self.guidance, self.negative)
        return self._denoisers[len(x)].predict(x, self.sigmas[i])

    def decode(self, x0: Tensor) -> Tensor:
        images: Tensor = self.pipeline.decode(x0)
        return images
