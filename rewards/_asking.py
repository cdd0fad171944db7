"""Heads that ask a vision-language model: their options, and one way to ask a local model and one behind a server."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field, model_validator

from diffalign.rewards import Reward
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._loading import Dtype
from diffalign.rewards._server import Failed, Server, connect
from diffalign.types import RewardOutput, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffalign.rewards._server import Client
    from diffalign.rewards._vlm import Row, Vlm

EMBEDDED = "tiny-vlm"
LOCAL = ("revision", "local_files_only", "dtype", "pixels")  # options that mean nothing to a server
YES = ("yes", "Yes", " yes", " Yes", "YES")
NO = ("no", "No", " no", " No", "NO")


@dataclass(frozen=True)
class Told:
    """A text as the model says it."""

    tokens: list[str]
    log_probs: Tensor  # [L] fp32


@dataclass(frozen=True)
class Answer:
    """How likely the model is to begin with yes, and with no; -inf where a server does not say."""

    yes: Tensor  # [] fp32
    no: Tensor


@dataclass(frozen=True)
class Question:
    images: Sequence[Tensor]  # each [3, H, W] in [0, 1]
    text: str
    text_first: bool = False  # else the pictures


class Asked(Protocol):
    """What the heads need of a model. A Failed stands for what it could not be asked."""

    def echo(self, questions: Sequence[Question], labels: Sequence[str], end: bool) -> list[Told | Failed]: ...

    def answer(self, questions: Sequence[Question]) -> list[Answer | Failed]: ...


class VlmReward(Reward):
    """Options of every head that asks a vision-language model."""

    model: str | None = None
    """Embedded name (by default tiny-vlm), local folder or hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, such as
    Qwen/Qwen3-VL-8B-Instruct; with a server the name it serves the model under, by default the first it lists."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    local_files_only: bool = False
    """Use the hub cache alone."""
    dtype: Dtype = "fp32"
    """Precision of the network; log-probabilities are fp32 always."""
    pixels: int | None = Field(None, ge=1)
    """Resize every picture to about this many pixels; by default only those outside the model's own bounds."""
    server: Annotated[Server, BeforeValidator(lambda v: {"url": v} if isinstance(v, str) else v)] | None = None
    """Ask this server instead of a model here: its address, or {url, api, timeout, retries, backoff, concurrency,
    key_env}. Pictures are sent as PNG, and the server's own chat template and limits on size apply."""

    @property
    def remote(self) -> bool:
        return self.server is not None

    @property
    def differentiable(self) -> bool:
        return self.server is None

    @model_validator(mode="after")
    def _apply(self) -> VlmReward:
        idle = self.changed(LOCAL)
        if self.server is not None and idle:
            raise ValueError(f"{idle[0]} does not apply to a model behind a server; set it there and leave it out here")
        return self

    def checkpoints(self) -> list[Checkpoint]:
        return [Checkpoint(self.model or EMBEDDED, self.revision)] if self.server is None else []

    def ready(self, device: torch.device | str, yes: Sequence[str] = YES, no: Sequence[str] = NO) -> Asked:
        """The model, loaded or found. Raises UserError when it cannot be."""
        if self.server is not None:
            return Remote(connect(self.server, self.model), yes, no)
        from diffalign.rewards._vlm import load

        (checkpoint,) = self.checkpoints()
        return local(load(checkpoint, self.dtype, self.pixels, device, self.local_files_only), yes, no)


