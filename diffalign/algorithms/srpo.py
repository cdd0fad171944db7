"""SRPO (arXiv 2509.06942): one step from a noised image, exactly undone, towards a reward relative to control words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field, field_validator

from diffalign.algorithms import Loss, Memory, Policy, unrewarded
from diffalign.algorithms._reward_gradient import ALIGNED, RewardGradient, shared

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.schedules import Schedule
    from diffalign.sections import Sampling
    from diffalign.types import Rollout


class SRPO(RewardGradient):
    """Direct-Align with semantic relative preference.

    An image x0 is noised with a known e to x_s, the model takes one step to x_t, and what is known is taken out:
        x_s = (1 - s) x0 + s e,    x_t = x_s + (t - s) v(x_s, s),    x0hat = (x_t - t e) / (1 - t)
    so that x0hat = x0 where v is right, at any noise level, and d x0hat / dv = (t - s) / (1 - t). The reward is
    relative to the same prompt with other words before it, r+ and r-:
        denoising (t < s): (1 + k) r+ - r-,        inversion (t > s): (1 + k) r- - r+
    In the inversion the step's sign is the other, so it moves the model away from what r- likes. Both are taken for
    each image, between the same two levels, and averaged.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    positive: str
    """Words put before the prompt for r+, such as 'Realistic photo. '; may be empty."""
    negative: str
    """Words put before the prompt for r-, such as 'CG render. '."""
    branches: Literal["both", "denoising", "inversion"] = "both"
    """Which of the two is trained; denoising alone leaves the oily look that the paper is against."""
    denoising: tuple[float, float] = (0.1, 0.25)
    """k of the denoising branch at the noisiest level of the range and at its last, linear in the step between."""
    inversion: tuple[float, float] = (0.3, 0.01)
    """k of the inversion branch, likewise."""
    range: tuple[float, float] = (0.1, 0.9)
    """The part of the sampling steps that the two levels are drawn from: 0 is pure noise, where x0hat is undefined, 1
    the image."""
    span: int = Field(1, ge=1)
    """Sampling steps from one level to the other."""
    guidance: float | None = Field(None, ge=1)
    """Guidance of the trained call (paper: rollout 1, trained 3.5 with FLUX.1-dev); not given, that of sampling."""

    @field_validator("range")
    @classmethod
    def _rises(cls, ends: tuple[float, float]) -> tuple[float, float]:
        low, high = ends
        if not 0 < low < high <= 1:
            raise ValueError(f"must rise within 0 to 1 and begin above 0, got {low:g} to {high:g}")
        return ends

    def conflicts(self, sampling: Sampling) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().conflicts(sampling)
        if self.positive == self.negative:
            yield ("algorithm", "negative"), "is what positive is, so r+ and r- are one; take words to move away from"
        if not self.starts(sampling.steps):
            low, high = self.range
            said = (
                f"no {self.span} of the {sampling.steps} sampling steps lie within {low:g} to {high:g}; widen the "
                "range, shorten the span or sample more steps"
            )
            yield ("algorithm", "range"), said
        if self.guidance is not None and self.guidance == sampling.guidance:
            yield ("algorithm", "guidance"), "is that of sampling, which is the default; remove it"
        idle = set(self.k) - set(self.trained)
        for branch in self.changed(sorted(idle)):
            yield ("algorithm", branch), f"has no effect with branches: {self.branches}; remove it"

    def starts(self, steps: int) -> list[int]:
        """Steps at whose start the noisier level may lie."""
        low, high = self.range
        first, last = math.ceil(low * steps - 1e-9), math.floor(high * steps + 1e-9)
        return list(range(first, last - self.span + 1))

    @property
    def k(self) -> dict[str, tuple[float, float]]:
        return {"denoising": self.denoising, "inversion": self.inversion}

    @property
    def trained(self) -> tuple[str, ...]:
        return tuple(self.k) if self.branches == "both" else (self.branches,)

    def levels(self, steps: int) -> int:
        return len(self.trained)

    def forwards(self, steps: int, updates: int, passes: int) -> dict[str, float]:
        return {"to train": float(len(self.trained) * passes)}

    def kept(self, steps: int, seed: int, epoch: int) -> list[int]:
        return []

    def losses(self, policy: Policy, batch: Rollout, memory: Memory) -> Iterator[Loss]:
        import torch

        from diffalign.algorithms._scores import Draws
        from diffalign.schedules import noised

        assert batch.advantages is not None
        cond, x0 = batch.cond, batch.x0
        own = policy.denoiser(cond) if self.guidance is None else policy.guided(cond, self.guidance)
        schedule = own.schedule
        draw, sigmas = Draws(batch.seeds, batch.turn, ALIGNED), batch.sigmas.to(x0.device)
        starts = torch.tensor(self.starts(len(sigmas) - 1), device=x0.device)
        nth = (draw.uniform(x0) * len(starts)).long().clamp(max=len(starts) - 1)
        high, low, noise = sigmas[starts[nth]], sigmas[starts[nth] + self.span], draw.normal(x0)
        for branch in self.trained:
            s, t = (high, low) if branch == "denoising" else (low, high)
            words = (self.positive, self.negative) if branch == "denoising" else (self.negative, self.positive)
            predicted = own.predict(noised(schedule, x0, noise, s), s)
            images = policy.decode(recovered(schedule, *predicted, noise, t))
            first, last = self.k[branch]
            k = first + (last - first) * nth.to(images) / max(1, len(starts) - 1)
            loss, metrics = self.ascent(partial(compared, policy, batch, images, words, k))
            parts = len(self.trained)
            yield Loss(unrewarded, batch.advantages, loss / parts, shared(metrics, parts))


def recovered(schedule: Schedule, x0: Tensor, eps: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x0hat [B, ...] of the step to t [B] that the prediction (x0, eps) takes, `noise` being what was put in."""
    from diffalign.schedules import noised, per_sample, spread

    level = spread(per_sample(t, x0), x0)
    return (noised(schedule, x0, eps, t) - schedule.sigma(level) * noise) / schedule.alpha(level)


def relative(preferred: Tensor, other: Tensor, k: Tensor | float) -> Tensor:
    """(1 + k) r+ - r-, [B]; NaN where one of them does not apply."""
    return (1 + k) * preferred - other


def compared(policy: Policy, batch: Rollout, images: Tensor, words: tuple[str, str], k: Tensor, reward: str) -> Tensor:
    """The relative score [B] of a reward for the prompts after the first words, as against the second ones."""
    preferred, other = (policy.score(reward, images, batch, [w + p for p in batch.prompts]) for w in words)
    return relative(preferred, other, k)
