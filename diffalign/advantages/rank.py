"""Rank of the reward among the prompt's images: an outlier counts no more than the next best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffalign.advantages import Scalar

if TYPE_CHECKING:
    from torch import Tensor


class Rank(Scalar):
    """A = (images below - images above) sqrt(3 / (n^2 - 1)), counted among the n images of the prompt.

    This is the centred rank, ties sharing their mean rank, over the std that n different ranks have: mean 0, population
    std 1 without ties, |A| < sqrt(3). Any increasing change of the reward leaves it as it is. Rank transforms of
    rewards are those of evolution strategies (arXiv 1703.03864).
    """

    each: bool = False
    """Rank by each reward on its own and sum the weighted ranks, so that rewards of any scales count alike."""

    def __call__(
        self, rewards: Mapping[str, Tensor], weights: Mapping[str, float], group: Tensor, state: dict[str, Tensor]
    ) -> Tensor:
        import torch

        if not self.each:
            return super().__call__(rewards, weights, group, state)
        parts = torch.stack([weights[name] * self.estimate(r.double(), group, state) for name, r in rewards.items()])
        return parts.nansum(0).masked_fill(parts.isnan().all(0), torch.nan)

    def estimate(self, reward: Tensor, group: Tensor, state: dict[str, Tensor]) -> Tensor:
        import torch

        rivals = (group[:, None] == group) & ~reward.isnan()
        below = (rivals & (reward < reward[:, None])).sum(1)
        above = (rivals & (reward > reward[:, None])).sum(1)
        scale = (3 / (rivals.sum(1).double().square() - 1).clamp(min=1)).sqrt()
        return ((below - above) * scale).masked_fill(reward.isnan(), torch.nan)
