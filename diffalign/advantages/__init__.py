"""From rewards to advantages: one file an estimator, found by name; a frozen pydantic model is its configuration."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from diffalign.methods import Method

if TYPE_CHECKING:
    from torch import Tensor


class Advantage(Method):
    """Base of every estimator: how much better an image is than what to expect for its prompt."""

    clip: float = Field(5.0, gt=0)
    """Advantages are cut to [-clip, clip]."""

    def start(self) -> dict[str, Tensor]:
        """What the estimator carries from epoch to epoch, such as a buffer of past rewards; checkpoints keep it."""
        return {}

    @abstractmethod
    def __call__(
        self, rewards: Mapping[str, Tensor], weights: Mapping[str, float], group: Tensor, state: dict[str, Tensor]
    ) -> Tensor:
        """Advantages [B] float64 of all images of an epoch, not yet clipped.

        Args:
            rewards: name -> [B]; NaN = this reward does not apply to that prompt, or its judgement failed.
            weights: name -> weight.
            group: [B] prompt ids.
            state: what `start` gave, or the last epoch left; to be changed in place.

        Where the images of a prompt are compared with each other, a prompt whose images are all alike, or that has only
        one, gives exactly 0. An estimator that compares with past epochs, or with nothing, says so in its docstring.
        NaN where no reward applies: such an image trains nothing.
        """

    def overall(self, rewards: Mapping[str, Tensor], weights: Mapping[str, float], group: Tensor) -> Tensor:
        """One reward for each image, [B] float64, by which a curriculum judges prompts: the weighted sum."""
        from diffalign.advantages import _statistics as statistics

        return statistics.combined(rewards, weights, group)


class Scalar(Advantage):
    """Base of the estimators that make one reward out of several before anything else."""

    combine: Literal["sum", "min"] = "sum"
    """Several rewards: their weighted sum, or the smallest weighted one, which no other can make up for."""

    def __call__(
        self, rewards: Mapping[str, Tensor], weights: Mapping[str, float], group: Tensor, state: dict[str, Tensor]
    ) -> Tensor:
        return self.estimate(self.overall(rewards, weights, group), group, state)

    def overall(self, rewards: Mapping[str, Tensor], weights: Mapping[str, float], group: Tensor) -> Tensor:
        from diffalign.advantages import _statistics as statistics

        return statistics.combined(rewards, weights, group, self.combine)

    @abstractmethod
    def estimate(self, reward: Tensor, group: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Advantages [B] float64 from the combined reward [B] float64; NaN in, NaN out."""
