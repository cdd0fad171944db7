"""At which noise levels an image is trained on the forward process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Timesteps(BaseModel):
    """At which noise levels each image is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    choice: Literal["grid", "stratified", "uniform"] = "grid"
    """grid: different levels of the sampler's own grid; stratified: one from each of `count` equal stretches of it;
    uniform: anywhere on it. The last two fall between the grid's levels."""
    count: int | None = Field(None, ge=1)
    """Levels for each image in an epoch; not given, with grid: as many as int(0.99 steps), all but one."""
    range: tuple[float, float] = (0.0, 1.0)
    """The part of the sampling steps that is used: 0 is pure noise, 1 the image."""

    @model_validator(mode="after")
    def _fits(self) -> Timesteps:
        low, high = self.range
        if not 0 <= low < high <= 1:
            raise ValueError(f"range must rise within 0 to 1, got {low:g} to {high:g}")
        if self.choice != "grid" and self.count is None:
            raise ValueError(f"{self.choice} needs a count, the number of noise levels for each image")
        return self

    def steps(self, steps: int) -> list[int]:
        """The steps of the grid whose start lies in the range."""
        low, high = self.range
        return [i for i in range(steps) if low <= i / steps < high]

    def number(self, steps: int) -> int:
        """Noise levels for each image."""
        return self.count or min(len(self.steps(steps)), max(1, int(0.99 * steps)))

    def draw(self, sigmas: Tensor, generator: torch.Generator) -> Tensor:
        """[n] noise levels of one image, from the grid [T+1] it was sampled on."""
        import torch

        steps, n = len(sigmas) - 1, self.number(len(sigmas) - 1)
        if self.choice == "grid":
            usable = torch.tensor(self.steps(steps))
            return sigmas[usable[torch.randperm(len(usable), generator=generator)[:n]]]
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        low, high = self.range
        if self.choice == "stratified":
            u = (torch.arange(n) + u) / n
        at = (low + (high - low) * u) * steps
        i = at.long().clamp(max=steps - 1)
        return torch.lerp(sigmas[i].double(), sigmas[i + 1].double(), at - i)
