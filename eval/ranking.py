"""Ranking several contestants: Bradley-Terry strengths, Holm's correction, and who is best in several ways at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from diffalign.types import UserError

ROUNDS = 200  # a dozen do; gaps of hundreds, which only absurdly small pseudo-wins allow, need more


def wins_matrix(scores: np.ndarray, tie: float = 0.0) -> np.ndarray:
    """[M, M] float64: entry (i, j) counts the prompts on which i beat j, ties as half a win for each.

    Args:
        scores: [M, P], one per contestant and prompt. Where one of a pair is NaN, the prompt is left out for that pair.
        tie: differences up to this much are ties.
    """
    won: np.ndarray = outcomes(scores, tie).sum(0)
    return won


def outcomes(scores: np.ndarray, tie: float = 0.0) -> np.ndarray:
    """[P, M, M] float64: 1 where contestant i beat j on the prompt, 1/2 for a tie, 0 for a loss or a missing score."""
    s = np.asarray(scores, dtype=np.float64)
    if s.ndim != 2:
        raise ValueError(f"scores must be [M, P], got {s.shape}")
    d = s.T[:, :, None] - s.T[:, None, :]
    won = np.where(np.abs(d) <= tie, 0.5, d > tie)
    return np.where(np.eye(len(s), dtype=bool), 0.0, won)


def bradley_terry(wins: np.ndarray, pseudo: float = 0.1) -> np.ndarray:
    """Log-strengths theta [M], mean zero, of greatest likelihood where P(i beats j) = 1 / (1 + exp(theta_j - theta_i)).

    Bradley and Terry 1952, by Newton's method. With the step's length t = log(1 + d) / d, d the widest gap between two
    entries of the step, the likelihood never falls (self-concordance, arXiv 0910.4627), so nothing needs tuning.

    Args:
        wins: [M, M], or several such [..., M, M]; entry (i, j) counts i's wins over j, half of one for a tie. The
            diagonal is not read.
        pseudo: added to the wins of everyone over everyone. Without, one who never lost would be infinitely strong.

    Raises UserError when no finite strengths fit: without pseudo-wins, every contestant must have beaten every other,
    be it through third ones.
    """
    w = np.array(wins, dtype=np.float64)
    m = w.shape[-1]
    if w.ndim < 2 or w.shape[-2] != m or m == 0:
        raise ValueError(f"wins must be [..., M, M], got {w.shape}")
    w = np.where(np.eye(m, dtype=bool), 0.0, w)
    if not (np.isfinite(w).all() and (w >= 0).all() and np.isfinite(pseudo) and pseudo >= 0):
        raise UserError("wins and pseudo-wins must be finite numbers of at least 0")
    w = np.where(np.eye(m, dtype=bool), 0.0, w + pseudo)
    if pseudo == 0 and any(connected_components(one, connection="strong")[0] > 1 for one in w.reshape(-1, m, m)):
        raise UserError(
            "some contestants never lost to some others, so their strengths have no finite fit; use pseudo-wins"
        )
    lost = w.swapaxes(-1, -2)
    theta = np.zeros(w.shape[:-1])
    for _ in range(ROUNDS):
        gap = theta[..., :, None] - theta[..., None, :]
        p, q = expit(gap), expit(-gap)  # 1 - p would lose the digits of a wide gap
        curvature = (w + lost) * p * q
        # a constant may be added to all strengths; the 1 / M everywhere holds their mean
        hessian = curvature.sum(-1)[..., None] * np.eye(m) - curvature + 1 / m
        newton = np.linalg.solve(hessian, (w * q - lost * p).sum(-1)[..., None])[..., 0]
        d = np.ptp(newton, axis=-1, keepdims=True)
        theta += newton * np.divide(np.log1p(d), d, out=np.ones_like(d), where=d > 0)
        if d.max() < 1e-12:
            break
    centred: np.ndarray = theta - theta.mean(-1, keepdims=True)
    return centred


def bradley_terry_interval(
    scores: np.ndarray, resamples: int = 1000, seed: int = 0, *, tie: float = 0.0, pseudo: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """(low [M], high [M]): 95 % percentile bootstrap over prompts of the strengths of `scores` [M, P].

    Deterministic in `seed`. NaN for fewer than two prompts, where nothing can be said.
    """
    each = outcomes(scores, tie)
    prompts, m = each.shape[:2]
    if prompts < 2:
        return np.full(m, np.nan), np.full(m, np.nan)
    drawn = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    theta = bradley_terry((drawn @ each.reshape(prompts, -1)).reshape(-1, m, m), pseudo)
    low, high = np.percentile(theta, [2.5, 97.5], axis=0)
    return low, high


def elo(theta: np.ndarray) -> np.ndarray:
    """400 theta / ln 10 + 1000: 400 points more are ten wins to one."""
    points: np.ndarray = 400 / np.log(10) * np.asarray(theta, dtype=np.float64) + 1000
    return points


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: those below 0.05 are significant together (Holm 1979).

    With the m values sorted, p'_(i) = max over j <= i of min(1, (m - j + 1) p_(j)).
    """
    values = np.asarray(p, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise UserError("p-values must be between 0 and 1; leave out comparisons that have none")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(values), 0, -1) * values[order]))
    return [float(value) for value in adjusted]


def pareto(points: np.ndarray) -> list[bool]:
    """Which of the points [M, D] no other is at least as good as in every column and better in one; larger is better.

    Equal points are both on the front. A point with a NaN is not, and keeps no other off it.
    """
    x = np.asarray(points, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"points must be [M, D], got {x.shape}")
    mine, theirs = x[:, None], x[None, :]
    worse: np.ndarray = np.all(theirs >= mine, -1) & np.any(theirs > mine, -1)
    return [not (row.any() or np.isnan(point).any()) for row, point in zip(worse, x, strict=True)]
