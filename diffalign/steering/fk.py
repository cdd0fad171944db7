"""Feynman-Kac steering (arXiv 2501.06848): particles that are weighed and resampled while they are denoised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from diffalign.steering import Count, Outcome, Steering, Strength, scheduled
from diffalign.types import UserError

if TYPE_CHECKING:
    from diffalign.steering._problem import Problem


class FK(Steering):
    """Samples p(x_T) exp(lam r(x_T)) as K grows, p being the law of the stochastic sampler; K T forwards.

    Weights are w = prod G_i, with G_i = exp(lam (r_i - r_{i-1})) for `diff`, exp(lam max_j r_j) for `max`,
    exp(lam sum_j r_j) for `sum` and exp(lam r_i) for `rt`; G_T makes the product exp(lam r(x_T)). Rewards r_i are those
    of the clean image predicted from the state that is resampled, where the paper's code takes its parent's; and
    weights are kept when nothing is resampled, where the code forgets them. Only `diff` is near exact at usable K;
    `max` and `sum` tilt further on purpose. K = 4, the paper's setting, is far from the target.
    """

    name: str = "fk"
    particles: Count = 8
    """K, images that are denoised together."""
    lam: Strength = "auto"
    """Strength of the reward; auto: 3 / its standard deviation over plain samples."""
    potential: Literal["diff", "max", "sum", "rt"] = "diff"
    """What a particle is weighed by on the way."""
    resample_at: tuple[int, ...] | Literal["auto", "all"] = "auto"
    """Steps 1 to T - 1 at which particles are weighed; auto: five between 20 and 80 % where sigma <= 0.95."""
    resample: Literal["systematic", "stratified", "multinomial", "residual", "ssp"] = "systematic"
    """Resampling scheme."""
    ess: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Resample when fewer than this share of the particles are effective; 1: at every weighing."""
    temper: Annotated[float, Field(gt=0)] | Literal["adaptive"] | None = None
    """Strength on the way: lam min((1 + temper)^i - 1, 1), or the largest that keeps `ess`; else lam."""
    compat: Literal["fkd-official"] | None = None
    """fkd-official: the paper's code with its errors, to compare with."""

    def forwards(self, steps: int, cost: int) -> int:
        return self.particles * steps * cost

    def run(self, problem: Problem) -> Outcome:
        from diffalign.steering._fkd_official import official
        from diffalign.steering._smc import Plan, smc
        from diffalign.steering._tempering import strengths

        if self.lam == "auto":
            raise UserError("lam 'auto' is set by diffalign.Steer from plain samples; give a number here")
        at = scheduled(self.resample_at, problem.oracle.sigmas.tolist(), problem.noisy(), self.name)
        if self.compat is not None:
            return self.rounds(
                problem, self.particles, lambda first: official(self, problem, float(self.lam), at, first)
            )
        gamma = self.temper if isinstance(self.temper, float) else None
        plan = Plan(
            self.particles,
            strengths(float(self.lam), problem.steps, gamma),
            at,
            self.potential,
            self.resample,
            self.ess if self.ess < 1 else 1 + 1e-9,  # ess = K exactly must resample too
            self.temper == "adaptive",
        )
        return self.rounds(problem, self.particles, lambda first: smc(problem, plan, first))
