"""Stop a run that can no longer learn, with the cause and the remedy."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor

from diffalign.sections import Guard
from diffalign.types import Stopped

LAST = 50  # gradient norms whose median is the usual one
IN_A_ROW = 3


class Watch:
    """Sees every epoch and every update of a run; raises Stopped when going on is of no use."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.flat = 0
        self.exploded = 0
        self.norms: deque[float] = deque(maxlen=LAST)

    def state_dict(self) -> dict[str, Tensor]:
        """What it has seen, for checkpoints."""
        norms = torch.tensor(list(self.norms), dtype=torch.float64)
        return {"flat": torch.tensor(self.flat), "exploded": torch.tensor(self.exploded), "norms": norms}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        self.flat, self.exploded = int(saved["flat"]), int(saved["exploded"])
        self.norms = deque(saved["norms"].tolist(), maxlen=LAST)

    def rewards(self, epoch: int, spread: Mapping[str, float], alike: bool) -> None:
        """`spread`: std of each reward over the epoch; `alike`: in no group do the advantages differ."""
        self.flat = self.flat + 1 if alike else 0
        if not self.guard.flat_epochs or self.flat < self.guard.flat_epochs:
            return
        if all(std == 0 for std in spread.values()):
            cause = "every image got the same reward"
            remedy = "check the reward on known images, or give partial credit"
        else:
            cause = "the images of each prompt all scored alike"
            remedy = "raise trainer.images_per_prompt or sampling.eta, or take prompts that sometimes succeed"
        raise Stopped(
            f"nothing was learnt in {self.flat} epochs up to {epoch}: {cause}; {remedy} (guard.flat_epochs 0 goes on)"
        )

    def gradient(self, epoch: int, norm: float) -> None:
        """The gradient norm of one update, before it is applied."""
        if not math.isfinite(norm):
            raise Stopped(
                f"gradients of epoch {epoch} are not finite, so they were not applied; resume from the last checkpoint "
                "with a lower trainer.lr, or with model.dtype fp32"
            )
        usual = median(self.norms) if len(self.norms) >= LAST // 5 else math.inf
        self.exploded = self.exploded + 1 if norm > self.guard.grad_norm * usual > 0 else 0
        if self.exploded >= IN_A_ROW:
            raise Stopped(
                f"the gradient norm rose to {norm:.3g} in epoch {epoch}, over {self.guard.grad_norm:g} times its usual "
                f"{usual:.3g}, and stayed: training has diverged; resume from an earlier checkpoint with a lower "
                "trainer.lr, a smaller algorithm.clip or a KL weight"
            )
        self.norms.append(norm)
