"""DAS (arXiv 2501.05803): Feynman-Kac steering whose transitions follow the reward's gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from diffalign.steering import Count, Outcome
from diffalign.steering._filter import ParticleFilter

if TYPE_CHECKING:
    from diffalign.steering._problem import Problem


class DAS(ParticleFilter):
    """`fk` with potential diff and the proposal N(mean + std^2 lam grad_x r(decode(x0(x))), std^2); K T forwards.

    Weights take log p - log q, summed over dimensions, so the target stays p(x_T) exp(lam r(x_T)). The gradient goes
    through the network and the decoder: about three times the time of `fk`, and the memory of training, one micro-batch
    at a time. After resampling, everything of a particle moves with it; the published pipelines leave its gradient and
    twist behind. lam is the paper's 1 / kl_coeff, and its tempering is temper = 0.008 for T = 100.
    """

    name: str = "das"
    particles: Count = 4
    """K, images that are denoised together."""
    resample_at: tuple[int, ...] | Literal["auto", "all"] = "all"
    """Steps 1 to T - 1 at which particles are weighed; the gradient is followed at every step with noise, from the
    first weighing on where the strength is adaptive."""
    resample: Literal["systematic", "stratified", "multinomial", "residual", "ssp"] = "ssp"
    """Resampling scheme."""

    differentiates: ClassVar[bool] = True

    def run(self, problem: Problem) -> Outcome:
        return self.filtered(problem, "diff", guided=True)
