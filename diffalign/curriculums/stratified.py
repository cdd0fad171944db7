"""A fixed share of every epoch for each kind of prompt, such as each source, however many prompts it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from diffalign.curriculums import Curriculum
from diffalign.listing import nearest
from diffalign.prompts import label
from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Stratified(Curriculum):
    """Of n prompts, stratum s gives n w_s / sum w by largest remainder; which ones, uniformly without replacement.

    A stratum with fewer prompts gives all of them, and the others share the rest in the same way. MARBLE (arXiv
    2605.06507) so mixes prompts that its rewards apply to differently.
    """

    by: str = Field("source", min_length=1)
    """Key of the prompts' metadata whose value is their stratum: source, where prompts.train lists several, or another
    such as tag."""
    shares: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Weight w of every stratum by name, 0 to leave it out; without any, all weigh alike."""

    @field_validator("shares")
    @classmethod
    def _some(cls, shares: dict[str, float]) -> dict[str, float]:
        if shares and not sum(shares.values()):
            raise ValueError("every stratum has weight 0; raise one, or leave shares out to take all alike")
        return shares

    def start(self, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """[P] int64, each prompt's number in the sorted strata. UserError if `by` or `shares` does not suit them."""
        import torch

        strata = [self._stratum(entry) for entry in prompts]
        known = sorted(set(strata))
        if self.shares:
            for name in sorted(self.shares.keys() - set(known)):
                raise UserError(f"curriculum.shares: no prompt has the {self.by} '{name}'; {nearest(name, known)}")
            for name in sorted(set(known) - self.shares.keys()):
                raise UserError(
                    f"curriculum.shares leaves out the {self.by} '{name}'; give it a weight, 0 for none of its prompts"
                )
        number = {name: i for i, name in enumerate(known)}
        return {self._kept: torch.tensor([number[name] for name in strata], dtype=torch.int64)}

    def choose(self, prompts: int, count: int, generator: torch.Generator, state: dict[str, Tensor]) -> Tensor:
        import torch

        if self._kept not in state:
            raise UserError(
                f"the curriculum remembers strata by another key than '{self.by}'; resume with the curriculum.by that "
                "the run began with"
            )
        stratum = state[self._kept]
        sizes = stratum.bincount().tolist()
        # the decimals as they were written: 0.1 + 0.2 + 0.7 is 1
        weights = [Fraction(str(self.shares[name])) for name in sorted(self.shares)] or [Fraction(1)] * len(sizes)
        if len(stratum) != prompts or len(weights) != len(sizes):
            raise UserError(
                f"the curriculum remembers {len(stratum)} prompts in {len(sizes)} strata, which are not those that "
                "there are; resume with the prompts that the run began with"
            )
        order = torch.randperm(prompts, generator=generator)
        taken = quotas(sizes, weights, count)
        return torch.cat([order[stratum[order] == s][:n] for s, n in enumerate(taken)])

    @property
    def _kept(self) -> str:
        return f"stratum/{self.by}"

    def _stratum(self, entry: Mapping[str, Any]) -> str:
        name = label(entry, self.by)
        if name is not None:
            return name
        remedy = "add it to their metadata, or set curriculum.by to another key"
        if self.by == "source":
            remedy = "list several files in prompts.train, or set curriculum.by to a key of their metadata"
        raise UserError(
            f"curriculum 'stratified' needs a {self.by} of every prompt, and {entry['prompt']!r} has none; {remedy}"
        )


def quotas(sizes: Sequence[int], weights: Sequence[Fraction], count: int) -> list[int]:
    """How many of `count` prompts each stratum gives, never more than its size; UserError if they are too few."""
    found = [0] * len(sizes)
    left = [s for s, weight in enumerate(weights) if weight]
    held = sum(sizes[s] for s in left)
    if count > held:
        raise UserError(
            f"{count} prompts asked for an epoch, but the strata with a share hold {held}; ask for {held} or fewer, or "
            "raise curriculum.shares"
        )
    while True:
        asked = largest_remainder(count, {s: weights[s] for s in left})
        small = [s for s in left if asked[s] > sizes[s]]
        for s in small or left:
            found[s] = min(asked[s], sizes[s])
        if not small:
            return found
        count -= sum(sizes[s] for s in small)
        left = [s for s in left if s not in small]


def largest_remainder(count: int, weights: Mapping[int, Fraction]) -> dict[int, int]:
    """Whole numbers of sum `count` next to count w / sum w; those with the largest remainders, at a tie the first, are
    rounded up."""
    exact = {s: count * weight / sum(weights.values()) for s, weight in weights.items()}
    found = {s: floor(share) for s, share in exact.items()}
    for s in sorted(found, key=lambda s: found[s] - exact[s])[: count - sum(found.values())]:
        found[s] += 1
    return found
