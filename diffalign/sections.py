"""The sections of a run's configuration, each a strict, frozen model; :mod:`diffalign.config` puts them together."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from diffalign.fields import YAML_LIST, Decay, NonNegativeInt, PositiveInt, Rewards, Section, Side
from diffalign.prompts import Texts

Kernel = Literal["ode", "flow_sde", "cps", "dance", "ddim", "dpm2"]
DETERMINISTIC = ("ode", "dpm2")
Timestep = Annotated[float, Field(gt=0, le=1000)]
UNIT_ETA = ("cps", "ddim")  # eta is a fraction of the noise that may be replaced
Tracker = Literal["tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"]


class ModelRef(Section):
    """The model to load. A string is short for {path: string}."""

    path: str
    """Embedded name such as tiny-sd3, a local diffusers folder, or a hub id such as owner/name."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the frozen weights; trained weights and log-probabilities stay fp32."""
    device: str | None = None
    """Such as cpu or cuda:1; not given, the accelerator that is there."""
    encoders: Literal["resident", "offload"] = "resident"
    """offload: text encoders wait in main memory and come to the device only to encode; saves 11 GB with SD3.5."""
    max_sequence_length: Annotated[int, Field(ge=0, le=512)] | None = None
    """Tokens that a T5 encoder sees of a prompt; fewer are faster; not given, the model's own number."""


class Prompts(Section):
    """Where prompts come from: an embedded set, a text file with one prompt a line, or JSONL with metadata."""

    train: Texts
    """Prompts to train on: shapes-train, shapes-test, a .txt or .jsonl file, or a list of several, whose names are then
    the "source" in their prompts' metadata."""
    test: Texts | None = None
    """Prompts to evaluate on, likewise; of several sources one prompt each in turn. Needed when evaluation.every is not
    0."""


