"""A fixed share of every epoch for each kind of prompt, such as each source, however many prompts it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
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
    """Of n prompts, stratum s gives q_s = n w_s / sum w, rounded at random to one of its two neighbours so that it is
    q_s on average over epochs; which prompts, uniformly without replacement.

    A stratum that holds fewer prompts gives all of them, and the others share the rest in the same way. MARBLE (arXiv
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

    def conflicts(self, prompts: Sequence[Mapping[str, Any]], count: int) -> Iterator[tuple[tuple[str, ...], str]]:
        strata = [label(entry, self.by) for entry in prompts]
        if None in strata:
            text, remedy = prompts[strata.index(None)]["prompt"], "add it to their metadata, or take another key"
            if self.by == "source":
                remedy = "list several files in prompts.train, or take a key of their metadata"
            yield ("curriculum", "by"), f"every prompt needs a {self.by}, and {text!r} has none; {remedy}"
            return
        sizes = Counter(map(str, strata))
        known = sorted(sizes)
        shares = self.shares or dict.fromkeys(known, 1.0)
        for name in sorted(shares.keys() - sizes.keys()):
            yield ("curriculum", "shares", name), f"no prompt has the {self.by} '{name}'; {nearest(name, known)}"
        for name in sorted(sizes.keys() - shares.keys()):
            said = f"the {self.by} '{name}' is left out; give it a weight, 0 for none of its prompts"
            yield ("curriculum", "shares"), said
        held = sum(size for name, size in sizes.items() if shares.get(name, 1.0))
        if count > held:
            yield ("trainer", "prompts"), too_few(count, held)

    def start(self, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """[P] int64, each prompt's number in the sorted strata. UserError if `by` or `shares` does not suit them."""
        import torch

        for key, said in self.conflicts(prompts, 0):
            raise UserError(f"{'.'.join(key)}: {said}")
        strata = [str(label(entry, self.by)) for entry in prompts]
        number = {name: i for i, name in enumerate(sorted(set(strata)))}
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
        shares = quotas(sizes, weights, count)
        order = torch.randperm(prompts, generator=generator)
        turns = torch.randperm(len(sizes), generator=generator).tolist()  # in one order, neighbours would never meet
        offset = Fraction(float(torch.rand((), generator=generator, dtype=torch.float64)))
        taken = zip(turns, rounded([shares[s] for s in turns], offset), strict=True)
        return torch.cat([order[stratum[order] == s][:n] for s, n in taken])

    @property
    def _kept(self) -> str:
        return f"stratum/{self.by}"


def quotas(sizes: Sequence[int], weights: Sequence[Fraction], count: int) -> list[Fraction]:
    """Of `count` prompts, the share of each stratum: in proportion to its weight, but never more than its size, what is
    over going to the others likewise. UserError if all those of a weight are too few."""
    found = [Fraction(0)] * len(sizes)
    left = [s for s, weight in enumerate(weights) if weight]
    held = sum(sizes[s] for s in left)
    if count > held:
        raise UserError(too_few(count, held))
    while True:
        unit = Fraction(count) / sum(weights[s] for s in left)
        small = [s for s in left if unit * weights[s] > sizes[s]]
        for s in small or left:
            found[s] = Fraction(sizes[s]) if small else unit * weights[s]
        if not small:
            return found
        count -= sum(sizes[s] for s in small)
        left = [s for s in left if s not in small]


def rounded(shares: Sequence[Fraction], offset: Fraction) -> list[int]:
    """n_s = floor(C_s + u) - floor(C_{s-1} + u) for the cumulative sums C of the shares, whose total is whole.

    They have the same total, and each is its share rounded down or up. With the offset u uniform on [0, 1) it is the
    share on average: systematic sampling (Madow, Ann. Math. Stat. 20, 1949).
    """
    ends = [floor(end) for end in accumulate(shares, initial=offset)]
    return [last - first for first, last in pairwise(ends)]


def too_few(count: int, held: int) -> str:
    return (
        f"{count} prompts asked for an epoch, but the strata with a share hold {held}; ask for {held} or fewer, or "
        "raise curriculum.shares"
    )
