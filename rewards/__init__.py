"""Rewards: one file per head, found by name; `{name: geneval, weight: 0.5}` is the class in `rewards/geneval.py`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PrivateAttr, ValidationError

from diffalign.methods import Method, lookup
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

    differentiable: ClassVar[bool] = False
    """The scores carry gradients to the images."""
    needs_prompt: ClassVar[bool] = True
    """The scores depend on the prompt or its metadata."""
    remote: ClassVar[bool] = False
    """The scores come from another process or machine, so that waiting for them can overlap with sampling."""

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
        """images [B, 3, H, W] in [0, 1] -> RewardOutput with scores [B] fp32 on the images' device.

        Raises UserError when the head returns another shape, another type, or an infinite score.
        """
        import torch

        name = self.reward.key
        output = self.head(images.to(self.device), prompts, metadata)
        scores, extra = (output.scores, output.extra) if isinstance(output, RewardOutput) else (output, {})
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
        infinite = scores.detach().isinf().nonzero()
        if len(infinite):
            prompt = prompts[int(infinite[0])]
            raise UserError(f"reward '{name}' gave an infinite score for the prompt {prompt!r}; return NaN to abstain")
        return RewardOutput(scores, extra)


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
    try:
        reward: Reward = (found if is_head else FunctionReward).model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "options"
        raise UserError(f"reward '{options['name']}', {where}: {first['msg'].lower()}") from error
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


def shaped(reward: Reward, scores: Tensor) -> Tensor:
    """What advantages are made of: [B] float64, the scores bent by the reward's `shape`; NaN stays NaN."""
    return scores.double() if reward.shape is None else reward.shape(scores.double())


def score(
    rewards: Mapping[str, Scorer],
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    batch: int,
) -> dict[str, Tensor]:
    """Every reward's scores [B] fp32 on the images' device; at most `batch` images are scored at once."""
    import torch

    scores: dict[str, Tensor] = {}
    for name, scorer in rewards.items():
        parts = [
            scorer(images[i : i + batch], prompts[i : i + batch], metadata[i : i + batch]).scores
            for i in range(0, len(prompts), batch)
        ]
        scores[name] = torch.cat(parts)
    return scores
