"""Statistics of paired scores. The unit is the prompt: average its images before calling anything here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from diffalign.types import UserError


@dataclass(frozen=True)
class Paired:
    """A comparison of a with b over n prompts, d = a - b."""

    n: int
    mean: float  # mean of d
    standard_error: float  # NaN for n < 2, like the intervals
    low: float  # 95 % bootstrap interval of the mean
    high: float
    t_interval: tuple[float, float]  # 95 % interval of Student's t
    wins: int  # prompts with d > tie
    ties: int
    losses: int  # prompts with d < -tie
    win_rate: float  # (wins + ties / 2) / n
    sign_test_p: float  # exact, two-sided, over decided prompts


def paired(
    a: Sequence[float],
    b: Sequence[float],
    *,
    method: Literal["percentile", "BCa"] = "percentile",
    resamples: int = 10_000,
    seed: int = 0,
    tie: float = 0.0,
) -> Paired:
    """Compare per-prompt scores a and b [n]; the bootstrap draws prompts and is deterministic in `seed`.

    Differences up to `tie` count as ties; the mean and its intervals take them as they are.

    Raises UserError when the lengths differ, nothing is given, or a score is not finite.
    """
    if len(a) != len(b) or len(a) == 0:
        raise UserError(f"a paired comparison needs the same prompts on both sides, got {len(a)} and {len(b)}")
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if not np.isfinite(d).all():
        raise UserError("a paired comparison needs finite scores; leave out prompts to which the reward does not apply")
    n, mean = len(d), float(d.mean())
    wins, losses = int((d > tie).sum()), int((d < -tie).sum())
    se = float(d.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    half = float(stats.t.ppf(0.975, n - 1)) * se if n > 1 else float("nan")
    low, high = bootstrap_mean(d, method=method, resamples=resamples, seed=seed)
    return Paired(
        n=n,
        mean=mean,
        standard_error=se,
        low=low,
        high=high,
        t_interval=(mean - half, mean + half),
        wins=wins,
        ties=n - wins - losses,
        losses=losses,
        win_rate=(wins + (n - wins - losses) / 2) / n,
        sign_test_p=float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
    )


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    *,
    method: Literal["percentile", "BCa"] = "percentile",
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of values [n]; (NaN, NaN) for n < 2, where nothing can be said."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return float("nan"), float("nan")
    if np.ptp(x) <= 1e-12 * np.abs(x).max():
        # Every resample has the same mean but for rounding, and BCa would divide by the spread.
        return float(x.mean()), float(x.mean())
    interval = stats.bootstrap(
        (x,),
        np.mean,
        n_resamples=resamples,
        batch=1000,
        vectorized=True,
        method=method,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion; (0, 1) when nothing was tried."""
    if not 0 <= successes <= trials:
        raise UserError(f"a proportion needs 0 <= successes <= trials, got {successes} of {trials}")
    if trials == 0:
        return 0.0, 1.0
    interval = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
