"""The values that travel between samplers, trainers, steering and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffalign.schedules import Schedule


class UserError(Exception):
    """A mistake the user can mend. Its message, one sentence, says how; the command line prints it, exit code 2."""


class Stopped(UserError):
    """Why every process ends the run between two optimizer steps; what was finished before is saved."""


class Elsewhere(UserError):
    """The main process failed and says why; this one leaves without a word."""


@dataclass(frozen=True)
class Step:
    """One transition x_i -> x_{i+1} of a batch; see :func:`diffalign.samplers.step`."""

    mean: Tensor  # [B, ...] fp32, mean of p(x_{i+1} | x_i)
    std: Tensor  # [B, 1, ...] actual Gaussian std of the transition; 0 for a deterministic one
    next: Tensor  # [B, ...] sampled, or given (then it is scored)
    log_prob: Tensor  # [B] fp32, mean over latent dimensions; 0 where std is 0 (except cps, see step)
    x0: Tensor  # [B, ...] clean prediction


@dataclass(frozen=True)
class Conditioning:
    """Text conditioning of a batch: every unique prompt is stored once, `index` says which row each sample uses."""

    tensors: dict[str, Tensor]  # each [U, ...], one row per unique prompt
    index: Tensor  # [B] row of each sample

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: Tensor | slice) -> Conditioning:
        return replace(self, index=self.index[i])

    def rows(self) -> dict[str, Tensor]:
        """The tensors gathered to batch size, each [B, ...]; made only when a model needs them."""
        return {name: t[self.index.to(t.device)] for name, t in self.tensors.items()}

    def to(self, device: torch.device | str) -> Conditioning:
        return Conditioning({k: t.to(device) for k, t in self.tensors.items()}, self.index.to(device))


class Denoiser(Protocol):
    """Anything that predicts the clean image and the noise in x at noise level s."""

    @property
    def schedule(self) -> Schedule: ...

    def predict(self, x: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        """x [B, ...], s scalar or [B] -> (x0, eps), both [B, ...] fp32 (float64 for a float64 x)."""
        ...


@dataclass(frozen=True)
class RewardOutput:
    """Scores of a batch. NaN = this reward does not apply to that prompt.

    A score that applies but could not be had (a server that failed, an answer that cannot be read) is never 0: it is
    marked invalid, is left out of the statistics of its group and gets advantage 0.
    """

    scores: Tensor  # [B] fp32
    extra: dict[str, Any] = field(default_factory=dict)  # for reports: name -> B entries, a list or a tensor [B, ...]
    valid: Tensor | None = None  # [B] bool; None = all


@dataclass
class Rollout:
    """A batch of sampled images with what training needs; batch-first, `rollout[index]` selects samples."""

    prompts: list[str]
    metadata: list[dict[str, Any]]
    group: Tensor  # [B] prompt id: samples of one group are compared with each other
    seeds: Tensor  # [B] int64, the noise of each sample is a function of its seed alone
    cond: Conditioning
    sigmas: Tensor  # [T+1], shared by the batch, exactly those sampled with
    kept: Tensor  # [K] step indices whose transition is stored, shared by the batch
    x0: Tensor  # [B, ...] final latents
    states: Tensor | None = None  # [B, K, 2, ...] (x_i, x_{i+1}) of the kept steps
    log_probs: Tensor | None = None  # [B, K] behaviour log-probs of the kept steps
    images: Tensor | None = None  # [B, 3, H, W] in [0, 1]
    rewards: dict[str, Tensor] = field(default_factory=dict)  # name -> [B]
    advantages: Tensor | None = None  # [B]
    separate: dict[str, Tensor] = field(default_factory=dict)  # reward -> [B] its own advantages, NaN: does not apply
    old: dict[str, Tensor] = field(default_factory=dict)  # name -> [B, ...], the sampling policy as training sees it
    turn: int = 0  # how often these images were trained on before

    SHARED = ("sigmas", "kept", "turn")

    @property
    def flat(self) -> Tensor:
        """[B] bool: every advantage is 0, as where no reward tells the images of a group apart."""
        assert self.advantages is not None
        flat = self.advantages == 0
        for own in self.separate.values():
            flat = flat & (own.nan_to_num(0.0) == 0)
        return flat

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Tensor) -> Rollout:
        def pick(name: str, value: Any) -> Any:
            if value is None or name in self.SHARED:
                return value
            if isinstance(value, dict):
                return {k: t[index] for k, t in value.items()}
            if isinstance(value, list):
                return [value[j] for j in index.tolist()]
            return value[index]

        return Rollout(**{f.name: pick(f.name, getattr(self, f.name)) for f in fields(self)})


class Pipeline(Protocol):
    """One model family seen by samplers and trainers. Latents are the model's own (VAE-scaled) ones."""

    schedule: Schedule
    device: torch.device  # where latents are made and the network runs
    trainable: torch.nn.Module  # the denoising network; adapters are added to it
    lora_targets: tuple[str, ...]  # module-name suffixes of the papers' LoRA

    def encode(self, prompts: Sequence[str]) -> Conditioning: ...

    def sigmas(self, steps: int | Sequence[float], height: int, width: int) -> Tensor: ...  # [T+1], last 0

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]: ...  # without the batch axis

    def denoiser(self, cond: Conditioning, guidance: float = 1.0, negative: Conditioning | None = None) -> Denoiser: ...

    def decode(self, latents: Tensor) -> Tensor: ...  # [B, ...] -> [B, 3, H, W] in [0, 1]
