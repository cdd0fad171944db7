"""Transition kernels and the one sampling loop that training records, steering redirects and evaluation drains."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffalign.schedules import RectifiedFlow, Schedule, per_sample, spread, upcast
from diffalign.types import Denoiser, Step, UserError


class Levels(NamedTuple):
    """Both ends of a transition, each [B]."""

    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    sigma_next: Tensor


# A kernel gives (c, std), each [B], of x' ~ N(alpha' x0 + c eps, std^2). That is the papers' own form rewritten with
# x = alpha x0 + sigma eps: nothing depends on how the model predicts, and eta = 0 is the ODE step to the last bit.
Kernel = Callable[[Levels, float], tuple[Tensor, Tensor]]


def _ode(at: Levels, eta: float) -> tuple[Tensor, Tensor]:
    """The probability-flow step: Euler in sigma for a flow, DDIM for VP (arXiv 2010.02502)."""
    return at.sigma_next, torch.zeros_like(at.sigma_next)


def _euler_maruyama(at: Levels, g2: Tensor | float) -> tuple[Tensor, Tensor]:
    """x - h (v + g^2 eps / (2 sigma)) and g sqrt(h), with h = sigma - sigma'."""
    variance = g2 * (at.sigma - at.sigma_next)
    return at.sigma_next - variance / (2 * at.sigma), variance.sqrt()


def _flow_sde(at: Levels, eta: float) -> tuple[Tensor, Tensor]:
    """Flow-GRPO (arXiv 2505.05470): g = eta sqrt(sigma / (1 - sigma)), with 1 - sigma' under the root at sigma = 1."""
    edge = torch.where(at.sigma == 1, at.sigma_next, at.sigma)
    return _euler_maruyama(at, eta**2 * at.sigma / (1 - edge))


def _dance(at: Levels, eta: float) -> tuple[Tensor, Tensor]:
    """DanceGRPO (arXiv 2505.07818): g = eta."""
    return _euler_maruyama(at, eta**2)


def _cps(at: Levels, eta: float) -> tuple[Tensor, Tensor]:
    """Coefficients-preserving sampling (arXiv 2509.05952): total noise is sigma'; eta = 1 re-noises x0 from scratch."""
    return at.sigma_next * math.cos(eta * math.pi / 2), at.sigma_next * math.sin(eta * math.pi / 2)


def _ddim(at: Levels, eta: float) -> tuple[Tensor, Tensor]:
    """DDIM (arXiv 2010.02502): eta = 1 is the ancestral posterior. Deterministic where sigma' = 0."""
    gap = at.sigma**2 - (at.alpha / at.alpha_next * at.sigma_next) ** 2
    std = eta * at.sigma_next / at.sigma * gap.clamp(min=0).sqrt()
    return (at.sigma_next**2 - std**2).clamp(min=0).sqrt(), std


KERNELS: dict[str, Kernel] = {"ode": _ode, "flow_sde": _flow_sde, "cps": _cps, "dance": _dance, "ddim": _ddim}
FLOW_ONLY = ("flow_sde", "dance")  # their g is derived for alpha = 1 - sigma
UNIT_ETA = ("cps", "ddim")  # eta is a fraction of the noise that may be replaced


def _kernel(kind: str, eta: float, schedule: Schedule) -> Kernel:
    if kind not in KERNELS:
        near = difflib.get_close_matches(kind, KERNELS, 1)
        hint = f"did you mean '{near[0]}'?" if near else "known: " + ", ".join(KERNELS)
        raise UserError(f"unknown kernel '{kind}'; {hint}")
    if kind in FLOW_ONLY and not isinstance(schedule, RectifiedFlow):
        raise UserError(f"kernel '{kind}' is defined for flow models only; use 'ddim' for this one")
    if not 0 <= eta <= (1 if kind in UNIT_ETA else math.inf):
        raise UserError(f"eta {eta} does not suit kernel '{kind}'; use {'0 to 1' if kind in UNIT_ETA else '0 or more'}")
    return KERNELS[kind]


