"""A reward for tests of steering, which can press Ctrl-C."""

from __future__ import annotations

from typing import Any

from torch import Tensor

interrupt_after: int | None = None
scored = 0


def redness(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    global scored
    scored += len(images)
    if interrupt_after is not None and scored > interrupt_after:
        scored = 0
        raise KeyboardInterrupt
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def constant(images: Tensor, prompts: Any, metadata: Any) -> list[float]:
    return [1.0] * len(images)
