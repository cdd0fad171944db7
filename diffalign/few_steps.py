"""How a few-step generator is sampled: what its folder remembers, and what the command line may say instead."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffalign.types import UserError

if TYPE_CHECKING:
    from diffalign.sections import Sampling

STEPS = 20  # of every other model, unless the command line says


@dataclass(frozen=True)
class FewSteps:
    """Steps of :func:`diffalign.samplers.denoise` that a distilled model was trained for.

    Attributes:
        timesteps: falling from 1000, before the model family's shift.
        eta: of the CPS kernel; 0 is the ODE.
    """

    timesteps: tuple[float, ...]
    eta: float = 0.0

    @classmethod
    def of(cls, sampling: Sampling) -> FewSteps | None:
        """None for a grid of the scheduler's own. The noise of a kernel other than CPS is a matter of training."""
        if sampling.timesteps is None:
            return None
        return cls(sampling.timesteps, sampling.eta if sampling.kernel == "cps" else 0.0)

    @property
    def kernel(self) -> str:
        return kernel(self.eta)


def kernel(eta: float) -> str:
    """As :func:`diffalign.steering.parse_kernel` reads it."""
    return f"cps:{eta}" if eta else "ode"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=int, metavar="N", help=f"denoising steps (default {STEPS}, or what a few-step model remembers)"
    )
    parser.add_argument(
        "--timesteps", metavar="T1,T2,...", help="those of a few-step model, falling from 1000: 1000,750,500,250"
    )
    parser.add_argument(
        "--eta", type=float, metavar="E", help="noise of the steps, 0 to 1 (default 0, or what the model remembers)"
    )


def asked(args: argparse.Namespace, known: FewSteps | None, where: str) -> dict[str, Any]:
    """What the command line says, for :func:`settings`."""
    named = None if args.timesteps is None else numbers(args.timesteps, ",", f"{where}: --timesteps")
    return settings(args.steps, named, args.eta, known, where)


def settings(
    steps: int | None, timesteps: tuple[float, ...] | None, eta: float | None, known: FewSteps | None, where: str
) -> dict[str, Any]:
    """Grid, kernel and eta of a :class:`Sampling`: those given, else what the model remembers, else 20 plain steps.

    Raises UserError for a number of steps beside timesteps.
    """
    if steps is not None and timesteps is not None:
        raise UserError(f"{where}: steps are those of the plain grid, so they contradict timesteps; give one of them")
    if steps is None and known is not None:
        timesteps, eta = timesteps or known.timesteps, known.eta if eta is None else eta
    number = STEPS if steps is None else steps
    grid: dict[str, Any] = {"steps": number} if timesteps is None else {"timesteps": timesteps}
    return {**grid, "kernel": "cps" if eta else "ode", "eta": eta or 0.0}


def numbers(text: str, mark: str, where: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(mark))
    except ValueError:
        raise UserError(f"{where} {text!r} is no list of numbers, such as {mark.join(('1000', '500'))}") from None