def randn(
    shape: Sequence[int],
    generators: Sequence[torch.Generator] | None,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal [B, ...]. Sample j draws from generators[j] on that generator's device and is then moved, so it
    depends neither on the batch it sits in nor, for CPU generators, on the accelerator. None uses the global RNG."""
    if generators is None:
        return torch.randn(*shape, device=device, dtype=dtype)
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for a batch of {shape[0]}")
    draws = [torch.randn(*shape[1:], generator=g, device=g.device, dtype=dtype) for g in generators]
    return torch.stack(draws).to(device)


def step(
    schedule: Schedule,
    x0: Tensor,
    eps: Tensor,
    x: Tensor,
    s: Tensor | float,
    s_next: Tensor | float,
    kind: str = "ode",
    eta: float = 0.0,
    next: Tensor | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> Step:
    """One transition x -> x' ~ N(alpha(s') x0 + c eps, std^2); c and std are the kernel's.

    x0, eps, x [B, ...] with x = alpha x0 + sigma eps; s, s_next scalar or [B]. Pass `next` to score a stored x'. The
    precision is that of x, at least fp32. log_prob is the mean over latent dimensions of the Gaussian log-density
    (0 where std = 0), except for cps, whose paper defines it as -mean (x' - mean)^2 without the scale. Its gradient
    reaches the mean only, never x'. Raises UserError for an unknown kernel, or one that does not fit eta or schedule.
    """
    kernel = _kernel(kind, eta, schedule)
    x = upcast(x)
    now, after = per_sample(s, x), per_sample(s_next, x)
    alpha_next = schedule.alpha(after)
    c, deviation = kernel(Levels(schedule.alpha(now), schedule.sigma(now), alpha_next, schedule.sigma(after)), eta)
    x0 = x0.to(x.dtype)
    mean = spread(alpha_next, x) * x0 + spread(c, x) * eps.to(x.dtype)
    std = spread(deviation, x)
    if next is not None:
        next = next.to(x.dtype)
    elif kind == "ode" or eta == 0:
        next = mean
    else:
        next = mean + std * randn(x.shape, generators, x.device, x.dtype)
    return Step(mean=mean, std=std, next=next, log_prob=_log_prob(kind, mean, deviation, next.detach()), x0=x0)


def _log_prob(kind: str, mean: Tensor, std: Tensor, next: Tensor) -> Tensor:
    distance = (next - mean).square().flatten(1).mean(1)
    if kind == "cps":
        return -distance
    safe = torch.where(std > 0, std, 1)
    density = -distance / (2 * safe**2) - safe.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(std > 0, density, 0)


def count_steps(sigmas: Tensor) -> int:
    """T of a grid [T+1]. Raises UserError for one that is too short or rises."""
    if len(sigmas) < 2 or bool((sigmas.diff() > 0).any()):
        raise UserError("sigmas must hold at least two values that never rise, from noise to data")
    return len(sigmas) - 1


def denoise(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    kernel: str = "ode",
    eta: float = 0.0,
    stochastic: Collection[int] | None = None,
    generators: Sequence[torch.Generator] | None = None,
    tied: Mapping[int, Sequence[torch.Generator]] | None = None,
) -> Generator[Step, Tensor | None, None]:
    """Walk x [B, ...] down sigmas [T+1] and yield each of the T Steps; `.send(state)` replaces the state to go on from.

    `stochastic` names the step indices that use `kernel` (None: all); the others take the ODE step. The steps in `tied`
    draw from generators of their own. Gradients follow the caller's grad mode. Raises UserError for an unfit kernel, a
    grid that rises, or an index outside it.
    """
    steps = count_steps(sigmas)
    if stochastic is not None and not all(0 <= i < steps for i in stochastic):
        raise UserError(f"stochastic steps {sorted(stochastic)} must lie in 0 to {steps - 1}, the steps of this run")
    _kernel(kernel, eta, denoiser.schedule)
    for i in range(steps):
        x0, eps = denoiser.predict(x, sigmas[i])
        kind = kernel if stochastic is None or i in stochastic else "ode"
        noise = generators if tied is None else tied.get(i, generators)
        taken = step(denoiser.schedule, x0, eps, x, sigmas[i], sigmas[i + 1], kind, eta, generators=noise)
        redirected = yield taken
        x = taken.next if redirected is None else redirected


def drain(steps: Iterable[Step]) -> Tensor:
    """Run a sampler to its end and return the final latents [B, ...]."""
    for taken in steps:
        final = taken.next
    return final
