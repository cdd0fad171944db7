"""A slow copy of the trained weights: the old policy of DiffusionNFT, the anchor of AWM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffalign.algorithms import Memory

if TYPE_CHECKING:
    from torch import Tensor, nn


class Decay(BaseModel):
    """How much of the old weights stays: eta(n) = min(rate max(n - start, 0), cap) after n optimizer steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    rate: float = Field(0.001, ge=0)
    """Growth of eta with each optimizer step; 0 makes the old policy the current one at every update of it."""
    start: int = Field(0, ge=0)
    """Optimizer steps before eta starts to grow."""
    cap: float = Field(0.5, ge=0, lt=1)
    """The largest eta."""

    @property
    def lags(self) -> bool:
        """Anything of the old weights is ever kept."""
        return self.rate > 0 and self.cap > 0

    @model_validator(mode="after")
    def _grows(self) -> Decay:
        if self.rate == 0 and self.start:
            raise ValueError("start has no effect with rate 0; remove it")
        return self

    def __call__(self, steps: int) -> float:
        return min(self.rate * max(steps - self.start, 0), self.cap)


class Shadow(Memory):
    """theta_old <- eta theta_old + (1 - eta) theta, after every epoch or every optimizer step; it begins as theta.

    A copy of the trained tensors alone: with a LoRA that is what a second adapter would hold, and with all weights the
    one copy that is needed. It is put in place by exchanging storage, not by copying.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], decay: Decay, every: Literal["epoch", "step"], acts: bool
    ) -> None:
        """`acts`: the copy samples the images, not the trained weights."""
        self.parameters = dict(parameters)
        self.old = {name: p.detach().clone() for name, p in parameters.items()}
        self.decay, self.every, self.acts = decay, every, acts
        self.steps = 0
        self.equal = True  # to the trained weights, to the last bit

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the old weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def acting(self) -> AbstractContextManager[None]:
        return self.applied() if self.acts else nullcontext()

    def after_step(self) -> None:
        self.steps += 1
        self.equal = False
        if self.every == "step":
            self._follow()

    def after_epoch(self) -> None:
        if self.every == "epoch":
            self._follow()

    def state_dict(self) -> dict[str, Tensor]:
        import torch

        return {"steps": torch.tensor(self.steps), **self.old}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        import torch

        if "steps" not in state:
            raise ValueError(
                "it was saved without a copy of the weights; resume with the algorithm's settings as they were"
            )
        self.steps = int(state["steps"])
        for name, old in self.old.items():
            old.copy_(state[name])
        self.equal = all(torch.equal(old, self.parameters[name].detach()) for name, old in self.old.items())

    def _follow(self) -> None:
        import torch

        eta = self.decay(self.steps)
        with torch.no_grad():
            for name, old in self.old.items():
                old.copy_(torch.lerp(self.parameters[name].detach(), old, eta) if eta else self.parameters[name])
        self.equal = eta == 0

    def _exchange(self) -> None:
        for name, p in self.parameters.items():
            p.data, self.old[name] = self.old[name], p.data
