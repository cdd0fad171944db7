"""Training methods: one file each, found by name. A method is a frozen pydantic model that is its own configuration."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """One item per backward: policy(A) + penalty. The trainer averages over the epoch's images, so nothing depends on
    the micro-batch. The policy loss is a function of the advantages, because with several rewards each has its own:
    one forward pass then serves them all."""

    policy: Callable[[Tensor], Tensor]  # advantages [B] -> [B], carries the gradient
    advantages: Tensor  # [B], those of the batch
    penalty: Tensor | None = None  # [B], what no advantage scales, such as a KL; its weight is in it
    metrics: dict[str, Tensor] = field(default_factory=dict)  # name -> [B], logged as their mean

    @property
    def per_sample(self) -> Tensor:
        """[B]; computed anew at every call."""
        return self.total(self.policy(self.advantages))

    def total(self, policy: Tensor) -> Tensor:
        """[B] of a policy loss [B] and the penalty."""
        return policy if self.penalty is None else policy + self.penalty


def unrewarded(advantages: Tensor) -> Tensor:
    """The policy loss of what no advantage scales, [B]."""
    return advantages.new_zeros(len(advantages))


class Policy(Protocol):
    """What a method may ask of the model in training."""

    @property
    def kernel(self) -> str: ...

    @property
    def eta(self) -> float: ...

    def denoiser(self, cond: Conditioning, guided: bool = True) -> Denoiser:
        """The trained model with the guidance it was sampled with, or without any."""
        ...

    def guided(self, cond: Conditioning, guidance: float) -> Denoiser:
        """The model with another guidance than it was sampled with, such as a teacher's."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, `denoiser` is the model as it was before training."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of latents [B, ...], with their gradient."""
        ...

    def score(self, reward: str, images: Tensor, batch: Rollout, prompts: Sequence[str] | None = None) -> Tensor:
        """[B] scores of one of the run's differentiable rewards, with their gradient; NaN where it does not apply.

        `prompts`: other texts than the batch's own.
        """
        ...


@dataclass(frozen=True)
class Study:
    """An epoch's samples as a method's own networks see them: this process's share of `total` over all processes."""

    seed: int  # of the run
    epoch: int  # from 0
    policy: Policy
    rollout: Rollout
    total: int
    batch: int  # samples to take at once; it must change no result
    sum: Callable[[Tensor], Tensor]  # over processes; every process must call it equally often


class Memory:
    """What a method carries from step to step beside the trained weights: an old policy, a critic, statistics.

    This one carries nothing. A method that needs more derives from it and returns its own from `Algorithm.start`.
    """

    def acting(self) -> AbstractContextManager[None]:
        """Inside, the model is the policy that samples; by default the trained one."""
        return nullcontext()

    def learn(self, study: Study) -> tuple[bool, dict[str, float]]:
        """Train what the method has beside the model, before the model's own steps of the epoch.

        (whether the model is to be trained in this epoch too, what to log), alike on every process.
        """
        return True, {}

    def after_step(self) -> None:
        """Called after every optimizer step."""

    def after_epoch(self) -> None:
        """Called after an epoch's last optimizer step."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, in place."""


class Algorithm(Method):
    """Base of every method."""

    trajectory: ClassVar[bool] = False
    """Trains on stored transitions, so it needs stochastic steps."""
    estimators: ClassVar[tuple[str, ...]] = ()
    """The advantage estimators that suit; none named, all do."""
    compares: ClassVar[bool] = True
    """Trains on advantages, for which an epoch has several images of a prompt."""
    rewarded: ClassVar[bool] = True
    """Trains on rewards; where it is False, `rewards` may be empty and no image of a rollout is decoded."""

    @property
    def needs_reference(self) -> bool:
        """Compares with the model as it was before training."""
        return False

    def affine(self, updates: int) -> bool:
        """Whether, in an epoch of so many updates, the gradient of the policy loss is affine in the advantages while
        none is clipped: then the gradient at a mixture of advantages is the mixture of the gradients."""
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

    def until(self, steps: int, seed: int, epoch: int) -> int | None:
        """Number of the steps that an epoch's samples take, where it is not all of them."""
        return None

    def tied(self, steps: int, seed: int, epoch: int) -> list[int]:
        """Indices of the steps whose noise all images of a prompt share."""
        return []

    def ascends(self) -> tuple[str, ...]:
        """Names of the rewards whose gradient with respect to the image is used; they must be differentiable."""
        return ()

    def kept(self, steps: int, seed: int, epoch: int) -> list[int]:
        """Indices of the steps whose transitions are stored, because they are trained."""
        return self.stochastic(steps, seed, epoch)

    def levels(self, steps: int) -> int:
        """Noise levels at which each image is trained."""
        return max(1, len(self.kept(steps, 0, 0)))

    def forwards(self, steps: int, updates: int, passes: int) -> dict[str, float]:
        """Forward passes of the network by purpose, beside those that sample: how many an image costs in an epoch.

        Of `passes` passes over the images, each in `updates` optimizer steps. `diffalign check` tells them; a method
        with others than these, such as an old policy's, names them too.
        """
        trained: float = self.levels(steps) * passes
        return {"to train": trained} | ({"of the reference": trained} if self.needs_reference else {})

    @property
    def copies(self) -> tuple[str, ...]:
        """Names of the copies of the trained weights that the method keeps beside them, for the estimate of memory."""
        return ()

    def graphs(self, steps: int) -> dict[str, int]:
        """For the estimate of memory: of each kind of training the forward passes of an image whose activations are
        kept at once, until the backward pass."""
        return {"training": 1}

    def trains_on(self, rollout: Rollout, memory: Memory, update: int) -> Tensor:
        """[B] bool: samples whose loss has a gradient in an epoch's update number 0, 1, ...; the others are not run
        through the model."""
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
