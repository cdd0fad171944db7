"""What `dts` and `dts_star` have in common: the options of a tree. The tree itself is in `_tree`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from diffalign.steering import Count, Outcome, Positive, Steering
from diffalign.types import UserError

if TYPE_CHECKING:
    from diffalign.steering._problem import Problem
    from diffalign.steering._tree_growth import Weigh


class TreeSearch(Steering):
    """M walks down a tree of denoising paths, each of which ends in a finished image."""

    rollouts: Count | None = None
    """M, walks down the tree, in whole batches; by default 64, or what the budget allows."""
    lam: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Strength of the reward; auto: 3 / its standard deviation over plain samples."""
    width: Positive = 1.0
    """C of the widening: a node with fewer than C N^a children after N visits gets a new one."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.5
    """a of the widening."""
    branch_steps: tuple[int, ...] | Literal["auto", "all"] = "auto"
    """Steps whose states may have several children, and are kept; auto: five where 0.1 <= sigma <= 0.95."""
    batch: Count = 1
    """Walks that are chosen before any of their images is made; more are faster on a GPU and a little less informed."""
    store: Literal["exact", "bf16"] = "exact"
    """Precision of the states that are kept."""
    trees: str | None = None
    """Folder that trees are saved to and gone on from, after Ctrl-C too, one file a prompt; seconds count anew,
    forwards do not."""

    def forwards(self, steps: int, cost: int) -> int:
        from diffalign.steering._tree import most_forwards

        return most_forwards(self.rollouts, self.batch, self.budget_nfe, steps * cost)

    def searched(
        self,
        problem: Problem,
        root_alpha: float,
        weigh: Weigh,
        min_visits: int = 1,
        c_uct: float | Literal["auto"] | None = None,
    ) -> Outcome:
        """Grow the tree, or the saved one. Raises UserError where no transition has noise to branch at."""
        from diffalign.steering._tree import Rules, branching
        from diffalign.steering._tree_growth import limits, search

        if isinstance(self.lam, str):
            raise UserError("lam 'auto' is set by diffalign.Steer from plain samples; give a number here")
        rules = Rules(
            lam=self.lam,
            width=self.width,
            alpha=self.alpha,
            root_alpha=root_alpha,
            branch=branching(self.branch_steps, problem.oracle.sigmas.tolist(), problem.noisy(), self.name),
            batch=self.batch,
            min_visits=min_visits,
            c_uct=c_uct,
            store=self.store,
        )
        end = limits(self.rollouts, self.budget_nfe, self.budget_seconds)
        return search(problem, rules, end, self.name, self.trees, weigh)
