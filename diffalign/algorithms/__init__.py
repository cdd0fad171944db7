"""Training methods: one file each, found by name. A method is a frozen pydantic model that is its own configuration."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from diffalign.methods import Method

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffalign.sections import Sampling
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

    def denoiser(self, cond: Conditioning, guided: bool = True) -> Denoiser:
        """The trained model with the guidance it was sampled with, or without any."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, `denoiser` is the model as it was before training."""
        ...


class Memory:
    """What a method carries from step to step beside the trained weights: an old policy, a critic, statistics.

    This one carries nothing. A method that needs more derives from it and returns its own from `Algorithm.start`.
    """

    def acting(self) -> AbstractContextManager[None]:
        """Inside, the model is the policy that samples; by default the trained one."""
        return nullcontext()

    def after_step(self) -> None:
        """Called after every optimizer step."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, in place."""


class Algorithm(Method):
    """Base of every method."""

    trajectory: ClassVar[bool] = False
    """Trains on stored transitions, so it needs stochastic steps."""

    @property
    def needs_reference(self) -> bool:
        """Compares with the model as it was before training."""
        return False

    def conflicts(self, sampling: Sampling) -> Iterator[tuple[tuple[str, ...], str]]:
        """(key, sentence) for settings that do not suit this method; found before a model is loaded."""
        if self.trajectory and sampling.deterministic:
            yield ("sampling", "kernel"), f"'{self.name}' needs a stochastic kernel; take cps or flow_sde"
        elif self.trajectory and sampling.eta == 0:
            yield ("sampling", "eta"), f"0 makes every step deterministic; '{self.name}' needs eta above 0"
        elif self.trajectory and not self.stochastic(sampling.steps, 0, 0):
            yield ("sampling", "steps"), f"{sampling.steps} leaves '{self.name}' no step to train; add steps"

    def start(self, pipeline: Any, parameters: dict[str, nn.Parameter]) -> Memory:
        """Called once, when the trained parameters exist; may add frozen adapters to the pipeline."""
        return Memory()

    def stochastic(self, steps: int, seed: int, epoch: int) -> list[int]:
        """Indices of the steps that are sampled with noise in this epoch; the same on every process."""
        return []

    def kept(self, steps: int, seed: int, epoch: int) -> list[int]:
        """Indices of the steps whose transitions are stored, because they are trained."""
        return self.stochastic(steps, seed, epoch)

    def trains_on(self, rollout: Rollout) -> Tensor:
        """[B] bool: samples whose loss has a gradient; the others are not run through the model."""
        return rollout.group >= 0

    def behaviour(self, policy: Policy, batch: Rollout) -> dict[str, Tensor]:
        """What the losses compare with in an epoch's later updates, each [B, ...]: `batch.old`, empty in the first.

        Called without gradients before the first update, on the batches that the later ones train on.
        """
        return {}

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Sentences for the user that an epoch's metrics give cause to; each key is told once a run."""
        return {}

    @abstractmethod
    def losses(self, policy: Policy, batch: Rollout, memory: Memory) -> Iterator[Loss]:
        """Losses whose sum is the method's loss; each is back-propagated before the next is computed."""
