"""What a caller of :class:`diffalign.steer.Steer` brings, checked and made into what a `Problem` holds."""

from __future__ import annotations

import hashlib
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards import FunctionReward, Reward, Scorer, resolve, shaped
from diffalign.steering import Steering
from diffalign.steering._problem import Judge, Problem, Watched
from diffalign.types import UserError

Preview = Callable[[Tensor, Sequence[str], float], Tensor]
RewardLike = str | Reward | Mapping[str, Any] | Callable[..., Any]


def rewards_of(reward: RewardLike | Sequence[RewardLike]) -> list[Reward]:
    """The configuration of each reward; loads no weights."""
    entries = reward if isinstance(reward, Sequence) and not isinstance(reward, str) else [reward]
    if not entries:
        raise UserError("steering needs at least one reward")
    return [_function(e, k) if callable(e) and not isinstance(e, Reward) else resolve(e) for k, e in enumerate(entries)]


def _function(function: Any, number: int) -> Reward:
    named = inspect.isroutine(function) and function.__name__ != "<lambda>"
    name = function.__name__ if named else f"reward_{number}"
    reward = FunctionReward(name=name)
    reward._function = function
    return reward


def suit(method: Steering, rewards: Sequence[Reward]) -> None:
    for reward in rewards:
        if reward.learns:
            raise UserError(f"'{reward.key}' is trained during a run and scores nothing without one; leave it out")
        unknown = isinstance(reward, FunctionReward)  # its first gradient tells
        if method.differentiates and not (reward.differentiable or unknown):
            raise UserError(
                f"steering '{method.name}' follows the reward's gradient, and '{reward.key}' has none; take fk, or a "
                "differentiable reward such as pickscore"
            )


def judge(scorers: Mapping[str, Scorer], prompt: str, metadata: Mapping[str, Any]) -> Judge:
    """Weighted scores [n, R] of images of one prompt."""

    def judged(images: Tensor, sigma: float) -> Tensor:
        prompts, entries = [prompt] * len(images), [metadata] * len(images)
        columns = []
        for scorer in scorers.values():
            scores = scorer(images, prompts, entries).scores
            columns.append(scorer.reward.weight * shaped(scorer.reward, scores))
        return torch.stack(columns, 1)

    return judged


def previewed(preview: Preview, prompt: str) -> Judge:
    return lambda images, sigma: preview(images, [prompt] * len(images), sigma)


def seeded(
    generator: int | torch.Generator | Sequence[torch.Generator] | None,
) -> tuple[int, Sequence[torch.Generator] | None]:
    """(seed, generators of the particles if the caller brings them)."""
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(1 << 31, (), generator=generator, device=device)), None
    if isinstance(generator, Sequence):
        if not generator:
            raise UserError("there is no generator in the list; give one a particle, or one seed")
        return generator[0].initial_seed() % (1 << 31), generator
    seed = operator.index(generator)
    if seed < 0:
        raise UserError(f"a seed must be 0 or more, got {seed}")
    return seed, None


def check_prompt(prompt: str) -> None:
    if not isinstance(prompt, str):
        raise UserError("give one prompt at a time, a text; call again for the next, with index=1, 2 ...")
    if not prompt.strip():
        raise UserError("the prompt is empty; write what the image should show")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt {prompt!r} is no text; write it in UTF-8") from error


def told(value: Any) -> Any:
    """A value as JSON, or its digest, to compare it with another run's."""
    if isinstance(value, Mapping):
        return {str(k): told(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [told(v) for v in value]
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().float().cpu().numpy().tobytes()).hexdigest()
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def watching(steer: Any, problem: Problem, callback: Callable[..., Any]) -> Callable[[Watched], Tensor | None]:
    def watch(seen: Watched) -> Tensor | None:
        shown = {"latents": seen.x, "x0": seen.x0, "rewards": None, "log_weights": None, "ess": None, **seen.row}
        answer = callback(steer, seen.step, float(problem.oracle.sigmas[seen.step]), shown)
        if answer is None:
            return None
        latents = answer.get("latents") if isinstance(answer, Mapping) and set(answer) <= {"latents"} else None
        if not isinstance(latents, Tensor) or latents.shape != seen.x.shape:
            raise UserError(
                f"callback_on_step_end must return None or {{'latents': tensor of shape {list(seen.x.shape)}}}, and "
                "nothing else"
            )
        return latents.to(seen.x)

    return watch
