"""Rewards: one file per head, found by name; `{name: geneval, weight: 0.5}` is the class in `rewards/geneval.py`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import PrivateAttr, field_validator

from diffalign.methods import Method, configured, lookup
from diffalign.rewards import _applies
from diffalign.shaping import Shape
from diffalign.types import RewardOutput, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Head = Callable[["Tensor", Sequence[str], Sequence[Mapping[str, Any]]], "RewardOutput | Tensor | Sequence[float]"]


class Reward(Method):
    """Base of every head. A head without weights defines `__call__`; one that loads them overrides `setup` instead."""

    weight: float = 1.0
    """Weight of this reward in the total advantage."""
    label: str | None = None
    """Name in logs, needed when one head is used twice; by default the name without its path."""
    shape: Shape | None = None
    """Bend the scores before they are trained on, against reward hacking; logs and evaluation keep the raw ones."""
    only: _applies.Only = {}
    """Score only images whose prompt's metadata has this value, or one of these, under each key, such as
    {tag: counting} or {source: [ocr, geneval]}; to the others the reward does not apply."""

    needs_prompt: ClassVar[bool] = True
    """The scores depend on the prompt or its metadata."""
    abstains: ClassVar[bool] = True
    """NaN says that the reward does not apply to an image; where this is False it is a failure, and not valid."""
    learns: ClassVar[bool] = False
    """`setup` returns a `Learner`, which the trainer shows every epoch's images before they are scored."""

    @field_validator("only")
    @classmethod
    def _selects(cls, only: _applies.Only) -> _applies.Only:
        if only and cls.learns:
            raise ValueError("a reward that is trained during the run learns from all images; leave `only` out")
        if empty := [key for key, values in only.items() if not values]:
            raise ValueError(f"no value is given for '{empty[0]}'; name one, or leave the key out")
        return only

    @property
    def differentiable(self) -> bool:
        """The scores carry gradients to the images; a head that always gives them sets a ClassVar[bool] instead."""
        return False

    @property
    def remote(self) -> bool:
        """The scores come from another process or machine: waiting for them overlaps with sampling, in a thread."""
        return False

    @property
    def key(self) -> str:
        return self.label or self.name.rpartition(".")[2]

    def setup(self, device: torch.device | str) -> Head:
        """Load what the head needs and return the function that scores; called once a run."""
        return self

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput | Tensor | Sequence[float]:
        """images [B, 3, H, W] in [0, 1] -> B scores; NaN = this reward does not apply to that prompt."""
        raise UserError(f"reward '{self.key}' cannot score: its class must define __call__, or setup to load weights")


@dataclass(frozen=True)
class Lesson:
    """One epoch's images as a learning head sees them: this process's share of `total` over all processes."""

    epoch: int  # from 0
    images: Tensor  # [B, 3, H, W] in [0, 1]; B may be 0
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]
    seeds: Tensor  # [B] int64, one for each image: whatever a head draws is a function of it
    total: int
    batch: int  # images to take at once; it must change no result
    sum: Callable[[Tensor], Tensor]  # over processes; every process must call it equally often


