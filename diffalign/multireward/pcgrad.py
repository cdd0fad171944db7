"""PCGrad (arXiv 2001.06782): each reward's gradient loses what opposes the others; the baseline beside MARBLE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffalign.multireward import MultiReward

if TYPE_CHECKING:
    from torch import Tensor


ORDER = 3  # tells the seeds of the order from those of images


class PCGrad(MultiReward):
    """g_i <- g_i - min(0, g_i . g_j) g_j / |g_j|^2 for all j != i in random order; then their weighted mean.

    All losses of every step are split, so an epoch costs a backward pass for each reward. With three or more rewards
    the sum may still oppose one of them, because a later projection undoes an earlier one.
    """

    def start(self, rewards: int, seed: int) -> dict[str, Tensor]:
        import torch

        return {"seed": torch.tensor(seed), "step": torch.tensor(0)}

    def lead(self, state: Mapping[str, Tensor]) -> int | None:
        return None

    def coefficients(self, gram: Tensor, importance: Tensor, state: dict[str, Tensor]) -> Tensor:
        import torch

        from diffalign.rollout import sample_seed

        order = torch.Generator().manual_seed(sample_seed(int(state["seed"]), int(state["step"]), len(gram), ORDER))
        projected = torch.eye(len(gram), dtype=gram.dtype)  # row i: what g_i has become, as a sum of all g
        for i, own in enumerate(projected):
            for j in torch.randperm(len(gram), generator=order).tolist():
                along = own @ gram[j]
                if j != i and along < 0:
                    own[j] -= along / gram[j, j]
        return importance @ projected / importance.sum()

    def mixture(self, importance: Tensor, applies: Tensor, state: dict[str, Tensor]) -> Tensor:
        state["step"] = state["step"] + 1
        return importance / importance.sum()
