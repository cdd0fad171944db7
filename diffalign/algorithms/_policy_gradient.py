"""The arithmetic of policy gradients on denoising steps; all results [B] unless said otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.types import Step


class KL(BaseModel):
    """Penalty for leaving the reference policy, the model before training."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    weight: float = Field(0.0, ge=0)
    """Weight of the penalty; 0 skips the reference forward."""
    norm: Literal["code", "exact", "velocity"] = "code"
    """exact: the Gaussian KL of the step; code: as Flow-GRPO's program, with flow_sde and dance the exact one times the
    step length, else alike; velocity: the squared velocity difference."""


def policy_loss(advantages: Tensor, ratio: Tensor, clip: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), all [B]."""
    return (-advantages * ratio).maximum(-advantages * ratio.clamp(1 - clip, 1 + clip))


def weighted_policy_loss(ratio: Tensor, clip: float, weight: float, advantages: Tensor) -> Tensor:
    """One step's share of the loss of an image, as a function of the advantages."""
    return weight * policy_loss(advantages, ratio, clip)


def guarded_ratio(taken: Step, old_log_prob: Tensor, old_mean: Tensor) -> Tensor:
    """rho = exp(S (log p - log p_old + mean_d (mu - mu_old)^2 / (2 S^2))) = exp(mean_d (mu - mu_old) z), [B].

    z is the noise that was drawn, so log rho has mean 0 at every step, where the plain one is biased below 0
    (GRPO-Guard, arXiv 2510.22319). The upstream program averages the bias over the batch too; here it is per sample.
    """
    std = taken.std.flatten()
    bias = mean_kl(taken.mean, old_mean, taken.std)
    return ((taken.log_prob - old_log_prob + bias) * std).exp()


def mean_kl(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """KL of two Gaussians of equal std, per latent dimension: mean_d (mu - mu_ref)^2 / (2 std^2), [B]."""
    return ((mean - reference).square() / (2 * std.square())).flatten(1).mean(1)
