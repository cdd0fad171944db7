"""The Gaussian mixture as a model for tests of trees, and what is measured of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_oracle import TOY, A
from torch import Tensor

from diffalign.samplers import randn, step
from diffalign.schedules import Schedule, plain_sigmas
from diffalign.steering import Outcome
from diffalign.steering._problem import Problem
from diffalign.steering.dts import DTS
from diffalign.steering.dts_star import DTSStar
from diffalign.types import Step

TARGET, LOG_Z = TOY.tilted(A), TOY.log_z(A)
METHODS: list[type[DTS] | type[DTSStar]] = [DTS, DTSStar]
DEEP: dict[str, Any] = {"lam": 1.0, "root_alpha": 0.5, "alpha": 0.7}  # a tree that branches below the root


class Toy:
    """The mixture on T = 10 steps; its images are its latents. Counts the states that it saw."""

    schedule: Schedule = TOY.schedule

    def __init__(self, steps: int = 10, cost: int = 1) -> None:
        self.sigmas, self.cost, self.calls, self.states = plain_sigmas(steps), cost, 0, 0

    def start(self, generators: Sequence[torch.Generator]) -> Tensor:
        return randn((len(generators), 2), generators, "cpu", torch.float64)

    def predict(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        self.calls += 1
        self.states += len(x)
        return TOY.predict(x, self.sigmas[i])

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def exact(self, x: Tensor, x0: Tensor, eps: Tensor, i: int, generators: Sequence[torch.Generator]) -> Step:
        """x' given x and an exact draw of x0 given x, so that plain samples are draws of the mixture whatever T."""
        s, s_next = self.sigmas[i : i + 2]
        drawn = TOY.sample_posterior(x, s, generators)
        return step(TOY.schedule, drawn, (x - (1 - s) * drawn) / s, x, s, s_next, "ddim", 1.0, generators=generators)


def tilt(images: Tensor, sigma: float = 0.0) -> Tensor:
    return images @ A


def problem(seed: int = 0, judge: Any = tilt, oracle: Toy | None = None, **how: Any) -> Problem:
    oracle = oracle or Toy()
    return Problem(oracle, judge, seed=seed, **{"move": oracle.exact, "micro_batch": 64, **how})


def sde(**how: Any) -> Problem:
    return problem(move=None, kernel="flow_sde", eta=1.0, stochastic=range(1, 7), **how)


def states(asked: Problem) -> int:
    """Those that the model saw."""
    assert isinstance(asked.oracle, Toy)
    return asked.oracle.states


def mode_tv(found: Outcome) -> float:
    nearest = torch.cdist(found.x, TARGET.means).argmin(1)
    share = torch.zeros(4, dtype=torch.float64).index_add(0, nearest, found.log_weights.exp())
    return float((share - TARGET.weights).abs().sum() / 2)


def errors(trees: int, **options: Any) -> tuple[float, float, int]:
    """(mean total variation over modes, mean of Z-hat / Z, forwards a tree)."""
    tv, ratio, nfe = [], [], 0
    for seed in range(trees):
        asked = problem(seed)
        found = DTS(lam=1.0, rollouts=512, **options).run(asked)
        assert float(found.log_weights.logsumexp(0)) == pytest.approx(0, abs=1e-9)
        assert found.log_z is not None
        tv.append(mode_tv(found))
        ratio.append(math.exp(found.log_z - LOG_Z))
        nfe = asked.spent.nfe
    return mean(tv), mean(ratio), nfe


def same(a: Outcome, b: Outcome) -> None:
    for one, other in ((a.x, b.x), (a.rewards, b.rewards), (a.log_weights, b.log_weights)):
        assert torch.equal(one, other)
    assert (a.leaves, a.lineage, a.log_z, a.history) == (b.leaves, b.lineage, b.log_z, b.history)


def kept(folder: Path, prompt: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a saved tree."""
    with safe_open(folder / f"tree-{prompt:04d}.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["tree"])  # noqa: SIM118