@dataclass(frozen=True)
class Local:
    vlm: Vlm
    yes: list[int]  # first tokens of every spelling, each once
    no: list[int]

    def echo(self, questions: Sequence[Question], labels: Sequence[str], end: bool) -> list[Told | Failed]:
        ids = [[*self.vlm.encode(label), *[self.vlm.end] * end] for label in labels]
        rows = [self._row(q, i) for q, i in zip(questions, ids, strict=True)]
        spelt = [[self.vlm.words.decode([i]) for i in row] for row in ids]
        return [Told(tokens, logp) for tokens, logp in zip(spelt, self.vlm.echo(rows), strict=True)]

    def answer(self, questions: Sequence[Question]) -> list[Answer | Failed]:
        logp = self.vlm.next([self._row(q) for q in questions])
        both = (logp[:, ids].logsumexp(1) for ids in (self.yes, self.no))
        return [Answer(yes, no) for yes, no in zip(*both, strict=True)]

    def _row(self, question: Question, label: Sequence[int] = ()) -> Row:
        from diffalign.rewards._vlm import Row

        images = [self.vlm.look.fit(image[None])[0] for image in question.images]
        return Row(images, self.vlm.prefix(images, question.text, question.text_first), label)


@dataclass(frozen=True)
class Remote:
    client: Client
    yes: Sequence[str]
    no: Sequence[str]

    def echo(self, questions: Sequence[Question], labels: Sequence[str], end: bool) -> list[Told | Failed]:
        import torch

        def one(question: Question, label: str) -> Told | Failed:
            try:
                tokens, logp = self.client.echo(question.images, question.text, label, end)
            except Failed as error:
                return error
            return Told(tokens, torch.tensor(logp))

        return self.client.pool.map(one, questions, labels)

    def answer(self, questions: Sequence[Question]) -> list[Answer | Failed]:
        def one(question: Question) -> Answer | Failed:
            try:
                return heard(self.client.answer(question.images, question.text, question.text_first), self.yes, self.no)
            except Failed as error:
                return error

        return self.client.pool.map(one, questions)


def local(vlm: Vlm, yes: Sequence[str], no: Sequence[str]) -> Local:
    """The first tokens of both answers. One that opens both, such as a lone space, tells nothing and is left out."""
    first = [list(dict.fromkeys(vlm.encode(text)[0] for text in texts)) for texts in (yes, no)]
    ids = [[i for i in mine if i not in other] for mine, other in (first, first[::-1])]
    if not all(ids):
        raise UserError("the model's tokenizer begins yes and no with the same token; give it other spellings")
    return Local(vlm, *ids)


def heard(top: Mapping[str, float], yes: Sequence[str], no: Sequence[str]) -> Answer:
    """Log-probabilities of the likeliest tokens, by spelling -> those of yes and no in any case, with any spaces.

    Raises Failed when neither is among them: that is no answer, and neither a yes nor a no.
    """
    import torch

    found = []
    for texts in (yes, no):
        known = {text.strip().lower() for text in texts}
        found.append([logp for token, logp in top.items() if token.strip().lower() in known])
    if not any(found):
        likeliest = max(top, key=lambda token: top[token], default="")
        raise Failed(
            f"neither yes nor no is among the {len(top)} likeliest answers, of which the first is {likeliest!r}"
        )
    return Answer(*(torch.tensor(f or [-math.inf], dtype=torch.float64).logsumexp(0) for f in found))


def probability(answer: Answer, normalise: Literal["full", "yes_no"], bias: float = 0.0) -> Tensor:
    """P(yes) over the whole vocabulary, or P(yes) / (P(yes) + P(no)); `bias` is added to its log-odds."""
    if normalise == "full":
        return answer.yes.exp()
    return (answer.yes - answer.no + bias).sigmoid()


def output(values: Sequence[Tensor | Failed | None], images: Tensor, extra: Mapping[str, list[Any]]) -> RewardOutput:
    """Scores with their gradients; a Failed is not valid, None does not apply."""
    import torch

    nothing = images.new_tensor(torch.nan, dtype=torch.float32)
    scores = [v.to(nothing) if isinstance(v, torch.Tensor) else nothing for v in values]
    errors = [str(v) if isinstance(v, Failed) else None for v in values]
    valid = torch.tensor([e is None for e in errors], device=images.device)
    return RewardOutput(torch.stack(scores), {**extra, "error": errors}, valid)
