"""ReFL (arXiv 2304.05977): the reward's gradient at the clean prediction of one late, randomly chosen step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from diffalign.algorithms import Loss, Memory, Policy, unrewarded
from diffalign.algorithms._reward_gradient import CLEAN, PAIRED, RewardGradient

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffalign.algorithms._pairs import Pairs
    from diffalign.sections import Sampling
    from diffalign.types import Rollout


class Pretraining(BaseModel):
    """The denoising loss on pictures of the user's, which keeps the model's images as natural as they were."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    weight: float = Field(0.0, ge=0)
    """Weight of the term; 0 leaves it out."""
    pairs: str | None = None
    """Pictures and their texts: a .jsonl file of {"prompt": ..., "file": ...}, a .json file of {prompt: [file, ...]},
    files relative to its folder, or shapes-train, scenes of the embedded world."""


class ReFL(RewardGradient):
    """Maximise r(x0hat), x0hat being predicted in one step from the noisy state before step j of a sampled trajectory.

    L = relu(margin - r(decode(x0hat))) + pretraining.weight mean_d (v - (eps - y))^2, y a picture of the user's at a
    noise level drawn uniformly. j is drawn in each epoch from the late steps, where x0hat is close to an image. For a
    flow d x0hat / dv = -s, s the noise level at j. The published program leaves the second term out, and its models
    get worse for it.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    range: tuple[float, float] = (0.75, 1.0)
    """The part of the sampling steps that j is drawn from: 0 is pure noise, 1 the image (paper: 30 to 39 of 40)."""
    finish: bool = True
    """Sample on after step j, so that finished images are scored and logged; false: stop there, as the paper does, and
    log the scores of noisy ones."""
    pretraining: Pretraining = Pretraining()
    """The denoising loss beside it."""

    @field_validator("range")
    @classmethod
    def _rises(cls, ends: tuple[float, float]) -> tuple[float, float]:
        low, high = ends
        if not 0 <= low < high <= 1:
            raise ValueError(f"must rise within 0 to 1, got {low:g} to {high:g}")
        return ends

    def conflicts(self, sampling: Sampling) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().conflicts(sampling)
        if not self.late(sampling.steps):
            low, high = self.range
            said = f"no step of {sampling.steps} lies within {low:g} to {high:g}; widen it, or sample more steps"
            yield ("algorithm", "range"), said
        if self.pretraining.weight and self.pretraining.pairs is None:
            said = "needs pictures: name them under pretraining.pairs, or set the weight to 0"
            yield ("algorithm", "pretraining", "weight"), said
        if self.pretraining.pairs is not None and not self.pretraining.weight:
            yield ("algorithm", "pretraining", "pairs"), "has no effect at weight 0; set pretraining.weight, such as 1"

    def late(self, steps: int) -> list[int]:
        """What j is drawn from."""
        low, high = self.range
        return [i for i in range(steps) if low <= i / steps < high]

    def kept(self, steps: int, seed: int, epoch: int) -> list[int]:
        return [random.Random(f"refl {seed} {epoch}").choice(self.late(steps))]

    def until(self, steps: int, seed: int, epoch: int) -> int | None:
        return None if self.finish else self.kept(steps, seed, epoch)[0] + 1

    def forwards(self, steps: int, updates: int, passes: int) -> dict[str, float]:
        pairs = {"of the pictures": float(passes)} if self.pretraining.weight else {}
        return {"to train": float(passes)} | pairs

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        found, level = super().warnings(metrics), metrics.get("level", 1.0)
        if level < CLEAN:
            found["level"] = (
                f"the step trained begins at noise level {level:.2g}, where the image can hardly change; let "
                "algorithm.range end before 1"
            )
        return found

    def start(self, pipeline: Any, parameters: dict[str, nn.Parameter]) -> Memory:
        from diffalign.algorithms._pairs import load

        source = self.pretraining.pairs
        return Memory() if source is None else Pictures(load(source), pipeline)

    def losses(self, policy: Policy, batch: Rollout, memory: Memory) -> Iterator[Loss]:
        assert batch.advantages is not None and batch.states is not None
        s = batch.sigmas[int(batch.kept[0])]
        x0, _ = policy.denoiser(batch.cond).predict(batch.states[:, 0, 0], s)
        images = policy.decode(x0)
        loss, metrics = self.ascent(partial(policy.score, images=images, batch=batch))
        level = s.to(loss).expand(len(batch))
        yield Loss(unrewarded, batch.advantages, loss, {**metrics, "level": level})
        if isinstance(memory, Pictures):
            error = memory.denoising(policy, batch)
            metrics = {"pretraining": error.detach()}
            yield Loss(unrewarded, batch.advantages, self.pretraining.weight * error, metrics)


@dataclass
class Pictures(Memory):
    """The user's pictures with their texts."""

    pairs: Pairs
    pipeline: Any

    def denoising(self, policy: Policy, batch: Rollout) -> Tensor:
        """mean_d (v - (eps - y))^2, [B]: each sample's seed draws a picture, a noise level and the noise."""
        from diffalign.algorithms._forward import squared
        from diffalign.algorithms._scores import Draws
        from diffalign.schedules import noised

        draw = Draws(batch.seeds, batch.turn, PAIRED)
        nth = (draw.uniform(batch.x0) * len(self.pairs)).long().clamp(max=len(self.pairs) - 1).tolist()
        y = self.pairs.latents(self.pipeline, nth, batch.x0.shape[1:])
        denoiser = policy.denoiser(self.pipeline.encode([self.pairs.texts[i] for i in nth]), guided=False)
        s, eps = draw.uniform(y), draw.normal(y)
        x0, predicted = denoiser.predict(noised(denoiser.schedule, y, eps, s), s)
        return squared(predicted - x0, eps - y)
