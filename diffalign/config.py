"""What one run is. `diffalign.loading` reads it from YAML and command-line overrides."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from diffalign.advantages import Scalar
from diffalign.advantages.group import Group
from diffalign.curriculums.uniform import Uniform
from diffalign.fields import (
    YAML_LIST,
    AdvantageChoice,
    AlgorithmChoice,
    CurriculumChoice,
    MultiRewardChoice,
    NonNegativeInt,
    Rewards,
    Section,
    spelled_out,
)
from diffalign.sections import (
    Checkpoint,
    Evaluation,
    Full,
    Guard,
    Lora,
    ModelRef,
    Prompts,
    Sampling,
    Tracker,
    TrainerConfig,
)
from diffalign.source import Path as KeyPath
from diffalign.types import UserError


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
    advantage: Annotated[AdvantageChoice, spelled_out("name", "group")] = Group(name="group")
    """How rewards become advantages: {name: ..., settings of that estimator}."""
    curriculum: Annotated[CurriculumChoice, spelled_out("name", "uniform")] = Uniform(name="uniform")
    """Which prompts an epoch takes: {name: ..., settings of that curriculum}."""
    rewards: Rewards = ()
    """What to maximise: names, or {name: ..., weight: ..., settings of that reward}."""
    multireward: Annotated[MultiRewardChoice, spelled_out("name")] | None = None
    """How several rewards share one gradient: {name: marble, ...}; not given, `advantage` makes one reward of them."""
    adapter: Annotated[Lora | Full, Field(discriminator="name"), spelled_out("name", "lora")] = Lora()
    """Which weights are trained."""
    trainer: TrainerConfig
    """The loop."""
    evaluation: Evaluation = Field(default=Evaluation(), validate_default=True)
    """What is measured on test prompts."""
    checkpoint: Checkpoint = Checkpoint()
    """What is kept to resume from."""
    guard: Guard = Guard()
    """When to stop a run that has collapsed."""
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
        if trained is None or not value.get("rewards"):  # none valid: their own error says so
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
        """Deterministic sampling with evaluation's steps and guidance; a few-step generator samples as in training."""
        guidance = self.sampling.guidance if self.evaluation.guidance is None else self.evaluation.guidance
        if self.sampling.timesteps is not None:
            return self.sampling.model_copy(update={"guidance": guidance, "shared_noise": False})
        changes = {
            "kernel": "ode",
            "eta": 0.0,
            "steps": self.evaluation.steps,
            "guidance": guidance,
            "shared_noise": False,
        }
        return self.sampling.model_copy(update=changes)


def _conflicts(config: Config) -> list[tuple[KeyPath, str]]:
    """(key, sentence) for settings that are right alone and wrong together."""
    wrong: list[tuple[KeyPath, str]] = []
    sampling, algorithm = config.sampling, config.algorithm
    wrong += algorithm.conflicts(sampling)
    images = config.trainer.prompts * config.trainer.images_per_prompt
    if config.trainer.updates_per_rollout > images:
        said = f"{config.trainer.updates_per_rollout} updates need as many images, got {images} an epoch"
        wrong.append((("trainer", "updates_per_rollout"), said))
    if config.model.dtype == "fp16":
        wrong.append((("model", "dtype"), "fp16 is for sampling: its gradients underflow; train in bf16 or fp32"))
    if config.trainer.ema_every > 1 and not config.trainer.ema:
        wrong.append((("trainer", "ema_every"), "has no effect without trainer.ema"))
    if algorithm.compares and config.trainer.images_per_prompt < 2:
        said = "must be at least 2, got 1: an image is compared with others of its prompt"
        wrong.append((("trainer", "images_per_prompt"), said))
    if not config.rewards and algorithm.rewarded:
        wrong.append((("rewards",), "name at least one reward"))
    if config.rewards and not algorithm.rewarded:
        said = f"'{algorithm.name}' trains on none; put them under evaluation.rewards to measure them"
        wrong.append((("rewards",), said))
    if not algorithm.rewarded and config.advantage != Group(name="group"):
        wrong.append((("advantage",), f"has no effect with '{algorithm.name}'; remove it"))
    if config.evaluation.every and not algorithm.rewarded and not config.evaluation.rewards:
        wrong.append((("evaluation", "rewards"), "name what to measure, such as [geneval]"))
    known = {r.key: r for r in config.rewards}
    for name in algorithm.ascends():
        if name not in known:
            named = ", ".join(known) or "none"
            wrong.append((("algorithm",), f"'{name}' is not one of the run's rewards ({named}); list it under rewards"))
        elif not known[name].differentiable:
            wrong.append((("algorithm",), f"reward '{name}' has no gradient; take a differentiable one"))
    if config.sampling.timesteps is not None and config.evaluation.steps != Evaluation().steps:
        said = "has no effect with sampling.timesteps, whose steps evaluation takes too; remove it"
        wrong.append((("evaluation", "steps"), said))
    wrong += _shared(config)
    if algorithm.estimators and config.advantage.name not in algorithm.estimators:
        said = (
            f"'{algorithm.name}' does not train on '{config.advantage.name}'; take {' or '.join(algorithm.estimators)}"
        )
        wrong.append((("advantage", "name"), said))
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


def _shared(config: Config) -> list[tuple[KeyPath, str]]:
    """What is wrong with several rewards that share one gradient."""
    method = config.multireward
    if method is None:
        return []
    if not config.algorithm.compares:
        return [(("multireward",), f"mixes advantages, and '{config.algorithm.name}' trains on none; remove it")]
    try:
        groups = method.grouped([r.key for r in config.rewards])
    except UserError as error:
        return [(("multireward", "groups"), str(error))]
    wrong: list[tuple[KeyPath, str]] = []
    if len(groups) < 2:
        wrong.append((("multireward",), f"'{method.name}' needs two or more rewards; remove it or add one"))
    wrong += [
        (("rewards", i, "weight"), f"must be above 0 with multireward, got {r.weight:g}; remove the reward instead")
        for i, r in enumerate(config.rewards)
        if r.weight <= 0
    ]
    if isinstance(config.advantage, Scalar) and config.advantage.combine != "sum":
        wrong.append(
            (("advantage", "combine"), "has no effect with multireward, where each reward is alone; remove it")
        )
    levels, split = config.algorithm.levels(config.sampling.steps), method.split_losses
    if split is not None and split > levels:
        said = f"{split} asked for, but each image has {levels} losses; ask for {levels} or fewer, or null for all"
        wrong.append((("multireward", "losses"), said))
    updates = config.trainer.updates_per_rollout * config.trainer.passes
    if method.mixes and not config.algorithm.affine(updates):
        said = (
            f"trains on mixtures of advantages, in which the loss of '{config.algorithm.name}' must be affine, and it "
            "is not with these settings; take one update an epoch (and mode all with nft), or split all losses of "
            "every step (marble: every 1 and losses null)"
        )
        wrong.append((("multireward",), said))
    return wrong
