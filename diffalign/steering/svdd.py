"""SVDD-PM (arXiv 2408.08252): at every step draw M next states and go on from the one that promises most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from diffalign.steering import Count, Lineage, Outcome, Steering, scheduled

if TYPE_CHECKING:
    from diffalign.steering._problem import Problem


class SVDD(Steering):
    """x_{i+1} = argmax_m r(x0(x^m)), or a draw by softmax(r / alpha), over M draws x^m ~ p(x_{i+1} | x_i).

    The chosen draw's forward is the next step's own, so an image takes 1 + M (T - 1) forwards, fewer where transitions
    have no noise. Greedy: high reward and little diversity. It needs predictions that tell good from bad early.
    """

    name: str = "svdd"
    particles: Count = 20
    """M, next states to choose from."""
    alpha: Annotated[float, Field(ge=0)] = 0.0
    """Temperature of the choice, in units of the reward; 0 takes the best, as the paper's code does."""

    def forwards(self, steps: int, cost: int) -> int:
        return (1 + self.particles * (steps - 1)) * cost

    def run(self, problem: Problem) -> Outcome:
        scheduled("all", problem.oracle.sigmas.tolist(), problem.noisy(), self.name)  # refuses the ODE
        return self.rounds(problem, self.particles, lambda first: self._once(problem, first))

    def _once(self, problem: Problem, first: int) -> Outcome:
        import torch

        from diffalign.steering._resampling import even

        generators, control = problem.particles(first, self.particles), problem.generator(first)
        noisy, end = set(problem.noisy()), problem.steps
        lineage, history = Lineage(), []
        x = problem.start(generators[:1])
        x0, eps = problem.predict(x, 0)
        node = lineage.add(0, None)
        for i in range(end - 1):
            n = self.particles if i in noisy else 1
            x, x0, eps = (t.repeat_interleave(n, 0) for t in (x, x0, eps))
            x = problem.seen(i, problem.advance(x, x0, eps, i, generators[:n]).next, x0)
            x0, eps = problem.predict(x, i + 1)
            if n == 1:
                continue
            r = problem.score(x0, i + 1)
            drawn = torch.multinomial((r / self.alpha).softmax(0), 1, generator=control) if self.alpha else r.argmax()
            best = int(drawn)
            nodes = [lineage.add(i + 1, node, value) for value in r.tolist()]
            node = nodes[best]
            x, x0, eps = x[best : best + 1], x0[best : best + 1], eps[best : best + 1]
            history.append({"step": i + 1, "best": float(r.max()), "mean": float(r[r > -torch.inf].mean())})
        x = problem.seen(end - 1, problem.advance(x, x0, eps, end - 1, generators[:1]).next, x0)
        r = problem.score(x, end)
        history.append({"step": end, "best": float(r), "mean": float(r)})
        return Outcome(x, r, even(1), [lineage.add(end, node, float(r))], lineage, None, history)
