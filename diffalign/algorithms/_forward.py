"""Training on noised images instead of sampled trajectories: what DiffusionNFT, AWM and RAFT share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pydantic import ConfigDict

from diffalign.algorithms import Algorithm, Loss, Memory, Policy
from diffalign.algorithms._timesteps import Timesteps

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.sections import Sampling
    from diffalign.types import Denoiser, Rollout

FORWARD = 1  # tells the seeds of training noise from those of sampling


@dataclass(frozen=True)
class Noised:
    """A batch of images at one noise level each, x = alpha(s) x0 + sigma(s) eps."""

    x: Tensor  # [B, ...]
    s: Tensor  # [B]
    x0: Tensor  # [B, ...] the sampled image
    eps: Tensor  # [B, ...] fresh noise


class ForwardProcess(Algorithm):
    """Base of the methods that see only the finished images: any sampler, no trajectory, no likelihood."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    timesteps: Timesteps = Timesteps()
    """Noise levels that each image is trained at."""

    def conflicts(self, sampling: Sampling) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().conflicts(sampling)
        if sampling.guidance != 1:
            said = (
                f"'{self.name}' trains the conditional prediction itself, and images sampled with guidance are not its "
                "own; set sampling.guidance to 1 (what guidance adds is learnt)"
            )
            yield ("sampling", "guidance"), said
        usable, count = len(self.timesteps.steps(sampling.steps)), self.timesteps.count
        if self.timesteps.choice == "grid" and (not usable or (count or 0) > usable):
            said = (
                f"{count or 'all'} levels asked for, but {usable} of the {sampling.steps} steps are in the range; ask "
                "for fewer, widen it, or take stratified"
            )
            yield ("algorithm", "timesteps"), said

    def stochastic(self, steps: int, seed: int, epoch: int) -> list[int]:
        return list(range(steps))  # whatever the kernel does

    def kept(self, steps: int, seed: int, epoch: int) -> list[int]:
        return []

    def levels(self, steps: int) -> int:
        return self.timesteps.number(steps)

    def noised(self, denoiser: Denoiser, batch: Rollout) -> Iterator[Noised]:
        """The batch at each of its noise levels, from generators that only the images' seeds and the turn decide."""
        import torch

        from diffalign.rollout import generators, sample_seed
        from diffalign.samplers import randn
        from diffalign.schedules import noised

        seeds = [sample_seed(seed, batch.turn, 0, FORWARD) for seed in batch.seeds.tolist()]
        own = generators(seeds)
        sigmas = batch.sigmas.cpu()
        for s in torch.stack([self.timesteps.draw(sigmas, g) for g in own], 1).to(batch.x0.device):
            eps = randn(batch.x0.shape, own, batch.x0.device, torch.promote_types(batch.x0.dtype, torch.float32))
            yield Noised(noised(denoiser.schedule, batch.x0, eps, s), s, batch.x0, eps)

    def losses(self, policy: Policy, batch: Rollout, memory: Memory) -> Iterator[Loss]:
        assert batch.advantages is not None
        denoiser = policy.denoiser(batch.cond, guided=False)
        levels = self.timesteps.number(len(batch.sigmas) - 1)
        for k, at in enumerate(self.noised(denoiser, batch)):
            objective, penalty, metrics = self.terms(denoiser, policy, batch, memory, at, k)
            share = None if penalty is None else penalty / levels
            logged = {name: m.detach() / levels for name, m in metrics.items()}
            yield Loss(partial(divided, objective, levels), batch.advantages, share, logged)

    @abstractmethod
    def terms(
        self, denoiser: Denoiser, policy: Policy, batch: Rollout, memory: Memory, at: Noised, k: int
    ) -> tuple[Callable[[Tensor], Tensor], Tensor | None, dict[str, Tensor]]:
        """The policy loss as a function of the advantages, the weighted penalty and what to log, all [B], at the k-th
        noise level of the batch."""


def divided(objective: Callable[[Tensor], Tensor], levels: int, advantages: Tensor) -> Tensor:
    """One noise level's share of the policy loss, [B]."""
    return objective(advantages) / levels


def squared(a: Tensor, b: Tensor) -> Tensor:
    """mean_d (a - b)^2, [B]."""
    return (a - b).square().flatten(1).mean(1)


def reference_velocity(denoiser: Denoiser, policy: Policy, at: Noised) -> Tensor:
    """eps - x0 as the model before training predicts it, [B, ...]."""
    import torch

    with torch.no_grad(), policy.reference():
        x0, eps = denoiser.predict(at.x, at.s)
    return eps - x0
