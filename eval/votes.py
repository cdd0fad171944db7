"""Votes of people, cast on the page without knowing the names, as wins for Bradley-Terry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffalign.eval.gallery import Gallery
from diffalign.eval.records import digest_of
from diffalign.types import UserError


class Vote(BaseModel):
    """Which of the contestants shown for a prompt somebody found best."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    """Of the prompt."""
    shown: tuple[str, ...] = Field(min_length=2)
    """From left to right, as they were shown."""
    best: str | None
    """null: no difference."""
    seed: int | None = None
    """Of the choice and order of those shown, by the page's generator."""
    evaluation: str = ""
    """`fingerprint` of what was voted on."""
    sitting: str = ""
    """Tells the people apart, and no more of them."""

    @model_validator(mode="after")
    def _belongs(self) -> Vote:
        if len(set(self.shown)) < len(self.shown) or (self.best is not None and self.best not in self.shown):
            raise ValueError("the best must be one of those shown, and each is shown once")
        return self


class Ballot(BaseModel):
    """A file that the page exports."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal["diffalign votes"]
    version: Literal[1]
    evaluation: str
    sitting: str
    votes: tuple[Vote, ...]


def fingerprint(gallery: Gallery) -> str:
    """Of prompts, seed, size and number of images: contestants may be added, and earlier votes still count."""
    asked = gallery.asked
    return digest_of([gallery.prompts, asked.seed, asked.height, asked.width, asked.images_per_prompt])


def read(paths: Iterable[Path | str]) -> list[Vote]:
    """Raises UserError when a file is no export of votes, votes twice on a prompt, or is of a sitting read before."""
    votes: list[Vote] = []
    sittings: dict[str, Path] = {}
    for path in map(Path, paths):
        try:
            ballot = Ballot.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"'{path}' holds no votes exported by a report page") from error
        if ballot.sitting in sittings:
            raise UserError(f"'{sittings[ballot.sitting]}' and '{path}' are of one sitting; give the later one alone")
        sittings[ballot.sitting] = path
        if len({vote.id for vote in ballot.votes}) < len(ballot.votes):
            raise UserError(f"'{path}' votes twice on a prompt; export the votes again")
        same = {"evaluation": ballot.evaluation, "sitting": ballot.sitting}
        votes += [vote.model_copy(update=same) for vote in ballot.votes]
    return votes


def check(votes: Sequence[Vote], gallery: Gallery) -> None:
    """Raises UserError unless all were cast on this evaluation, of contestants that it has."""
    own, ids = fingerprint(gallery), {prompt["id"] for prompt in gallery.prompts}
    if any(vote.evaluation != own or vote.id not in ids for vote in votes):
        raise UserError("these votes were cast on another evaluation: its prompts, seed or size differ")
    wins(votes, list(gallery.entries))


def wins(votes: Iterable[Vote], names: Sequence[str]) -> np.ndarray:
    """[M, M] float64: how often i beat j. The best beats everyone it was shown with; no difference is half a win each.

    Nothing is learnt about those that somebody else beat. Raises UserError on a name that is not in `names`.
    """
    place = {name: i for i, name in enumerate(names)}
    won = np.zeros((len(names), len(names)))
    for vote in votes:
        if unknown := [name for name in vote.shown if name not in place]:
            raise UserError(f"there are votes on '{unknown[0]}', which is not in this evaluation")
        shown = [place[name] for name in vote.shown]
        if vote.best is None:
            for i in shown:
                won[i, [j for j in shown if j != i]] += 0.5
        else:
            best = place[vote.best]
            won[best, [j for j in shown if j != best]] += 1
    return won


def tally(votes: Iterable[Vote], names: Sequence[str]) -> dict[str, int]:
    """How often each was found best, in the order of `names`."""
    best = [vote.best for vote in votes]
    return {name: best.count(name) for name in names}
