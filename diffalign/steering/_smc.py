"""The particle filter behind `fk` and `das`: sequential Monte Carlo on the model's own transitions.

Target pi(x_T) ~ p(x_T) exp(lam r(x_T)), p the law of the stochastic sampler. A particle carries a twist psi, the log of
what its weight already holds of the reward. At each weighing, log w += psi' - psi, whether particles are resampled then
or not; the last psi' is lam r(x_T) for every potential. So exp(log_z) is an unbiased estimate of E[exp(lam r)].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.steering import Lineage, Outcome
from diffalign.steering._problem import Problem
from diffalign.steering._resampling import effective, resample
from diffalign.types import UserError

# psi' from (rho = lam r, psi, running maximum, running sum)
POTENTIALS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "diff": lambda rho, psi, peak, total: rho,
    "max": lambda rho, psi, peak, total: psi + peak,
    "sum": lambda rho, psi, peak, total: psi + total,
    "rt": lambda rho, psi, peak, total: psi + rho,
}


@dataclass(frozen=True)
class Plan:
    """How the filter is run.

    Attributes:
        lam: [T+1] strength at each step; the last is the target's.
        at: steps at which particles are weighed; T always is.
        potential: of `POTENTIALS`.
        adaptive: find the strength at each weighing that keeps `threshold`, instead of taking lam.
        guided: shift each transition's mean by std^2 lam grad r, and weigh by the ratio of the densities (DAS).
    """

    particles: int
    lam: Sequence[float]
    at: Collection[int]
    potential: str = "diff"
    scheme: str = "systematic"
    threshold: float = 0.5
    adaptive: bool = False
    guided: bool = False


@dataclass(frozen=True)
class Cloud:
    """Everything that belongs to a particle, so that nothing is forgotten when particles are copied."""

    x: Tensor  # [K, ...]
    psi: Tensor  # [K]
    peak: Tensor  # [K] largest rho so far
    total: Tensor  # [K] sum of rho so far
    node: Tensor  # [K] of the lineage
    x0: Tensor | None = None
    eps: Tensor | None = None
    slope: Tensor | None = None  # d r / d x

    def pick(self, index: Tensor) -> Cloud:
        here: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {name: None if t is None else t[index.to(t.device)] for name, t in here.items()}
        return Cloud(**chosen)


def smc(problem: Problem, plan: Plan, first: int = 0) -> Outcome:
    """Run one system of K particles, numbered from `first`."""
    k, end = plan.particles, problem.steps
    generators, control = problem.particles(first, k), problem.generator(first)
    zero = torch.zeros(k, dtype=torch.float64)
    lineage = Lineage()
    node = torch.tensor([lineage.add(0, None) for _ in range(k)])
    cloud = Cloud(problem.start(generators), zero, zero - torch.inf, zero, node)
    log_w, log_z, scale, history = zero, 0.0, 0.0, []
    rewards = zero
    for i in range(end + 1):
        cloud, scored = _look(problem, plan, cloud, i, scale)
        row: dict[str, Any] = {}
        if scored is not None:
            rewards = scored
            scale = _strength(plan, i, scale, log_w, cloud, rewards)
            psi, peak, total = _twist(plan.potential if i < end else "diff", cloud, rewards, scale)
            log_w = torch.where(log_w == -torch.inf, log_w, log_w + psi - cloud.psi)
            if bool((log_w == -torch.inf).all()):
                raise UserError(f"every particle has weight 0 at step {i} of {end}; check the reward for NaN")
            node = torch.tensor(
                [lineage.add(i, p, r) for p, r in zip(cloud.node.tolist(), rewards.tolist(), strict=True)]
            )
            # a particle of weight 0 stays at it whatever its twist, which must not become inf - inf
            cloud = replace(cloud, psi=psi.nan_to_num(0.0, 0.0, 0.0), peak=peak, total=total, node=node)
            ess = float(effective(log_w))
            # a strength held back leaves just `threshold`; equal weights bear more of it next time
            held = plan.adaptive and scale < plan.lam[i]
            resampled = i < end and (held or ess < plan.threshold * k)
            row = {"step": i, "ess": ess, "best": float(rewards.max()), "strength": scale, "resampled": resampled}
            row["mean"] = float(rewards[rewards > -torch.inf].mean())
            if resampled or i == end:
                log_z += float(log_w.logsumexp(0)) - math.log(k)
            if resampled:
                index = resample(plan.scheme, log_w, control)
                cloud, log_w, rewards = cloud.pick(index), zero, rewards[index]
            row["roots"] = len({lineage.root(n) for n in cloud.node.tolist()})
            history.append(row)
        if i < end:
            assert cloud.x0 is not None and cloud.eps is not None
            x, gained = _move(problem, plan, cloud, i, scale, generators)
            log_w = log_w + gained
            x = problem.seen(i, x, cloud.x0, {**row, "rewards": rewards, "log_weights": log_w} if row else None)
            cloud = replace(cloud, x=x)
    return Outcome(cloud.x, rewards, log_w.log_softmax(0), cloud.node.tolist(), lineage, log_z, history)


def _look(problem: Problem, plan: Plan, cloud: Cloud, i: int, scale: float) -> tuple[Cloud, Tensor | None]:
    """The model's view of the states at step i, and the rewards where they are weighed.

    It is that of the current state: copies of one parent already differ, and the transition uses the same call.
    """
    if i == problem.steps:
        return cloud, problem.score(cloud.x, i)
    follows = i in plan.at or (scale if plan.adaptive else plan.lam[i + 1]) > 0
    if plan.guided and follows:
        x0, eps, rewards, slope = problem.differentiate(cloud.x, i)
        return replace(cloud, x0=x0, eps=eps, slope=slope), rewards if i in plan.at else None
    x0, eps = problem.predict(cloud.x, i)
    return replace(cloud, x0=x0, eps=eps, slope=None), problem.score(x0, i) if i in plan.at else None


def _twist(potential: str, cloud: Cloud, rewards: Tensor, strength: float) -> tuple[Tensor, Tensor, Tensor]:
    rho = torch.where(rewards == -torch.inf, rewards, strength * rewards)  # -inf also at strength 0
    peak, total = torch.maximum(cloud.peak, rho), cloud.total + rho
    return POTENTIALS[potential](rho, cloud.psi, peak, total), peak, total


def _strength(plan: Plan, i: int, before: float, log_w: Tensor, cloud: Cloud, rewards: Tensor) -> float:
    """lam at step i; adaptive: the largest in [before, lam] that leaves `threshold` of the particles effective."""
    most = plan.lam[i]
    if not plan.adaptive or i == len(plan.lam) - 1:
        return most

    def enough(strength: float) -> bool:
        psi, _, _ = _twist(plan.potential, cloud, rewards, strength)
        return float(effective(torch.where(log_w == -torch.inf, log_w, log_w + psi - cloud.psi))) >= (
            plan.threshold * plan.particles
        )

    return bisected(enough, min(before, most), most)


def bisected(enough: Callable[[float], bool], low: float, high: float, halvings: int = 40) -> float:
    """The largest value in [low, high] with enough(value), for a condition that holds below it; low if none does."""
    if enough(high):
        return high
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def _move(
    problem: Problem, plan: Plan, cloud: Cloud, i: int, strength: float, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor | float]:
    """(x', log p(x' | x) - log q(x' | x) [K]), with q = N(mean + std^2 lam grad r, std^2)."""
    assert cloud.x0 is not None and cloud.eps is not None
    taken = problem.advance(cloud.x, cloud.x0, cloud.eps, i, generators)
    if cloud.slope is None:
        return taken.next, 0.0
    shift = taken.std**2 * (strength if plan.adaptive else plan.lam[i + 1]) * cloud.slope
    noise = taken.next - taken.mean
    # (|noise|^2 - |noise + shift|^2) / (2 std^2), free of cancellation; 0 where there is no noise
    safe = torch.where(taken.std > 0, taken.std, 1)
    ratio = -(shift * (2 * noise + shift) / (2 * safe**2)).double().flatten(1).sum(1).cpu()
    return taken.next + shift, ratio
