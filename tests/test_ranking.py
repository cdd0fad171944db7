"""Rankings against closed forms, counting by hand and other solvers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from diffalign.eval.ranking import bradley_terry, bradley_terry_interval, elo, holm, pareto, wins_matrix
from diffalign.types import UserError

RNG = np.random.default_rng(7)


def test_two_contestants_have_a_closed_form() -> None:
    for first, second, pseudo in (7.0, 3.0, 0.0), (12.5, 0.5, 0.1), (40.0, 0.0, 0.1), (1e6, 0.0, 1e-6):
        theta = bradley_terry(np.array([[0, first], [second, 0]]), pseudo)
        gap = math.log((first + pseudo) / (second + pseudo))
        assert theta == pytest.approx([gap / 2, -gap / 2], abs=1e-8)


def test_strengths_are_found_again_from_the_wins_that_they_imply() -> None:
    theta = RNG.normal(0, 2, size=7)
    games = RNG.integers(1, 50, size=(7, 7))
    games += games.T
    wins = games / (1 + np.exp(theta[None, :] - theta[:, None]))
    wins[np.diag_indices(7)] = math.nan  # not read
    assert bradley_terry(wins, 0.0) == pytest.approx(theta - theta.mean(), abs=1e-8)


def test_several_matrices_at_once_equal_each_alone() -> None:
    wins = RNG.integers(0, 20, size=(5, 4, 4)).astype(float)
    both = bradley_terry(wins)
    assert both.shape == (5, 4)
    for found, one in zip(both, wins, strict=True):
        assert found == pytest.approx(bradley_terry(one), abs=1e-9)
        assert found.sum() == pytest.approx(0, abs=1e-9)

        def loss(theta: np.ndarray, one: np.ndarray = one) -> float:
            off = ~np.eye(4, dtype=bool)
            return float(((one + 0.1) * np.logaddexp(0, theta[None, :] - theta[:, None]))[off].sum())

        other = minimize(loss, np.zeros(4), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12}).x
        assert found == pytest.approx(other - other.mean(), abs=1e-3)


def test_separable_wins_diverge_without_pseudo_wins_and_stay_finite_with_them() -> None:
    unbeaten = np.array([[0, 10, 10], [0, 0, 6], [0, 4, 0]])
    with pytest.raises(UserError, match="pseudo-wins"):
        bradley_terry(unbeaten, pseudo=0.0)
    leads = [bradley_terry(unbeaten, pseudo)[0] for pseudo in (1e-1, 1e-3, 1e-5, 1e-7)]
    # with ever smaller pseudo-wins the lead over the two others grows without bound, as log(1 / pseudo)
    assert np.diff(leads) == pytest.approx([2 / 3 * math.log(100)] * 3, rel=0.05)
    assert np.isfinite(bradley_terry(unbeaten)).all()
    beaten_in_turn = np.array([[0, 5, 0], [0, 0, 5], [5, 0, 0]])  # never directly, but round a circle
    assert bradley_terry(beaten_in_turn, 0.0) == pytest.approx([0, 0, 0], abs=1e-9)


def test_odd_wins() -> None:
    assert bradley_terry(np.zeros((3, 3))) == pytest.approx([0, 0, 0])
    assert bradley_terry(np.zeros((1, 1))).tolist() == [0]
    for wins, pseudo in (np.full((2, 2), -1.0), 0.1), (np.full((2, 2), np.nan), 0.1), (np.ones((2, 2)), -1.0):
        with pytest.raises(UserError):
            bradley_terry(wins, pseudo)
    with pytest.raises(ValueError, match="M, M"):
        bradley_terry(np.zeros((2, 3)))


def test_wins_are_counted() -> None:
    nan = math.nan
    scores = np.array([[1.0, 2.0, 3.0, nan], [1.0, 1.0, 4.0, 0.0], [0.0, nan, nan, 0.3]])
    assert wins_matrix(scores).tolist() == [[0, 1.5, 1], [1.5, 0, 1], [0, 1, 0]]
    assert wins_matrix(scores, tie=0.5).tolist() == [[0, 1.5, 1], [1.5, 0, 1.5], [0, 0.5, 0]]
    assert wins_matrix(scores, tie=1.0).tolist() == [[0, 1.5, 0.5], [1.5, 0, 1], [0.5, 1, 0]]


def test_the_interval_is_deterministic_and_covers_the_strengths() -> None:
    scores = RNG.normal(size=(3, 150)) + np.array([[0.0], [0.0], [1.5]])
    theta = bradley_terry(wins_matrix(scores))
    low, high = bradley_terry_interval(scores)
    again, other = bradley_terry_interval(scores), bradley_terry_interval(scores, seed=1)
    assert (low < theta).all() and (theta < high).all()
    assert np.array_equal(low, again[0]) and np.array_equal(high, again[1])
    assert not np.array_equal(low, other[0])
    assert low[2] > max(high[0], high[1])  # the better one, beyond doubt
    few = bradley_terry_interval(scores[:, :20])
    assert (few[1] - few[0] > high - low).all()


def test_the_interval_of_prompts_that_all_agree_is_a_point_and_of_one_is_unknown() -> None:
    scores = np.tile(np.array([[1.0], [0.0]]), 30)
    low, high = bradley_terry_interval(scores, resamples=50)
    theta = bradley_terry(wins_matrix(scores))
    assert low == pytest.approx(theta) and high == pytest.approx(theta)
    assert np.isnan(bradley_terry_interval(scores[:, :1])).all()


def test_elo_says_ten_to_one_for_400_points() -> None:
    points = elo(bradley_terry(np.array([[0, 10], [1, 0]]), 0.0))
    assert points[0] - points[1] == pytest.approx(400)
    assert points.mean() == pytest.approx(1000)


def test_holm_by_hand() -> None:
    # 4 * 0.005, 3 * 0.01, 2 * 0.03, and 0.04, which may not fall below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
    for bad in ([math.nan], [1.5], [-0.1]):
        with pytest.raises(UserError):
            holm(bad)


def test_holm_rejects_as_its_steps_do() -> None:
    for _ in range(20):
        p = RNG.uniform(0, 0.1, size=6)
        order = np.argsort(p)
        steps = np.cumprod([p[i] <= 0.05 / (6 - rank) for rank, i in enumerate(order)])
        assert [value <= 0.05 for value in np.array(holm(list(p)))[order]] == list(steps.astype(bool))


def test_pareto() -> None:
    points = np.array([[1, 5], [2, 4], [2, 3], [3, 1], [0, 5], [2, 4], [math.nan, 9]])
    assert pareto(points) == [True, True, False, True, False, True, False]
    assert pareto(np.array([[1.0], [2.0], [2.0]])) == [False, True, True]
    assert pareto(np.empty((0, 2))) == []
