"""Which prompts an epoch takes: one file a curriculum, found by name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffalign.methods import Method
from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Curriculum(Method):
    """Base of every curriculum."""

    def conflicts(self, prompts: Sequence[Mapping[str, Any]], count: int) -> Iterator[tuple[tuple[str, ...], str]]:
        """(key, sentence) for what does not suit the training set, given as its prompts' metadata, or an epoch of
        `count` of them, which are not more than there are; found before a model is loaded."""
        yield from ()

    def start(self, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """What it remembers of the training set, likewise given; checkpoints keep it. UserError if it does not suit."""
        return {}

    def draw(self, prompts: int, count: int, generator: torch.Generator, state: dict[str, Tensor]) -> Tensor:
        """[count] different prompt numbers below `prompts`. UserError if there are fewer."""
        if count > prompts:
            raise UserError(f"{count} prompts asked for an epoch, but there are {prompts}; ask for {prompts} or fewer")
        return self.choose(prompts, count, generator, state)

    @abstractmethod
    def choose(self, prompts: int, count: int, generator: torch.Generator, state: dict[str, Tensor]) -> Tensor:
        """What `draw` returns, of prompts that are enough; a function of the arguments alone: processes agree."""

    def learn(self, group: Tensor, advantages: Tensor, rewards: Tensor, state: dict[str, Tensor]) -> None:
        """Take an epoch into `state`, in place: prompt numbers, advantages, weighted rewards (NaN: none), all [B]."""


def k_repeat(chosen: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Each chosen prompt number k times, shuffled: [m] -> [m k]; process r of W takes the r-th of W equal slices.

    With the generator that drew them, seeded alike everywhere, it is Flow-GRPO's sampler (arXiv 2505.05470): the images
    of a prompt are spread over the processes, each of which knows what all do without asking.
    """
    import torch

    return chosen.repeat_interleave(k)[torch.randperm(len(chosen) * k, generator=generator)]
