"""Resampling schemes: which particles live on, and how often. All but `ssp` take points u and return ancestors.

W [K] are normalised weights, float64. A point u picks the first j whose cumulative weight reaches u. Every scheme is
unbiased: particle k has K W_k children on average. Their spread falls from multinomial to systematic and ssp.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMES = ("systematic", "stratified", "multinomial", "residual", "ssp")


def normalised(log_w: Tensor) -> Tensor:
    """[..., K] log weights that sum to 1."""
    return log_w.log_softmax(-1)


def effective(log_w: Tensor) -> Tensor:
    """Effective sample size (sum w)^2 / sum w^2 of [..., K] log weights, 1 to K."""
    return (-(2 * normalised(log_w)).logsumexp(-1)).exp()


def even(n: int) -> Tensor:
    """[n] normalised log weights of draws that count alike."""
    return torch.zeros(n, dtype=torch.float64).log_softmax(0)


def picked(w: Tensor, u: Tensor) -> Tensor:
    """Ancestor [n] of each point u [n]."""
    edges = w.cumsum(0)
    edges[-1] = 1.0  # rounding must not leave a gap
    return torch.searchsorted(edges, u).clamp(max=len(w) - 1)


def systematic(w: Tensor, u: Tensor) -> Tensor:
    """Points (u + k) / K from one u [1]: the usual choice."""
    return picked(w, (u + torch.arange(len(w))) / len(w))


def stratified(w: Tensor, u: Tensor) -> Tensor:
    """Points (u_k + k) / K, u [K]."""
    return picked(w, (u + torch.arange(len(w))) / len(w))


def multinomial(w: Tensor, u: Tensor) -> Tensor:
    """Independent points u [K]."""
    return picked(w, u.sort().values)


def residual(w: Tensor, u: Tensor) -> Tensor:
    """floor(K W_k) children each; the rest by multinomial points, of which len(u) - 1 are needed.

    The points come sorted from exponential gaps, z = cumsum(-log u), as z_k / z_n.
    """
    share = len(w) * w
    sure = share.floor()
    kept = torch.arange(len(w)).repeat_interleave(sure.long())
    missing = len(w) - len(kept)
    if missing == 0:
        return kept
    gaps = (-u[: missing + 1].log()).cumsum(0)
    return torch.cat([kept, picked((share - sure) / (share - sure).sum(), gaps[:-1] / gaps[-1])])


def ssp(w: Tensor, u: Tensor) -> Tensor:
    """Srinivasan's pairing (Gerber, Chopin, Whiteley, arXiv 1708.04846): floor or ceil of K W_k children, u [K - 1].

    Two fractional shares meet; one takes from the other until it is whole, by a coin that keeps the means.
    """
    share = (len(w) * w).tolist()
    children = [int(s) for s in share]
    rest = [s - c for s, c in zip(share, children, strict=True)]
    i, j = 0, 1
    for k, coin in enumerate(u.tolist()):
        up, down = min(rest[j], 1 - rest[i]), min(rest[i], 1 - rest[j])
        if up + down > 0 and coin < up / (up + down):
            i, j, up = j, i, down
        if rest[j] < 1 - rest[i]:  # i takes all of j
            rest[i] += up
            j = k + 2
        else:  # i becomes whole
            rest[j] -= up
            children[i] += 1
            i = k + 2
    last = i if j == len(w) else j
    if sum(children) == len(w) - 1:  # rounding kept the last share just below 1
        children[last] += 1
    return torch.arange(len(w)).repeat_interleave(torch.tensor(children))


def resample(scheme: str, log_w: Tensor, generator: torch.Generator) -> Tensor:
    """Ancestors [K] of the next generation, by one of `SCHEMES`."""
    w = normalised(log_w).exp()
    count = {"systematic": 1, "ssp": len(w) - 1, "residual": len(w) + 1}.get(scheme, len(w))
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    schemes = {"systematic": systematic, "stratified": stratified, "multinomial": multinomial, "residual": residual}
    return ssp(w, u) if scheme == "ssp" else schemes[scheme](w, u)
