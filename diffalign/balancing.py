"""From the losses of one optimizer step to its gradient, with one reward or many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from statistics import fmean

import torch
from accelerate.utils import gather_object
from torch import Tensor

from diffalign.algorithms import Loss
from diffalign.multireward import MultiReward
from diffalign.run import Run
from diffalign.types import Rollout

BUCKET = 2**26  # gradient elements in one message between processes
Work = Sequence[tuple[Rollout, Iterator[Loss]]]  # a step's micro-batches, each with its losses, not yet computed


class Meter:
    """Means over the trained images of what the losses log, and the last step's own numbers."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        self.step: dict[str, float] = {}

    def add(self, batch: Rollout, loss: Loss, value: Tensor, first: bool) -> None:
        """`first`: of the batch's losses, over which a metric may be divided into shares."""
        for name, metric in {"loss": value.detach(), **loss.metrics}.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(metric.sum())
            self.counts[name] = self.counts.get(name, 0.0) + len(batch) * first

    def means(self) -> dict[str, float]:
        """Over all processes."""
        shared: list[tuple[dict[str, float], dict[str, float]]] = gather_object([(self.sums, self.counts)])
        names = dict.fromkeys(name for _, counts in shared for name in counts)
        total = {name: [sum(part[i].get(name, 0.0) for part in shared) for i in (0, 1)] for name in names}
        return {name: value / count for name, (value, count) in total.items()} | self.step


def back_propagate(run: Run, work: Work, images: Rollout, count: int, meter: Meter) -> None:
    """Add the step's gradient to `p.grad`; it is still to be summed over processes.

    `images` are all of this process's images in the step, trained or not; `count` is their number over all processes.
    """
    if run.config.multireward is None:
        weights = None
        started = [0] * len(work)
    else:
        weights, started = split(run, run.config.multireward, work, images, count, meter)
    for (batch, losses), before in zip(work, started, strict=True):
        advantages = batch.advantages if weights is None else mixed(batch, weights)
        assert advantages is not None
        for number, loss in enumerate(losses, before):
            value = loss.total(loss.policy(advantages))
            (value.sum() / count).backward()
            meter.add(batch, loss, value, number == 0)


def mixed(batch: Rollout, weights: Tensor) -> Tensor:
    """sum_k weights_k A_k, [B]; a reward that does not apply to an image adds 0."""
    own = torch.stack([a.nan_to_num(0.0) for a in batch.separate.values()])
    return (weights.to(own)[:, None] * own).sum(0)


def split(
    run: Run, method: MultiReward, work: Work, images: Rollout, count: int, meter: Meter
) -> tuple[Tensor, list[int]]:
    """Back-propagate the first losses of every micro-batch once for each reward, and combine the rewards' gradients.

    Returns the weights [K] of the rewards' advantages in the other losses, and how many losses of each micro-batch are
    done. The gradient of reward k is that of the mean of its policy loss over the images it applies to, in the whole
    step and over all processes: nothing depends on the micro-batch. Penalties have a gradient of their own.
    """
    state, names = run.states["multireward"], list(images.separate)
    importance = importances(run)
    valid = run.sum(torch.stack([(~images.separate[name].isnan()).sum() for name in names]).double()).cpu()
    lead = method.lead(state)
    done = [0] * len(work)
    if lead != 0:
        parameters = list(run.parameters.values())
        sums = [[torch.zeros_like(p) for p in parameters] for _ in range(len(names) + 1)]
        for i, (batch, losses) in enumerate(work):
            for loss in islice(losses, lead):
                values = [loss.policy(batch.separate[name].nan_to_num(0.0)) for name in names]
                parts = [
                    value.where(~batch.separate[name].isnan(), 0.0).sum() / max(float(n), 1.0)
                    for name, value, n in zip(names, values, valid, strict=True)
                ]
                penalty = [] if loss.penalty is None else [loss.penalty.sum() / count]
                for own, part in zip(sums, parts + penalty, strict=False):
                    gradients = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
                    for total, gradient in zip(own, gradients, strict=True):
                        if gradient is not None:
                            total += gradient
                meter.add(batch, loss, loss.total(torch.stack(values).mean(0)), done[i] == 0)
                done[i] += 1
        for own in sums:
            reduce(run, own)
        gram = products(sums[:-1])
        if not gram.isfinite().all():  # the norm of the whole gradient is looked at before the step, and stops the run
            coefficients = torch.full((len(names),), torch.nan)
        else:
            coefficients = method.coefficients(gram, importance, state)
        meter.step |= aims(names, gram, coefficients)
        if run.accelerator.is_main_process:  # the others' share of a sum that is already over all
            for i, p in enumerate(parameters):
                parts_of = zip([*coefficients.tolist(), 1.0], sums, strict=True)
                p.grad = sum((c * own[i] for c, own in parts_of), torch.zeros_like(p) if p.grad is None else p.grad)
    weights = method.mixture(importance, valid / count, state)
    meter.step |= {f"alpha/{name}": float(w) for name, w in zip(names, weights, strict=True)}
    return weights, done


def importances(run: Run) -> Tensor:
    """[K] float64 weights of the rewards; that of a group is the mean of its members'."""
    weight = {reward.key: reward.weight for reward in run.config.rewards}
    return torch.tensor([fmean(weight[m] for m in members) for members in run.groups.values()], dtype=torch.float64)


@torch.no_grad()
def products(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """Gram matrix [K, K] float64 of K gradients, each a tensor for every parameter."""
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for of_parameter in zip(*gradients, strict=True):
        rows = torch.stack([g.flatten() for g in of_parameter]).double()
        gram += (rows @ rows.T).cpu()
    return gram


def aims(names: Sequence[str], gram: Tensor, coefficients: Tensor) -> dict[str, float]:
    """Cosine of each reward's gradient with their combination, and the smallest; a reward without gradient has none."""
    along, length = gram @ coefficients, (coefficients @ gram @ coefficients).clamp(min=0).sqrt()
    norms = gram.diagonal().sqrt()
    cosines = {
        name: float(a / (norm * length))
        for name, a, norm in zip(names, along, norms, strict=True)
        if norm > 0 and length > 0
    }
    shown = {f"cosine/{name}": value for name, value in cosines.items()}
    return shown | ({"worst_cosine": min(cosines.values())} if cosines else {})


@torch.no_grad()
def reduce(run: Run, gradients: Sequence[Tensor]) -> None:
    """Sum over processes in place, a bucket at a time; by hand, as a process may have nothing to back-propagate."""
    if run.accelerator.num_processes == 1:
        return
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.numel() for g in bucket) + gradient.numel() > BUCKET:
            _sum(run, bucket)
            bucket = []
        bucket.append(gradient)
    _sum(run, bucket)


def _sum(run: Run, gradients: list[Tensor]) -> None:
    flat = run.sum(torch.cat([g.flatten() for g in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
