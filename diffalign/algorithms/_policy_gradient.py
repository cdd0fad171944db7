"""The arithmetic of policy gradients on denoising steps; all results [B] unless said otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.schedules import Schedule
    from diffalign.types import Step


def hindsight(schedule: Schedule, x0: Tensor, x: Tensor, s: Tensor, s_next: Tensor, kernel: str, eta: float) -> Tensor:
    """E[x' | x, x0]: where a step from x leads on average, given that the image became x0; [B, ...].

    The kernel's own mean with the final x0, and the noise that it leaves in x, in the place of the predictions: exact
    for a sampler that reverses the forward process. Since grad log p(x' | x) is linear in x', scoring this x' gives the
    policy gradient's expectation over the noise given (x, x0); what that noise adds beyond the image is variance alone.
    Advantage-weighted matching (arXiv 2509.25050) regresses on the same x0 at fresh noise.
    """
    from diffalign.samplers import step

    eps = (x - schedule.alpha(s) * x0) / schedule.sigma(s)
    return step(schedule, x0, eps, x, s, s_next, kernel, eta).mean


def policy_loss(advantages: Tensor, ratio: Tensor, clip: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), all [B]."""
    return (-advantages * ratio).maximum(-advantages * ratio.clamp(1 - clip, 1 + clip))


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
