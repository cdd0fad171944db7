"""A Gaussian mixture as the oracle of steering methods, with a linear reward: the law that they must reach is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from test_oracle import TOY, A
from torch import Tensor

from diffalign.samplers import randn, step
from diffalign.schedules import Schedule, plain_sigmas
from diffalign.steering._problem import Problem
from diffalign.types import Step

STEPS = 20
AT = (4, 8, 12, 16)
SDE: dict[str, Any] = {"kernel": "flow_sde", "eta": 1.0, "stochastic": range(STEPS)}


@dataclass
class Toy:
    """The mixture as an oracle. Its images are its latents, and it remembers the states that it saw last."""

    schedule: Schedule = TOY.schedule
    sigmas: Tensor = field(default_factory=lambda: plain_sigmas(STEPS))
    cost: int = 1
    last: Tensor | None = None

    def start(self, generators: Sequence[torch.Generator]) -> Tensor:
        return randn((len(generators), 2), generators, "cpu", torch.float64)

    def predict(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        self.last = x
        return TOY.predict(x, self.sigmas[i])

    def decode(self, x0: Tensor) -> Tensor:
        return x0


def reward(images: Tensor, sigma: float) -> Tensor:
    return images @ A


def exact(x: Tensor, x0: Tensor, eps: Tensor, i: int, generators: Sequence[torch.Generator]) -> Step:
    """x' given x and an exact draw of x0 given x, which takes the place of the prediction."""
    levels = plain_sigmas(STEPS)[i : i + 2]
    drawn = TOY.sample_posterior(x, levels[0], generators)
    noise = (x - (1 - levels[0]) * drawn) / levels[0]
    return step(TOY.schedule, drawn, noise, x, levels[0], levels[1], "ddim", 1.0, generators=generators)


CHAIN: dict[str, Any] = {"move": exact}


def toy(seed: int = 0, prompt: int = 0, judge: Any = reward, **how: Any) -> Problem:
    return Problem(how.pop("oracle", None) or Toy(), judge, seed=seed, prompt=prompt, **{"micro_batch": 4096, **how})
