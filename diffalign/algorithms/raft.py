"""RAFT (arXiv 2304.06767): supervised fine-tuning on the best of the model's own images, again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from pydantic import ConfigDict, Field

from diffalign.algorithms import Memory, Policy
from diffalign.algorithms._forward import ForwardProcess, Noised, reference_velocity, squared
from diffalign.algorithms._timesteps import Timesteps

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.types import Denoiser, Rollout


class RAFT(ForwardProcess):
    """L = A mean_d (v - (eps - x0))^2 + kl A mean_d (v - v_ref)^2, A = 1 for the best image of each prompt, else 0.

    Which images are kept is the estimator's matter: `advantage: sft`, ties included. The others are not run through the
    model. There is nothing to push away from, which makes it the baseline that every method should beat.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)
    estimators: ClassVar[tuple[str, ...]] = ("sft",)

    timesteps: Timesteps = Timesteps(choice="stratified", count=6)
    """Noise levels that each image is trained at."""
    kl: float = Field(0.0, ge=0)
    """Weight of the velocity's squared distance to the model before training; 0 skips that forward pass."""

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0

    def affine(self, updates: int) -> bool:
        return True

    def trains_on(self, rollout: Rollout, memory: Memory, update: int) -> Tensor:
        return ~rollout.flat

    def terms(
        self, denoiser: Denoiser, policy: Policy, batch: Rollout, memory: Memory, at: Noised, k: int
    ) -> tuple[Callable[[Tensor], Tensor], Tensor | None, dict[str, Tensor]]:
        x0, eps = denoiser.predict(at.x, at.s)
        error = squared(eps - x0, at.eps - at.x0)
        if not self.needs_reference:
            return error.mul, None, {"matching": error}
        kl = squared(eps - x0, reference_velocity(denoiser, policy, at))
        return (error + self.kl * kl).mul, None, {"matching": error, "kl": kl}