class Sampling(Section):
    """How training samples its images."""

    steps: PositiveInt = 10
    """Number of denoising steps; with `timesteps` their number, and not to be given."""
    timesteps: Annotated[tuple[Timestep, ...], YAML_LIST] | None = None
    """The steps of a few-step generator, before the model family's shift: falling, from 1000, such as [1000, 750, 500,
    250]; evaluation then samples as training does. Not given, the scheduler's own grid of `steps`."""
    kernel: Kernel = "cps"
    """Transition of one step: ode, flow_sde (arXiv 2505.05470), cps (2509.05952), dance (2505.07818), ddim
    (2010.02502), or the deterministic solver dpm2 (2509.16117)."""
    eta: Annotated[float, Field(ge=0)] = 0.7
    """Noise level of a stochastic kernel; 0 is deterministic."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance scale; 1 samples without guidance at half the cost."""
    height: Side = 512
    """Image height in pixels."""
    width: Side = 512
    """Image width in pixels."""
    negative_prompt: str = ""
    """Prompt of the unconditional branch; needs guidance other than 1."""
    shared_noise: bool = False
    """All images of a prompt start from the same noise (DanceGRPO, arXiv 2505.07818)."""

    @property
    def deterministic(self) -> bool:
        return self.kernel in DETERMINISTIC

    @property
    def grid(self) -> int | tuple[float, ...]:
        """What `Pipeline.sigmas` makes the noise levels from."""
        return self.steps if self.timesteps is None else self.timesteps

    @model_validator(mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("timesteps"), (list, tuple)):
            return value
        count = len(value["timesteps"])
        if value.get("steps", count) != count:
            raise ValueError(
                f"steps {value['steps']} contradicts the {count} timesteps; leave steps out, or give {count}"
            )
        return {**value, "steps": count}

    @field_validator("timesteps")
    @classmethod
    def _fall(cls, timesteps: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if timesteps is None:
            return None
        if not timesteps or timesteps[0] != 1000 or any(a <= b for a, b in pairwise(timesteps)):
            raise ValueError("must fall from 1000, pure noise, such as [1000, 750, 500, 250]")
        return timesteps

    @model_validator(mode="after")
    def _eta_suits(self) -> Sampling:
        if self.kernel in UNIT_ETA and self.eta > 1:
            raise ValueError(f"eta {self.eta} does not suit kernel '{self.kernel}'; use 0 to 1")
        return self

    @model_validator(mode="after")
    def _noise_differs(self) -> Sampling:
        if self.shared_noise and (self.deterministic or self.eta == 0):
            raise ValueError("shared_noise without a stochastic kernel gives the same image for a whole group")
        return self

    @model_validator(mode="after")
    def _negative_is_used(self) -> Sampling:
        if self.negative_prompt and self.guidance == 1.0:
            raise ValueError("negative_prompt has no effect at guidance 1; raise guidance or remove it")
        return self


class Lora(Section):
    """Train low-rank adapters (arXiv 2106.09685) on a frozen model."""

    name: Literal["lora"] = "lora"
    """lora: low-rank adapters on a frozen model."""
    rank: PositiveInt = 32
    """Rank of each update."""
    alpha: Annotated[float, Field(gt=0)] = 64.0
    """Updates are scaled by alpha / rank."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """Distribution of the first factor; the second starts at zero."""
    targets: Annotated[tuple[str, ...], YAML_LIST] | None = None
    """Module-name suffixes to adapt; not given, those of the model family's papers."""
    start: Annotated[str, Field(min_length=1)] | None = None
    """A trained LoRA to start from, in diffusers' format: a folder such as runs/NAME/lora, or a hub id. It stays as it
    is under the new one; references and teachers are the model without both, and the export holds their sum."""

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if targets == ():
            raise ValueError("an empty list adapts nothing; remove it for the family's default")
        return targets


class Full(Section):
    """Train every weight of the denoising network."""

    name: Literal["full"]
    """full: train every weight."""


class TrainerConfig(Section):
    """The loop. micro_batch and the number of processes change results by rounding alone."""

    epochs: PositiveInt
    """Rollouts to collect, each followed by its updates."""
    prompts: PositiveInt
    """Prompts in an epoch."""
    images_per_prompt: PositiveInt
    """Images of each prompt in an epoch: the group that GRPO compares."""
    micro_batch: PositiveInt = 8
    """Images in one forward pass on one device: for memory and speed. It changes results by rounding alone, which is
    about 1e-5 in fp32, and in bf16 grows until two runs differ as two seeds do."""
    updates_per_rollout: PositiveInt = 1
    """Optimizer steps that one pass over an epoch's images is divided into; the first is on-policy."""
    passes: PositiveInt = 1
    """Passes over an epoch's images (PPO's inner epochs)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: far less memory, about a third slower."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Learning rate of AdamW."""
    betas: Annotated[tuple[Decay, Decay], YAML_LIST] = (0.9, 0.999)
    """Decay of AdamW's moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    ema: Decay = 0.0
    """Decay of the moving average of the trained weights; 0 keeps none."""
    ema_every: PositiveInt = 1
    """Optimizer steps between updates of that average (Flow-GRPO: 8)."""


class Guard(Section):
    """When to stop a run that can no longer learn, rather than burn a week of it."""

    flat_epochs: NonNegativeInt = 20
    """Stop after so many epochs in a row in which no group of images differs in reward; 0 never does."""
    grad_norm: Annotated[float, Field(gt=1)] = 1000.0
    """Stop when the gradient norm exceeds this multiple of its recent median three times in a row."""


class Evaluation(Section):
    """Deterministic sampling of test prompts with fixed seeds, scored by any rewards."""

    every: NonNegativeInt = 0
    """Epochs between evaluations, which also come first and last; 0 never evaluates."""
    prompts: PositiveInt = 60
    """Test prompts, from the start of prompts.test."""
    images_per_prompt: PositiveInt = 2
    """Images of each test prompt."""
    steps: PositiveInt = 20
    """Denoising steps of the ode kernel."""
    guidance: Annotated[float, Field(ge=1)] | None = None
    """Guidance scale; not given, that of sampling."""
    rewards: Rewards = ()
    """Rewards to report; a bare name takes the settings it has under rewards; not given, the training rewards."""


class Checkpoint(Section):
    """Resumable state: weights, optimizer, random numbers."""

    every: NonNegativeInt = 0
    """Epochs between checkpoints; 0 writes one at the end."""
    keep: PositiveInt = 2
    """Older checkpoints are deleted."""
