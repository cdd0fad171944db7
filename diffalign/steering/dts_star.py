"""Diffusion Tree Search (arXiv 2506.20701), the greedy form of `dts`: it looks for the best image, not for a sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from diffalign.steering import Count, Outcome, Positive, Steering
from diffalign.types import UserError

if TYPE_CHECKING:
    from diffalign.steering._problem import Problem


class DTSStar(Steering):
    """max r(x_T) by a walk down a tree of denoising paths; at most M T forwards.

    A visit goes to the child of highest v_c + c_uct sqrt(log N / N_c), or adds one while there are fewer than C N^a
    after N visits; v = (1 / lam) log mean_c exp(lam v_c), so a large lam looks at the best leaf below a node and a
    small one at their mean. The images are all leaves, so the best one seen is among them; all weight is on the leaf
    that the children of highest value lead to, the paper's answer, which need not be the best seen. No reward of an
    unfinished image is needed, and one that is NaN is never followed.
    """

    name: str = "dts_star"
    rollouts: Count | None = None
    """M, walks down the tree, in whole batches; by default 64, or what the budget allows."""
    lam: Positive | Literal["auto"] = "auto"
    """Strength of the reward; auto: 3 / its standard deviation over plain samples."""
    width: Positive = 1.0
    """C of the widening."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.5
    """a of the widening."""
    root_alpha: Annotated[float, Field(gt=0, le=1)] | None = None
    """a of the widening at the root, whose children are new initial noise; by default that of the others."""
    c_uct: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Weight of rarely visited children, on the reward's scale; auto: the standard deviation of the leaves' rewards."""
    branch_steps: tuple[int, ...] | Literal["auto", "all"] = "auto"
    """Steps whose states may have several children, and are kept; auto: five where 0.1 <= sigma <= 0.95."""
    batch: Count = 1
    """Walks that are chosen before any of their images is made; more are faster on a GPU and a little less informed."""
    store: Literal["exact", "bf16"] = "exact"
    """Precision of the states that are kept."""
    trees: str | None = None
    """Folder that trees are saved to and gone on from, one file a prompt; seconds count anew, forwards do not."""

    def forwards(self, steps: int, cost: int) -> int:
        from diffalign.steering._tree import most_forwards

        return most_forwards(self.rollouts, self.batch, self.budget_nfe, steps * cost)

    def run(self, problem: Problem) -> Outcome:
        from diffalign.steering._tree import Rules, branching, greedy
        from diffalign.steering._tree_growth import limits, search

        if self.lam == "auto":
            raise UserError("lam 'auto' is set by diffalign.Steer from plain samples; give a number here")
        branch = branching(self.branch_steps, problem.oracle.sigmas.tolist(), problem.noisy(), self.name)
        rules = Rules(
            lam=float(self.lam),
            width=self.width,
            alpha=self.alpha,
            root_alpha=self.root_alpha or self.alpha,
            branch=branch,
            batch=self.batch,
            c_uct=self.c_uct,
            store=self.store,
        )
        end = limits(self.rollouts, self.budget_nfe, self.budget_seconds)
        return search(problem, rules, end, self.name, self.trees, lambda tree: (greedy(tree), None))
