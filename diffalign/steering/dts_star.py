"""Diffusion Tree Search (arXiv 2506.20701), the greedy form of `dts`: it looks for the best image, not for a sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from diffalign.steering import Outcome, Positive
from diffalign.steering._tree_options import TreeSearch

if TYPE_CHECKING:
    from diffalign.steering._problem import Problem


class DTSStar(TreeSearch):
    """max r(x_T) by a walk down a tree of denoising paths; at most M T forwards.

    A visit goes to the child of highest v_c + c_uct sqrt(log N / N_c), or adds one while there are fewer than C N^a
    after N visits; v = (1 / lam) log mean_c exp(lam v_c), so a large lam looks at the best leaf below a node and a
    small one at their mean. The images are all leaves, so the best one seen is among them; all weight is on the leaf
    that the children of highest value lead to, the paper's answer, which need not be the best seen. No reward of an
    unfinished image is needed, and one that is NaN is never followed.
    """

    name: str = "dts_star"
    lam: Positive | Literal["auto"] = "auto"
    """Strength of the reward; auto: 3 / its standard deviation over plain samples."""
    root_alpha: Annotated[float, Field(gt=0, le=1)] | None = None
    """a of the widening at the root, whose children are new initial noise; by default that of the others."""
    c_uct: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Weight of rarely visited children, on the reward's scale; auto: the standard deviation of the leaves' rewards."""

    def run(self, problem: Problem) -> Outcome:
        from diffalign.steering._tree import greedy

        return self.searched(
            problem, self.root_alpha or self.alpha, lambda tree: (greedy(tree), None), c_uct=self.c_uct
        )
