"""Tree sampling and search on the Gaussian mixture, where the exact chain leaves the method's own error alone."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest
import torch
from steering_trees import DEEP, METHODS, Toy, errors, kept, problem, same, sde, states, tilt
from torch import Tensor

from diffalign.steering import Steering
from diffalign.steering.best_of_n import BestOfN
from diffalign.steering.dts import DTS
from diffalign.steering.dts_star import DTSStar
from diffalign.types import UserError


def test_the_wide_root_is_exact() -> None:
    tv, ratio, nfe = errors(12, batch=32)
    assert tv < 0.08 and 0.8 < ratio < 1.1
    assert nfe == 512 * 10  # every visit is new noise


def test_a_narrow_root_is_biased() -> None:
    """The negative control: bad first rollouts are never corrected, so the evidence is far too low."""
    tv, ratio, nfe = errors(4, batch=16, branch_steps="all", root_alpha=0.8)
    assert tv > 0.1 and ratio < 0.75
    assert nfe < 512 * 10


def test_min_visits_take_the_bias_away() -> None:
    tv, ratio, nfe = errors(6, batch=16, root_alpha=0.8, min_visits=4)
    assert tv < 0.08 and 0.8 < ratio < 1.2
    assert nfe < 512 * 10


def test_weights_at_the_wide_root_are_importance_weights() -> None:
    found = DTS(lam=2.0, rollouts=16).run(problem())
    torch.testing.assert_close(found.log_weights, (2 * found.rewards).log_softmax(0), atol=1e-12, rtol=0)
    assert found.log_z == pytest.approx(float((2 * found.rewards).logsumexp(0)) - math.log(16))


def test_weights_are_those_of_the_descent() -> None:
    """At every node, sum_leaves p(leaf) = 1, and p prefers a child by the mean of exp(lam r) below it."""
    found = DTS(**DEEP, rollouts=40, branch_steps="all").run(problem())
    value, weight = {}, dict(zip(found.leaves, found.log_weights.exp().tolist(), strict=True))
    below: dict[int | None, list[int]] = {}
    for n, parent in enumerate(found.lineage.parent):
        below.setdefault(parent, []).append(n)
    for n in [*range(len(found.lineage.step) - 1, -1, -1), None]:
        if n in below:
            value[n] = mean(value[c] for c in below[n])
            weight[n] = sum(weight[c] for c in below[n])
            for c in below[n]:
                assert weight[c] == pytest.approx(weight[n] * value[c] / sum(value[d] for d in below[n]))
        else:
            value[n] = math.exp(found.lineage.reward[n])  # type: ignore[arg-type, index]
    assert weight[None] == pytest.approx(1) and math.log(value[None]) == pytest.approx(found.log_z)
    assert max(map(len, below.values())) > 1 and any(len(below[n]) > 1 for n in below if n is not None)


def test_search_beats_best_of_n() -> None:
    """A narrow peak off the modes, at 640 forwards; medians over seeds."""
    peak = torch.tensor([3.3, 3.3], dtype=torch.float64)

    def best(method: Steering) -> float:
        results = []
        for seed in range(5):
            asked = problem(seed, lambda images, sigma: -20 * (images - peak).square().sum(1))
            results.append(float(method.run(asked).rewards.max()))
            assert asked.spent.nfe <= 640
        return median(results)

    plain = best(BestOfN(budget_nfe=640))
    assert best(DTSStar(budget_nfe=640, lam=1.0, c_uct=1.0)) > plain + 4
    assert best(DTSStar(budget_nfe=640, lam=1.0)) > plain


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 4])
def test_micro_batch_changes_nothing(method: Any, batch: int) -> None:
    tried = [problem(3, micro_batch=size) for size in (1, 8)]
    one, eight = (method(**DEEP, rollouts=24, batch=batch).run(p) for p in tried)
    same(one, eight)
    assert tried[0].spent.nfe == tried[1].spent.nfe == states(tried[0])
    assert max(one.lineage.step) == 10


def test_rollouts_of_a_batch_share_model_calls() -> None:
    calls = []
    for batch in (1, 8):
        oracle = Toy()
        DTSStar(lam=1.0, rollouts=16, batch=batch).run(problem(oracle=oracle))
        calls.append(oracle.calls)
    assert calls[1] <= 2 * 10 < calls[0]


def test_visits_of_a_batch_spread_out(tmp_path: Path) -> None:
    """Virtual loss: children of equal value are visited in turn, although none of the batch's rewards is known."""
    method = DTSStar(lam=1.0, c_uct=1.0, rollouts=32, batch=8, branch_steps=(4,), trees=str(tmp_path))
    method.run(problem(judge=lambda images, sigma: images[:, 0] * 0 + 1))
    nodes = kept(tmp_path)[1]["nodes"]
    assert [n for n, parent in zip(nodes["visits"], nodes["parent"], strict=True) if parent == 0] == [4] * 8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cost, batch", [(1, 1), (2, 3)])
