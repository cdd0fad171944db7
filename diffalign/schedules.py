"""Noise schedules x_s = alpha(s) x0 + sigma(s) eps, and the grids of s that samplers walk down.

For every family the model's timestep is 1000 s (N s for a VP model trained on N steps), and s falls from noise to data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffalign.types import UserError


def upcast(x: Tensor) -> Tensor:
    """Half types to fp32; fp32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_sample(s: Tensor | float, x: Tensor) -> Tensor:
    """A scalar or [B] value as [B], in the precision (fp32 or more) and on the device of x [B, ...]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.as_tensor(s, dtype=dtype, device=x.device).expand(len(x))


def spread(values: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], ready to multiply x [B, ...]."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def _level(s: Tensor | float) -> Tensor:
    # A Python number keeps its float64 value; a 0-d tensor does not widen what it multiplies.
    return s if isinstance(s, Tensor) else torch.tensor(s, dtype=torch.float64)


class Schedule(Protocol):
    """How much data and how much noise there is at level s. Scalars give scalars, [B] gives [B]."""

    def alpha(self, s: Tensor | float) -> Tensor: ...

    def sigma(self, s: Tensor | float) -> Tensor: ...

    def to_x0_eps(self, model_output: Tensor, x: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        """model_output, x [B, ...], s scalar or [B] -> (x0, eps) with x = alpha x0 + sigma eps; fp32 or float64."""
        ...


def noised(schedule: Schedule, x0: Tensor, eps: Tensor, s: Tensor | float) -> Tensor:
    """The forward process alpha(s) x0 + sigma(s) eps; x0, eps [B, ...], s scalar or [B] -> [B, ...] fp32 or float64."""
    level = per_sample(s, x0)
    return spread(schedule.alpha(level), x0) * upcast(x0) + spread(schedule.sigma(level), x0) * upcast(eps)


@dataclass(frozen=True)
class RectifiedFlow:
    """alpha = 1 - s, sigma = s; the model predicts v = eps - x0 (SD3, FLUX, Qwen-Image, Z-Image; arXiv 2403.03206)."""

    def alpha(self, s: Tensor | float) -> Tensor:
        return 1 - _level(s)

    def sigma(self, s: Tensor | float) -> Tensor:
        return _level(s)

    def to_x0_eps(self, model_output: Tensor, x: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        x = upcast(x)
        v = model_output.to(x.dtype)
        t = spread(per_sample(s, x), x)
        return x - t * v, x + (1 - t) * v


@dataclass(frozen=True, eq=False)
class VP:
    """alpha = sqrt(abar), sigma = sqrt(1 - abar): discrete variance-preserving models (SD1.5, SDXL; arXiv 2006.11239).

    s = timestep / N, rounded to the nearest of the N trained timesteps (s = 1 is the last). s = 0 is timestep 0, where
    SD1.5 and SDXL end: abar[0] < 1, a trace of noise is left, and DDPO's last step stays stochastic. A negative s is
    clean data, abar = 1: the end of a model whose scheduler says `set_alpha_to_one`.
    """

    alphas_cumprod: Tensor  # [N] abar of every trained timestep
    prediction_type: str = "epsilon"  # 'epsilon', 'v_prediction' or 'sample', as diffusers names them

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise UserError(
                f"prediction type '{self.prediction_type}' is unknown; set epsilon, v_prediction or sample in the "
                "model's scheduler config"
            )

    @classmethod
    def scaled_linear(
        cls, start: float = 0.00085, end: float = 0.012, n: int = 1000, prediction: str = "epsilon"
    ) -> VP:
        """Betas with linear square roots, as SD1.5 and SDXL have; in fp32, so that the table is diffusers' own."""
        betas = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2
        return cls((1 - betas).cumprod(0), prediction)

    def alpha(self, s: Tensor | float) -> Tensor:
        return self._look_up(self.alphas_cumprod.double().sqrt(), s, clean=1.0)

    def sigma(self, s: Tensor | float) -> Tensor:
        return self._look_up((1 - self.alphas_cumprod.double()).sqrt(), s, clean=0.0)

    def to_x0_eps(self, model_output: Tensor, x: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        x = upcast(x)
        out = model_output.to(x.dtype)
        level = per_sample(s, x)
        alpha, sigma = spread(self.alpha(level), x), spread(self.sigma(level), x)
        if self.prediction_type == "epsilon":
            return (x - sigma * out) / alpha, out
        if self.prediction_type == "v_prediction":
            return alpha * x - sigma * out, alpha * out + sigma * x
        return out, (x - alpha * out) / sigma

    def _look_up(self, table: Tensor, s: Tensor | float, clean: float) -> Tensor:
        # Values go to the dtype of s after the float64 look-up: 1 - abar in fp32 loses digits where abar is near 1.
        level = _level(s)
        index = (level * len(table)).round().long()
        values = table.to(level.device)[index.clamp(0, len(table) - 1)]
        return torch.where(index < 0, clean, values).to(level.dtype)


def shifted(u: Tensor, shift: float) -> Tensor:
    """shift u / (1 + (shift - 1) u): spends more steps near noise. FLUX's dynamic shift is shift = exp(mu)."""
    return shift * u / (1 + (shift - 1) * u)


def plain_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """[T+1] shifted linspace(1, 0), float64: DanceGRPO, MixGRPO, DiffusionNFT, and FLUX with shift = exp(mu)."""
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def flow_match_sigmas(steps: int, shift: float = 1.0, n: int = 1000) -> Tensor:
    """[T+1] the grid of diffusers' FlowMatchEulerDiscreteScheduler with a static shift (SD3), float64.

    It shifts sigma_min = 1/n twice, so its last positive value is far below the plain grid's.
    """
    low = float(shifted(torch.tensor(1 / n, dtype=torch.float64), shift))
    grid = shifted(torch.linspace(1, low, steps, dtype=torch.float64), shift)
    return torch.cat([grid, grid.new_zeros(1)])


def few_step_sigmas(timesteps: Sequence[float], shift: float = 1.0, n: int = 1000) -> Tensor:
    """[T+1] shifted timesteps / n with 0 appended, float64: the lists of distilled models, e.g. 1000, 750, 500, 250."""
    grid = shifted(torch.tensor([t / n for t in timesteps], dtype=torch.float64), shift)
    return torch.cat([grid, grid.new_zeros(1)])


def vp_sigmas(steps: int, n: int = 1000, offset: int = 1) -> Tensor:
    """[T+1] s of diffusers' 'leading' timesteps i (n // T) + offset, then timestep 0, float64 (SD1.5, SDXL)."""
    timesteps = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (n // steps) + offset
    return torch.cat([timesteps, timesteps.new_zeros(1)]) / n


def flux_mu(tokens: int) -> float:
    """mu of FLUX.1: 0.5 at 256 image tokens, 1.15 at 4096, linear. Use shift = exp(mu)."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def flux2_mu(tokens: int, steps: int) -> float:
    """mu of FLUX.2: an empirical fit in tokens at 10 and at 200 steps, linear in steps between. Use shift = exp(mu)."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-5 * tokens + 1.89833333
    return at_200 + (at_10 - at_200) * (200 - steps) / (200 - 10)
