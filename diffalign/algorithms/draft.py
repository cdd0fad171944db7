"""DRaFT (arXiv 2309.17400) and AlignProp (2310.03739): the reward's gradient through the last steps of sampling."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field

from diffalign.algorithms import Loss, Memory, Policy, unrewarded
from diffalign.algorithms._reward_gradient import CLEAN, RENOISED, Recomputed, RewardGradient, shared

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.sections import Sampling
    from diffalign.types import Denoiser, Rollout


class DRaFT(RewardGradient):
    """Maximise r(x0) by backpropagation through the last K deterministic steps, x' = alpha' x0hat + sigma' eps.

    K = 1 is DRaFT-1, K = T full backpropagation, and a K drawn from 0 to T in each epoch (0 counts as 1) AlignProp's
    randomised truncation. With `renoised` it is DRaFT-LV: the image itself is noised n times, to where the last K steps
    begin, one step leads back from each, and the gradients are averaged; it needs no memory for a trajectory.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    steps: int = Field(1, ge=1)
    """K. A flow model's scheduler may end in a step from a noise level of 0.001, in which nothing can change: take
    2 or more then."""
    randomised: bool = False
    """AlignProp: draw K in each epoch; `steps` is then not to be given."""
    renoised: int = Field(0, ge=0)
    """DRaFT-LV: noised copies of each image (paper: 2); 0: the steps as they were sampled."""
    checkpoint: bool = False
    """Compute each step's activations again in the backward pass, so that memory does not grow with K."""

    def conflicts(self, sampling: Sampling) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().conflicts(sampling)
        if self.randomised and self.steps > 1:
            yield ("algorithm", "steps"), "has no effect with randomised, which draws it; remove it"
        if self.steps > sampling.steps:
            yield ("algorithm", "steps"), f"{self.steps} exceeds the {sampling.steps} sampling steps"
        if self.checkpoint and (self.renoised or (self.steps == 1 and not self.randomised)):
            yield ("algorithm", "checkpoint"), "has no effect on a single step; remove it"
        if self.renoised:  # nothing is sampled again
            return
        if not sampling.deterministic and sampling.eta > 0:
            said = (
                f"'{self.name}' takes the last steps again, which must then be deterministic; take ode, or set renoised"
            )
            yield ("sampling", "kernel"), said
        if sampling.kernel == "dpm2" and (self.steps > 1 or self.randomised):
            said = "dpm2 looks back at the step before the first one trained; take ode, or train one step"
            yield ("sampling", "kernel"), said

    def trained(self, steps: int, seed: int, epoch: int) -> int:
        """K of an epoch."""
        if not self.randomised:
            return self.steps
        return max(1, random.Random(f"truncation {seed} {epoch}").randint(0, steps))

    def kept(self, steps: int, seed: int, epoch: int) -> list[int]:
        return [steps - self.trained(steps, seed, epoch)]

    def levels(self, steps: int) -> int:
        return max(1, self.renoised)

    def forwards(self, steps: int, updates: int, passes: int) -> dict[str, float]:
        mean = (1 + steps * (steps + 1) / 2) / (steps + 1)
        calls = self.renoised or (mean if self.randomised else self.steps)
        return {"to train": float(calls * passes)}

    def graphs(self, steps: int) -> dict[str, int]:
        whole = 1 if self.renoised or self.checkpoint else steps if self.randomised else self.steps
        return {"training": whole}

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        found, level = super().warnings(metrics), metrics.get("level", 1.0)
        if level < CLEAN and not self.randomised:
            found["level"] = (
                f"the trained steps begin at noise level {level:.2g}, where the image can hardly change; raise "
                "algorithm.steps"
            )
        return found

    def losses(self, policy: Policy, batch: Rollout, memory: Memory) -> Iterator[Loss]:
        assert batch.advantages is not None
        denoiser = policy.denoiser(batch.cond)
        level = batch.sigmas[int(batch.kept[0])].to(batch.x0).expand(len(batch))
        parts = max(1, self.renoised)
        for x0 in self.images(denoiser, batch):
            images = policy.decode(x0)
            loss, metrics = self.ascent(partial(policy.score, images=images, batch=batch))
            yield Loss(unrewarded, batch.advantages, loss / parts, shared({**metrics, "level": level}, parts))

    def images(self, denoiser: Denoiser, batch: Rollout) -> Iterator[Tensor]:
        """Latents [B, ...] of the image with their gradient: one, or a prediction from each noised copy."""
        from diffalign.algorithms._scores import Draws
        from diffalign.samplers import denoise, drain
        from diffalign.schedules import noised

        assert batch.states is not None
        i = int(batch.kept[0])
        if not self.renoised:
            again = Recomputed(denoiser) if self.checkpoint else denoiser
            yield drain(denoise(again, batch.states[:, 0, 0], batch.sigmas[i:]))
            return
        draw = Draws(batch.seeds, batch.turn, RENOISED)
        for _ in range(self.renoised):
            x = noised(denoiser.schedule, batch.x0, draw.normal(batch.x0), batch.sigmas[i])
            yield denoiser.predict(x, batch.sigmas[i])[0]
