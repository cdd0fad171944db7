"""A run of a method without a model, to count what it will cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.clock import Clock
from diffalign.schedules import RectifiedFlow, Schedule, flow_match_sigmas
from diffalign.steering import Steering
from diffalign.steering._problem import Problem, Spent

NOISE = ("flow_sde", 0.7)


class Blank:
    """A model of one number a sample that predicts the state itself."""

    def __init__(self, steps: int, cost: int, shift: float = 3.0) -> None:
        self.schedule: Schedule = RectifiedFlow()
        self.sigmas = flow_match_sigmas(steps, shift)
        self.cost = cost

    def start(self, generators: Sequence[torch.Generator]) -> Tensor:
        return torch.stack([torch.randn(1, generator=g, dtype=torch.float64) for g in generators])

    def predict(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        return x, x

    def decode(self, x0: Tensor) -> Tensor:
        return x0


def rehearse(method: Steering, steps: int, cost: int) -> Spent:
    """What a prompt costs: exact for all but searches whose way depends on the rewards, where it is an example."""
    noise = NOISE if method.stochastic else ("ode", 0.0)
    chosen = {"lam": 1.0} if dict(method).get("lam") == "auto" else {}
    problem = Problem(
        oracle=Blank(steps, cost),
        judge=lambda images, sigma: images[:, 0],
        kernel=noise[0],
        eta=noise[1],
        stochastic=range(steps - 1) if method.stochastic else (),
        micro_batch=1 << 20,
        spent=Spent(Clock()),
    )
    method.model_copy(update={**chosen, "budget_seconds": None}).run(problem)
    return problem.spent
