"""Probability that a vision-language model says yes: the picture shows its prompt, or is better than another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from diffalign.rewards import Head, _references
from diffalign.rewards._asking import NO, YES, Answer, Asked, Question, VlmReward, output, probability
from diffalign.rewards._server import Failed
from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffalign.types import RewardOutput

SHOWS = "Does this image show {prompt}? Answer yes or no."
BETTER = (
    'Both images were made for the prompt "{prompt}". Judge how well each follows it, how real its details are, and '
    "how pleasing it is. Is the first image better than the second? Answer yes or no."
)
FROM_METADATA = "metadata."


class YesProbability(VlmReward):
    """r = P(yes | picture, question), the reward of RewardDance (arXiv 2509.08826), in [0, 1].

    With a reference B for the picture A both orders are asked, since models prefer a place:
    r = (P(yes | A, B) + 1 - P(yes | B, A)) / 2. A server's answer that has neither yes nor no among its 20 likeliest
    tokens is not valid; the official code counts it as 0.
    """

    template: str | None = None
    """The question, in which {prompt} stands for the prompt; by default whether the picture shows it or, with a
    reference, whether the first picture is the better one."""
    reference: str | None = None
    """Picture to compare with: a file for all prompts, or metadata.KEY for the file that a prompt's metadata names
    under KEY; prompts without one have no score."""
    normalise: Literal["full", "yes_no"] = "full"
    """full: probability over the whole vocabulary; yes_no: P(yes) / (P(yes) + P(no))."""
    yes: tuple[str, ...] = Field(YES, min_length=1)
    """Spellings of yes. The first tokens of all are summed, each once; a server's tokens match in any case."""
    no: tuple[str, ...] = Field(NO, min_length=1)
    """Spellings of no."""

    @field_validator("yes", "no")
    @classmethod
    def _says_something(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        if not all(text.strip() for text in texts):
            raise ValueError("a spelling is empty; write words such as yes and no")
        return texts

    @model_validator(mode="after")
    def _asks_about_the_prompt(self) -> YesProbability:
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError("template must contain {prompt}")
        return self

    def setup(self, device: torch.device | str) -> Head:
        asked = self.ready(device, self.yes, self.no)
        if self.reference is not None and not self.reference.startswith(FROM_METADATA):
            read(self.reference)
        return lambda images, prompts, metadata: self.score(asked, images, prompts, metadata)

    def score(
        self, asked: Asked, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        template = self.template or (SHOWS if self.reference is None else BETTER)
        texts = [template.replace("{prompt}", prompt.strip()) for prompt in prompts]
        if self.reference is None:
            answers = asked.answer([Question([x], t) for x, t in zip(images, texts, strict=True)])
            return output([a if isinstance(a, Failed) else self._p(a) for a in answers], images, {})
        others = [self._other(m) for m in metadata]
        pairs = [(i, images[i], read(path).to(images)) for i, path in enumerate(others) if path is not None]
        orders = [Question(pair, texts[i]) for i, a, b in pairs for pair in ([a, b], [b, a])]
        found = asked.answer(orders) if orders else []
        values: list[Tensor | Failed | None] = [None] * len(prompts)
        each: list[list[float] | None] = [None] * len(prompts)
        for k, (i, _, _) in enumerate(pairs):
            first, second = found[2 * k], found[2 * k + 1]
            if isinstance(first, Failed):
                values[i] = first
            elif isinstance(second, Failed):
                values[i] = second
            else:
                there, back = self._p(first), self._p(second)
                values[i], each[i] = (there + 1 - back) / 2, [there.item(), back.item()]
        return output(values, images, {"orders": each})

    def _p(self, answer: Answer) -> Tensor:
        return probability(answer, self.normalise)

    def _other(self, metadata: Mapping[str, Any]) -> str | None:
        if self.reference is None or not self.reference.startswith(FROM_METADATA):
            return self.reference
        key = self.reference.removeprefix(FROM_METADATA)
        path = metadata.get(key)
        if path is not None and not isinstance(path, str):
            raise UserError(f"metadata '{key}' must be the path of a picture, not {path!r}; mend the prompt file")
        return path


@lru_cache(maxsize=64)
def read(path: str) -> Tensor:
    """[3, H, W] in [0, 1]. Raises UserError when it is no picture."""
    return _references.read(Path(path).expanduser())
