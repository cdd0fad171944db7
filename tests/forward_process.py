"""What the tests of forward-process methods share: small float64 models, rollouts of them, and a tiny SD3's policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign import adapters
from diffalign.algorithms import Memory, Policy
from diffalign.algorithms._forward import ForwardProcess
from diffalign.rollout import collect, sample_seed
from diffalign.schedules import RectifiedFlow, plain_sigmas
from diffalign.sections import Sampling
from diffalign.types import Conditioning, Rollout

SHAPE = (2, 4, 4)
PROMPTS = [{"prompt": p} for p in ("a cat", "a cat", "two dogs", "two dogs")]
Velocity = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]


class Toy:
    """A float64 model v(x, s) of named parameters: a denoiser, and a policy that keeps its reference."""

    schedule = RectifiedFlow()
    kernel, eta = "ode", 0.0

    def __init__(self, velocity: Velocity, parameters: Mapping[str, Tensor]) -> None:
        self.velocity = velocity
        self.parameters = {name: nn.Parameter(p.double().clone()) for name, p in parameters.items()}
        self.initial = {name: p.detach().clone() for name, p in self.parameters.items()}

    def predict(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule.to_x0_eps(self.velocity(self.parameters, x, s), x, s)

    def denoiser(self, cond: Conditioning, guided: bool = True) -> Toy:
        return self

    @contextmanager
    def reference(self) -> Iterator[None]:
        trained, self.parameters = self.parameters, self.initial
        yield
        self.parameters = trained

    def put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(values[name])

    def move(self, scale: float, seed: int = 1) -> None:
        perturb(self.parameters, scale, seed)


def affine(p: Mapping[str, Tensor], x: Tensor, s: Tensor) -> Tensor:
    return (x.flatten(1) @ p["w"] + s[:, None] * p["u"] + p["b"]).view_as(x)


def free(p: Mapping[str, Tensor], x: Tensor, s: Tensor) -> Tensor:
    """The velocity of every image is a parameter of its own."""
    return p["v"]


def small(seed: int = 0) -> Toy:
    generator = torch.Generator().manual_seed(seed)
    n = torch.Size(SHAPE).numel()
    sizes = {"w": (n, n), "u": (n,), "b": (n,)}
    return Toy(affine, {name: 0.2 * torch.randn(size, generator=generator) for name, size in sizes.items()})


def perturb(parameters: Mapping[str, nn.Parameter], scale: float = 0.05, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(scale * torch.randn(p.shape, generator=generator))


def images(advantages: list[float], steps: int = 6, seed: int = 0) -> Rollout:
    """Random float64 latents with those advantages."""
    count = len(advantages)
    generator = torch.Generator().manual_seed(seed)
    return Rollout(
        prompts=["a"] * count,
        metadata=[{}] * count,
        group=torch.zeros(count, dtype=torch.long),
        seeds=torch.tensor([sample_seed(seed, 0, 0, j) for j in range(count)]),
        cond=Conditioning({}, torch.arange(count)),
        sigmas=plain_sigmas(steps, 3.0),
        kept=torch.tensor([], dtype=torch.long),
        x0=torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
    )


@dataclass
class Model:
    """The policy of a loaded pipeline."""

    pipeline: Any
    kernel: str = "ode"
    eta: float = 0.0

    def denoiser(self, cond: Conditioning, guided: bool = True) -> Any:
        return self.pipeline.denoiser(cond, 1.0)

    @contextmanager
    def reference(self) -> Iterator[None]:
        with adapters.reference(self.pipeline):
            yield


def trained(pipeline: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in pipeline.network.named_parameters() if p.requires_grad}


def roll(pipeline: Any, advantages: list[float], kernel: str = "dpm2", eta: float = 0.7) -> Rollout:
    sampling = Sampling(steps=4, kernel=kernel, eta=eta, height=32, width=32)
    seeds = torch.tensor([sample_seed(0, 0, 0, j) for j in range(4)])
    rollout = collect(pipeline, PROMPTS, torch.tensor([0, 0, 1, 1]), seeds, sampling, stochastic=range(4))
    rollout.advantages = torch.tensor(advantages)
    return rollout


def total(method: ForwardProcess, policy: Policy, batch: Rollout, memory: Memory) -> Tensor:
    """[B] the sum of the losses."""
    return torch.stack([loss.per_sample for loss in method.losses(policy, batch, memory)]).sum(0)


def gradient(
    method: ForwardProcess, policy: Policy, batch: Rollout, memory: Memory, parameters: Mapping[str, nn.Parameter]
) -> Tensor:
    """Of the sum over images and losses, flattened."""
    parts = torch.autograd.grad(total(method, policy, batch, memory).sum(), list(parameters.values()))
    return torch.cat([p.flatten() for p in parts])


def differences(
    value: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter], entries: int = 3, h: float = 1e-6
) -> Tensor:
    """Central differences of a scalar with respect to the first entries of every parameter."""
    found = []
    for p in parameters.values():
        for i in range(entries):
            flat = p.detach().view(-1)
            at, sides = float(flat[i]), []
            for step in (h, -h):
                flat[i] = at + step
                sides.append(float(value().detach()))
            flat[i] = at
            found.append((sides[0] - sides[1]) / (2 * h))
    return torch.tensor(found, dtype=torch.float64)
