"""The reward itself, compared with nothing (reward-weighted regression)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from diffalign.advantages import Scalar

if TYPE_CHECKING:
    from torch import Tensor


class Rwr(Scalar):
    """A = r, as flow_grpo's type 'rwr' (arXiv 2505.05470) has it; images that are all alike get their reward, not 0."""

    clip: float = Field(1000.0, gt=0)
    """Advantages are cut to [-clip, clip]; wide, because raw rewards are of any size."""

    def estimate(self, reward: Tensor, group: Tensor, state: dict[str, Tensor]) -> Tensor:
        return reward
