"""Advantage Weighted Matching (arXiv 2509.25050): policy gradients whose log-likelihood is the flow-matching loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffalign.algorithms import Memory, Policy
from diffalign.algorithms._forward import ForwardProcess, Noised, reference_velocity, squared
from diffalign.algorithms._shadow import Decay, Shadow
from diffalign.algorithms._timesteps import Timesteps
from diffalign.algorithms._weighted_matching import Weighting, awm_loss, drift, log_likelihood

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffalign.types import Denoiser, Rollout


class KL(BaseModel):
    """Penalty for leaving the model before training: weight mean_d (v - v_ref)^2."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    weight: float = Field(0.001, ge=0)
    """Weight of the penalty; 0 skips the reference forward (paper: 0.001 to 0.003)."""
    norm: Literal["velocity", "elbo"] = "velocity"
    """velocity: as it is; elbo: over 2 * 0.49 t / (1 - min(t, 0.99)), the variance of Flow-GRPO's steps at eta 0.7."""


class AWM(ForwardProcess):
    """PPO on log p(x0) ~ -w(l, t), l = mean_d (v - (eps - x0))^2 at fresh noise, t the noise level:

        rho = exp(log p - log p_old),   L = max(-A rho, -A clip(rho, 1 - clip, 1 + clip)),   A = clip(A, -c, c) / c
            + kl.weight mean_d (v - v_ref)^2 + anchor mean_d (v - v_slow)^2

    In an epoch's first update log p_old is the current one, so that the gradient is A times that of w; for later ones
    it is computed before the first, at the same noise. v_slow is a slow copy of the weights. Without `anchor` and
    with a large `clip` training is unstable.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    timesteps: Timesteps = Timesteps(choice="stratified", count=6, range=(0.1, 0.9))
    """Noise levels that each image is trained at."""
    weighting: Weighting = "ghuber"
    """w: uniform l; t: t l; t2: t^2 l; huber: t (sqrt(l + 1e-10) - 1e-5); ghuber: (t/p) ((l + 1e-10)^p - 1e-10^p)."""
    power: float = Field(0.25, gt=0, le=1)
    """p of ghuber."""
    clip: float = Field(1.0, gt=0)
    """PPO clip range of rho; at 1 it hardly ever acts."""
    advantage_clip: float = Field(5.0, gt=0)
    """c: the advantage that counts as 1; larger ones are cut."""
    kl: KL = KL()
    """Penalty for leaving the model before training."""
    anchor: float = Field(1.0, ge=0)
    """Weight of the distance to the slow copy of the weights; 0 keeps none."""
    slow: Decay = Decay(rate=0.001, cap=0.3)
    """How that copy follows after every optimizer step."""

    @model_validator(mode="after")
    def _apply(self) -> AWM:
        if self.weighting != "ghuber" and self.changed(("power",)):
            raise ValueError(f"power has no effect with the weighting '{self.weighting}'; remove it")
        if not self.anchor and self.changed(("slow",)):
            raise ValueError("slow has no effect with anchor 0; remove it")
        return self

    @property
    def needs_reference(self) -> bool:
        return self.kl.weight > 0

    @property
    def copies(self) -> tuple[str, ...]:
        return ("slow copy",) if self.anchor else ()

    def forwards(self, steps: int, updates: int, passes: int) -> dict[str, float]:
        own, later = super().forwards(steps, updates, passes), passes - 1 / updates
        if later:
            own["of the old policy"] = later * self.levels(steps)
        if self.anchor and self.slow.lags:
            own["of the slow copy"] = passes * self.levels(steps)
        return own

    def affine(self, updates: int) -> bool:
        return updates == 1 or self.clip >= 1  # rho is 1, or between 0 and 2 unless the weights leap

    def start(self, pipeline: Any, parameters: dict[str, nn.Parameter]) -> Memory:
        return Shadow(parameters, self.slow, "step", acts=False) if self.anchor else Memory()

    def trains_on(self, rollout: Rollout, memory: Memory, update: int) -> Tensor:
        return ~rollout.flat | (self.needs_reference or self.anchor > 0)

    def behaviour(self, policy: Policy, batch: Rollout) -> dict[str, Tensor]:
        import torch

        denoiser = policy.denoiser(batch.cond, guided=False)
        every = [self.log_prob(*denoiser.predict(at.x, at.s), at) for at in self.noised(denoiser, batch)]
        return {"log_prob": torch.stack(every, 1)}

    def log_prob(self, x0: Tensor, eps: Tensor, at: Noised) -> Tensor:
        """[B], up to a constant."""
        return log_likelihood(squared(eps - x0, at.eps - at.x0), at.s, self.weighting, self.power)

    def terms(
        self, denoiser: Denoiser, policy: Policy, batch: Rollout, memory: Memory, at: Noised, k: int
    ) -> tuple[Callable[[Tensor], Tensor], Tensor | None, dict[str, Tensor]]:
        import torch

        x0, eps = denoiser.predict(at.x, at.s)
        log_prob = self.log_prob(x0, eps, at)
        ratio = (log_prob - (batch.old["log_prob"][:, k] if batch.old else log_prob.detach())).exp()
        objective = partial(awm_loss, ratio, self.clip, self.advantage_clip)
        metrics, penalties = {"log_prob": log_prob, "ratio": ratio}, []
        if self.needs_reference:
            metrics["kl"] = drift(eps - x0, reference_velocity(denoiser, policy, at), at.s, self.kl.norm)
            penalties.append(self.kl.weight * metrics["kl"])
        if isinstance(memory, Shadow) and not memory.equal:
            with torch.no_grad(), memory.applied():
                slow_x0, slow_eps = denoiser.predict(at.x, at.s)
            metrics["anchor"] = squared(eps - x0, slow_eps - slow_x0)
            penalties.append(self.anchor * metrics["anchor"])
        return objective, torch.stack(penalties).sum(0) if penalties else None, metrics
