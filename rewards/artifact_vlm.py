"""Freedom from visible faults, as a vision-language model answers yes or no (arXiv 2601.03468)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import field_validator

from diffalign.rewards import Head
from diffalign.rewards._asking import EMBEDDED, Asked, Question, VlmReward, output, probability
from diffalign.rewards._server import Failed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffalign.types import RewardOutput

FAULTS = (
    "Look closely at this image for faults that an image generator left in it without intent: light and shadows that "
    "contradict each other, objects that float or stand where they cannot, seams and smears where things meet, limbs, "
    "letters or textures that fall apart, anything that makes it look less real. An artistic style is no fault, nor is "
    "a scene that is meant to be strange. Does the image contain such faults? Answer yes or no."
)
FAULTY_SHAPES = "Are there broken or malformed shapes? Answer yes or no."  # what tiny-vlm has learnt to answer


class ArtifactVlm(VlmReward):
    """r = 1 - P(yes) with P(yes) = sigmoid(log P(yes) - log P(no) + bias): 1 is free of faults. The prompt is not used.

    As published, the instruction comes before the picture; tiny-vlm is shown the picture first, as it learnt.

    All spellings of yes are summed, and of no; the published code takes exact matches, the last of them, and counts a
    missing answer as free of faults (:func:`published`). A server tells 20 tokens: with no but no yes among them the
    score is 1, with yes but no no it is 0, and with neither it is not valid.
    """

    instruction: str | None = None
    """What the model is asked; by default for faults in pictures of the real world or, with tiny-vlm, in shapes."""
    bias: float = 0.0
    """Added to the log-odds of a fault, to calibrate a model that says yes too rarely (> 0) or too often (< 0)."""

    abstains: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = False

    @field_validator("instruction")
    @classmethod
    def _asks_something(cls, instruction: str | None) -> str | None:
        if instruction is not None and not instruction.strip():
            raise ValueError("it is empty; leave it out for the default question")
        return instruction

    def setup(self, device: torch.device | str) -> Head:
        asked = self.ready(device)
        return lambda images, prompts, metadata: self.score(asked, images)

    def score(self, asked: Asked, images: Tensor) -> RewardOutput:
        embedded = self.server is None and self.model in (None, EMBEDDED)
        text = (FAULTY_SHAPES if embedded else FAULTS) if self.instruction is None else self.instruction
        answers = asked.answer([Question([image], text, text_first=not embedded) for image in images])
        values = [a if isinstance(a, Failed) else 1 - probability(a, "yes_no", self.bias) for a in answers]
        return output(values, images, {})


def published(top: Sequence[tuple[str, float]]) -> float:
    """P(yes) as the published code reads (token, log-probability) pairs, likeliest first: to compare with its numbers.

    Only exact matches in any case count, a later one replaces an earlier one, a missing no gives 1, a missing yes 0.
    """
    found = {token.lower(): logp for token, logp in top if token.lower() in ("yes", "no")}
    if "yes" not in found:
        return 0.0
    return 1 / (1 + math.exp(found["no"] - found["yes"])) if "no" in found else 1.0
