"""The shortest vector in the convex hull of the rewards' gradients (MGDA, as in MARBLE, arXiv 2605.06507).

Only the inner products of the gradients are needed, a K x K Gram matrix, so nothing here is as large as the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

LEAST_NORM = 1e-12  # a gradient no longer than this says nothing
TOLERANCE = 1e-6  # of the optimality conditions, between unit vectors; a solution is normally right to 1e-12


class SolveError(Exception):
    """The solver found no minimum."""


@dataclass(frozen=True)
class Balance:
    """How to combine K gradients. Tensors are float64 and on the CPU, and 0 for a reward that is not valid."""

    coefficients: Tensor
    """[K]: the combined gradient is sum_k coefficients_k g_k, of the raw gradients."""
    alphas: Tensor
    """[K]: shares of the solved gradients ghat_k, of sum 1; all 0 if no reward is valid."""
    valid: Tensor
    """[K] bool: the gradient is finite and longer than 1e-12."""
    norms: Tensor
    """[K] norms of the raw gradients, 0 where one is not finite."""
    scale: float
    """|g| / |d|: the mean norm of the valid gradients; 1 if they were not normalised, 0 if there is none."""
    gram: Tensor
    """[V, V]: ghat_j . ghat_k of the V valid rewards."""
    fallback: Literal["none", "all_zero", "single_valid", "solver_failed"]
    """Why nothing was solved: no valid reward, only one, or a failure, and then all valid rewards have equal shares."""

    @property
    def inner(self) -> Tensor:
        """[V]: ghat_k . d of the valid rewards. With floor 0 none is below |d|^2, and it is that where alpha_k > 0."""
        return self.gram @ self.alphas[self.valid]

    @property
    def direction_norm(self) -> float:
        """|d|; it is 0 if some mixture of the gradients cancels out, so that no step improves all rewards."""
        return math.sqrt(max(float(self.alphas[self.valid] @ self.inner), 0.0))


def balance(gram: Tensor, normalize: bool = True, scales: Tensor | None = None, floor: float = 0.0) -> Balance:
    """A combination of gradients that improves all rewards, MARBLE section 6 (arXiv 2605.06507).

        ghat_k = s_k g_k / |g_k|,  alpha = argmin |sum_k alpha_k ghat_k|,  d = sum_k alpha_k ghat_k,  g = d mean_k |g_k|

    over the valid rewards, for sum_k alpha_k = 1 and alpha_k >= floor. With floor 0 the cosine of g and g_k is
    |d| / s_k wherever alpha_k > 0, and no less elsewhere: the smaller s_k, the more a reward counts.

    Args:
        gram: [K, K] inner products of the raw gradients; a row that is not finite makes its reward invalid.
        normalize: False leaves out the division by |g_k| and the product with their mean.
        scales: [K] s_k > 0; by default 1.
        floor: one above 1 / (number of valid rewards) counts as that.

    If only one reward is valid, g is its gradient; if none is, g is 0.
    """
    import torch

    gram = gram.detach().to("cpu", torch.float64)
    square = gram.diagonal()
    norms = square.where(square.isfinite(), 0.0).clamp(min=0).sqrt()
    valid = norms > LEAST_NORM
    count = int(valid.sum())
    factor = torch.ones_like(norms) if scales is None else scales.detach().to("cpu", torch.float64)
    if normalize:
        factor = factor / norms.where(valid, 1.0)
    solved = gram[valid][:, valid] * factor[valid].outer(factor[valid])
    alphas = valid.double() / max(count, 1)
    if count == 0:
        return Balance(alphas, alphas, valid, norms, 0.0, solved, "all_zero")
    mean = float(norms[valid].mean())
    if count == 1:
        return Balance(alphas, alphas, valid, norms, mean, solved, "single_valid")
    fallback: Literal["none", "solver_failed"] = "none"
    try:
        alphas[valid] = min_norm(solved, floor)
    except SolveError:
        fallback = "solver_failed"
    scale = mean if normalize else 1.0
    return Balance(alphas * factor * scale, alphas, valid, norms, scale, solved, fallback)


def min_norm(gram: Tensor, floor: float = 0.0) -> Tensor:
    """alpha = argmin 1/2 alpha^T G alpha over sum_k alpha_k = 1, alpha_k >= floor.

    With alpha = floor + (1 - K floor) w this is a mixture w of the vectors (1 - K floor) v_k + floor sum_j v_j: a floor
    moves the vectors, and what is solved has none.

    Args:
        gram: [K, K], K >= 1; eigenvalues that are negative, by rounding, count as 0.
        floor: one above 1 / K counts as that.

    Returns [K] float64 on the CPU. alpha need not be unique; the vector sum_k alpha_k v_k is.

    Raises SolveError if G is not finite or the solver fails.
    """
    vectors = _factor(gram)
    floor = min(max(floor, 0.0), 1 / len(vectors))
    rest = 1 - len(vectors) * floor
    return floor + rest * _mixture(rest * vectors + floor * vectors.sum(0))


def _factor(gram: Tensor) -> Tensor:
    """[K, K] rows with that Gram matrix, each exact relative to its own length, however much the lengths differ."""
    import torch

    gram = gram.detach().to("cpu", torch.float64)
    if not gram.isfinite().all():
        raise SolveError("an inner product of the gradients is not finite")
    norms = gram.diagonal().clamp(min=0).sqrt()
    divisor = norms.where(norms > 0, 1.0)
    values, axes = torch.linalg.eigh((gram + gram.T) / 2 / divisor[:, None] / divisor)
    rows: Tensor = norms[:, None] * axes * values.clamp(min=0).sqrt()
    return rows


def _mixture(vectors: Tensor) -> Tensor:
    """[K] shares w >= 0 of sum 1 with the least |sum_k w_k v_k|.

    The unknowns are b_k = w_k |v_k| / min_j |v_j|, the amounts of the unit vectors u_k: so the programme is well scaled
    though the lengths differ by orders of magnitude. With r_k = min_j |v_j| / |v_k| it reads

        minimise |sum_k b_k u_k|^2 over r . b = 1, b >= 0.
    """
    import warnings

    import cvxpy
    import torch

    norms = vectors.norm(dim=1)
    zero = norms == 0
    if zero.any():
        w: Tensor = zero.double() / zero.sum()
        return w
    units, ratios = vectors / norms[:, None], norms.min() / norms
    problem, given_units, given_ratios, b = _problem(len(vectors))
    given_units.value, given_ratios.value = units.numpy(), ratios.numpy()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it may be inaccurate, which is tested below
            problem.solve(solver=cvxpy.CLARABEL, warm_start=False, tol_gap_abs=1e-14, tol_gap_rel=1e-14, tol_feas=1e-12)
    except cvxpy.SolverError as e:
        raise SolveError(str(e)) from e
    if b.value is None:
        raise SolveError(f"the solver ended with '{problem.status}'")
    amounts = torch.from_numpy(b.value).clamp(min=0)
    amounts = amounts / (ratios @ amounts)
    shortest = amounts @ units
    if not (units @ shortest >= shortest.square().sum() * ratios - TOLERANCE * amounts.sum()).all():
        raise SolveError(f"the solver ended with '{problem.status}', at no minimum")
    w = amounts * ratios
    return w


@cache
def _problem(count: int) -> tuple[Any, Any, Any, Any]:
    """The programme for so many vectors, its parameters u and r, and its unknown; it is compiled once."""
    import cvxpy

    units, ratios = cvxpy.Parameter((count, count)), cvxpy.Parameter(count, nonneg=True)
    b = cvxpy.Variable(count)
    return cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(b @ units)), [ratios @ b == 1, b >= 0]), units, ratios, b
