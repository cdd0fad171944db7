"""Each reward normalised within its group, then weighted and summed, so that none drowns another (GDPO)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from diffalign.advantages import Advantage

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-6  # no std counts as less


class Gdpo(Advantage):
    """A = sum_k w_k (r_k - mean of the group) / std_k, then A / std of all A; GDPO (arXiv 2601.05242).

    Here std stands for max(std + eps, 1e-6). The mean of all A is 0 already, so whitening is a mere division, and a
    prompt whose images are alike in every reward keeps exactly 0. A reward that an image lacks adds nothing to its A.

    The defaults are Flow-Factory's. MixGRPO (arXiv 2507.21802) has ddof 1, eps 1e-8, whiten false; RTDMD has std
    global, eps 1e-4.
    """

    std: Literal["group", "global"] = "group"
    """Each reward is divided by its std within the group, or over the whole epoch."""
    ddof: Literal[0, 1] = 0
    """Delta degrees of freedom of that std; whitening always takes the population std."""
    eps: float = Field(0.0, ge=0)
    """Added to every std."""
    whiten: bool = True
    """Divide the sum by its std over the epoch, so that its scale depends on neither weights nor number of rewards."""

    def __call__(
        self, rewards: Mapping[str, Tensor], weights: Mapping[str, float], group: Tensor, state: dict[str, Tensor]
    ) -> Tensor:
        import torch

        from diffalign.advantages import _statistics as statistics

        parts = torch.stack([
            weights[name] * statistics.group_advantages(r, group, self.std, self.ddof, self.eps, FLOOR)
            for name, r in rewards.items()
        ])  # fmt: skip
        total = parts.nansum(0).masked_fill(parts.isnan().all(0), torch.nan)
        if not self.whiten:
            return total
        return total / (total.square().nanmean().sqrt() + self.eps).clamp(min=FLOOR)
