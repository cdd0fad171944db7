"""A reward with a gradient, as a user might write it in a module of their own."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from diffalign.rewards import Reward


class Greenness(Reward):
    differentiable: ClassVar[bool] = True

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        return images[:, 1].mean((1, 2)) - images[:, 0].mean((1, 2))
