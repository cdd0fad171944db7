"""Training methods: one file each, found by name. A method is a frozen pydantic model that is its own configuration."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from diffalign.methods import Method

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.types import Conditioning, Denoiser, Rollout


@dataclass(frozen=True)
class Loss:
    """One item per backward. The trainer averages over the epoch's images, so nothing depends on the micro-batch."""

    per_sample: Tensor  # [B], carries the gradient
    metrics: dict[str, Tensor] = field(default_factory=dict)  # name -> [B], logged as their mean


class Policy(Protocol):
    """What a method may ask of the model in training."""

    @property
    def kernel(self) -> str: ...

    @property
    def eta(self) -> float: ...

    def denoiser(self, cond: Conditioning) -> Denoiser:
        """The trained model with the guidance it was sampled with."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, `denoiser` is the model as it was before training."""
        ...


class Algorithm(Method):
    """Base of every method."""

    trajectory: ClassVar[bool] = False
    """Trains on stored transitions, so it needs stochastic steps."""

    @property
    def needs_reference(self) -> bool:
        """Compares with the model as it was before training."""
        return False

    def stochastic(self, steps: int, seed: int, epoch: int) -> list[int]:
        """Indices of the steps that are sampled with noise and stored in this epoch; the same on every process."""
        return []

    def trains_on(self, rollout: Rollout) -> Tensor:
        """[B] bool: samples whose loss has a gradient; the others are not run through the model."""
        return rollout.group >= 0

    @abstractmethod
    def losses(self, policy: Policy, batch: Rollout) -> Iterator[Loss]:
        """Losses whose sum is the method's loss; each is back-propagated before the next is computed."""
