"""The reward that RTDMD back-propagates through its last step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from diffalign.algorithms import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.types import Rollout


class Backpropagated(BaseModel):
    """The reward whose gradient goes back through the decoder into the last step."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    weight: float = Field(1e-4, ge=0)
    """lambda_bp; 0 leaves the decoder and the reward models out of training."""
    rewards: tuple[str, ...] = ()
    """Names of the run's rewards that are summed; they must be differentiable."""
    margin: float = 3.0
    """Only sums below it have a gradient."""

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """(key, sentence) for what does not go together."""
        place = ("algorithm", "backpropagated")
        if self.weight and not self.rewards:
            yield (
                (*place, "rewards"),
                "name differentiable rewards of the run, such as [pickscore], or set the weight to 0",
            )

    def loss(self, policy: Policy, batch: Rollout, x0: Tensor) -> tuple[Tensor, Tensor]:
        """relu(margin - R) of latents x0 [B, ...], and R, which has no gradient; both [B]. A reward that does not apply
        adds 0."""
        import torch

        images = policy.decode(x0)
        reward = torch.stack([policy.score(name, images, batch).nan_to_num(0.0) for name in self.rewards]).sum(0)
        return (self.margin - reward.to(x0)).relu(), reward.detach().to(x0)

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        if metrics.get("backpropagated", -float("inf")) <= self.margin:
            return {}
        return {
            "backpropagated": f"the back-propagated rewards sum to {metrics['backpropagated']:.3g}, beyond algorithm."
            f"backpropagated.margin {self.margin:g}, where they have no gradient; raise it above what they reach"
        }
