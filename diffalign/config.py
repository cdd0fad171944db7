"""What one run is: strict, frozen models. `diffalign.loading` reads them from YAML and command-line overrides."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from diffalign.fields import (
    YAML_LIST,
    AlgorithmChoice,
    Decay,
    NonNegativeInt,
    PositiveInt,
    Rewards,
    Section,
    Side,
    spelled_out,
)
from diffalign.source import Path as KeyPath

Kernel = Literal["ode", "flow_sde", "cps", "dance", "ddim", "dpm2"]
DETERMINISTIC = ("ode", "dpm2")
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


class Prompts(Section):
    """Where prompts come from: an embedded set, a text file with one prompt a line, or JSONL with metadata."""

    train: str
    """Prompts to train on: shapes-train, shapes-test, or a .txt or .jsonl file."""
    test: str | None = None
    """Prompts to evaluate on; needed when evaluation.every is not 0."""


class Sampling(Section):
    """How training samples its images."""

    steps: PositiveInt = 10
    """Number of denoising steps."""
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

    @property
    def deterministic(self) -> bool:
        return self.kernel in DETERMINISTIC

    @model_validator(mode="after")
    def _eta_suits(self) -> Sampling:
        if self.kernel in UNIT_ETA and self.eta > 1:
            raise ValueError(f"eta {self.eta} does not suit kernel '{self.kernel}'; use 0 to 1")
        return self

    @model_validator(mode="after")
    def _negative_is_used(self) -> Sampling:
        if self.negative_prompt and self.guidance == 1.0:
            raise ValueError("negative_prompt has no effect at guidance 1; raise guidance or remove it")
        return self


class AdvantageConfig(Section):
    """How rewards become advantages. A string is short for {name: string}."""

    name: Literal["group"] = "group"
    """group: subtract the mean reward of the prompt's images (GRPO, arXiv 2402.03300)."""
    std: Literal["group", "global", "none"] = "global"
    """Divide by the std within the group, over the whole epoch, or not at all."""
    ddof: Literal[0, 1] = 0
    """Delta degrees of freedom of that std."""
    eps: Annotated[float, Field(gt=0)] = 1e-4
    """Added to the std."""
    clip: Annotated[float, Field(gt=0)] = 5.0
    """Advantages are cut to [-clip, clip]."""


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
    """The loop. Results do not depend on micro_batch, nor on the number of processes."""

    epochs: PositiveInt
    """Rollouts to collect, each followed by its updates."""
    prompts: PositiveInt
    """Prompts in an epoch."""
    images_per_prompt: int
    """Images of each prompt in an epoch: the group that GRPO compares."""
    micro_batch: PositiveInt = 8
    """Images in one forward pass on one device; only memory and speed depend on it."""
    updates_per_rollout: int = 1
    """Optimizer steps in an epoch."""
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

    @field_validator("images_per_prompt")
    @classmethod
    def _group(cls, n: int) -> int:
        if n < 2:
            raise ValueError(f"must be at least 2, got {n}: an image is compared with others of its prompt")
        return n

    @field_validator("updates_per_rollout")
    @classmethod
    def _on_policy(cls, n: int) -> int:
        if n != 1:
            raise ValueError(f"only 1 update per rollout is supported, got {n}")
        return n


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


class Config(Section):
    """One run, complete: what `config.yaml` in its folder holds."""

    model: Annotated[ModelRef, spelled_out("path")]
    """The model to align."""
    output: str
    """Run folder, made if missing."""
    seed: NonNegativeInt = 0
    """Every random number of the run follows from it."""
    prompts: Prompts
    """Prompts to train and to evaluate on."""
    sampling: Sampling = Sampling()
    """How training samples its images."""
    algorithm: AlgorithmChoice
    """The training method: {name: ..., settings of that method}."""
    advantage: Annotated[AdvantageConfig, spelled_out("name")] = AdvantageConfig()
    """How rewards become advantages."""
    rewards: Rewards
    """What to maximise: names, or {name: ..., weight: ..., settings of that reward}."""
    adapter: Annotated[Lora | Full, Field(discriminator="name"), spelled_out("name", "lora")] = Lora()
    """Which weights are trained."""
    trainer: TrainerConfig
    """The loop."""
    evaluation: Evaluation = Field(default=Evaluation(), validate_default=True)
    """What is measured on test prompts."""
    checkpoint: Checkpoint = Checkpoint()
    """What is kept to resume from."""
    log_with: Annotated[tuple[Tracker, ...], YAML_LIST] = ()
    """Trackers that get the metrics too; metrics.jsonl is always written."""

    @field_validator("evaluation", mode="before")
    @classmethod
    def _share_rewards(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, Evaluation):
            value = {name: getattr(value, name) for name in value.model_fields_set}
        trained = info.data.get("rewards")
        if not isinstance(value, dict):
            return value
        if not trained or not value.get("rewards"):  # none valid: their own error says so
            return {**value, "rewards": trained or ()}
        if not isinstance(value["rewards"], list):
            return value
        named = {r.key: r for r in trained}
        return {**value, "rewards": [named.get(r, r) if isinstance(r, str) else r for r in value["rewards"]]}

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        wrong = _conflicts(self)
        if wrong:
            lines = [
                InitErrorDetails(type=PydanticCustomError("conflict", "{said}", {"said": said}), loc=path, input=None)
                for path, said in wrong
            ]
            raise ValidationError.from_exception_data("Config", lines)
        return self

    @property
    def evaluation_sampling(self) -> Sampling:
        """Deterministic sampling with evaluation's steps and guidance."""
        guidance = self.sampling.guidance if self.evaluation.guidance is None else self.evaluation.guidance
        changes = {"kernel": "ode", "eta": 0.0, "steps": self.evaluation.steps, "guidance": guidance}
        return self.sampling.model_copy(update=changes)


def _conflicts(config: Config) -> list[tuple[KeyPath, str]]:
    """(key, sentence) for settings that are right alone and wrong together."""
    wrong: list[tuple[KeyPath, str]] = []
    sampling, algorithm = config.sampling, config.algorithm
    wrong += algorithm.conflicts(sampling)
    if not config.rewards:
        wrong.append((("rewards",), "name at least one reward"))
    places: dict[KeyPath, Rewards] = {("rewards",): config.rewards}
    if config.evaluation.rewards != config.rewards:
        places["evaluation", "rewards"] = config.evaluation.rewards
    for place, rewards in places.items():
        names = [r.key for r in rewards]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice:
            wrong.append((place, f"'{twice}' is listed twice; remove one or give it a label"))
    if config.evaluation.every and config.prompts.test is None:
        wrong.append((("prompts", "test"), f"needed because evaluation.every is {config.evaluation.every}"))
    return wrong
