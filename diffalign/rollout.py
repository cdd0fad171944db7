"""Sampling: prompts -> Rollout. Each sample is a function of the model and its own seed, whatever the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
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


def shared_noise_seed(prompt: str, step: int, seed: int, epoch: int) -> int:
    """Seed of the noise that all images of a prompt share at one step of one epoch, as in RTDMD's program."""
    return prompt_seed(prompt, step, 100_000 * epoch + seed)


def prompt_seed(prompt: str, step: int, epoch_seed: int) -> int:
    """(first 4 bytes of sha256(prompt) + 10007 step + epoch_seed) mod 2^31 (SubGRPO, arXiv 2605.26108)."""
    head = hashlib.sha256(prompt.encode()).digest()[:4]
    return (int.from_bytes(head, "big") + step * 10007 + epoch_seed) % 2**31


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
    until: int | None = None,
    tied: Mapping[int, Tensor] | None = None,
    decode: bool = True,
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
        until: stop after so many steps; `x0` is then the noisy state that was reached.
        tied: step index -> [B] seeds of that step's noise, when it is not to come from `seeds`.
        decode: make the images.
    """
    clock = clock if clock is not None else Clock(pipeline.device)
    texts = [m["prompt"] for m in prompts]
    with clock("encode"):
        cond = pipeline.encode(texts)
        negative = pipeline.encode([sampling.negative_prompt]) if sampling.guidance != 1 else None
    sigmas = pipeline.sigmas(sampling.grid, sampling.height, sampling.width)
    shape = pipeline.latent_shape(sampling.height, sampling.width)
    noisy = frozenset(kept if stochastic is None else stochastic)
    images: list[Tensor] = []
    parts, stored = [], None
    for rows in torch.arange(len(texts)).split(micro_batch):
        noise = generators(seeds[rows])
        x = randn((len(rows), *shape), noise if start is None else generators(start[rows]), pipeline.device)
        own = None if tied is None else {i: generators(own_seeds[rows]) for i, own_seeds in tied.items()}
        with clock("rollout"):
            x0, states, log_probs = _sample(
                pipeline, cond[rows], negative, x, sigmas, sampling, noisy, list(kept), noise, until, own
            )
        if decode:
            with clock("decode"):
                # Images are large and the network never needs them again: they do not stay on the accelerator.
                images.append(pipeline.decode(x0).cpu())
            if decoded is not None:
                decoded(images[-1], [texts[i] for i in rows.tolist()], [prompts[i] for i in rows.tolist()])
        parts.append((x0, log_probs))
        if stored is None:
            stored = states.new_empty(len(texts), *states.shape[1:])
        stored[rows.to(stored.device)] = states  # the largest part: joined at the end, it would be held twice
    x0, log_probs = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Rollout(
        prompts=texts,
        metadata=list(prompts),
        group=group,
        seeds=seeds,
        cond=cond,
        sigmas=sigmas,
        kept=torch.tensor(list(kept), dtype=torch.long),
        x0=x0,
        images=torch.cat(images) if images else None,
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
    until: int | None,
    tied: Mapping[int, Sequence[torch.Generator]] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One micro-batch: final latents, states [b, K, 2, ...] and log-probs [b, K]."""
    denoiser = pipeline.denoiser(cond, sampling.guidance, negative)
    states, log_probs = [], []
    if sampling.kernel in SOLVERS:
        walk = SOLVERS[sampling.kernel](denoiser, x, sigmas)
    else:
        walk = denoise(denoiser, x, sigmas, sampling.kernel, sampling.eta, stochastic, noise, tied)
    for i, taken in enumerate(islice(walk, until)):
        if i in kept:
            states.append(torch.stack([x, taken.next], 1))
            log_probs.append(taken.log_prob)
        x = taken.next
    empty = x.new_empty(len(x), 0)
    kept_states = torch.stack(states, 1) if states else empty
    kept_log_probs = torch.stack(log_probs, 1) if log_probs else empty
    return x, kept_states, kept_log_probs
