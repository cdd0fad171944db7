"""Deterministic multistep solvers: better images per model call than the ODE step, and nothing to score."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from torch import Tensor

from diffalign.samplers import count_steps, step
from diffalign.types import Denoiser, Step


def dpm2(denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Generator[Step, Tensor | None, None]:
    """Second-order multistep DPM-Solver++ in data prediction (arXiv 2211.01095), used by DiffusionNFT (2509.16117).

    With lambda = log(alpha / sigma) and h = lambda' - lambda:
    x' = alpha' x0 + sigma' eps + (alpha' - alpha sigma' / sigma) (h / (2 h_prev)) (x0 - x0_prev).
    The first and last steps are first order, and so is the second one of a flow, whose h_prev is infinite. As in
    `samplers.denoise`: x [B, ...], sigmas [T+1]; yields Steps with std 0; `.send(state)` replaces the state and
    forgets x0_prev, which belongs to the old one. Raises UserError for a grid that rises.
    """
    steps = count_steps(sigmas)
    schedule = denoiser.schedule
    grid = sigmas.cpu().double()
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
    log_snr = (alpha / sigma).log()
    x0_prev: Tensor | None = None
    for i in range(steps):
        x0, eps = denoiser.predict(x, sigmas[i])
        taken = step(schedule, x0, eps, x, sigmas[i], sigmas[i + 1])
        if x0_prev is not None and i < steps - 1:
            h, h_prev = log_snr[i + 1] - log_snr[i], log_snr[i] - log_snr[i - 1]
            second = (alpha[i + 1] - alpha[i] * sigma[i + 1] / sigma[i]) * h / (2 * h_prev)
            mean = taken.mean + float(second) * (taken.x0 - x0_prev)
            taken = replace(taken, mean=mean, next=mean)
        redirected = yield taken
        x, x0_prev = (taken.next, taken.x0) if redirected is None else (redirected, None)


SOLVERS = {"dpm2": dpm2}
