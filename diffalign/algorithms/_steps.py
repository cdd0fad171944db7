"""The steps of a few-step generator: what suits them, and a stored one taken again with its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.algorithms import Policy
    from diffalign.sections import Sampling
    from diffalign.types import Denoiser, Rollout, Step


def last_step(policy: Policy, batch: Rollout, again: bool = True) -> tuple[Step, Tensor, float]:
    """The last kept step of a batch, the level [B] that it led to, and its eta.

    With `again` the model is run once more: `next` has the value that was stored and the gradient of the mean, as its
    noise is what was drawn.
    """
    import torch

    from diffalign.types import Step

    assert batch.states is not None
    x_next = batch.states[:, -1, 1]
    level = batch.sigmas[int(batch.kept[-1]) + 1].expand(len(x_next)).to(x_next.device)
    if not again:
        nothing = torch.zeros(len(x_next), device=x_next.device)
        return Step(x_next, nothing, x_next, nothing, x_next), level, policy.eta
    taken = stored_step(policy.denoiser(batch.cond), policy, batch, -1)
    return replace(taken, next=x_next + (taken.mean - taken.mean.detach())), level, policy.eta


def stored_step(denoiser: Denoiser, policy: Policy, batch: Rollout, k: int) -> Step:
    """The k-th kept transition under the current weights."""
    from diffalign.samplers import step

    assert batch.states is not None
    i = int(batch.kept[k])
    x, x_next, s, s_next = batch.states[:, k, 0], batch.states[:, k, 1], batch.sigmas[i], batch.sigmas[i + 1]
    x0, eps = denoiser.predict(x, s)
    return step(denoiser.schedule, x0, eps, x, s, s_next, policy.kernel, policy.eta, next=x_next)


def few_step_conflicts(name: str, sampling: Sampling) -> Iterator[tuple[tuple[str, ...], str]]:
    """What does not suit a few-step generator."""
    if sampling.kernel != "cps":
        said = f"'{name}' is derived for cps, not '{sampling.kernel}'; set sampling.kernel: cps (eta 0 is the ODE)"
        yield ("sampling", "kernel"), said
    if sampling.guidance != 1:
        said = "the generator learns what guidance adds; set it to 1 (the teacher's is algorithm.guidance)"
        yield ("sampling", "guidance"), said
    if sampling.timesteps is None:
        yield ("sampling", "timesteps"), "name the generator's steps, such as [1000, 750, 500, 250]"
    if sampling.shared_noise:
        yield ("sampling", "shared_noise"), f"has no use with '{name}'; remove it"
