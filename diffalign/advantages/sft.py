"""The best images of each prompt and no others, as for supervised fine-tuning on them (RAFT, arXiv 2304.06767)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign.advantages import Scalar

if TYPE_CHECKING:
    from torch import Tensor


class Sft(Scalar):
    """A = 1 where the reward is the highest of the prompt, ties included, else 0; flow_grpo's type 'sft' (2505.05470).

    Images that are all alike are all the best and get 1, not 0.
    """

    def estimate(self, reward: Tensor, group: Tensor, state: dict[str, Tensor]) -> Tensor:
        import torch

        from diffalign.advantages import _statistics as statistics

        _, high = statistics.bounds(reward, statistics.rows(group))
        return (reward == high).double().masked_fill(reward.isnan(), torch.nan)
