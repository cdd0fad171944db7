"""Which steps are stochastic and trained: a window on the step indices that moves from epoch to epoch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

OPTIONS = {  # strategy -> the keys that only some strategies read
    "random": set(),
    "fixed": set(),
    "progressive": {"every", "stride", "roll_back"},
    "decay": {"every", "stride", "roll_back", "least"},
    "exp_decay": {"every", "stride", "roll_back", "decay_from", "decay_rate"},
}


class Window(BaseModel):
    """Only `size` neighbouring steps are stochastic and trained; the others follow the ODE.

    One window holds for a whole epoch, every group and every process. Flow-GRPO-Fast (arXiv 2505.05470) draws its start
    at random; MixGRPO (2507.21802) lets it slide from noise to data. A window is never cut short: MixGRPO's program
    slides it past the end, where it shrinks and at last trains nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    size: int = Field(3, ge=1)
    """Number of steps."""
    range: tuple[int, int] = (0, 5)
    """The window lies within [first, last) of the step indices."""
    strategy: Literal["random", "fixed", "progressive", "decay", "exp_decay"] = "random"
    """random: drawn each epoch; fixed: at the start of the range; progressive: slides; decay and exp_decay: slides
    and stays ever shorter."""
    every: int = Field(25, ge=1)
    """progressive: epochs before the window moves."""
    stride: int = Field(1, ge=1)
    """progressive: steps that it moves by."""
    roll_back: bool = True
    """progressive: start again after the end of the range, rather than stay there."""
    least: int = Field(1, ge=1)
    """decay: epochs at the end of the range; in between they fall linearly from `every`."""
    decay_from: int = Field(13, ge=0)
    """exp_decay: step index up to which the window stays `every` epochs."""
    decay_rate: float = Field(0.1, gt=0)
    """exp_decay: beyond it, the stay shrinks by exp(-decay_rate) a step."""

    @model_validator(mode="after")
    def _fits(self) -> Window:
        first, last = self.range
        if not 0 <= first <= last - self.size:
            raise ValueError(f"a window of {self.size} steps does not fit in the range [{first}, {last})")
        defaults = {key: field.default for key, field in type(self).model_fields.items()}
        changed = {key for key in set().union(*OPTIONS.values()) if self.__dict__[key] != defaults[key]}
        unread = changed - OPTIONS[self.strategy]
        if unread:
            raise ValueError(f"{', '.join(sorted(unread))} has no effect with strategy '{self.strategy}'; remove it")
        return self

    def steps(self, seed: int, epoch: int) -> list[int]:
        """Step indices of one epoch, a function of the arguments alone."""
        first, last = self.range
        room = last - first - self.size  # the start moves within [0, room]
        if self.strategy == "fixed":
            start = 0
        elif self.strategy == "random":
            start = random.Random(f"window {seed} {epoch}").randint(0, room)
        else:
            stay = self.stay(last - first)
            start = next(islice(starts(stay, self.stride, room, self.roll_back), epoch, None))
        return list(range(first + start, first + start + self.size))

    def stay(self, length: int) -> Callable[[int], int]:
        """Epochs that the window spends at a start, as a function of that start within a range of `length` steps."""
        if self.strategy == "decay":
            return lambda at: max(self.least, int(self.every * (1 - at / length) + self.least * (at / length)))
        if self.strategy == "exp_decay":
            return lambda at: math.ceil(self.every * math.exp(-self.decay_rate * max(0, at - self.decay_from)))
        return lambda at: self.every


def starts(stay: Callable[[int], int], stride: int, last: int, roll_back: bool) -> Iterator[int]:
    """Start of MixGRPO's sliding window in each epoch: `stay(start)` epochs at each, from 0 up to `last`."""
    at = 0
    while True:
        for _ in range(stay(at)):
            yield at
        at += stride
        if at > last:
            at = 0 if roll_back else last
