"""The best image of each prompt against the worst, the others left out, as in a preference pair (DPO)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign.advantages import Scalar

if TYPE_CHECKING:
    from torch import Tensor


class Dpo(Scalar):
    """A = 1 for the first image of the highest reward, -1 for the first of the lowest, else 0 (arXiv 2505.05470)."""

    pair_ties: bool = False
    """Images that are all alike make a pair too, the first -1 and the second 1, as in flow_grpo; it is only noise."""

    def estimate(self, reward: Tensor, group: Tensor, state: dict[str, Tensor]) -> Tensor:
        import torch

        from diffalign.advantages import _statistics as statistics

        row, end = statistics.rows(group), len(reward)
        place = torch.arange(end, device=reward.device)
        low, high = statistics.bounds(reward, row)

        def first(chosen: Tensor) -> Tensor:  # place of the first chosen image of each sample's group; `end` if none
            places = place.where(chosen, end)
            return place.new_full((int(row.max()) + 1,), end).scatter_reduce_(0, row, places, "amin")[row]

        worst = first(reward == low)
        best = first((reward == high) & ((place != worst) | (not self.pair_ties)))
        pair = (place == best).double() - (place == worst).double()
        return pair.masked_fill(best == end, 0.0).masked_fill(reward.isnan(), torch.nan)
