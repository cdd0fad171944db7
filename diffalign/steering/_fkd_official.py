"""The FKD class of the FK steering repository (arXiv 2501.06848) with its errors: for comparisons, not for steering.

What differs from `fk`, and why its samples are not p exp(lam r) even with many particles:

* with adaptive resampling, the weight of a step at which nothing is resampled is forgotten, though its reward is
  remembered, so the next difference starts from it; the product that the last weight is divided by forgets it as well;
* the last weight holds the running maximum or sum in place of r(x_T);
* the text-to-image class resamples at the end only if fewer than half of the particles are effective, and then
  counts all of them alike; its evidence is not known;
* rewards are those of the image that the parent's state predicts: copies of one state cannot be told apart;
* exp(lam r) is held in fp32 and cut at 1e10, so that large rewards all weigh the same, and the maximum never falls
  below 0, so that negative rewards do too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.steering import Lineage, Outcome
from diffalign.steering._resampling import even
from diffalign.types import UserError

if TYPE_CHECKING:
    from diffalign.steering._problem import Problem
    from diffalign.steering.fk import FK

LARGEST = 1e10
THRESHOLD = 0.5
CORRECTED = ("max", "add", "rt")  # potentials whose last weight is divided by the earlier ones
AT_END = ("bon", "is")  # potentials that weigh finished samples alone


@dataclass(frozen=True)
class Rules:
    """How the class is set up; indices count transitions from 0 and name the state after each.

    Attributes:
        potential: diff, max, add or rt; discrete: also bon and is.
        at: indices that are weighed; `last`, T - 1, always is.
        adaptive: resample only where fewer than half of the particles are effective.
        discrete: the class of the discrete-diffusion folder, which always resamples at the end unless adaptive.
    """

    potential: str
    lam: float
    at: Collection[int]
    last: int
    adaptive: bool
    discrete: bool = False

    def weighs(self, i: int) -> bool:
        return i == self.last or (i in self.at and self.potential not in AT_END)


@dataclass(frozen=True)
class Population:
    """What the class remembers of each particle."""

    rewards: Tensor  # [K] as the potential adds them up; at first the lowest reward that the user expects
    product: Tensor  # [K] of the weights by which its ancestors were drawn


def resampled(
    rules: Rules, before: Population, rewards: Tensor, i: int, generator: torch.Generator
) -> tuple[Population, Tensor, Tensor | None]:
    """(population, ancestors [K], weights [K] that they were drawn by or None) after a weighing at index i.

    rewards [K] may be NaN, and give the precision.
    """
    total = rewards
    if rules.potential == "max":
        total = torch.maximum(rewards, before.rewards)
    elif rules.potential == "add":
        total = rewards + before.rewards
    if rules.potential == "bon":
        return before, total.argsort(descending=True), None
    w = (rules.lam * (total - before.rewards if rules.potential == "diff" else total)).exp()
    if i == rules.last and rules.potential in CORRECTED:
        w = w / before.product
    w = w.clamp(0, LARGEST).nan_to_num(0.0)
    if rules.discrete and float(w.sum()) == 0:
        w = torch.ones_like(w)
    if rules.adaptive or (i == rules.last and not rules.discrete):
        ess = 1 / (w / w.sum()).square().sum()
        if not float(ess) < THRESHOLD * len(w):  # NaN, of weights that are all 0, is not less
            return Population(total, before.product), torch.arange(len(w)), None
    if float(w.sum()) == 0:
        raise UserError("every weight is 0, at which the official code stops; lower lam, or leave out compat")
    index = torch.multinomial(w, len(w), replacement=True, generator=generator)
    return Population(total[index], (before.product * w)[index]), index, w


def official(method: FK, problem: Problem, lam: float, at: Sequence[int], first: int) -> Outcome:
    """K particles, numbered from `first`, by the text-to-image class; `at` counts states, as `fk` does.

    Rewards of the outcome are those of x_T, which cost K calls that the class does not make.
    """
    _refuse_what_it_lacks(method)
    k, end = method.particles, problem.steps
    generators, control = problem.particles(first, k), problem.generator(first)
    name = {"sum": "add"}.get(method.potential, method.potential)
    rules = Rules(name, lam, [i - 1 for i in at], end - 1, method.ess < 1)
    population = Population(torch.zeros(k), torch.ones(k))
    lineage, history = Lineage(), []
    node = [lineage.add(0, None) for _ in range(k)]
    x, rewards = problem.start(generators), torch.zeros(k, dtype=torch.float64)
    for i in range(end):
        x0, eps = problem.predict(x, i)
        x = problem.advance(x, x0, eps, i, generators).next
        row: dict[str, Any] = {}
        if rules.weighs(i):
            stale = problem.score(x0, i)
            rewards = problem.score(x, end) if i == rules.last else stale
            node = [lineage.add(i + 1, p, r) for p, r in zip(node, rewards.tolist(), strict=True)]
            seen = stale.masked_fill(stale == -torch.inf, torch.nan).float()
            population, index, drawn = resampled(rules, population, seen, i, control)
            row = {"step": i + 1, "best": float(rewards.max()), "resampled": drawn is not None}
            there = index.to(x.device)
            x, x0, rewards, node = x[there], x0[there], rewards[index], [node[j] for j in index.tolist()]
            row["roots"] = len({lineage.root(n) for n in node})
            history.append(row)
        x = problem.seen(i, x, x0, {**row, "rewards": rewards} if row else None)
    return Outcome(x, rewards, even(k), node, lineage, None, history)


def _refuse_what_it_lacks(method: FK) -> None:
    if method.temper != "none" and "temper" in method.model_fields_set:
        raise UserError("compat 'fkd-official' has no temper; leave one of them out")
    if method.ess not in (THRESHOLD, 1):
        raise UserError(f"compat 'fkd-official' knows ess {THRESHOLD} and 1, not {method.ess}; take one of them")
    if method.resample != "multinomial" and "resample" in method.model_fields_set:
        raise UserError(f"compat 'fkd-official' draws multinomially; leave out resample '{method.resample}'")
