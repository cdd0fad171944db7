"""MARBLE (arXiv 2605.06507): the step that improves every reward alike, as the shortest mixture of their gradients."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from diffalign.multireward import MultiReward
from diffalign.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

NEVER = -1
DROPOUT = 2  # tells the seeds of dropout from those of images


class Marble(MultiReward):
    """alpha = argmin |sum_k alpha_k g_k / |g_k||^2 over alpha >= floor, sum alpha = 1; the direction d found so has the
    same cosine with every reward's gradient whose alpha is above the floor, and a larger one with the others: no reward
    is traded for another, whatever their scales. The step is d times the mean |g_k|.

    That takes a backward pass for each reward. Between solves one is enough: where the loss is affine in the
    advantages, sum_k alpha_k L(A_k) = L(sum_k alpha_k A_k), at the moving average of alpha over the solves. Here a
    solve sees the gradients of the whole step over all processes, where the published program solves for every
    micro-batch alone; so the result depends on neither. A weight w of a reward asks for w times the cosine, and without
    `normalize` for w times the inner product.
    """

    alphas: Literal["solve", "fixed"] = "solve"
    """fixed: never solve; alpha in proportion to the rewards' weights, so equal ones by default."""
    every: int = Field(10, ge=1)
    """Optimizer steps from one solve to the next."""
    warmup: int = Field(1, ge=0)
    """In so many first steps all losses are split by reward, and alpha is solved in each."""
    losses: int | None = Field(1, ge=1)
    """Losses of every micro-batch that a later solve splits: with nft and awm, noise levels; null: all."""
    momentum: float = Field(0.7, ge=0, lt=1)
    """Of the moving average of alpha over the solves."""
    floor: float = Field(0.0, ge=0, lt=1)
    """No alpha is less; at most 1/K counts."""
    normalize: bool = True
    """Solve for gradients of length 1; false: for the raw ones, of which the shortest then decides."""
    rescale: bool = False
    """Between solves, weigh advantages by alpha_k / |g_k| instead of alpha_k, which is the direction that was solved
    for; as published it is not."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Each solve leaves every reward out with this probability, never all."""
    groups: dict[str, list[str]] = Field(default_factory=dict)
    """Rewards that count as one, by the mean of their advantages: {name: [reward, reward]}."""

    @model_validator(mode="after")
    def _apply(self) -> Marble:
        idle = self.changed(("every", "warmup", "losses", "momentum", "floor", "normalize", "rescale", "dropout"))
        if self.alphas == "fixed" and idle:
            raise ValueError(f"{idle[0]} has no effect when alphas is fixed; remove it")
        idle = self.changed(("warmup", "momentum", "rescale"))
        if not self.mixes and idle:
            raise ValueError(f"{idle[0]} has no effect when all losses of every step are split; remove it")
        if self.normalize is False and self.rescale:
            raise ValueError("rescale has no effect without normalize; remove it")
        return self

    @property
    def mixes(self) -> bool:
        return self.alphas == "fixed" or self.every > 1 or self.losses is not None

    @property
    def splits(self) -> bool:
        return self.alphas == "solve"

    @property
    def split_losses(self) -> int | None:
        return None if self.alphas == "fixed" else self.losses

    def grouped(self, names: list[str]) -> dict[str, list[str]]:
        members = [m for group in self.groups.values() for m in group]
        unknown = [m for m in members if m not in names]
        twice = [m for m, count in Counter(members).items() if count > 1]
        clash = [g for g, own in self.groups.items() if g in names and g not in own]
        if unknown:
            raise UserError(f"there is no reward '{unknown[0]}'; rewards: {', '.join(names)}")
        if twice:
            raise UserError(f"'{twice[0]}' is in a group twice; name it once")
        if clash:
            raise UserError(f"the group '{clash[0]}' has the name of a reward outside it; choose another")
        if not all(self.groups.values()):
            raise UserError("a group is empty; name its rewards or remove it")
        alone = {name: [name] for name in names if name not in members}
        return {**self.groups, **alone}

    def start(self, rewards: int, seed: int) -> dict[str, Tensor]:
        import torch

        return {
            "seed": torch.tensor(seed),
            "alphas": torch.full((rewards,), 1 / rewards, dtype=torch.float64),
            "norms": torch.ones(rewards, dtype=torch.float64),
            "solved": torch.tensor(NEVER),
            "step": torch.tensor(0),
        }

    def lead(self, state: Mapping[str, Tensor]) -> int | None:
        step, solved = int(state["step"]), int(state["solved"])
        if self.alphas == "fixed" or not due(step, solved, self.every, self.warmup):
            return 0
        return None if step < self.warmup else self.losses

    def coefficients(self, gram: Tensor, importance: Tensor, state: dict[str, Tensor]) -> Tensor:
        from diffalign.multireward._min_norm import balance

        kept = self.kept(gram.diagonal() > 0, int(state["seed"]), int(state["step"])).to(gram)
        found = balance(gram * kept * kept[:, None], self.normalize, 1 / importance, self.floor)
        if found.fallback == "solver_failed":
            warnings.warn("the rewards' gradients could not be balanced; this step takes equal shares", stacklevel=2)
        first = int(state["solved"]) == NEVER
        state["alphas"] = found.alphas if first else smoothed(state["alphas"], found.alphas, self.momentum)
        state["norms"] = found.norms.where(found.valid, state["norms"])
        state["solved"] = state["step"].clone()
        return found.coefficients

    def kept(self, among: Tensor, seed: int, step: int) -> Tensor:
        """[K] bool: the rewards that dropout leaves in, at least one of those `among` [K] bool."""
        import torch

        from diffalign.rollout import sample_seed

        generator = torch.Generator().manual_seed(sample_seed(seed, step, len(among), DROPOUT))
        u = torch.rand(len(among), generator=generator).masked_fill(~among.cpu(), -1.0)
        return (u >= self.dropout) | (u == u.max())

    def mixture(self, importance: Tensor, applies: Tensor, state: dict[str, Tensor]) -> Tensor:
        state["step"] = state["step"] + 1
        if self.alphas == "fixed":
            return importance / importance.sum()
        weights = state["alphas"] / importance
        if self.rescale:  # g_k is a mean over the images it applies to, the mixture's loss one over all
            weights = (weights / (state["norms"] * applies)).nan_to_num(0.0, 0.0)
        total = weights.sum()
        return weights / total if total > 0 else weights + 1 / len(weights)


def due(step: int, solved: int, every: int, warmup: int) -> bool:
    """Whether alpha is solved at `step`, the last solve being at `solved`."""
    return solved == NEVER or step < warmup or step - solved >= every


def smoothed(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    """momentum old + (1 - momentum) new."""
    return momentum * old + (1 - momentum) * new