def test_a_budget_is_filled_and_kept(method: Any, cost: int, batch: int) -> None:
    asked = problem(oracle=Toy(cost=cost))
    found = method(**DEEP, budget_nfe=500, batch=batch).run(asked)
    assert 500 - batch * 10 * cost < asked.spent.nfe <= 500
    assert asked.spent.nfe == states(asked) * cost
    assert asked.spent.reward_calls == len(found.leaves)
    few = problem()
    method(**DEEP, budget_nfe=500, rollouts=4, batch=2).run(few)
    assert few.spent.nfe <= 40


def test_a_budget_counts_what_was_spent_before(tmp_path: Path) -> None:
    method = DTS(lam=1.0, budget_nfe=105, trees=str(tmp_path))
    method.run(problem())
    again = problem()
    assert len(method.run(again).leaves) == 10 and states(again) == 0
    more = problem()
    assert len(method.model_copy(update={"budget_nfe": 200}).run(more).leaves) == 20
    assert more.spent.nfe == 200


def test_the_first_batch_is_finished_in_any_time() -> None:
    assert len(DTS(lam=1.0, budget_seconds=1e-9, batch=4).run(problem()).leaves) == 4


def test_a_settled_search_ends() -> None:
    """All that is left are visits to old leaves, which cost no forwards."""
    found = DTSStar(lam=1.0, alpha=0.05, budget_nfe=100, branch_steps=()).run(problem())
    assert 1 < len(found.leaves) < 10


@pytest.mark.parametrize("branch", [(), (4,), (2, 5, 6)])
def test_only_branch_steps_are_kept(branch: tuple[int, ...], tmp_path: Path) -> None:
    found = DTSStar(**DEEP, rollouts=20, branch_steps=branch, trees=str(tmp_path)).run(problem())
    tensors, about = kept(tmp_path)
    steps = found.lineage.step
    assert set(steps) == {*branch, 10} and len(tensors["leaves"]) == steps.count(10) == len(found.leaves)
    inner = len(steps) - steps.count(10)
    assert all(len(tensors[part]) == inner for part in ("x", "x0", "eps")) if branch else "x" not in tensors
    assert inner <= 20 * len(branch)
    assert all(p is None or p < n for n, p in enumerate(found.lineage.parent))


def test_a_second_child_costs_no_call_at_its_parent() -> None:
    """The root has one child here, and x_4 two: T forwards, none for the old leaf, and T - 1 - 4 for the second."""
    asked = problem()
    found = DTS(lam=1.0, rollouts=3, branch_steps=(4,), width=0.9, root_alpha=0.05, alpha=1.0).run(asked)
    first = DTS(lam=1.0, rollouts=1, branch_steps=(4,)).run(problem())
    assert torch.equal(found.x[:1], first.x)
    assert found.lineage.parent == [None, 0, 0] and asked.spent.nfe == 10 + 5


def test_root_children_are_plain_samples() -> None:
    asked = problem(4)
    generators = asked.particles(0, 6)
    plain = asked.walk(asked.start(generators), generators)
    assert torch.equal(DTS(lam=1.0, rollouts=6).run(problem(4)).x, plain)


