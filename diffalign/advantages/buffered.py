"""Reward against the prompt's last rewards, also those of past epochs (DDPO's tracker, arXiv 2305.13301)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from diffalign.advantages import Scalar

if TYPE_CHECKING:
    from torch import Tensor


class Buffered(Scalar):
    """A = (r - mean) / (std + eps) of the last `buffer_size` rewards of the prompt, those of this epoch included.

    While a prompt has fewer than `min_count`, mean and std are those of the whole epoch. The past takes part, so images
    that are all alike do not give 0 unless they are also like the ones before; a single image of a prompt can learn.
    """

    buffer_size: int = Field(16, gt=0)
    """Rewards remembered of each prompt."""
    min_count: int = Field(16, gt=0)
    """Remembered rewards from which a prompt is judged by its own; until then by the epoch's."""
    eps: float = Field(1e-6, gt=0)
    """Added to the std."""

    @model_validator(mode="after")
    def _can_be_reached(self) -> Buffered:
        if self.min_count > self.buffer_size:
            raise ValueError(
                f"a buffer_size of {self.buffer_size} never holds min_count {self.min_count} rewards; raise buffer_size"
            )
        return self

    def start(self) -> dict[str, Tensor]:
        import torch

        return {"group": torch.zeros(0, dtype=torch.int64), "reward": torch.zeros(0, dtype=torch.float64)}

    def estimate(self, reward: Tensor, group: Tensor, state: dict[str, Tensor]) -> Tensor:
        import torch

        valid = ~reward.isnan()
        owner = torch.cat([state["group"], group[valid]])  # in order of arrival
        past = torch.cat([state["reward"], reward[valid]])
        advantages, kept = torch.full_like(reward, torch.nan), torch.ones_like(owner, dtype=torch.bool)
        for prompt in group[valid].unique():
            mine, here = (owner == prompt).nonzero().flatten(), (group == prompt) & valid
            kept[mine[: -self.buffer_size]] = False
            own = past[mine[-self.buffer_size :]]
            known = own if len(own) >= self.min_count else reward[valid]
            shifted = known - known[0]  # rewards that are all alike then give exactly 0
            advantages[here] = (reward[here] - known[0] - shifted.mean()) / (shifted.std(correction=0) + self.eps)
        state["group"], state["reward"] = owner[kept], past[kept]
        return advantages
