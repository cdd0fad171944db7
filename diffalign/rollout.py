"""Sampling: prompts -> Rollout. Each sample is a function of the model and its own seed, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffalign.clock import Clock
from diffalign.samplers import denoise, randn
from diffalign.solvers import SOLVERS
from diffalign.types import Conditioning, Pipeline, Rollout

if TYPE_CHECKING:
    from diffalign.sections import Sampling


def sample_seed(seed: int, epoch: int, prompt: int, image: int) -> int:
    """Seed of image j of prompt p in epoch e: a hash, so that neighbouring numbers give unrelated noise."""
    words = np.random.SeedSequence([seed, epoch, prompt, image]).generate_state(2, np.uint32)
    return int(words[0]) << 31 ^ int(words[1])


def generators(seeds: Sequence[int] | Tensor) -> list[torch.Generator]:
    """One CPU generator a sample, so that its noise depends neither on the batch nor on the device."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


@torch.no_grad()
def collect(
    pipeline: Pipeline,
    prompts: Sequence[dict[str, Any]],
    group: Tensor,
    seeds: Tensor,
    sampling: Sampling,
    kept: Sequence[int] = (),
    micro_batch: int = 8,
    start: Tensor | None = None,
    stochastic: Sequence[int] | None = None,
    clock: Clock | None = None,
    decoded: Callable[[Tensor, Sequence[str], Sequence[dict[str, Any]]], None] | None = None,
) -> Rollout:
    """Sample one image for each entry of `prompts` and keep the transitions of the `kept` steps.

    Args:
        prompts: B metadata dictionaries with the text under "prompt"; repeat an entry for several images.
        group: [B] prompt ids.
        seeds: [B] int64; the initial noise and then the noise of each stochastic step are drawn from it.
        kept: step indices whose transitions are stored.
        micro_batch: samples made at a time; a memory knob.
        start: [B] seeds of the initial noise, when it is not to come from `seeds`; images may share one.
        stochastic: step indices that use `sampling.kernel`, by default the kept ones; the others are deterministic.
        clock: gets the seconds of encode, rollout and decode.
        decoded: called with the images of each micro-batch, their prompts and their entries as soon as they are there.
    """
    clock = clock if clock is not None else Clock(pipeline.device)
    texts = [m["prompt"] for m in prompts]
    with clock("encode"):
        cond = pipeline.encode(texts)
        negative = pipeline.encode([sampling.negative_prompt]) if sampling.guidance != 1 else None
    sigmas = pipeline.sigmas(sampling.steps, sampling.height, sampling.width)
    shape = pipeline.latent_shape(sampling.height, sampling.width)
    noisy = frozenset(kept if stochastic is None else stochastic)
    parts, stored = [], None
    for rows in torch.arange(len(texts)).split(micro_batch):
        noise = generators(seeds[rows])
        x = randn((len(rows), *shape), noise if start is None else generators(start[rows]), pipeline.device)
        with clock("rollout"):
            x0, states, log_probs = _sample(
                pipeline, cond[rows], negative, x, sigmas, sampling, noisy, list(kept), noise
            )
        with clock("decode"):
            # Images are large and the network never needs them again: they do not stay on the accelerator.
            images = pipeline.decode(x0).cpu()
        if decoded is not None:
            decoded(images, [texts[i] for i in rows.tolist()], [prompts[i] for i in rows.tolist()])
        parts.append((x0, images, log_probs))
        if stored is None:
            stored = states.new_empty(len(texts), *states.shape[1:])
        stored[rows.to(stored.device)] = states  # the largest part: joined at the end, it would be held twice
    x0, images, log_probs = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Rollout(
        prompts=texts,
        metadata=list(prompts),
        group=group,
        seeds=seeds,
        cond=cond,
        sigmas=sigmas,
        kept=torch.tensor(list(kept), dtype=torch.long),
        x0=x0,
        images=images,
        states=stored if len(kept) else None,
        log_probs=log_probs if len(kept) else None,
    )


def _sample(
    pipeline: Pipeline,
    cond: Conditioning,
    negative: Conditioning | None,
    x: Tensor,
    sigmas: Tensor,
    sampling: Sampling,
    stochastic: frozenset[int],
    kept: list[int],
    noise: list[torch.Generator],
) -> tuple[Tensor, Tensor, Tensor]:
    """One micro-batch: final latents, states [b, K, 2, ...] and log-probs [b, K]."""
    denoiser = pipeline.denoiser(cond, sampling.guidance, negative)
    states, log_probs = [], []
    if sampling.kernel in SOLVERS:
        walk = SOLVERS[sampling.kernel](denoiser, x, sigmas)
    else:
        walk = denoise(denoiser, x, sigmas, sampling.kernel, sampling.eta, stochastic, noise)
    for i, taken in enumerate(walk):
        if i in kept:
            states.append(torch.stack([x, taken.next], 1))
            log_probs.append(taken.log_prob)
        x = taken.next
    empty = x.new_empty(len(x), 0)
    kept_states = torch.stack(states, 1) if states else empty
    kept_log_probs = torch.stack(log_probs, 1) if log_probs else empty
    return x, kept_states, kept_log_probs
