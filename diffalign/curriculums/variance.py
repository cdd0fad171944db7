"""Prompts whose images lately differed in reward come more often than those whose images were all alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from diffalign.curriculums import Curriculum
from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Variance(Curriculum):
    """Weights w = max(v, floor max v), where v is the moving average of the variance of a prompt's rewards.

    Images that all score alike have advantage 0 and teach nothing. A prompt not yet seen has the largest v, so that it
    is soon tried; `floor` brings back what was too hard or too easy once. Only ratios of v matter, not the scale of the
    reward. Sorting by Exp(1) / w is weighted sampling without replacement (Efraimidis and Spirakis, IPL 97, 2006).
    """

    decay: float = Field(0.7, ge=0, lt=1)
    """Of the moving average; 0 keeps the last variance alone."""
    floor: float = Field(0.1, gt=0, le=1)
    """Smallest weight, as a share of the largest; 1 draws all prompts alike."""

    def start(self, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        import torch

        return {"variance": torch.full((len(prompts),), torch.nan, dtype=torch.float64)}  # NaN: not yet seen

    def choose(self, prompts: int, count: int, generator: torch.Generator, state: dict[str, Tensor]) -> Tensor:
        import torch

        variance = state["variance"]
        if len(variance) != prompts:
            raise UserError(
                f"the curriculum remembers {len(variance)} prompts, but there are {prompts}; resume with the prompts "
                "that the run began with"
            )
        largest = variance.nan_to_num(0.0).max()
        share = (variance / largest if largest > 0 else variance).nan_to_num(1.0).clamp(min=self.floor)
        waiting = torch.empty(prompts, dtype=torch.float64).exponential_(generator=generator)
        return (waiting / share).argsort(stable=True)[:count]

    def learn(self, group: Tensor, advantages: Tensor, rewards: Tensor, state: dict[str, Tensor]) -> None:
        variance = state["variance"]
        for prompt in group.unique():
            scores = rewards[(group == prompt) & ~rewards.isnan()].double()
            if len(scores) < 2:
                continue
            new, old = (scores - scores[0]).var(correction=0), variance[prompt]
            variance[prompt] = new if bool(old.isnan()) else self.decay * old + (1 - self.decay) * new
