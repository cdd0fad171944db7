"""Exponential moving average of the trained weights, for evaluation and export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """theta_ema <- theta_ema + (1 - d) (theta - theta_ema), d = min((1 + n) / (10 + n), decay) after n updates.

    The warm-up forgets the initial weights quickly; decay 0 follows the weights exactly.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
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
