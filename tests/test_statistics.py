"""Statistics against closed forms and their own definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffalign.eval.statistics import bootstrap_mean, paired, wilson
from diffalign.types import UserError

RNG = np.random.default_rng(1)
BEFORE = RNG.normal(size=40)
AFTER = BEFORE + RNG.normal(0.4, 0.5, size=40)


def test_the_interval_is_deterministic_in_its_seed() -> None:
    first, again, other = (paired(AFTER, BEFORE, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_swapping_sides_mirrors_everything() -> None:
    forward, back = paired(AFTER, BEFORE, method="percentile"), paired(BEFORE, AFTER, method="percentile")
    assert back.mean == pytest.approx(-forward.mean)
    assert (back.wins, back.losses) == (forward.losses, forward.wins)
    assert back.win_rate == pytest.approx(1 - forward.win_rate)
    assert (back.low, back.high) == pytest.approx((-forward.high, -forward.low))


def test_pairing_removes_what_the_prompts_share() -> None:
    hard_and_easy = RNG.normal(0, 50, size=40)
    shifted = paired(AFTER + hard_and_easy, BEFORE + hard_and_easy)
    plain = paired(AFTER, BEFORE)
    assert (shifted.low, shifted.high) == pytest.approx((plain.low, plain.high))
    assert plain.low > 0


def test_large_samples_agree_with_the_normal_interval() -> None:
    x = RNG.normal(size=2000)
    half = 1.96 * x.std(ddof=1) / math.sqrt(len(x))
    for method in ("percentile", "BCa"):
        low, high = bootstrap_mean(x, method=method)  # type: ignore[arg-type]
        assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.05 * 2 * half)


def test_degenerate_samples() -> None:
    same = paired([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
    assert (same.mean, same.low, same.high) == (0.5, 0.5, 0.5)
    equal = paired([1.0, 2.0], [1.0, 2.0])
    assert (equal.mean, equal.low, equal.high, equal.sign_test_p) == (0, 0, 0, 1)
    single = paired([1.0], [0.0])
    assert single.mean == 1 and all(map(math.isnan, (single.low, single.high, single.standard_error)))


def test_bad_samples_are_user_errors() -> None:
    for a, b in ([1.0], [1.0, 2.0]), ([], []), ([math.nan, 1.0], [0.0, 0.0]):
        with pytest.raises(UserError):
            paired(a, b)
    with pytest.raises(UserError):
        wilson(3, 2)


def test_wilson_solves_its_equation() -> None:
    # The ends p satisfy |x / n - p| = z sqrt(p (1 - p) / n).
    for x, n in (7, 20), (0, 12), (12, 12), (199, 500):
        for p in wilson(x, n):
            assert abs(x / n - p) == pytest.approx(1.959963984540054 * math.sqrt(p * (1 - p) / n), abs=1e-9)
    assert wilson(0, 0) == (0.0, 1.0)


def test_differences_within_the_band_are_ties() -> None:
    a, b = [1.0, 2.0, 3.0, 4.0], [0.9, 2.1, 1.0, 6.0]
    exact, banded = paired(a, b), paired(a, b, tie=0.5)
    assert (exact.wins, exact.ties, exact.losses) == (2, 0, 2)
    assert (banded.wins, banded.ties, banded.losses, banded.win_rate) == (1, 2, 1, 0.5)
    assert (banded.mean, banded.low, banded.high) == (exact.mean, exact.low, exact.high)


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_equal_differences_but_for_rounding_have_an_interval(method: str) -> None:
    values = [(1 + 0.1 * p) - 0.1 * p for p in range(10)]
    assert len(set(values)) > 1
    found = bootstrap_mean(values, method=method)  # type: ignore[arg-type]
    assert found == pytest.approx((1.0, 1.0))
