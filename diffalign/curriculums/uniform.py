"""Every prompt as often as any other, without replacement within an epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign.curriculums import Curriculum

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Uniform(Curriculum):
    """The first numbers of a random permutation, as Flow-GRPO's K-repeat sampler (arXiv 2505.05470) draws them."""

    def choose(self, prompts: int, count: int, generator: torch.Generator, state: dict[str, Tensor]) -> Tensor:
        import torch

        return torch.randperm(prompts, generator=generator)[:count]
