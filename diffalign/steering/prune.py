"""Successive pruning (TTSnap, arXiv 2511.22242): many seeds start, and few of them are finished."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from diffalign.steering import Count, Lineage, Outcome, Steering
from diffalign.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.steering._problem import Problem

PUBLISHED_AT, PUBLISHED_STEPS = (2, 6, 11), 20


class Prune(Steering):
    """At steps s_j, round(a_j n) of the n survivors go on, by the reward of their predicted images; at least one.

    The paper judges predictions by a reward trained on such pictures; `preview` of :class:`diffalign.Steer` is the
    place of one. With any other it works as well as early predictions look like the finished images.
    """

    name: str = "prune"
    particles: Count = 16
    """N, seeds that start."""
    keep: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (0.4, 0.4, 0.5)
    """a_j, share of the survivors that goes on after each pruning."""
    at: tuple[int, ...] | Literal["auto"] = "auto"
    """s_j, steps of the prunings, rising; auto: 2, 6 and 11 of 20, to scale."""
    combine: Literal["sum", "rank"] = "sum"
    """Several rewards: their weighted sum, or the sum of the ranks that each gives, which ignores their scales."""

    stochastic: ClassVar[bool] = False

    def prunings(self, steps: int) -> list[int]:
        """s_j on T steps. Raises UserError when they do not fit `keep` or the steps."""
        if self.at == "auto":
            at = [round(s * steps / PUBLISHED_STEPS) for s in PUBLISHED_AT]
            if len(self.keep) != len(at):
                raise UserError(f"prune keeps {len(self.keep)} times; say at which steps with 'at'")
        else:
            at = list(self.at)
        if len(at) != len(self.keep) or at != sorted(set(at)) or not all(0 <= s < steps for s in at):
            raise UserError(
                f"prune at {at} must be {len(self.keep)} rising steps, one a share kept, in 0 to {steps - 1}"
            )
        return at

    def counts(self) -> list[int]:
        """Survivors before each pruning and after the last."""
        n = [self.particles]
        for share in self.keep:
            n.append(left(n[-1], share))
        return n

    def forwards(self, steps: int, cost: int) -> int:
        n = self.counts()
        # the paper's own count leaves out the forward that the first verification looks at
        return round(charged(n, self.prunings(steps), steps, cost)) + n[0] * cost

    def run(self, problem: Problem) -> Outcome:
        self.prunings(problem.steps)
        return self.rounds(problem, self.particles, lambda first: self._once(problem, first))

    def _once(self, problem: Problem, first: int) -> Outcome:
        from diffalign.steering._resampling import even

        generators = problem.particles(first, self.particles)
        x, begun = problem.start(generators), 0
        lineage, history = Lineage(), []
        nodes = [lineage.add(0, None) for _ in generators]
        for s, share in zip(self.prunings(problem.steps), self.keep, strict=True):
            x = problem.walk(x, generators, begun, s)
            x0, eps = problem.predict(x, s)
            columns = problem.columns(x0, s)
            nodes = [lineage.add(s, n, r) for n, r in zip(nodes, columns.sum(1).tolist(), strict=True)]
            kept = survivors(columns, share, self.combine)
            generators, nodes = [generators[k] for k in kept.tolist()], [nodes[k] for k in kept.tolist()]
            x, x0, eps = (t[kept.to(t.device)] for t in (x, x0, eps))
            row = _row(s, columns.sum(1), len(nodes))
            x = problem.seen(s, problem.advance(x, x0, eps, s, generators).next, x0, row)
            history.append(row)
            begun = s + 1
        x = problem.walk(x, generators, begun)
        columns = problem.columns(x, problem.steps)
        r = columns.sum(1)
        nodes = [lineage.add(problem.steps, n, value) for n, value in zip(nodes, r.tolist(), strict=True)]
        history.append(_row(problem.steps, r, len(nodes)))
        height = standing(columns, self.combine)
        return Outcome(x, r, even(len(x)), nodes, lineage, None, history, height)


def _row(step: int, rewards: Tensor, roots: int) -> dict[str, Any]:
    known = rewards[rewards > -float("inf")]
    return {"step": step, "best": float(known.max()), "mean": float(known.mean()), "roots": roots}


def left(n: int, share: float) -> int:
    return max(1, round(share * n))


def standing(columns: Tensor, combine: str) -> Tensor:
    """[n] what survivors are sorted by, from weighted scores [n, R]: their sum, or the sum of ranks 0 to n - 1."""
    return (
        columns.sum(1) if combine == "sum" else columns.argsort(dim=0, stable=True).argsort(dim=0, stable=True).sum(1)
    )


def survivors(columns: Tensor, share: float, combine: str = "sum") -> Tensor:
    """Indices of the round(share n) best of n, at least one, rising. Ties at the border go as numpy's partition goes,
    which is how the published simulation breaks them."""
    import numpy as np
    import torch

    n = left(len(columns), share)
    return torch.from_numpy(np.sort(np.argpartition(standing(columns, combine).numpy(), -n)[-n:]))


def charged(
    counts: Sequence[float], at: Sequence[int], steps: int, step_cost: float, verify_cost: float = 0.0
) -> float:
    """The paper's cost of pruning: sum of counts_j ((s_j - s_{j-1}) step + verify), from s = 0 to T - 1."""
    ends = [0, *at, steps - 1]
    spans = [b - a for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return sum(n * (span * step_cost + verify_cost) for n, span in zip(counts, spans, strict=True))
