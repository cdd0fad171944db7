"""The arithmetic of Advantage Weighted Matching (arXiv 2509.25050); all results [B]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from diffalign.algorithms._forward import squared
from diffalign.algorithms._policy_gradient import policy_loss

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-10  # keeps the roots of the Huber weightings smooth at 0
Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]


def log_likelihood(error: Tensor, t: Tensor, weighting: Weighting, power: float) -> Tensor:
    """-w(l, t); error l [B], t [B]."""
    if weighting == "uniform":
        return -error
    if weighting == "t":
        return -t * error
    if weighting == "t2":
        return -t.square() * error
    p, scale = (0.5, t) if weighting == "huber" else (power, t / power)
    log_prob: Tensor = -scale * ((error + TINY).pow(p) - TINY**p)
    return log_prob


def awm_loss(ratio: Tensor, clip: float, advantage_clip: float, advantages: Tensor) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) with A = clip(A, -c, c) / c, [B]."""
    return policy_loss(advantages.clamp(-advantage_clip, advantage_clip) / advantage_clip, ratio, clip)


def drift(velocity: Tensor, reference: Tensor, t: Tensor, norm: str) -> Tensor:
    """mean_d (v - v_ref)^2, with elbo over 2 s^2, s = 0.7 sqrt(t / (1 - min(t, 0.99))); [B]."""
    distance = squared(velocity, reference)
    return distance / (2 * 0.49 * t / (1 - t.clamp(max=0.99))) if norm == "elbo" else distance
