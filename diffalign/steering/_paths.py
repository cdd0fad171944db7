"""Search over paths (arXiv 2501.09732, section 4): partly denoised states are noised again, and the best go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffalign.schedules import per_sample, spread
from diffalign.steering import Lineage, Outcome
from diffalign.steering._problem import Problem
from diffalign.steering._resampling import even

if TYPE_CHECKING:
    from diffalign.steering.noise_search import NoiseSearch


def legs(steps: int, back: int, forth: int) -> list[tuple[int, int]]:
    """(first, last) step of each stretch that is denoised: 0 to back, then from `forth` steps earlier, to T."""
    found = [(0, min(back, steps))]
    while found[-1][1] < steps:
        begin = found[-1][1] - forth
        found.append((begin, min(begin + back, steps)))
    return found


def forwards(method: NoiseSearch, steps: int) -> int:
    """Network forwards of one search, a sample without guidance: every leg, and a look at where it ends."""
    spans = [last - first + (last < steps) for first, last in legs(steps, method.back, method.forth)]
    return method.paths * method.particles * sum(spans)


def renoised(problem: Problem, x: Tensor, low: int, high: int, generators: list[torch.Generator]) -> Tensor:
    """A draw of q(x_high | x_low), the forward process from step `low` to the noisier step `high`."""
    schedule, sigmas = problem.oracle.schedule, problem.oracle.sigmas
    a_low, a_high = (schedule.alpha(per_sample(sigmas[i], x)) for i in (low, high))
    s_low, s_high = (schedule.sigma(per_sample(sigmas[i], x)) for i in (low, high))
    ratio = a_high / a_low
    std = (s_high**2 - (ratio * s_low) ** 2).clamp(min=0).sqrt()
    return spread(ratio, x) * x + spread(std, x) * problem.start(generators)


def paths(method: NoiseSearch, problem: Problem, first: int) -> Outcome:
    """N M noises are denoised for `back` steps and judged by their predicted images; the M best are copied N times,
    noised `forth` steps and denoised `back` steps, again and again to the end.
    """
    n, end = method.particles * method.paths, problem.steps
    lineage, history = Lineage(), []
    generators = problem.particles(first * method.paths, n)
    x, nodes = problem.start(generators), [lineage.add(0, None) for _ in range(n)]
    for begin, last in legs(end, method.back, method.forth):
        x = problem.walk(x, generators, begin, last)
        r = problem.score(x if last == end else problem.predict(x, last)[0], last)
        nodes = [lineage.add(last, node, value) for node, value in zip(nodes, r.tolist(), strict=True)]
        history.append({"step": last, "best": float(r.max()), "mean": float(r[r > -torch.inf].mean())})
        if last < end:
            kept = r.argsort(descending=True, stable=True)[: method.paths].repeat_interleave(method.particles)
            x = renoised(problem, x[kept.to(x.device)], last, last - method.forth, generators)
            nodes = [nodes[k] for k in kept.tolist()]
    return Outcome(x, r, even(n), nodes, lineage, None, history)
