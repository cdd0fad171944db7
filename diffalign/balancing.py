"""From the losses of one optimizer step to its gradient, with one reward or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from diffalign.algorithms import Loss
from diffalign.multireward import MultiReward
from diffalign.types import Rollout

BUCKET = 2**26  # gradient elements in one message between processes


@dataclass(frozen=True)
class Work:
    """A micro-batch of a step, and its losses, which are computed as they are taken."""

    batch: Rollout
    losses: Iterator[Loss]
    logged: set[str] = field(default_factory=set)  # what was logged of it already: a metric may come in shares


class Meter:
    """Means over the trained images of what the losses log, and what the epoch's last solve says of the rewards."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        self.step: dict[str, float] = {}

    def add(self, part: Work, loss: Loss, value: Tensor) -> None:
        for name, metric in {"loss": value.detach(), **loss.metrics}.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(metric.sum())
            self.counts[name] = self.counts.get(name, 0.0) + len(part.batch) * (name not in part.logged)
            part.logged.add(name)

    def means(self) -> dict[str, float]:
        """Over all processes."""
        shared: list[tuple[dict[str, float], dict[str, float]]] = gather_object([(self.sums, self.counts)])
        names = dict.fromkeys(name for _, counts in shared for name in counts)
        total = {name: [sum(part[i].get(name, 0.0) for part in shared) for i in (0, 1)] for name in names}
        return {name: value / count for name, (value, count) in total.items()} | self.step


def back_propagate(
    balancer: Balancer | None, work: Sequence[Work], separate: Mapping[str, Tensor], count: int, meter: Meter
) -> None:
    """Add the step's gradient to `p.grad`; it is still to be summed over processes.

    `separate` are the rewards' own advantages of all of this process's images in the step, trained or not, and `count`
    is the number of images over all processes.
    """
    weights = None if balancer is None else balancer.split(work, separate, count, meter)
    for part in work:
        advantages = part.batch.advantages if weights is None else mixed(part.batch, weights)
        assert advantages is not None
        for loss in part.losses:
            value = loss.total(loss.policy(advantages))
            (value.sum() / count).backward()
            meter.add(part, loss, value)


def mixed(batch: Rollout, weights: Tensor) -> Tensor:
    """sum_k weights_k A_k, [B]; a reward that does not apply to an image adds 0."""
    own = torch.stack([a.nan_to_num(0.0) for a in batch.separate.values()])
    return (weights.to(own)[:, None] * own).sum(0)


@dataclass(frozen=True)
class Balancer:
    """Several rewards that share one gradient, as `method` says."""

    method: MultiReward
    groups: dict[str, list[str]]  # what counts as one reward -> its rewards
    importance: Tensor  # [K] float64 weights of those
    state: dict[str, Tensor]  # the method's, changed in place
    parameters: list[nn.Parameter]
    allsum: Callable[[Tensor], Tensor]  # over processes
    main: bool  # this process adds what is a sum over all already

    @classmethod
    def of(
        cls,
        method: MultiReward,
        seed: int,
        weights: Mapping[str, float],
        parameters: list[nn.Parameter],
        allsum: Callable[[Tensor], Tensor],
        main: bool,
    ) -> Balancer:
        """`weights` of the rewards by name; that of a group is the mean of its members'."""
        groups = method.grouped(list(weights))
        importance = [fmean(weights[m] for m in members) for members in groups.values()]
        state = method.start(len(groups), seed)
        return cls(method, groups, torch.tensor(importance, dtype=torch.float64), state, parameters, allsum, main)

    def split(self, work: Sequence[Work], separate: Mapping[str, Tensor], count: int, meter: Meter) -> Tensor:
        """Back-propagate the first losses of every micro-batch reward by reward, and combine the rewards' gradients.

        Returns the weights [K] of the rewards' advantages in the losses that are left. The gradient of reward k is that
        of the mean of its policy loss over the images it applies to, in the whole step and over all processes: nothing
        depends on the micro-batch. Penalties have a gradient of their own.
        """
        applying = torch.stack([(~own.isnan()).sum() for own in separate.values()])
        valid = self.allsum(applying.double()).cpu()
        lead = self.method.lead(self.state)
        if lead != 0:
            *rewards, penalty = self.gradients(work, lead, valid, count, meter)
            gram = products(rewards)
            coefficients = gram.new_full((len(gram),), torch.nan)  # such a gradient stops the run, before it is applied
            if gram.isfinite().all():
                coefficients = self.method.coefficients(gram, self.importance, self.state)
            meter.step |= aims(list(self.groups), gram, coefficients)
            if self.main:
                for i, p in enumerate(self.parameters):
                    shares = (c * own[i] for c, own in zip(coefficients.tolist(), rewards, strict=True))
                    p.grad = sum(shares, penalty[i] if p.grad is None else p.grad + penalty[i])
        weights = self.method.mixture(self.importance, valid / count, self.state)
        meter.step |= {f"alpha/{name}": float(w) for name, w in zip(self.groups, weights, strict=True)}
        return weights

    def gradients(
        self, work: Sequence[Work], lead: int | None, valid: Tensor, count: int, meter: Meter
    ) -> list[list[Tensor]]:
        """Of each reward, and last of the penalties: a tensor for every parameter, summed over processes."""
        sums = [[torch.zeros_like(p) for p in self.parameters] for _ in range(len(valid) + 1)]
        for part in work:
            advantages = list(part.batch.separate.values())
            for loss in islice(part.losses, lead):
                values = [loss.policy(own.nan_to_num(0.0)) for own in advantages]
                means = [
                    value.where(~own.isnan(), 0.0).sum() / max(float(n), 1.0)
                    for value, own, n in zip(values, advantages, valid, strict=True)
                ]
                if loss.penalty is not None:
                    means.append(loss.penalty.sum() / count)
                # a loss that no advantage scales has its penalty alone
                graphs = [
                    (own, mean) for own, mean in zip(sums[: len(means)], means, strict=True) if mean.requires_grad
                ]
                for number, (own, mean) in enumerate(graphs, 1):
                    again = number < len(graphs)  # the last pass frees what the forward pass saved
                    gradient = torch.autograd.grad(mean, self.parameters, retain_graph=again, allow_unused=True)
                    for total, addend in zip(own, gradient, strict=True):
                        if addend is not None:
                            total += addend
                meter.add(part, loss, loss.total(torch.stack(values).detach().mean(0)))
        for own in sums:
            reduce(self.allsum, own)
        return sums


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
def reduce(allsum: Callable[[Tensor], Tensor], gradients: Sequence[Tensor]) -> None:
    """Sum over processes in place, a bucket at a time; by hand, as a process may have nothing to back-propagate."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and size(bucket) + gradient.numel() > BUCKET:
            _reduce(allsum, bucket)
            bucket = []
        bucket.append(gradient)
    _reduce(allsum, bucket)


def size(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _reduce(allsum: Callable[[Tensor], Tensor], gradients: list[Tensor]) -> None:
    flat = allsum(torch.cat([g.flatten() for g in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
