"""Exponential moving average of the trained weights, for evaluation and export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """theta_ema <- theta_ema + (1 - d) (theta - theta_ema), d = min((1 + n) / (10 + n), decay) after n optimizer steps.

    Only every `every`-th step counts, the first being the one at which n + 1 = `every`. The warm-up forgets the initial
    weights quickly; decay 0 follows the weights exactly.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float, every: int = 1) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.every = every
        self.updates = 0  # optimizer steps so far
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """To be called once after each optimizer step."""
        if (self.updates + 1) % self.every == 0:
            d = min((1 + self.updates) / (10 + self.updates), self.decay)
            torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - d)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's parameters hold the average."""
        live = [p.detach().clone() for p in self.parameters]
        try:
            self._copy(self.shadow)
            yield
        finally:
            self._copy(live)

    @torch.no_grad()
    def _copy(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
