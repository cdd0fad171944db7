"""Best of N: N independent images, the best one first. Every other method is compared with it at equal cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from diffalign.steering import Count, Lineage, Outcome, Steering

if TYPE_CHECKING:
    from diffalign.steering._problem import Problem


class BestOfN(Steering):
    """argmax r(x_T) over N plain samples; N T forwards."""

    name: str = "best_of_n"
    particles: Count = 4
    """N, images that are made; with a budget, as many as it holds."""

    stochastic: ClassVar[bool] = False

    def forwards(self, steps: int, cost: int) -> int:
        return self.particles * steps * cost

    def run(self, problem: Problem) -> Outcome:
        if self.budget_nfe is None and self.budget_seconds is None:
            return self._once(problem, 0, self.particles)
        # with a budget, as many as it holds: at once where they can be counted before, else one after another
        one = self.model_copy(update={"particles": 1})
        n = 0 if self.budget_nfe is None else self.budget_nfe // one.forwards(problem.steps, problem.oracle.cost)
        if n and self.budget_seconds is None:
            return self._once(problem, 0, n)
        return one.rounds(problem, 1, lambda first: self._once(problem, first, 1))

    def _once(self, problem: Problem, first: int, n: int) -> Outcome:
        from diffalign.steering._resampling import even

        generators = problem.particles(first, n)
        x = problem.walk(problem.start(generators), generators)
        r = problem.score(x, problem.steps)
        lineage = Lineage()
        leaves = [lineage.add(problem.steps, lineage.add(0, None), reward) for reward in r.tolist()]
        return Outcome(x, r, even(n), leaves, lineage)
