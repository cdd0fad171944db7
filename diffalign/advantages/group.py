"""Reward minus the mean of the prompt's images, over a standard deviation (GRPO, arXiv 2402.03300)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from diffalign.advantages import Scalar

if TYPE_CHECKING:
    from torch import Tensor


class Group(Scalar):
    """A = (r - mean of the group) / (std + eps), r = sum_k w_k r_k or min_k w_k r_k.

    The sources differ in the std: Flow-GRPO takes the population std of the whole epoch and eps 1e-4, DanceGRPO the
    sample std (ddof 1) of the group and eps 1e-8.
    """

    std: Literal["group", "global", "none"] = "global"
    """Divide by the std within the group, over the whole epoch, or not at all."""
    ddof: Literal[0, 1] = 0
    """Delta degrees of freedom of that std."""
    eps: float = Field(1e-4, gt=0)
    """Added to the std."""

    def estimate(self, reward: Tensor, group: Tensor, state: dict[str, Tensor]) -> Tensor:
        from diffalign.advantages import _statistics as statistics

        return statistics.group_advantages(reward, group, self.std, self.ddof, self.eps)
