"""Identities of Feynman-Kac steering and DAS that hold to the last bit or to rounding, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from steering_toy import AT, CHAIN, SDE, STEPS, Toy, reward, toy
from test_oracle import TOY, A
from torch import Tensor

from diffalign.steering import Outcome, Steering
from diffalign.steering._fkd_official import Population, Rules, resampled
from diffalign.steering._problem import Problem, Watched
from diffalign.steering._resampling import effective
from diffalign.steering._smc import bisected
from diffalign.steering.das import DAS
from diffalign.steering.fk import FK
from diffalign.types import Step, UserError

POTENTIALS: tuple[Literal["diff", "max", "sum", "rt"], ...] = ("diff", "max", "sum", "rt")


def test_rounds_are_the_systems_one_by_one() -> None:
    once = FK(temper="none", particles=8, lam=1.0, resample_at=AT)
    problem = toy(**SDE)
    both = once.model_copy(update={"budget_nfe": 2 * 8 * STEPS}).run(problem)
    assert problem.spent.nfe == 2 * 8 * STEPS
    first = once.run(toy(**SDE))
    assert torch.equal(both.x[:8], first.x) and not torch.equal(both.x[8:], first.x)
    assert both.log_z is not None and first.log_z is not None
    share = both.log_weights[:8].logsumexp(0)
    torch.testing.assert_close(float(share), first.log_z - both.log_z - math.log(2), atol=1e-12, rtol=0)
    torch.testing.assert_close(both.log_weights[:8] - share, first.log_weights, atol=1e-12, rtol=0)
    assert [both.lineage.step[leaf] for leaf in both.leaves] == [STEPS] * 16
    assert {both.lineage.root(leaf) < 8 for leaf in both.leaves[:8]} == {True}
    assert {both.lineage.reward[leaf] for leaf in both.leaves} == set(both.rewards.tolist())


def plain(problem: Problem, n: int) -> Tensor:
    generators = problem.particles(0, n)
    return problem.walk(problem.start(generators), generators)


@pytest.mark.parametrize(
    "method", [FK(temper="none", particles=8, lam=0.0), DAS(temper="none", particles=8, lam=0.0)], ids=["fk", "das"]
)
@pytest.mark.parametrize("how", [CHAIN, SDE], ids=["chain", "sde"])
def test_strength_0_is_plain_sampling_to_the_bit(method: Steering, how: dict[str, Any]) -> None:
    found = method.run(toy(**how))
    assert torch.equal(found.x, plain(toy(**how), 8))
    torch.testing.assert_close(found.log_weights.exp(), torch.full((8,), 1 / 8, dtype=torch.float64))
    assert abs(found.log_z or 0.0) < 1e-12 and not any(row["resampled"] for row in found.history)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_one_particle_is_plain_sampling(potential: Any) -> None:
    found = FK(temper="none", particles=1, lam=3.0, potential=potential, resample_at="all", ess=1).run(toy(**SDE))
    assert torch.equal(found.x, plain(toy(**SDE), 1)) and float(found.log_weights) == 0
    torch.testing.assert_close(found.log_z, 3 * float(found.x[0] @ A), atol=1e-9, rtol=0)


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("temper", ["none", 0.1, "adaptive"])
def test_a_constant_reward_steers_nothing(potential: Any, temper: Any) -> None:
    problem = toy(judge=lambda images, sigma: torch.full((len(images),), -1.5), **SDE)
    found = FK(particles=8, lam=2.0, potential=potential, resample_at=AT, temper=temper).run(problem)
    assert not any(row["resampled"] for row in found.history)
    assert found.log_z == pytest.approx(2.0 * -1.5, abs=1e-12)
    assert torch.equal(found.x, plain(toy(**SDE), 8))


@pytest.mark.parametrize(
    "how",
    [{}, {"kernel": "flow_sde", "eta": 0.0, "stochastic": range(STEPS)}, {"kernel": "flow_sde", "eta": 1.0}],
    ids=["ode", "eta 0", "no stochastic step"],
)
@pytest.mark.parametrize(
    "method", [FK(temper="none", lam=1.0), FK(temper="none", lam=1.0, resample_at=AT), DAS(temper="none", lam=1.0)]
)
def test_copies_of_an_ode_are_refused(how: dict[str, Any], method: Steering) -> None:
    with pytest.raises(UserError, match="needs noise"):
        method.run(toy(**how))


def test_particles_are_their_generators() -> None:
    def own(order: Sequence[int]) -> Outcome:
        generators = [torch.Generator().manual_seed(100 + j) for j in order]
        return FK(temper="none", particles=6, lam=1.0, resample_at=()).run(toy(own=generators, **SDE))

    order = [3, 1, 5, 0, 4, 2]
    straight, permuted = own(range(6)), own(order)
    torch.testing.assert_close(permuted.x, straight.x[order], atol=1e-12, rtol=0)
    torch.testing.assert_close(permuted.log_weights, straight.log_weights[order], atol=1e-12, rtol=0)
    assert permuted.log_z == pytest.approx(straight.log_z)
    with pytest.raises(UserError, match="as many generators"):
        FK(temper="none", particles=7, lam=1.0).run(toy(own=[torch.Generator()] * 6, **SDE))


@pytest.mark.parametrize(
    "method", [FK(temper="none", particles=7, lam=4.0, resample_at=AT), DAS(temper="none", particles=7, lam=4.0)]
)
def test_the_micro_batch_changes_nothing(method: Steering) -> None:
    whole, single = method.run(toy(**SDE)), method.run(toy(micro_batch=1, **SDE))
    assert any(row["resampled"] for row in whole.history)
    torch.testing.assert_close(single.x, whole.x, atol=1e-9, rtol=0)
    torch.testing.assert_close(single.log_weights, whole.log_weights, atol=1e-9, rtol=0)
    assert single.lineage.parent == whole.lineage.parent and single.leaves == whole.leaves


@pytest.mark.parametrize(
    "method", [FK(temper="none", particles=8, lam=4.0, resample_at="all"), DAS(temper="none", particles=8, lam=4.0)]
)
def test_everything_of_a_particle_moves_with_it(method: Steering) -> None:
    """Transitions that add no noise of their own show which prediction, reward and gradient a copy was given."""
    oracle, resampled, std = Toy(), [], 0.2

    def watch(seen: Watched) -> None:
        assert oracle.last is not None
        if "rewards" not in seen.row:  # at sigma 1 all predictions are alike
            return
        before = oracle.last.clone().requires_grad_()  # the particles before they were copied
        x0, _ = TOY.predict(before, oracle.sigmas[seen.step])
        (slope,) = torch.autograd.grad((x0 @ A).sum(), before)
        parent = torch.cdist(seen.x0, x0.detach(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        followed = 4.0 * std**2 * slope[parent] if isinstance(method, DAS) else 0.0
        torch.testing.assert_close(seen.x, oracle.last[parent] + followed)
        torch.testing.assert_close(seen.row["rewards"], seen.x0 @ A)
        resampled.append(seen.row["resampled"])

    def still(x: Tensor, x0: Tensor, eps: Tensor, i: int, generators: Sequence[torch.Generator]) -> Step:
        return Step(x, torch.full_like(x[:, :1], std), x, x[:, 0], x0)

    found = method.run(toy(oracle=oracle, watch=watch, move=still))
    assert any(resampled)
    torch.testing.assert_close(found.rewards, found.x @ A)
    assert [found.lineage.reward[leaf] for leaf in found.leaves] == found.rewards.tolist()


@pytest.mark.parametrize(
    ("potential", "log_weight"),
    [
        ("diff", lambda r: r[-1]),
        ("max", lambda r: r.cummax(0).values.sum(0)),
        ("sum", lambda r: r.cumsum(0).sum(0)),
        ("rt", lambda r: r.sum(0)),
    ],
)
def test_potentials_are_the_papers(potential: Any, log_weight: Callable[[Tensor], Tensor]) -> None:
    """Where nothing is resampled the weight on the way is the product of the potentials, and at the end exp(lam r)."""
    rewards: list[Tensor] = []

    def watch(seen: Watched) -> None:
        if "rewards" in seen.row:
            rewards.append(2.0 * seen.row["rewards"])
            torch.testing.assert_close(seen.row["log_weights"], log_weight(torch.stack(rewards)))

    found = FK(temper="none", particles=5, lam=2.0, potential=potential, resample_at=AT, ess=0).run(
        toy(watch=watch, **SDE)
    )
    assert len(rewards) == len(AT)
    torch.testing.assert_close(found.log_weights, (2.0 * found.x @ A).log_softmax(0))


@pytest.mark.parametrize("potential", POTENTIALS)
def test_a_particle_without_a_reward_weighs_nothing(potential: Any) -> None:
    def left_only(images: Tensor, sigma: float) -> Tensor:
        return reward(images, sigma).where(images[:, 0] < 0, torch.nan)

    found = FK(temper="none", particles=16, lam=1.0, resample_at=AT, potential=potential).run(
        toy(judge=left_only, **SDE)
    )
    right = found.x[:, 0] >= 0
    assert bool((found.log_weights[right] == -torch.inf).all()) and bool((found.rewards[right] == -torch.inf).all())
    assert bool(found.log_weights[~right].isfinite().any()) and float(found.log_weights.exp().sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    "method", [FK(temper="none", lam=1.0), FK(lam=1.0, compat="fkd-official"), DAS(temper="none", lam=1.0)]
)
def test_no_reward_at_all_is_an_error(method: Steering) -> None:
    with pytest.raises(UserError, match="NaN for all"):
        method.run(toy(judge=lambda images, sigma: images[:, 0] * torch.nan, **SDE))


@pytest.mark.parametrize("method", [FK(temper="none", lam=1.0), DAS(temper="none", lam=1.0)])
def test_an_infinite_reward_is_an_error(method: Steering) -> None:
    with pytest.raises(UserError, match="infinite"):
        method.run(toy(judge=lambda images, sigma: reward(images, sigma).abs() / 0.0, **SDE))


def test_no_two_decisions_share_their_random_numbers() -> None:
    problems = [toy(seed, prompt) for seed in range(3) for prompt in range(3)]
    seeds = [g.initial_seed() for p in problems for g in p.particles(0, 3)]
    seeds += [p.generator(*key).initial_seed() for p in problems for key in ((), (0,), (1,), (0, 0), (1, 0))]
    assert len(set(seeds)) == len(seeds)


def test_the_strength_is_found_by_halving() -> None:
    assert bisected(lambda value: value <= 0.3, 0.1, 1.0) == pytest.approx(0.3)
    assert bisected(lambda value: True, 0.1, 1.0) == 1.0 and bisected(lambda value: False, 0.1, 1.0) == 0.1


def test_adaptive_strength_rises_to_the_whole_and_spares_the_particles() -> None:
    # sharper than the particles can bear at once
    found = FK(particles=64, lam=6.0, resample_at="all", temper="adaptive").run(toy(**SDE))
    strengths = [row["strength"] for row in found.history]
    assert strengths == sorted(strengths) and strengths[0] < 6.0 == strengths[-1]
    blunt = FK(temper="none", particles=64, lam=6.0, resample_at="all").run(toy(**SDE))
    assert found.history[0]["ess"] >= 32 * (1 - 1e-6) > blunt.history[0]["ess"]
    assert all(row["resampled"] for row in found.history if row["strength"] < 6.0), "equal weights can bear more"


def official(**settings: Any) -> FK:
    return FK(**{"particles": 6, "lam": 2.0, "compat": "fkd-official", "temper": "none", **settings})


@pytest.mark.parametrize("potential", POTENTIALS)
def test_the_official_code_walks_and_reports_like_fk(potential: Any) -> None:
    problem = toy(**SDE)
    found = official(resample_at=AT, potential=potential, ess=1).run(problem)
    assert problem.spent.nfe == official().forwards(STEPS, 1) == 6 * STEPS
    assert [row["step"] for row in found.history] == [*AT, STEPS]
    assert all(row["resampled"] for row in found.history[:-1])
    assert float(effective(found.log_weights)) == pytest.approx(6) and found.log_z is None
    torch.testing.assert_close(found.rewards, found.x @ A)
    assert [found.lineage.reward[leaf] for leaf in found.leaves] == found.rewards.tolist()
    assert all(found.lineage.root(leaf) < 6 for leaf in found.leaves)


@pytest.mark.parametrize(("settings", "word"), [({"temper": 0.1}, "temper"), ({"ess": 0.3}, "ess"), ({"resample": "ssp"}, "ssp")])  # fmt: skip
def test_what_the_official_code_lacks_is_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        official(**settings).run(toy(**SDE))


def test_official_weights_saturate_and_vanish() -> None:
    start, generator = Population(torch.zeros(4), torch.ones(4)), torch.Generator().manual_seed(0)
    rules = Rules("diff", 10.0, range(5), 5, adaptive=False)
    _, _, weights = resampled(rules, start, torch.tensor([20.0, 30.0, torch.nan, 25.0]), 1, generator)
    assert weights is not None and weights.tolist() == [1e10, 1e10, 0.0, 1e10]
    with pytest.raises(UserError, match="every weight is 0"):
        resampled(rules, start, torch.full((4,), -1e3), 1, generator)
    _, index, weights = resampled(replace(rules, discrete=True), start, torch.full((4,), -1e3), 1, generator)
    assert weights is not None and weights.tolist() == [1.0] * 4
