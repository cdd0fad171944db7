"""Flow-GRPO (arXiv 2505.05470): policy gradients through the stochastic steps of a diffusion or flow sampler."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffalign.algorithms import Algorithm, Loss, Memory, Policy

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.config import Sampling
    from diffalign.types import Denoiser, Rollout, Step


class Window(BaseModel):
    """Only `size` neighbouring steps are stochastic and trained (Flow-GRPO-Fast); their start is drawn each epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    size: int = Field(3, ge=1)
    """Number of steps."""
    range: tuple[int, int] = (0, 5)
    """The window lies within [first, last) of the step indices."""

    @model_validator(mode="after")
    def _fits(self) -> Window:
        first, last = self.range
        if not 0 <= first <= last - self.size:
            raise ValueError(f"a window of {self.size} steps does not fit in the range [{first}, {last})")
        return self


class KL(BaseModel):
    """Penalty for leaving the reference policy, the model before training."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    weight: float = Field(0.0, ge=0)
    """Weight of the penalty; 0 skips the reference forward."""
    norm: Literal["code", "exact", "velocity"] = "code"
    """code: as Flow-GRPO's program, the exact KL times the step length; exact: the Gaussian KL of the step; velocity:
    the squared velocity difference."""


class GRPO(Algorithm):
    """PPO-clipped policy gradient on single denoising steps with group-relative advantages.

    For every stored step, with rho = exp(log p - log p_old): L = max(-A rho, -A clip(rho, 1 - clip, 1 + clip))
    + kl.weight KL, averaged over images and steps. In the first update log p_old is the current one, so rho is
    exactly 1. log p is a mean over latent dimensions, which is why clip is so small. The last step is never trained:
    its noise is so small that its log-probability explodes.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)
    trajectory: ClassVar[bool] = True

    clip: float = Field(1e-4, gt=0)
    """PPO clip range of the probability ratio."""
    kl: KL = KL()
    """Penalty for leaving the reference policy."""
    window: Window | None = None
    """Stochastic, trained steps; not given, all but the last."""

    @property
    def needs_reference(self) -> bool:
        return self.kl.weight > 0

    def conflicts(self, sampling: Sampling) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().conflicts(sampling)
        if self.window is not None and self.window.range[1] >= sampling.steps:
            ends, last = self.window.range[1], sampling.steps - 1
            said = f"ends at {ends}, but the last of {sampling.steps} steps is never trained; end at {last}"
            yield ("algorithm", "window", "range"), said

    def stochastic(self, steps: int, seed: int, epoch: int) -> list[int]:
        if self.window is None:
            return list(range(steps - 1))
        first, last = self.window.range
        start = random.Random(f"window {seed} {epoch}").randint(first, last - self.window.size)
        return list(range(start, start + self.window.size))

    def trains_on(self, rollout: Rollout) -> Tensor:
        assert rollout.advantages is not None
        return (rollout.advantages != 0) | self.needs_reference

    def losses(self, policy: Policy, batch: Rollout, memory: Memory) -> Iterator[Loss]:
        assert batch.states is not None and batch.log_probs is not None and batch.advantages is not None
        denoiser = policy.denoiser(batch.cond)
        for k, i in enumerate(batch.kept.tolist()):
            x, x_next = batch.states[:, k, 0], batch.states[:, k, 1]
            s, s_next = batch.sigmas[i], batch.sigmas[i + 1]

            taken, velocity = score(denoiser, policy, x, x_next, s, s_next)
            old = taken.log_prob.detach()
            ratio = (taken.log_prob - old).exp()
            loss = policy_loss(batch.advantages, ratio, self.clip)
            metrics = {
                "ratio": ratio.detach(),
                "clip_fraction": ((ratio.detach() - 1).abs() > self.clip).float(),
                "logp_gap": (old - batch.log_probs[:, k]).abs(),
            }
            if self.needs_reference:
                import torch

                with torch.no_grad(), policy.reference():
                    reference, reference_velocity = score(denoiser, policy, x, x_next, s, s_next)
                if self.kl.norm == "velocity":
                    kl = (velocity - reference_velocity).square().flatten(1).mean(1)
                else:
                    kl = mean_kl(taken.mean, reference.mean, taken.std)
                    if self.kl.norm == "code" and policy.kernel in ("flow_sde", "dance"):
                        kl = kl * (s - s_next)  # the program divides by g^2 where the KL has g^2 times the step
                loss = loss + self.kl.weight * kl
                metrics["kl"] = kl.detach()
            yield Loss(loss / len(batch.kept), {name: m / len(batch.kept) for name, m in metrics.items()})


def score(
    denoiser: Denoiser, policy: Policy, x: Tensor, x_next: Tensor, s: Tensor, s_next: Tensor
) -> tuple[Step, Tensor]:
    """The stored transition x -> x_next under the current weights, and the velocity eps - x0 at x."""
    from diffalign.samplers import step

    x0, eps = denoiser.predict(x, s)
    return step(denoiser.schedule, x0, eps, x, s, s_next, policy.kernel, policy.eta, next=x_next), eps - x0


def policy_loss(advantages: Tensor, ratio: Tensor, clip: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), all [B]."""
    return (-advantages * ratio).maximum(-advantages * ratio.clamp(1 - clip, 1 + clip))


def mean_kl(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """KL of two Gaussians of equal std, per latent dimension: mean_d (mu - mu_ref)^2 / (2 std^2), [B]."""
    return ((mean - reference).square() / (2 * std.square())).flatten(1).mean(1)