class Learner(Protocol):
    """A head with weights that are trained during the run, such as a discriminator. They are saved with the run."""

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput | Tensor | Sequence[float]: ...

    def learn(self, lesson: Lesson) -> tuple[bool, dict[str, float]]:
        """Train on the images; (whether the generator is to train on them too, what to log), alike on every process."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class FunctionReward(Reward):
    """A plain function `(images, prompts, metadata) -> scores`, named in the config by its dotted path."""

    _function: Head = PrivateAttr()

    def setup(self, device: torch.device | str) -> Head:
        return self._function


@dataclass(frozen=True)
class Scorer:
    """A head that is ready to score, with its configuration; what it returns is checked."""

    reward: Reward
    head: Head
    device: torch.device | str  # where the head runs; images may be stored elsewhere

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """images [B, 3, H, W] in [0, 1] -> scores [B] fp32 on the images' device; those that are not valid are NaN.

        The head sees only images that the reward applies to by `only`; the others are NaN and valid, their extra None.
        Raises UserError when the head returns another shape, another type, or an infinite score.
        """
        rows = _applies.rows(self.reward.only, metadata)
        if len(rows) == len(prompts):
            return self._judged(images, prompts, metadata)
        some = [prompts[i] for i in rows], [metadata[i] for i in rows]
        return _applies.spread(self._judged(images[rows], *some) if rows else None, rows, images)

    def _judged(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        import torch

        name = self.reward.key
        output = self.head(images.to(self.device), prompts, metadata)
        given = output if isinstance(output, RewardOutput) else RewardOutput(output)  # type: ignore[arg-type]
        scores: Any = given.scores
        try:
            scores = torch.as_tensor(scores, device=images.device)
        except (TypeError, ValueError) as error:
            raise UserError(f"reward '{name}' must return a tensor or a list of {len(prompts)} numbers") from error
        if scores.shape != (len(prompts),) or scores.is_complex():
            raise UserError(
                f"reward '{name}' must return one real score an image, shape [{len(prompts)}], "
                f"but returned {scores.dtype} of shape {list(scores.shape)}"
            )
        scores = scores.float()
        valid = torch.ones_like(scores, dtype=torch.bool)
        if given.valid is not None:
            valid = torch.as_tensor(given.valid, device=images.device)
            if valid.shape != scores.shape or valid.dtype != torch.bool:
                raise UserError(
                    f"reward '{name}' must say of each image whether its score is valid, {len(prompts)} booleans, "
                    f"but gave {valid.dtype} of shape {list(valid.shape)}"
                )
        extra = given.extra
        failed = scores.isnan() & valid
        if not self.reward.abstains and failed.any():
            valid = valid & ~failed
            said = extra.get("error") or [None] * len(prompts)
            why = ["the score is not a number" if f else e for f, e in zip(failed.tolist(), said, strict=True)]
            extra = {**extra, "error": why}
        scores = scores.masked_fill(~valid, torch.nan)
        infinite = scores.detach().isinf().nonzero()
        if len(infinite):
            prompt = prompts[int(infinite[0])]
            raise UserError(f"reward '{name}' gave an infinite score for the prompt {prompt!r}; return NaN to abstain")
        for entry, values in extra.items():
            if len(values) != len(prompts):
                raise UserError(f"reward '{name}', extra '{entry}' must have one entry an image, {len(prompts)} in all")
        return RewardOutput(scores, extra, valid)


def resolve(entry: str | Mapping[str, Any] | Reward) -> Reward:
    """The validated configuration of one reward: a name, `{name: ..., weight: ..., ...}`, or a Reward as it is.

    Imports the head's file and nothing else, no weights. Raises UserError for an unknown name or a wrong option.
    """
    if isinstance(entry, Reward):
        return entry
    options = {"name": entry} if isinstance(entry, str) else dict(entry)
    if not isinstance(options.get("name"), str):
        raise UserError("every reward needs a name, such as {name: geneval, weight: 1.0}")
    found = lookup(__name__, options["name"], Reward)
    is_head = inspect.isclass(found) and issubclass(found, Reward)
    if not is_head and not callable(found):
        raise UserError(f"reward '{options['name']}' is a {type(found).__name__}; name a function or a Reward class")
    kind: type[Reward] = found if is_head else FunctionReward
    reward = configured(kind, options, "reward")
    if isinstance(reward, FunctionReward):
        reward._function = found
    return reward


def build(entries: Sequence[str | Mapping[str, Any] | Reward], device: torch.device | str = "cpu") -> dict[str, Scorer]:
    """Name -> scorer, in the order given, with weights loaded. Raises UserError when two share a name."""
    rewards: dict[str, Reward] = {}
    for entry in entries:
        reward = resolve(entry)
        if reward.key in rewards:
            raise UserError(f"two rewards are called '{reward.key}'; give one of them a label")
        rewards[reward.key] = reward
    return {key: Scorer(reward, reward.setup(device), device) for key, reward in rewards.items()}


def check_prompts(rewards: Sequence[Reward], prompts: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError when the `only` of a reward leaves out every one of the training prompts."""
    for reward in rewards:
        if said := _applies.unmatched(reward.only, prompts):
            raise UserError(f"reward '{reward.key}' {said}")


def shaped(reward: Reward, scores: Tensor) -> Tensor:
    """What advantages are made of: [B] float64, the scores bent by the reward's `shape`; NaN stays NaN."""
    return scores.double() if reward.shape is None else reward.shape(scores.double())


def score(
    rewards: Mapping[str, Scorer],
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    batch: int,
) -> dict[str, RewardOutput]:
    """Every reward's scores [B] fp32 on the images' device; at most `batch` images are scored at once."""
    parts = [slice(i, i + batch) for i in range(0, len(prompts), batch)]
    return {
        name: joined([scorer(images[i], prompts[i], metadata[i]) for i in parts]) for name, scorer in rewards.items()
    }


def joined(parts: Sequence[RewardOutput]) -> RewardOutput:
    """The outputs of several batches as one; of a batch that lacks an extra each entry is None."""
    import torch

    def together(name: str) -> Any:
        values = [p.extra.get(name, [None] * len(p.scores)) for p in parts]
        tensors = all(isinstance(value, torch.Tensor) for value in values)
        return torch.cat(values) if tensors else [v for value in values for v in value]

    valid = [p.valid for p in parts if p.valid is not None]
    extra = {name: together(name) for name in dict.fromkeys(name for p in parts for name in p.extra)}
    return RewardOutput(torch.cat([p.scores for p in parts]), extra, torch.cat(valid) if valid else None)
