"""Diffusion Tree Sampling (arXiv 2506.20701): a tree of denoising paths that learns where the reward is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from diffalign.steering import Count, Outcome, Positive, Steering, Strength
from diffalign.types import UserError

if TYPE_CHECKING:
    from diffalign.steering._problem import Problem


class DTS(Steering):
    """Samples p(x_T) exp(lam r(x_T)) as the tree grows, p the law of the stochastic sampler; at most M T forwards.

    A node's value is v = (1 / lam) log mean_c exp(lam v_c) over its children, draws of p; a visit goes to a child in
    proportion to exp(lam v_c), or adds one while there are fewer than C N^a after N visits. The images are all leaves,
    weighed by the exact probability that such a descent ends there, and log_z = lam v(root). No reward of an unfinished
    image is needed, and NaN rewards weigh nothing.

    What looked bad once is rarely seen again, so values are biased low: with one a for all nodes, C = 2, a = 0.8 and
    512 visits, exp(log_z) is 0.6 of its true value on a Gaussian mixture. There are two cures, neither in the paper.
    By default root_alpha is 1: the root takes a new child at every visit, which is importance sampling and has no bias.
    For a deeper tree lower root_alpha and raise min_visits to about 4.
    """

    name: str = "dts"
    rollouts: Count | None = None
    """M, walks down the tree, in whole batches; by default 64, or what the budget allows."""
    lam: Strength = "auto"
    """Strength of the reward; auto: 3 / its standard deviation over plain samples."""
    width: Positive = 2.0
    """C of the widening."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.8
    """a of the widening, below the root."""
    root_alpha: Annotated[float, Field(gt=0, le=1)] = 1.0
    """a of the widening at the root, whose children are new initial noise; at 1 with C >= 1 every visit makes one."""
    min_visits: Count = 1
    """Visits that a child gets before it is drawn by its value."""
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
        from diffalign.steering._tree import Rules, branching, log_probabilities
        from diffalign.steering._tree_growth import limits, search

        if self.lam == "auto":
            raise UserError("lam 'auto' is set by diffalign.Steer from plain samples; give a number here")
        branch = branching(self.branch_steps, problem.oracle.sigmas.tolist(), problem.noisy(), self.name)
        rules = Rules(
            lam=float(self.lam),
            width=self.width,
            alpha=self.alpha,
            root_alpha=self.root_alpha,
            branch=branch,
            batch=self.batch,
            min_visits=self.min_visits,
            store=self.store,
        )
        end = limits(self.rollouts, self.budget_nfe, self.budget_seconds)
        return search(problem, rules, end, self.name, self.trees, lambda tree: (log_probabilities(tree), tree.root.psi))
