"""Arithmetic of advantages. NaN = "this reward does not apply"; it takes no part in statistics and trains nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffalign.types import UserError


def combined(rewards: Mapping[str, Tensor], weights: Mapping[str, float], group: Tensor, how: str = "sum") -> Tensor:
    """sum_k w_k r_k (or min_k) over the rewards that apply to a sample's prompt, [B] float64; NaN where none does.

    A sample that lacks a reward which others of its group have is NaN: a failed judgement is not a low one.
    """
    stacked = torch.stack([rewards[name].double() * weights[name] for name in rewards])
    row = rows(group)
    valid = ~stacked.isnan()
    applies = stacked.new_zeros(len(stacked), int(row.max()) + 1).index_add_(1, row, valid.double())[:, row] > 0
    complete = (valid == applies).all(0) & applies.any(0)
    total = stacked.nansum(0) if how == "sum" else stacked.where(valid, torch.inf).amin(0)
    return total.masked_fill(~complete, torch.nan)


def rows(group: Tensor) -> Tensor:
    """[B] group ids as 0, 1, ... in the order of the ids."""
    row: Tensor = group.unique(return_inverse=True)[1]
    return row


def bounds(reward: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest reward of each sample's group, [B] each; +inf and -inf if all of the group are NaN."""
    valid, groups = ~reward.isnan(), int(row.max()) + 1
    low = reward.new_full((groups,), torch.inf).scatter_reduce_(0, row, reward.where(valid, torch.inf), "amin")
    high = reward.new_full((groups,), -torch.inf).scatter_reduce_(0, row, reward.where(valid, -torch.inf), "amax")
    return low[row], high[row]


def group_advantages(
    rewards: Tensor, group: Tensor, std: str = "global", ddof: int = 0, eps: float = 1e-4, floor: float = 0.0
) -> Tensor:
    """A = (r - mean of the group) / max(std + eps, floor), computed in float64; GRPO (arXiv 2402.03300).

    Args:
        rewards: [B], NaN where not applicable.
        group: [B] integers; samples of one prompt share one.
        std: 'group', 'global' (of all rewards of the epoch, Flow-GRPO's default) or 'none' (divide by 1).
        ddof: 0 for the population std (Flow-GRPO, eps 1e-4), 1 for the sample std (DanceGRPO, eps 1e-8).

    Returns [B] float64. A group whose rewards are all equal, or that has a single valid one, gives exactly 0; a NaN
    reward gives NaN.
    """
    if std not in ("group", "global", "none"):
        raise UserError(f"advantage std '{std}' is unknown; take group, global or none")
    r, row = rewards.double(), rows(group)
    valid = ~r.isnan()

    def total(values: Tensor) -> Tensor:
        return r.new_zeros(int(row.max()) + 1).index_add_(0, row, values.where(valid, 0.0))

    count = total(torch.ones_like(r))
    centred = r - (total(r) / count)[row]
    low, high = bounds(r, row)
    if std == "group":
        deviation = (total(centred.square()) / (count - ddof).clamp(min=1)).sqrt()[row]
    elif std == "global":
        seen = r[valid]
        deviation = (seen.var(correction=ddof) if len(seen) > ddof else seen.new_zeros(())).sqrt()
    scaled = centred if std == "none" else centred / (deviation + eps).clamp(min=floor)
    return scaled.masked_fill((low == high) & valid, 0.0)
