"""What is set from a few plain samples or from the model, what is returned, and what is warned of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffalign.clock import Clock
from diffalign.schedules import RectifiedFlow
from diffalign.steering import Oracle, Outcome, Steering
from diffalign.steering._problem import Problem, Spent
from diffalign.types import UserError

PILOT = 8  # plain samples that set lam
PILOT_FROM = 1 << 20  # their number as particles, far from those of any run
PILOTED = 4  # prompts of a list that set it
STRENGTHS = 3.0  # lam auto is so many times 1 / std
FALLBACK = 10.0  # lam where plain samples all score alike: Fk-Diffusion-Steering's own default


def default_kernel(method: Steering, oracle: Oracle) -> tuple[str, float]:
    """(kernel, eta): the ODE where no noise is needed; else what is least biased for the model's schedule."""
    if not method.stochastic:
        return "ode", 0.0
    if isinstance(oracle.schedule, RectifiedFlow):
        return "flow_sde", 1.0 if len(oracle.sigmas) > 28 else 0.7
    return "ddim", 1.0


def noisy_steps(kernel: str, steps: int, window: tuple[int, int] | None) -> range:
    """Steps with noise: those of the window, by default all but the last, which would leave its noise in the image.

    Raises UserError for a window that has no effect, or is no span of the steps.
    """
    if window is None:
        return range(0) if kernel == "ode" else range(steps - 1)
    first, last = window
    if kernel == "ode":
        raise UserError("the ODE has no noise, so a window has no effect; leave it out, or take another kernel")
    if not 0 <= first <= last < steps:
        raise UserError(f"window {first},{last} is no span of steps 0 to {steps - 1}; give the first and the last")
    return range(first, last + 1)


def tuned(method: Steering, problems: Sequence[Problem]) -> tuple[Steering, list[str], int]:
    """The method with lam set where it is 'auto': 3 / std of the reward over 8 plain samples of each prompt.

    The deviations are within prompts, since particles of one prompt alone compete. The samples are walked with the
    kernel that the method will use. Also returns what the user should know, and the network forwards that it took,
    which count in no budget.
    """
    if dict(method).get("lam") != "auto":
        return method, [], 0
    pilots = [replace(p, watch=None, best=None, spent=Spent(Clock(p.spent.clock.device))) for p in problems]
    off = torch.cat([_deviations(pilot) for pilot in pilots])
    nfe = sum(pilot.spent.nfe for pilot in pilots)
    std = float(off.square().sum() / max(1, len(off) - len(problems))) ** 0.5
    if std > 0:
        return method.model_copy(update={"lam": STRENGTHS / std}), [], nfe
    said = f"all {len(off)} plain samples of the pilot score alike, so lam is {FALLBACK:g}; give lam to choose another"
    return method.model_copy(update={"lam": FALLBACK}), [said], nfe


def _deviations(problem: Problem) -> Tensor:
    if problem.own is None:
        generators = problem.particles(PILOT_FROM, PILOT)
    else:
        generators = [problem.generator(PILOT_FROM, j) for j in range(PILOT)]
    rewards = problem.score(problem.walk(problem.start(generators), generators), problem.steps)
    known = rewards[rewards > -torch.inf]
    return known - known.mean()


def selected(method: Steering, outcome: Outcome, problem: Problem) -> Tensor:
    """Indices of what is returned: sorted by reward, the best alone, or one draw by weight."""
    if method.select == "sample":
        # two numbers in the key: those of rounds have one
        return torch.multinomial(outcome.log_weights.exp(), 1, generator=problem.generator(0, 0))
    height = outcome.rewards if outcome.standing is None else outcome.standing
    order = height.argsort(descending=True, stable=True)
    return order[:1] if method.select == "best" else order


def warnings(problem: Problem, history: Sequence[Mapping[str, Any]]) -> list[str]:
    """What went wrong on the way, for people: sentences."""
    said, steps = [], problem.steps
    if problem.kernel == "cps" and problem.stochastic and not problem.few_steps:
        said.append("cps samples a narrower distribution than the model's own, and so does what is steered with it")
    weighed = [row for row in history if "ess" in row]
    low = [row for row in weighed if row["ess"] < 1.5 and row["step"] < steps]
    if low:
        said.append(
            f"fewer than 1.5 particles were effective at step {low[0]['step']}: lam is too large, or particles too few"
        )
    single = [row for row in weighed if row["roots"] == 1 and row["step"] <= steps / 2]
    if single:
        said.append(
            f"all particles descend from one noise at step {single[0]['step']}, before half way: lower lam, or weigh "
            "later"
        )
    return said
