"""Search over the initial noise (arXiv 2501.09732): random, zero-order around the best noise so far, or over paths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from diffalign.steering import Count, Lineage, Outcome, Steering
from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffalign.steering._problem import Problem


PATHS = {"paths", "back", "forth"}


class NoiseSearch(Steering):
    """Chooses where the ODE starts, so it suits models whose images suffer from noise on the way.

    random: (1 + rounds) N independent noises, as best of N. zero_order: N neighbours z' = c z + sqrt(1 - c^2) xi of the
    pivot z a round; the best of them becomes the pivot when it beats it, and the next neighbours are new either way.
    With a stochastic kernel all of its images have the same noise on the way, so that z alone decides.
    paths: see :func:`diffalign.steering._paths.paths`.
    """

    name: str = "noise_search"
    algorithm: Literal["random", "zero_order", "paths"] = "zero_order"
    """random, zero_order or paths."""
    particles: Count = 4
    """N, noises of a round; of paths, the re-noised copies of each path."""
    repeats: Count = 4
    """Rounds after the first; with a budget, as many as it holds."""
    similarity: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """c, correlation of a neighbour with the pivot; the square root keeps its law that of noise."""
    paths: Count = 2
    """M, paths that are kept."""
    back: Count = 4
    """paths: steps that are denoised between two selections."""
    forth: Count = 2
    """paths: steps that are noised again before them; fewer than `back`."""

    stochastic: ClassVar[bool] = False

    @model_validator(mode="after")
    def _apply(self) -> NoiseSearch:
        idle = {"random": PATHS | {"similarity"}, "zero_order": PATHS, "paths": {"similarity", "repeats"}}[
            self.algorithm
        ]
        if self.changed(sorted(idle)):
            raise ValueError(f"{self.changed(sorted(idle))[0]} does not apply to {self.algorithm}; leave it out")
        if self.algorithm == "paths" and self.forth >= self.back:
            raise ValueError(f"paths noises {self.forth} steps and denoises {self.back}: take forth below back")
        return self

    def forwards(self, steps: int, cost: int) -> int:
        if self.algorithm == "paths":
            from diffalign.steering._paths import forwards

            return forwards(self, steps) * cost
        first = 1 if self.algorithm == "zero_order" else self.particles
        return (first + self.repeats * self.particles) * steps * cost

    def run(self, problem: Problem) -> Outcome:
        if self.algorithm == "paths":
            from diffalign.steering._paths import paths

            return self.rounds(problem, self.particles, lambda first: paths(self, problem, first))
        return self._search(problem)

    def _search(self, problem: Problem) -> Outcome:
        import torch

        from diffalign.steering._resampling import even

        one = problem.steps * problem.oracle.cost
        lineage, history = Lineage(), []
        finished: list[Tensor] = []
        scores: list[Tensor] = []
        leaves: list[int] = []
        pivot, height, parent, way = None, -float("inf"), None, None
        done = r = 0
        while True:
            n = 1 if r == 0 and self.algorithm == "zero_order" else self.particles
            if self.budget_nfe is not None:
                n = min(n, (self.budget_nfe - problem.spent.nfe) // one)
            if n < 1 or not self._goes_on(problem, r):
                break
            generators = problem.particles(done, n)
            z = self._noise(problem, generators, pivot)
            if self.algorithm == "zero_order":
                way = generators[0].get_state() if way is None else way
                for generator in generators:
                    generator.set_state(way)
            x = problem.walk(z, generators)
            rewards = problem.score(x, problem.steps, some=False)
            here = [lineage.add(r, parent, value) for value in rewards.tolist()]
            finished, scores, leaves = [*finished, x], [*scores, rewards], leaves + here
            best = int(rewards.argmax())
            if not done or float(rewards[best]) > height:
                height = float(rewards[best])
                if self.algorithm == "zero_order":
                    pivot, parent = z[best : best + 1], here[best]
            mean = float(rewards[rewards > -torch.inf].mean())
            history.append({"round": r, "nfe": problem.spent.nfe, "best": height, "mean": mean})
            done, r = done + n, r + 1
        if not finished:
            raise UserError(
                f"budget_nfe {self.budget_nfe} is less than the {one} network forwards of one image; raise it"
            )
        found = problem.checked(torch.cat(scores)[:, None], problem.steps)[:, 0]
        return Outcome(torch.cat(finished), found, even(done), leaves, lineage, None, history)

    def _goes_on(self, problem: Problem, done: int) -> bool:
        if self.budget_nfe is None and self.budget_seconds is None:
            return done <= self.repeats
        late = self.budget_seconds is not None and done > 0
        return not late or problem.spent.elapsed * (done + 1) / done <= float(self.budget_seconds or 0)

    def _noise(self, problem: Problem, generators: list[torch.Generator], pivot: Tensor | None) -> Tensor:
        fresh = problem.start(generators)
        return fresh if pivot is None else self.similarity * pivot + (1 - self.similarity**2) ** 0.5 * fresh
