"""Feynman-Kac steering (arXiv 2501.06848): particles that are weighed and resampled while they are denoised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from diffalign.steering import Outcome
from diffalign.steering._filter import ParticleFilter

if TYPE_CHECKING:
    from diffalign.steering._problem import Problem


class FK(ParticleFilter):
    """Samples p(x_T) exp(lam r(x_T)) as K grows, p being the law of the stochastic sampler; K T forwards.

    Weights are w = prod G_i, with G_i = exp(lam (r_i - r_{i-1})) for `diff`, exp(lam max_j r_j) for `max`,
    exp(lam sum_j r_j) for `sum` and exp(lam r_i) for `rt`; G_T makes the product exp(lam r(x_T)). Rewards r_i are those
    of the clean image predicted from the state that is resampled, where the paper's code takes its parent's; and
    weights are kept when nothing is resampled, where the code forgets them. Only `diff` is near exact at usable K;
    `max` and `sum` tilt further on purpose. K = 4, the paper's setting, is far from the target.
    """

    name: str = "fk"
    potential: Literal["diff", "max", "sum", "rt"] = "diff"
    """What a particle is weighed by on the way."""
    compat: Literal["fkd-official"] | None = None
    """fkd-official: the paper's code with its errors, to compare with."""

    def run(self, problem: Problem) -> Outcome:
        if self.compat is None:
            return self.filtered(problem, self.potential, guided=False)
        from diffalign.steering._fkd_official import official

        lam, at = self.strength(), self.weighings(problem)
        return self.rounds(problem, self.particles, lambda first: official(self, problem, lam, at, first))
