"""Bounds on what one reward can earn, against reward hacking: beyond them a higher score brings no more advantage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from torch import Tensor

STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Clamp(BaseModel):
    """r <- min(max(r, low), high). Images beyond a bound are alike, and give no advantage over each other."""

    model_config = STRICT

    name: Literal["clamp"]
    """clamp: cut at bounds."""
    low: float | None = None
    """Lower scores count as this; not given, there is no lower bound."""
    high: float | None = None
    """Higher scores count as this; not given, there is no upper bound."""

    @model_validator(mode="after")
    def _bounds(self) -> Clamp:
        if self.low is None and self.high is None:
            raise ValueError("a clamp needs low, high or both")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be less than high {self.high:g}")
        return self

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.clamp(self.low, self.high)


class Sigmoid(BaseModel):
    """r <- 1 / (1 + exp(-(r - center) / scale)), in (0, 1): steep around `center`, flat far from it."""

    model_config = STRICT

    name: Literal["sigmoid"]
    """sigmoid: squash into (0, 1)."""
    center: float
    """The score that becomes 1/2."""
    scale: Annotated[float, Field(gt=0)]
    """Distance from the center at which the result is 0.73; slopes fade over a few of these."""

    def __call__(self, scores: Tensor) -> Tensor:
        return ((scores - self.center) / self.scale).sigmoid()


Shape = Annotated[Clamp | Sigmoid, Field(discriminator="name")]
