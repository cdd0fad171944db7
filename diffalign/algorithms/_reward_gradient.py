"""What the methods share that train on the gradient of a reward with respect to the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import ConfigDict, Field, field_validator

from diffalign.algorithms import Algorithm

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.schedules import Schedule
    from diffalign.types import Denoiser

RENOISED, ALIGNED, PAIRED = 4, 5, 6  # tell the seeds of training noise from those of sampling
CLEAN = 0.02  # below this noise level the network moves the image by less than pixels are rounded

Weight = Annotated[float, Field(gt=0)]


class RewardGradient(Algorithm):
    """Base of ReFL, DRaFT and SRPO: the frozen reward model and the decoder are differentiated, nothing is compared.

    L = sum_k w_k relu(margin - r_k), or -sum_k w_k r_k without a margin; a reward that does not apply to an image adds
    0. Advantages are not used: whatever makes them is there for the log alone.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    compares: ClassVar[bool] = False

    rewards: dict[str, Weight]
    """Rewards of the run whose gradient is followed and the weight w of each, such as {pickscore: 1}; they must be
    differentiable. The others are logged."""
    margin: float | None = None
    """A reward above it has no gradient; not given, there is no such bound. One for all, so with rewards of several
    scales best left out."""

    @field_validator("rewards")
    @classmethod
    def _some(cls, rewards: dict[str, float]) -> dict[str, float]:
        if not rewards:
            raise ValueError("name at least one of the run's rewards with its weight, such as {pickscore: 1}")
        return rewards

    def ascends(self) -> tuple[str, ...]:
        return tuple(self.rewards)

    def stochastic(self, steps: int, seed: int, epoch: int) -> list[int]:
        return list(range(steps))  # whatever the kernel does

    def ascent(self, score: Callable[[str], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss [B] and what to log of it; `score` gives the scores [B] of a reward by its name."""
        loss: Tensor | float = 0.0
        metrics = {}
        for name, weight in self.rewards.items():
            scores = score(name)
            loss = loss + weight * descended(scores, self.margin)
            if self.margin is not None:
                metrics[f"below/{name}"] = (scores.detach() < self.margin).float()
        assert not isinstance(loss, float)
        return loss, metrics

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        return {
            f"below/{name}": f"no image is below algorithm.margin {self.margin:g} in '{name}', so it has no gradient; "
            "raise the margin, or remove it"
            for name in self.rewards
            if metrics.get(f"below/{name}") == 0
        }


def descended(scores: Tensor, margin: float | None) -> Tensor:
    """relu(margin - r), or -r without a margin; 0 where the reward does not apply; [B]."""
    applies = ~scores.isnan()
    loss = -scores if margin is None else (margin - scores).relu()
    return loss.where(applies, 0.0)


def shared(metrics: Mapping[str, Tensor], parts: int) -> dict[str, Tensor]:
    """One loss's share of what is logged, of so many losses."""
    return {name: metric / parts for name, metric in metrics.items()}


@dataclass(frozen=True)
class Recomputed:
    """A denoiser whose activations are computed again in the backward pass, so that only its input is kept."""

    denoiser: Denoiser

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def predict(self, x: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        from torch.utils.checkpoint import checkpoint

        x0, eps = checkpoint(self.denoiser.predict, x, s, use_reentrant=False)
        return x0, eps
