"""Strengths that grow while an image is denoised (DAS, arXiv 2501.05803)."""

from __future__ import annotations

from collections.abc import Callable


def exponential(gamma: float, steps: int, start: int = 0) -> list[float]:
    """min((1 + gamma)^(i - start) - 1, 1) for i = 0 to T - 1, 0 before `start`."""
    return [min(max((1 + gamma) ** (i - start) - 1, 0.0), 1.0) for i in range(steps)]


def linear(gamma: float, steps: int, start: int = 0) -> list[float]:
    """min(gamma (i - start), 1) for i = 0 to T - 1, 0 before `start`."""
    return [min(max(gamma * (i - start), 0.0), 1.0) for i in range(steps)]


RAMPS: dict[str, Callable[[float, int, int], list[float]]] = {"exponential": exponential, "linear": linear}


def strengths(
    lam: float, steps: int, gamma: float | None = None, start: int = 0, ramp: str = "exponential"
) -> list[float]:
    """lam at steps 0 to T: constant, or tempered; the last is lam itself, or the target would be another."""
    scale = [1.0] * steps if gamma is None else RAMPS[ramp](gamma, steps, start)
    return [lam * s for s in scale] + [lam]
