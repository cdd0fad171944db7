"""What `fk` and `das` have in common: the options of a particle filter. The filter itself is in `_smc`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from diffalign.steering import Count, Outcome, Steering, Strength, scheduled
from diffalign.types import UserError

if TYPE_CHECKING:
    from diffalign.steering._problem import Problem


class ParticleFilter(Steering):
    """K particles that are weighed and resampled while they are denoised."""

    particles: Count = 8
    """K, images that are denoised together."""
    lam: Strength = "auto"
    """Strength of the reward; auto: 3 / its standard deviation over plain samples."""
    resample_at: tuple[int, ...] | Literal["auto", "all"] = "auto"
    """Steps 1 to T - 1 at which particles are weighed; auto: five between 20 and 80 % where sigma <= 0.95."""
    resample: Literal["systematic", "stratified", "multinomial", "residual", "ssp"] = "systematic"
    """Resampling scheme."""
    ess: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Resample when fewer than this share of the particles are effective; 1: at every weighing."""
    temper: Annotated[float, Field(gt=0)] | Literal["adaptive", "none"] = "adaptive"
    """Strength on the way: the largest that keeps `ess`, a rate for `ramp`, or none, which is lam throughout."""
    ramp: Literal["exponential", "linear"] = "exponential"
    """With a rate: lam min((1 + temper)^i - 1, 1) at step i, as in DAS, or lam min(temper i, 1)."""

    @model_validator(mode="after")
    def _temper_suits(self) -> ParticleFilter:
        if self.ramp != "exponential" and not isinstance(self.temper, float):
            raise ValueError("ramp has no effect without a rate; give temper a number such as 0.1")
        if self.temper == "adaptive" and self.ess == 1:
            raise ValueError("adaptive tempering keeps ess, and 1 leaves no strength; take ess 0.5, or temper none")
        return self

    def forwards(self, steps: int, cost: int) -> int:
        return self.particles * steps * cost

    def filtered(self, problem: Problem, potential: str, guided: bool) -> Outcome:
        """Rounds of the filter with these options. Raises UserError for a schedule that does not fit, or no noise."""
        from diffalign.steering._smc import Plan, smc
        from diffalign.steering._tempering import strengths

        rate = self.temper if isinstance(self.temper, float) else None
        plan = Plan(
            self.particles,
            strengths(self.strength(), problem.steps, rate, ramp=self.ramp),
            self.weighings(problem),
            potential,
            self.resample,
            self.ess if self.ess < 1 else 1 + 1e-9,  # equal weights must be resampled too
            self.temper == "adaptive",
            guided,
        )
        return self.rounds(problem, self.particles, lambda first: smc(problem, plan, first))

    def weighings(self, problem: Problem) -> list[int]:
        return scheduled(self.resample_at, problem.oracle.sigmas.tolist(), problem.noisy(), self.name)

    def strength(self) -> float:
        if isinstance(self.lam, str):
            raise UserError("lam 'auto' is set by diffalign.Steer from plain samples; give a number here")
        return self.lam
