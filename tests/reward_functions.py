"""What a user might write in a module of their own: rewards as plain functions, and training methods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.algorithms import Algorithm, Loss, Memory, Policy
from diffalign.algorithms.grpo import GRPO
from diffalign.types import RewardOutput, Rollout


def redness(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def topness(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    """How much lighter the upper half is."""
    upper, lower = images.chunk(2, dim=2)
    return upper.mean((1, 2, 3)) - lower.mean((1, 2, 3))


def sometimes(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    """Brightness, of prompts of an even length only."""
    bright = images.mean((1, 2, 3))
    return bright.where(torch.tensor([len(p) % 2 == 0 for p in prompts], device=images.device), float("nan"))


def flat(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return torch.ones(len(images))


def broken(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return torch.full((len(images),), float("nan"))


def flaky(images: Tensor, prompts: Any, metadata: Any) -> RewardOutput:
    """No score for every fifth image, of eight or fewer the last."""
    valid = torch.arange(len(images)) % 5 != min(len(images) - 1, 4)
    return RewardOutput(redness(images, prompts, metadata), {"error": [None if v else "asleep" for v in valid]}, valid)


def asleep(images: Tensor, prompts: Any, metadata: Any) -> RewardOutput:
    return RewardOutput(torch.zeros(len(images)), {"error": ["asleep"] * len(images)}, torch.zeros(len(images)) > 0)


def wordy(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    """Cannot bear a prompt without words."""
    return torch.tensor([float(len(p.split()[0])) for p in prompts])


class Exploding(GRPO):
    def losses(self, policy: Policy, batch: Rollout, memory: Memory) -> Iterator[Loss]:
        for loss in super().losses(policy, batch, memory):
            yield Loss(lambda advantages, of=loss.policy: of(advantages) * float("inf"), loss.advantages)


class Shadow(Memory):
    """An old policy: a slow copy of the weights, which samples."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.old = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def put(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])

    @contextmanager
    def acting(self) -> Iterator[None]:
        live = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.put(self.old)
        try:
            yield
        finally:
            self.put(live)

    def after_step(self) -> None:
        for name, old in self.old.items():
            old.lerp_(self.parameters[name].detach(), 0.5)

    def state_dict(self) -> dict[str, Tensor]:
        return self.old

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, old in self.old.items():
            old.copy_(state[name])


class ForwardProcess(Algorithm):
    """Advantage-weighted flow matching on the sampled images: no trajectory, an old policy that samples."""

    def start(self, pipeline: Any, parameters: dict[str, nn.Parameter]) -> Memory:
        return Shadow(parameters)

    def losses(self, policy: Policy, batch: Rollout, memory: Memory) -> Iterator[Loss]:
        assert batch.advantages is not None
        s = torch.rand(len(batch), generator=torch.Generator().manual_seed(0))
        at, eps = s.view(-1, 1, 1, 1), torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(1))
        x = (1 - at) * batch.x0 + at * eps
        with torch.no_grad(), memory.acting():
            old, _ = policy.denoiser(batch.cond).predict(x, s)
        x0, _ = policy.denoiser(batch.cond).predict(x, s)
        error = (x0 - batch.x0).square().flatten(1).mean(1)
        moved = (x0 - old).abs().flatten(1).mean(1).detach()
        yield Loss(lambda advantages: advantages * error, batch.advantages, metrics={"moved": moved})
