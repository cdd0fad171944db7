"""A run of a method without a model, to count what it will cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.schedules import RectifiedFlow, Schedule, few_step_sigmas, flow_match_sigmas
from diffalign.steering import Steering
from diffalign.steering._problem import Problem, Spent
from diffalign.steering._tuning import default_kernel, noisy_steps

STAND_INS = {"lam": 1.0, "trees": None, "budget_seconds": None}  # what a rehearsal must not wait for, or write


class Blank:
    """A model of one number a sample that predicts the state itself."""

    def __init__(self, grid: int | Sequence[float], cost: int, shift: float = 3.0) -> None:
        self.schedule: Schedule = RectifiedFlow()
        self.sigmas = flow_match_sigmas(grid, shift) if isinstance(grid, int) else few_step_sigmas(grid, shift)
        self.cost = cost

    def start(self, generators: Sequence[torch.Generator]) -> Tensor:
        return torch.stack([torch.randn(1, generator=g, dtype=torch.float64) for g in generators])

    def predict(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        return x, x

    def decode(self, x0: Tensor) -> Tensor:
        return x0


def rehearse(
    method: Steering,
    grid: int | Sequence[float],
    cost: int = 1,
    kernel: tuple[str, float] | None = None,
    window: tuple[int, int] | None = None,
) -> Spent:
    """What a prompt costs: exact for all but searches whose way depends on the rewards, where it is an example.

    Raises the UserErrors of a run whose steps, noise or budget do not suit the method.
    """
    oracle = Blank(grid, cost)
    kind, eta = kernel or default_kernel(method, oracle)
    problem = Problem(
        oracle=oracle,
        judge=lambda images, sigma: images[:, 0],
        kernel=kind,
        eta=eta,
        stochastic=noisy_steps(kind, len(oracle.sigmas) - 1, window),
        micro_batch=1 << 20,
    )
    replaced = {k: v for k, v in STAND_INS.items() if k in type(method).model_fields}
    if dict(method).get("lam") != "auto":
        replaced.pop("lam", None)
    method.model_copy(update=replaced).run(problem)
    return problem.spent
