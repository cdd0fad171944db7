"""The arithmetic of distribution matching: DMD2 (arXiv 2405.14867) and AC-DMD (2605.26108); losses are [B].

A sample x_s of the generator at noise level s is noised further to t. At s = 0, a finished image, this is DMD2; at
s > 0 the generator's own noisy state is compared with the teacher's law at that level: a sub-interval [s, 1] a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.samplers import step
from diffalign.schedules import RectifiedFlow, Schedule, per_sample, spread, upcast
from diffalign.types import Denoiser

LARGEST = 10.0  # of the weight 1 / std^2
SMALLEST = 1e-12  # of std^2
FIRST, LAST = 20.0, 980.0  # timesteps between which samples are noised
GAP = 10.0  # timesteps that they are noised at least


@dataclass(frozen=True)
class Renoised:
    """x_t = a x_s + std n, a = alpha(t) / alpha(s), std^2 = sigma(t)^2 - a^2 sigma(s)^2."""

    x: Tensor  # [B, ...]
    s: Tensor  # [B]
    t: Tensor  # [B]
    noise: Tensor  # [B, ...] n
    std: Tensor  # [B, 1, ...]
    target: Tensor  # [B, ...] std u, u the velocity dx_t/dt at fixed x_s and n; of a VP model n, the noise


def levels(u: Tensor, s: Tensor | float) -> Tensor:
    """t = U[1000 s + 10, 1000] / 1000 from u = U[0, 1], cut to [.02, .98]; u [B], s [B] or scalar."""
    start = 1000 * torch.as_tensor(s, dtype=u.dtype, device=u.device) + GAP
    span = 1000 - start
    return torch.where(span > 0, u * span + start, start + 1).clamp(FIRST, LAST) / 1000


def renoised(schedule: Schedule, x: Tensor, s: Tensor | float, t: Tensor | float, noise: Tensor) -> Renoised:
    """A sample x [B, ...] at level s, carried to t > s with noise [B, ...].

    The expectation of u given x_t is the velocity of the law that x_s has, whatever s is, so that one network learns
    all of them. u = -x_s / (1 - s) + (t + (1 - t) s^2 / (1 - s)^2) n / std.
    """
    x = upcast(x)
    s, t, noise = per_sample(s, x), per_sample(t, x), noise.to(x.dtype)
    a = spread(schedule.alpha(t) / schedule.alpha(s), x)
    std = (spread(schedule.sigma(t), x) ** 2 - (a * spread(schedule.sigma(s), x)) ** 2).clamp(min=SMALLEST).sqrt()
    target = noise
    if isinstance(schedule, RectifiedFlow):
        r, u = spread(s, x), spread(t, x)
        target = (u + (1 - u) * r**2 / (1 - r) ** 2) * noise - std / (1 - r) * x
    return Renoised(a * x + std * noise, s, t, noise, std, target)


def denoising_loss(schedule: Schedule, x0: Tensor, eps: Tensor, at: Renoised, weighted: bool = True) -> Tensor:
    """mean_d min(1 / std^2, 10) (std v - std u)^2: u alone grows without bound as t comes near s.

    Not `weighted`: mean_d (v - u)^2. Of a VP model mean_d (eps - n)^2 either way, at s = 0.
    """
    if not isinstance(schedule, RectifiedFlow):
        return (eps - at.target).square().flatten(1).mean(1)
    v = eps - x0
    if not weighted:
        return (v - at.target / at.std).square().flatten(1).mean(1)
    weight = (1 / at.std.square()).clamp(max=LARGEST)
    return (weight * (at.std * v - at.target).square()).flatten(1).mean(1)


def consistency(
    denoiser: Denoiser,
    at: Renoised,
    x0: Tensor,
    eps: Tensor,
    back: Sequence[Tensor],
    noises: Sequence[Sequence[Tensor]],
    eta: float,
    through: bool = False,
) -> Tensor:
    """How far the clean prediction is from its mean after a stochastic step back: mean_d (h1 - h) (h2 - h).

    h is the prediction x0 at x_t; h1 and h2 those after CPS moves from it by independent noise: an unbiased estimate of
    |E h' - h|^2, which may be negative. One path gives mean_d (h1 - h)^2, too large by the variance of h'.

    Args:
        x0, eps: the prediction at `at`, [B, ...], with its gradient.
        back: of each move the timesteps it goes back by, [B]; the paths share them.
        noises: of each path the noise of its moves, each [B, ...].
        through: gradients also pass through the moves.
    """
    ends = []
    for path in noises:
        x, t, clean, noise = at.x, at.t, x0, eps
        for k, (by, drawn) in enumerate(zip(back, path, strict=True)):
            after = (1000 * t - by).clamp(min=0) / 1000
            with nullcontext() if through else torch.no_grad():
                move = step(denoiser.schedule, clean, noise, x, t, after, "cps", eta, next=x)
                x, t = move.mean + move.std * drawn, after
            last = k == len(back) - 1
            with nullcontext() if through or last else torch.no_grad():
                clean, noise = denoiser.predict(x, t)
        ends.append(clean)
    return ((ends[0] - x0) * (ends[-1] - x0)).flatten(1).mean(1)


def matching_gradient(x: Tensor, fake: Tensor, real: Tensor, normalised: bool = True) -> Tensor:
    """(fake - real) / mean_d |x - real|, [B, ...]: descent moves x towards `real`. 0 where it is no number."""
    gradient = fake - real
    if normalised:
        gradient = gradient / (x - real).abs().flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
    return gradient.detach().nan_to_num(nan=0.0)


def pulled(x: Tensor, gradient: Tensor) -> Tensor:
    """mean_d (x - sg(x - g))^2 / 2, whose gradient with respect to x is g / numel."""
    return 0.5 * (x - (x - gradient).detach()).square().flatten(1).mean(1)


def projected(schedule: Schedule, prediction: tuple[Tensor, Tensor], at: Renoised, noise: Tensor, eta: float) -> Tensor:
    """A prediction at x_t taken back to s by one CPS step with the given noise, [B, ...]."""
    taken = step(schedule, *prediction, at.x, at.t, at.s, "cps", eta, next=at.x)
    return taken.mean + taken.std * noise


def matching_loss(
    schedule: Schedule,
    x: Tensor,
    at: Renoised,
    fake: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    noise: Tensor,
    eta: float,
    normalised: bool = True,
) -> Tensor:
    """Pulls x [B, ...], a sample at level s, from where the fake score sees x_t's origin to where the teacher does.

    Both predictions are taken back to s with one noise, which cancels in their difference, not in the norm.
    """
    with torch.no_grad():
        y_fake, y_teacher = (projected(schedule, p, at, noise, eta) for p in (fake, teacher))
        gradient = matching_gradient(x, y_fake, y_teacher, normalised)
    return pulled(x, gradient)
