"""What a set of images is like as a whole: how many different ones it holds, and how far it is from another set.

Features are rows [n, D] of any encoder, such as those of :mod:`diffalign.eval.features`. All is computed in float64.
"""

from __future__ import annotations

import numpy as np

from diffalign.types import UserError

ROWS = 1024  # of a kernel matrix held at once


def vendi(features: np.ndarray, q: float = 1.0) -> float:
    """The effective number of different rows, 1 when all are alike and n when all are orthogonal.

    exp(H_q(lambda)), lambda the eigenvalues of K / n with K_ij = cos(x_i, x_j), and H_q Renyi's entropy
    log(sum lambda^q) / (1 - q); Shannon's for q = 1, -log(max lambda) for q = inf (arXiv 2210.02410, 2310.12952). For
    n > D they are those of the smaller X^T X / n, which are the same.

    Args:
        features: [n, D]; NaN for n = 0.
        q: the order, at least 0. Small ones count rare rows more; 0 counts every direction alike.
    """
    x = unit(features)
    n, dimensions = x.shape
    if not q >= 0:
        raise UserError(f"the order of a Vendi score must be at least 0, got {q}")
    if n == 0:
        return float("nan")
    gram = x.T @ x if n > dimensions else x @ x.T
    values = np.linalg.eigvalsh(gram / n)
    values = values[values > len(values) * np.finfo(np.float64).eps * values[-1]]  # the others are rounding
    if np.isinf(q):
        return float(1 / values[-1])
    if q == 1:
        return float(np.exp(-(values * np.log(values)).sum()))
    return float((values**q).sum() ** (1 / (1 - q)))


def pairwise_distance(features: np.ndarray) -> float:
    """Mean of 1 - cos over the pairs of rows [n, D], in [0, 2]; NaN for fewer than two rows.

    From |sum of the unit rows|^2 = n + sum of the cosines over ordered pairs.
    """
    x = unit(features)
    n = len(x)
    if n < 2:
        return float("nan")
    total = x.sum(0)
    return float(max(0.0, 1 - (total @ total - n) / (n * (n - 1))))


def fid(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to the rows of a [n, D] and b [m, D] (arXiv 1706.08500).

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), covariances divided by n - 1. With S = C^T C / (n - 1) of the
    centred rows C, the last trace is the sum of the singular values of C_a C_b^T / sqrt((n - 1)(m - 1)): no matrix
    square root, and stable when S is singular. Biased upwards by few rows: it needs some ten thousand to be compared
    with published ones. NaN for fewer than two rows.
    """
    a, b = same_width(a, b)
    if min(len(a), len(b)) < 2:
        return float("nan")
    mean_a, mean_b = a.mean(0), b.mean(0)
    # R of C = Q R has C's singular values in products, and at most D rows
    root_a, root_b = (np.linalg.qr(x - mean, mode="r") / np.sqrt(len(x) - 1) for x, mean in ((a, mean_a), (b, mean_b)))
    shared = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + (root_a**2).sum() + (root_b**2).sum() - 2 * shared
    return float(max(0.0, distance))


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """Kernel distance, the unbiased estimate of MMD^2 for k(x, y) = (x.y / D + 1)^3 (arXiv 1801.01401).

    Mean of k over pairs within a [n, D], plus that within b [m, D], minus twice that across. Zero on average for two
    samples of one distribution, whatever their size, so single values may be negative. NaN for fewer than two rows.
    """
    a, b = same_width(a, b)
    n, m = len(a), len(b)
    if min(n, m) < 2:
        return float("nan")
    within = [(_kernel_sum(x, x) - _kernel_diagonal(x)) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return sum(within) - 2 * _kernel_sum(a, b) / (n * m)


def unit(features: np.ndarray) -> np.ndarray:
    """Rows [n, D] of length one. Raises UserError for a row that has no direction."""
    x = finite(features)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    if not (norms > 0).all():
        raise UserError(f"feature {int(np.argmin(norms))} is all zeros and has no direction; embed that image again")
    rows: np.ndarray = x / norms
    return rows


def finite(features: np.ndarray) -> np.ndarray:
    """[n, D] float64. Raises UserError for a row that is not finite."""
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"features must be [n, D], got {x.shape}")
    if not (good := np.isfinite(x).all(1)).all():
        raise UserError(f"feature {int(np.argmin(good))} is not finite; embed that image again, in fp32")
    return x


def same_width(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = finite(a), finite(b)
    if a.shape[1] != b.shape[1]:
        raise UserError(f"features of {a.shape[1]} and {b.shape[1]} numbers come from different encoders; use one")
    return a, b


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
    parts = (a[i : i + ROWS] @ b.T / a.shape[1] + 1 for i in range(0, len(a), ROWS))
    return float(sum((part**3).sum() for part in parts))


def _kernel_diagonal(x: np.ndarray) -> float:
    return float((((x**2).sum(1) / x.shape[1] + 1) ** 3).sum())