@pytest.mark.parametrize("method", METHODS)
def test_nan_rewards_weigh_nothing(method: Any) -> None:
    def picky(images: Tensor, sigma: float) -> Tensor:
        return torch.where(images[:, 0] > 0, tilt(images), torch.nan)

    found = method(**DEEP, rollouts=40).run(problem(1, picky))
    without = found.rewards == -math.inf
    assert 0 < int(without.sum()) < len(found.x) and not bool((found.x[without, 0] > 0).any())
    assert bool((found.log_weights[without] == -math.inf).all())
    assert float(found.log_weights.logsumexp(0)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="NaN for all 5 images of the tree"):
        method(lam=1.0, rollouts=5).run(problem(1, lambda images, sigma: images[:, 0] * math.nan))


def test_strength_zero_is_the_prior() -> None:
    found = DTS(lam=0.0, rollouts=8).run(problem())
    assert found.log_z == 0 and found.log_weights.exp().tolist() == pytest.approx([1 / 8] * 8)
    half = itertools.cycle([1.0, math.nan])
    found = DTS(lam=0.0, rollouts=8).run(
        problem(judge=lambda images, sigma: torch.tensor([next(half) for _ in images]))
    )
    assert found.log_z == pytest.approx(math.log(0.5))
    assert found.log_weights.exp().tolist() == pytest.approx([1 / 4, 0] * 4)


@pytest.mark.parametrize("method", METHODS)
def test_small_and_constant(method: Any) -> None:
    one = method(lam=3.0, rollouts=1).run(problem())
    assert one.log_weights.tolist() == [0] and len(one.x) == 1
    constant = method(**{**DEEP, "lam": 3.0}, rollouts=30).run(
        problem(judge=lambda images, sigma: images[:, 0] * 0 + 1.5)
    )
    assert constant.log_z is None or constant.log_z == pytest.approx(4.5)
    assert len(constant.leaves) > 5


def test_greedy_weight_is_on_one_leaf_of_high_reward() -> None:
    found = DTSStar(**DEEP, rollouts=60, branch_steps="all").run(problem(2))
    assert found.log_weights.exp().sum() == found.log_weights.exp().max() == 1
    chosen = int(found.log_weights.argmax())
    assert found.rewards[chosen] > found.rewards.median()
    assert found.history[-1]["best"] == float(found.rewards.max())


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_work_is_refused(method: Any) -> None:
    with pytest.raises(UserError, match=f"steering '{method(lam=1.0).name}' needs noise"):
        method(lam=1.0).run(problem(move=None))
    with pytest.raises(UserError, match="needs noise"):
        method(lam=1.0).run(problem(move=None, kernel="flow_sde", eta=0.0, stochastic=range(9)))
    with pytest.raises(UserError, match="lam 'auto'"):
        method().run(problem())
    with pytest.raises(
        UserError, match="cannot branch at step 8, whose transition has no noise; give steps among 1, 2"
    ):
        method(lam=1.0, branch_steps=(3, 8)).run(sde())
    with pytest.raises(UserError, match="budget_nfe 25 is less than one batch of .*, 30 network forwards"):
        method(lam=1.0, budget_nfe=25, batch=3).run(problem())
    piloted = problem()
    piloted.spent.nfe = 16
    with pytest.raises(UserError, match="budget_nfe 25 is less .*, 10 network forwards after the 16 already spent"):
        method(lam=1.0, budget_nfe=25).run(piloted)


def test_branching_stays_where_noise_is() -> None:
    found = DTSStar(**DEEP, rollouts=20).run(sde())
    assert set(found.lineage.step) == {1, 2, 4, 5, 6, 10}  # five spread over them
    every = DTSStar(**DEEP, rollouts=20, branch_steps="all").run(sde())
    assert set(every.lineage.step) == {*range(1, 7), 10}


@pytest.mark.parametrize("method", METHODS)
def test_forwards(method: Any) -> None:
    assert method().forwards(20, 2) == 64 * 40
    assert method(rollouts=10, batch=4).forwards(20, 2) == 12 * 40
    assert method(budget_nfe=5000).forwards(20, 2) == 5000
    assert method(budget_nfe=5000, rollouts=10).forwards(20, 2) == 400
