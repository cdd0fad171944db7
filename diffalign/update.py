"""From a scored rollout to new weights: the optimizer steps of one epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from diffalign import adapters
from diffalign.balancing import Meter, Work, back_propagate, reduce
from diffalign.rewards import Scorer, shaped
from diffalign.rollout import sample_seed
from diffalign.run import Run
from diffalign.sections import Sampling
from diffalign.types import Conditioning, Denoiser, Rollout


@dataclass(frozen=True)
class TrainedPolicy:
    """The model as an algorithm sees it, with the sampling it was rolled out with; see :class:`algorithms.Policy`."""

    pipeline: Any  # a Pipeline that adapters can work on
    sampling: Sampling
    negative: Conditioning | None
    scorers: Mapping[str, Scorer] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run) -> TrainedPolicy:
        sampling = run.config.sampling
        negative = run.pipeline.encode([sampling.negative_prompt]) if sampling.guidance != 1 else None
        return cls(run.pipeline, sampling, negative, run.scorers)

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

    def guided(self, cond: Conditioning, guidance: float) -> Denoiser:
        denoiser: Denoiser = self.pipeline.denoiser(cond, guidance)
        return denoiser

    def reference(self) -> AbstractContextManager[None]:
        return adapters.reference(self.pipeline)

    def decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.pipeline.decode(latents)
        return images

    def score(self, reward: str, images: Tensor, batch: Rollout, prompts: Sequence[str] | None = None) -> Tensor:
        texts = batch.prompts if prompts is None else prompts
        scorer = self.scorers[reward]
        return shaped(scorer.reward, scorer(images, texts, batch.metadata).scores).to(images)


@dataclass(frozen=True)
class Part:
    """What one optimizer step is made of."""

    share: int  # which part of the epoch's images it takes
    turn: int  # passes over them before this one, for methods that draw something new in each
    rows: Tensor  # this process's images in it
    trained: tuple[Tensor, ...]  # those with a gradient, in micro-batches
    count: int  # images in it over all processes

    def batches(self, rollout: Rollout) -> list[Rollout]:
        return [replace(rollout[rows], turn=self.turn) for rows in self.trained]


def update(run: Run, rollout: Rollout, first: int, total: int) -> dict[str, float]:
    """Take the epoch's optimizer steps on this process's samples, which are numbers first, first + 1, ... of `total`.

    Every loss is back-propagated over every sample; gradients are summed over processes once a step, so that shares may
    be uneven or empty and no sample is dropped. Returns means over the trained images.
    """
    method = run.config.algorithm
    policy = TrainedPolicy.of(run)
    plan = list(parts(run, rollout, first, total))
    old: dict[tuple[int, int], list[dict[str, Tensor]]] = {}
    with torch.no_grad():  # before any step
        for part in plan[1:]:
            if (part.share, part.turn) not in old:
                old[part.share, part.turn] = [method.behaviour(policy, batch) for batch in part.batches(rollout)]
    meter = Meter()
    norms = []
    for number, part in enumerate(plan):
        batches = part.batches(rollout)
        if number:
            was = old[part.share, part.turn]
            batches = [replace(batch, old=known) for batch, known in zip(batches, was, strict=True)]
        work = [Work(batch, method.losses(policy, batch, run.memory)) for batch in batches]
        separate = {name: own[part.rows] for name, own in rollout.separate.items()}
        back_propagate(run.balancer, work, separate, part.count, meter)
        norms.append(step(run))
    run.memory.after_epoch()
    images: list[int] = gather_object([sum(len(rows) for rows in plan[0].trained)])
    return meter.means() | {"grad_norm": sum(norms) / len(norms), "trained_images": float(sum(images))}


def parts(run: Run, rollout: Rollout, first: int, total: int) -> Iterator[Part]:
    t, method = run.config.trainer, run.config.algorithm
    shares = list(partition(len(rollout), first, total, t.updates_per_rollout, run.config.seed, run.epoch))
    for turn in range(t.passes):
        for share, (rows, count) in enumerate(shares):
            trained = method.trains_on(rollout, run.memory, turn * len(shares) + share).cpu()
            chosen = rows[trained[rows]]
            batches = chosen.split(t.micro_batch) if len(chosen) else ()
            yield Part(share, 0 if method.trajectory else turn, rows, tuple(batches), count)


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
    for p in run.parameters.values():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    reduce(run.sum, [p.grad for p in run.parameters.values() if p.grad is not None])
    norm = float(nn.utils.clip_grad_norm_(run.parameters.values(), run.config.trainer.max_grad_norm))
    run.watch.gradient(run.epoch + 1, norm)
    run.between = False
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.memory.after_step()
    if run.ema is not None:
        run.ema.update()
    return norm
