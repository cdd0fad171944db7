"""Diffusion Tree Sampling (arXiv 2506.20701): a tree of denoising paths that learns where the reward is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from diffalign.steering import Count, Outcome, Positive
from diffalign.steering._tree_options import TreeSearch

if TYPE_CHECKING:
    from diffalign.steering._problem import Problem


class DTS(TreeSearch):
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
    width: Positive = 2.0
    """C of the widening: a node with fewer than C N^a children after N visits gets a new one."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.8
    """a of the widening, below the root."""
    root_alpha: Annotated[float, Field(gt=0, le=1)] = 1.0
    """a of the widening at the root, whose children are new initial noise; at 1 with C >= 1 every visit makes one."""
    min_visits: Count = 1
    """Visits that a child gets before it is drawn by its value."""

    def run(self, problem: Problem) -> Outcome:
        from diffalign.steering._tree import log_probabilities

        return self.searched(
            problem, self.root_alpha, lambda tree: (log_probabilities(tree), tree.root.psi), min_visits=self.min_visits
        )
