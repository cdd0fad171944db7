"""DAS (arXiv 2501.05803): Feynman-Kac steering whose transitions follow the reward's gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from diffalign.steering import Count, Outcome, Steering, Strength, scheduled
from diffalign.types import UserError

if TYPE_CHECKING:
    from diffalign.steering._problem import Problem


class DAS(Steering):
    """`fk` with potential diff and the proposal N(mean + std^2 lam grad_x r(decode(x0(x))), std^2); K T forwards.

    Weights take log p - log q, summed over dimensions, so the target stays p(x_T) exp(lam r(x_T)). The gradient goes
    through the network and the decoder: about three times the time of `fk`, and the memory of training, one micro-batch
    at a time. After resampling, everything of a particle moves with it; the published pipelines leave its gradient and
    twist behind. lam is the paper's 1 / kl_coeff.
    """

    name: str = "das"
    particles: Count = 4
    """K, images that are denoised together."""
    lam: Strength = "auto"
    """Strength of the reward; auto: 3 / its standard deviation over plain samples."""
    resample_at: tuple[int, ...] | Literal["auto", "all"] = "all"
    """Steps 1 to T - 1 at which particles are weighed; the gradient is followed at every step with noise."""
    resample: Literal["systematic", "stratified", "multinomial", "residual", "ssp"] = "ssp"
    """Resampling scheme."""
    ess: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Resample when fewer than this share of the particles are effective; 1: at every weighing."""
    temper: Annotated[float, Field(gt=0)] | Literal["adaptive"] | None = None
    """Strength on the way: lam min((1 + temper)^i - 1, 1), .008 in the paper for T = 100, or the largest that keeps
    `ess`; by default lam throughout."""

    differentiates: ClassVar[bool] = True

    def forwards(self, steps: int, cost: int) -> int:
        return self.particles * steps * cost

    def run(self, problem: Problem) -> Outcome:
        from diffalign.steering._smc import Plan, smc
        from diffalign.steering._tempering import strengths

        if self.lam == "auto":
            raise UserError("lam 'auto' is set by diffalign.Steer from plain samples; give a number here")
        plan = Plan(
            self.particles,
            strengths(float(self.lam), problem.steps, self.temper if isinstance(self.temper, float) else None),
            scheduled(self.resample_at, problem.oracle.sigmas.tolist(), problem.noisy(), self.name),
            "diff",
            self.resample,
            self.ess,
            self.temper == "adaptive",
            guided=True,
        )
        return self.rounds(problem, self.particles, lambda first: smc(problem, plan, first))
