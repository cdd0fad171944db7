"""How likely a vision-language model is to describe the picture with its prompt (PromptEcho, arXiv 2604.12652)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from diffalign.rewards import Head
from diffalign.rewards._asking import Asked, Question, Told, VlmReward, output
from diffalign.rewards._server import Failed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffalign.types import RewardOutput


class VlmEcho(VlmReward):
    """r = 1/L sum_t log p(c_t | picture, query, c_<t) in nats per token of the prompt c.

    The prompt is stripped and tokenised by itself, and follows the query's token ids. The paper names neither sum nor
    mean, system prompt nor end token: here it is the mean, so that long prompts do not outweigh short ones, without
    the other two. Advantages of the paper are centred and not divided by a standard deviation (advantage std none).
    Details by image: `tokens`, the `log_probs` of each and, when asked for, their `gain`. An empty prompt has no score.
    """

    query: str = "Describe this image in detail."
    """What the model is asked about the picture."""
    aggregate: Literal["mean", "sum"] = "mean"
    """mean: nats per token; sum: nats, which only rescales the advantages within a prompt."""
    end_token: bool = False
    """Count the token that ends the model's turn too."""
    pmi: bool = False
    """Subtract what the model says of the prompt without a picture: one constant per prompt, for comparisons across
    prompts; centred advantages stay the same. One more pass over text for each prompt."""
    gain: bool = False
    """Report how much likelier the picture makes each token, for maps of what is missing; the same pass as pmi."""
    token_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weight of all tokens of a word, whatever its case, 1 for words not named: {a: 0, the: 0} drops articles."""

    def setup(self, device: torch.device | str) -> Head:
        asked = self.ready(device)
        return lambda images, prompts, metadata: self.score(asked, images, prompts)

    def score(self, asked: Asked, images: Tensor, prompts: Sequence[str]) -> RewardOutput:
        import torch

        labels = [prompt.strip() for prompt in prompts]
        some = [i for i, label in enumerate(labels) if label]
        spoken = [labels[i] for i in some]
        told = dict(zip(some, self._ask(asked, [[images[i]] for i in some], spoken), strict=True))
        alone: dict[str, Told | Failed] = {}
        if self.pmi or self.gain:
            each = list(dict.fromkeys(spoken))
            with torch.no_grad():
                alone = dict(zip(each, self._ask(asked, [[]] * len(each), each), strict=True))
        values = [self._value(told[i], alone.get(label)) if label else None for i, label in enumerate(labels)]
        heard = [t if isinstance(t, Told) else None for t in (told.get(i) for i in range(len(labels)))]
        extra: dict[str, list[Any]] = {
            "tokens": [t and t.tokens for t in heard],
            "log_probs": [t and t.log_probs.tolist() for t in heard],
        }
        if self.gain:
            bare = [alone.get(label) for label in labels]
            extra["gain"] = [
                (t.log_probs - b.log_probs).tolist() if t and isinstance(b, Told) else None
                for t, b in zip(heard, bare, strict=True)
            ]
        return output(values, images, extra)

    def _ask(self, asked: Asked, images: Sequence[Sequence[Tensor]], labels: Sequence[str]) -> list[Told | Failed]:
        return asked.echo([Question(i, self.query) for i in images], labels, self.end_token) if labels else []

    def _value(self, told: Told | Failed, alone: Told | Failed | None) -> Tensor | Failed | None:
        if isinstance(told, Failed):
            return told
        log_probs = told.log_probs
        if self.pmi and not isinstance(alone, Told):
            return alone
        if self.pmi and isinstance(alone, Told):
            log_probs = log_probs - alone.log_probs
        weights = log_probs.new_tensor(word_weights(told.tokens, self.token_weights))
        if not weights.any():
            return None
        total = (weights * log_probs).sum()
        return total / weights.sum() if self.aggregate == "mean" else total


def word_weights(tokens: Sequence[str], weights: Mapping[str, float]) -> list[float]:
    """For every token the weight of the word it ends in; 1 where it ends in a space or a punctuation mark."""
    known = {word.lower(): weight for word, weight in weights.items()}
    text = "".join(tokens)
    at = [1.0] * len(text)
    for word in re.finditer(r"[\w'-]+", text):
        at[word.start() : word.end()] = [known.get(word[0].lower(), 1.0)] * len(word[0])
    ends = accumulate(map(len, tokens))
    return [at[end - 1] if token else 1.0 for token, end in zip(tokens, ends, strict=True)]
