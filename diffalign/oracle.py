"""A closed-form denoiser: on a Gaussian mixture every quantity that sampling and steering estimate is known exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffalign.samplers import randn
from diffalign.schedules import RectifiedFlow, Schedule, per_sample, upcast


class Posterior(NamedTuple):
    """p(x0 | x) = sum_k softmax(log_w)_k N(x0_k, var_k I); logsumexp(log_w) is log p_s(x)."""

    log_w: Tensor  # [B, K]
    x0: Tensor  # [B, K, D]
    eps: Tensor  # [B, K, D] the noise that goes with x0
    var: Tensor  # [B, K]


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """p(x0) = sum_k w_k N(mu_k, sd_k^2 I) seen through a noise schedule. It is a `Denoiser`.

    States are [B, ...] with D elements a sample; results keep their shape, device and precision (at least fp32).
    Rewards are linear, r(x0) = a.x0 with a [D], and count with strength lam.
    """

    weights: Tensor  # [K], sum 1
    means: Tensor  # [K, D]
    stds: Tensor  # [K]
    schedule: Schedule = field(default_factory=RectifiedFlow)

    def posterior(self, x: Tensor, s: Tensor | float) -> Posterior:
        """Bayes' rule per component, x | k ~ N(alpha mu_k, (alpha^2 sd_k^2 + sigma^2) I), without dividing by sigma."""
        flat = upcast(x).flatten(1)
        weights, means, sd2 = self.weights.to(flat), self.means.to(flat), self.stds.to(flat).square()
        level = per_sample(s, flat)[:, None]
        alpha, sigma = self.schedule.alpha(level), self.schedule.sigma(level)
        total = alpha**2 * sd2 + sigma**2
        off = flat[:, None] - alpha[..., None] * means
        log_w = weights.log() - off.square().sum(2) / (2 * total) - means.shape[1] / 2 * (2 * math.pi * total).log()
        gain, share = alpha * sd2 / total, sigma / total
        return Posterior(log_w, means + gain[..., None] * off, share[..., None] * off, sd2 * sigma**2 / total)

    def predict(self, x: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        """(E[x0 | x], E[eps | x]), the output of a perfect model."""
        p = self.posterior(x, s)
        w = p.log_w.softmax(1)[..., None]
        return (w * p.x0).sum(1).reshape(x.shape), (w * p.eps).sum(1).reshape(x.shape)

    def log_prob(self, x: Tensor, s: Tensor | float = 0.0) -> Tensor:
        """log p_s(x) [B], summed over dimensions; s = 0 is clean data for a flow, s < 0 for VP."""
        return self.posterior(x, s).log_w.logsumexp(1)

    def sample(self, n: int, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """[n, D] exact draws of x0, in the dtype of the means."""
        spread_out = self.means.expand(n, *self.means.shape), self.stds.expand(n, -1)
        return _draw(self.weights.expand(n, -1), *spread_out, generators)

    def sample_posterior(
        self, x: Tensor, s: Tensor | float, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """x0 ~ p(x0 | x) [B, ...]. With a ddim(eta=1) step from each draw a chain ends in p(x0) exactly, whatever T."""
        p = self.posterior(x, s)
        return _draw(p.log_w.softmax(1), p.x0, p.var.sqrt(), generators).reshape(x.shape)

    def tilted(self, a: Tensor, lam: float = 1.0) -> GaussianMixture:
        """The mixture proportional to p(x0) exp(lam a.x0): what steering must reach."""
        slope = lam * a.to(self.means)
        weights = _tilt(self.weights.log(), self.means, self.stds.square(), slope).softmax(0)
        return replace(self, weights=weights, means=self.means + self.stds.square()[:, None] * slope)

    def log_z(self, a: Tensor, lam: float = 1.0) -> float:
        """log E[exp(lam a.x0)]: what an unbiased evidence estimate averages to, in exp space."""
        return float(_tilt(self.weights.log(), self.means, self.stds.square(), lam * a.to(self.means)).logsumexp(0))

    def soft_value(self, x: Tensor, s: Tensor | float, a: Tensor, lam: float = 1.0) -> Tensor:
        """V(x, s) = (1 / lam) log E[exp(lam a.x0) | x] [B]: the perfect twist."""
        p = self.posterior(x, s)
        return _tilt(p.log_w.log_softmax(1), p.x0, p.var, lam * a.to(p.x0)).logsumexp(1) / lam


def _tilt(log_w: Tensor, means: Tensor, var: Tensor, slope: Tensor) -> Tensor:
    """log of the integral of each component times exp(slope.x0)."""
    return log_w + means @ slope + var * slope.square().sum() / 2


def _draw(weights: Tensor, means: Tensor, stds: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """weights, stds [B, K], means [B, K, D] -> [B, D]. One normal draw more than D picks the component."""
    n, count, dim = means.shape
    noise = randn((n, dim + 1), generators, means.device, means.dtype)
    u = torch.special.ndtr(noise[:, :1])
    k = (weights.cumsum(1) < u).sum(1).clamp(max=count - 1)
    rows = torch.arange(n, device=means.device)
    return means[rows, k] + stds[rows, k, None] * noise[:, 1:]
