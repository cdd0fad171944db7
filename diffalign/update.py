"""From a scored rollout to new weights: the optimizer steps of one epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from diffalign import adapters
from diffalign.rollout import sample_seed
from diffalign.run import Run
from diffalign.sections import Sampling
from diffalign.types import Conditioning, Denoiser, Rollout

BUCKET = 2**26  # gradient elements in one message between processes


@dataclass(frozen=True)
class TrainedPolicy:
    """The model as an algorithm sees it, with the sampling it was rolled out with; see :class:`algorithms.Policy`."""

    pipeline: Any  # a Pipeline that adapters can work on
    sampling: Sampling
    negative: Conditioning | None

    @property
    def kernel(self) -> str:
        return self.sampling.kernel

    @property
    def eta(self) -> float:
        return self.sampling.eta

    def denoiser(self, cond: Conditioning, guided: bool = True) -> Denoiser:
        guidance, negative = (self.sampling.guidance, self.negative) if guided else (1.0, None)
        denoiser: Denoiser = self.pipeline.denoiser(cond, guidance, negative)
        return denoiser

    def reference(self) -> AbstractContextManager[None]:
        return adapters.reference(self.pipeline)


def update(run: Run, rollout: Rollout, first: int, total: int) -> dict[str, float]:
    """Take the epoch's optimizer steps on this process's samples, which are numbers first, first + 1, ... of `total`.

    Every loss is back-propagated over every sample; gradients are summed over processes once a step, so that shares may
    be uneven or empty and no sample is dropped. Returns means over the trained images.
    """
    c = run.config
    negative = run.pipeline.encode([c.sampling.negative_prompt]) if c.sampling.guidance != 1 else None
    policy = TrainedPolicy(run.pipeline, c.sampling, negative)
    trained = c.algorithm.trains_on(rollout).cpu()
    plan = [
        (rows[trained[rows]].split(c.trainer.micro_batch), count)
        for rows, count in partition(len(rollout), first, total, c.trainer.updates_per_rollout, c.seed, run.epoch)
    ] * c.trainer.passes
    later = {id(rows): rows for batches, _ in plan[1:] for rows in batches if len(rows)}
    with torch.no_grad():
        old = {key: c.algorithm.behaviour(policy, rollout[rows]) for key, rows in later.items()}

    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    norms = []
    for number, (batches, count) in enumerate(plan):
        for rows in batches:
            if not len(rows):
                continue
            batch = replace(rollout[rows], old=old[id(rows)] if number else {})
            seen: set[str] = set()  # a metric may come in shares, one from each loss
            for loss in c.algorithm.losses(policy, batch, run.memory):
                (loss.per_sample.sum() / count).backward()
                metrics = {"loss": loss.per_sample.detach(), **loss.metrics}
                for name, metric in metrics.items():
                    sums[name] = sums.get(name, 0.0) + float(metric.sum())
                seen |= metrics.keys()
            counts |= {name: counts.get(name, 0.0) + len(rows) for name in seen}
        norms.append(step(run))
    shared: list[tuple[dict[str, float], dict[str, float]]] = gather_object([(sums, counts)])
    logged = {
        name: sum(s.get(name, 0.0) for s, _ in shared) / sum(c.get(name, 0.0) for _, c in shared)
        for name in dict.fromkeys(name for _, c in shared for name in c)
    }
    images: list[int] = gather_object([int(trained.sum())])
    return logged | {"grad_norm": sum(norms) / len(norms), "trained_images": float(sum(images))}


def partition(length: int, first: int, total: int, updates: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, int]]:
    """The epoch's images, shuffled and divided among `updates`: (this process's rows, images in the whole update).

    A function of the global image numbers, so that it is the same for any number of processes.
    """
    order = torch.arange(total)
    if updates > 1:
        shuffle = torch.Generator().manual_seed(sample_seed(seed, epoch, total, updates))
        order = torch.randperm(total, generator=shuffle)
    for part in order.tensor_split(updates):
        yield part[(part >= first) & (part < first + length)] - first, len(part)


def step(run: Run) -> float:
    """One optimizer step on the gradients of all processes; returns their norm before clipping."""
    reduce_gradients(run)
    norm = float(nn.utils.clip_grad_norm_(run.parameters.values(), run.config.trainer.max_grad_norm))
    run.watch.gradient(run.epoch + 1, norm)
    run.between = False
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.memory.after_step()
    if run.ema is not None:
        run.ema.update()
    return norm


@torch.no_grad()
def reduce_gradients(run: Run) -> None:
    """Sum over processes, a bucket at a time. By hand, because a process may have nothing to back-propagate."""
    for p in run.parameters.values():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if run.accelerator.num_processes == 1:
        return
    bucket: list[Tensor] = []
    for p in run.parameters.values():
        assert p.grad is not None
        if bucket and sum(g.numel() for g in bucket) + p.grad.numel() > BUCKET:
            _sum(run, bucket)
            bucket = []
        bucket.append(p.grad)
    _sum(run, bucket)


def _sum(run: Run, gradients: list[Tensor]) -> None:
    flat = run.sum(torch.cat([g.flatten() for g in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
