"""Discriminators: the losses of Adv-GRPO (arXiv 2511.20256) and how their weights are trained during a run.

The gradient is the sum over every image of every process, divided by their number, so it depends neither on the number
of processes nor on how many images are taken at once. The weights are fp32 whatever the precision of the backbone: an
update of 1e-4 of a weight is lost in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.rewards import Lesson
from diffalign.rewards._references import generator
from diffalign.states import of_optimizer

EPS = 1e-6  # of the norm, as in the reference
Compare = Callable[[], tuple[Tensor, dict[str, Tensor]]]  # (losses [b], what to log [b]) of some images


class Head(nn.Module):
    """D: Linear(d, hidden), GELU, Linear(hidden, 1) on every token. [..., d] -> [...]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.layers(tokens).squeeze(-1)
        return logits


def heads(width: int, hidden: int, count: int, seed: int) -> nn.ModuleList:
    """`count` heads whose first weights are a function of `seed`, and of no other random number of the run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList([Head(width, hidden) for _ in range(count)])


def raw(tokens: Tensor) -> Tensor:
    return tokens


def scaled(tokens: Tensor) -> Tensor:
    """Of norm sqrt(d), so that the entries have mean square 1."""
    return unit(tokens) * math.sqrt(tokens.shape[-1])


def unit(tokens: Tensor) -> Tensor:
    """t / (|t| + 1e-6)."""
    norm: Tensor = tokens.norm(dim=-1, keepdim=True)
    return tokens / (norm + EPS)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """(relu(1 - D(real)) + relu(1 + D(fake))) / 2, of each pair of logits."""
    return 0.5 * (F.relu(1 - real) + F.relu(1 + fake))


def token_loss(real: Tensor, fake: Tensor, patch_weight: float, rows: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """hinge(CLS) + patch_weight * mean hinge(patches): logits [b, 1 + N] of pairs -> losses [b].

    rows: indices [b, n] of the patches that count, of the real and of the fake images; by default all.
    """
    patches = [
        x[:, 1:] if r is None else x[:, 1:].gather(1, r)
        for x, r in zip((real, fake), rows or (None, None), strict=True)
    ]
    return hinge(real[:, 0], fake[:, 0]) + patch_weight * hinge(*patches).mean(1)


def token_reward(logits: Tensor, cls_weight: float, rows: Tensor | None = None) -> Tensor:
    """cls_weight * D(CLS) + (1 - cls_weight) * mean D(patches): logits [b, 1 + N] -> [b]; rows as for the loss."""
    patches = logits[:, 1:] if rows is None else logits[:, 1:].gather(1, rows)
    return cls_weight * logits[:, 0] + (1 - cls_weight) * patches.mean(1)


def top_patches(logits: Tensor, share: float) -> Tensor:
    """Mean of the `share` highest patch logits, at least one: [b, L, 1 + N] -> [b, L]."""
    patches = logits[..., 1:]
    return patches.topk(max(1, int(patches.shape[-1] * share)), dim=-1).values.mean(-1)


def layered_reward(logits: Tensor, share: float, temperature: float) -> Tensor:
    """sigmoid(mean over layers of the top patches / temperature): [b, L, 1 + N] -> [b], in (0, 1)."""
    return (top_patches(logits, share).mean(-1) / temperature).sigmoid()


def pairwise(real: Tensor, fake: Tensor) -> Tensor:
    """-log of the probability that the real image is picked, softplus(s_fake - s_real): scores [b] -> losses [b]."""
    return -F.logsigmoid(real - fake)  # softplus itself is rounded beyond 20


def draw(seeds: Tensor, patches: int, count: int, *purpose: int) -> Tensor:
    """Patch indices [B, count], with replacement, each row a function of its image's seed and the purpose."""
    rows = [torch.randint(patches, (count,), generator=generator(seed, *purpose)) for seed in seeds.tolist()]
    return torch.stack(rows) if rows else torch.zeros(0, count, dtype=torch.int64)


class Trained:
    """What a discriminator trains, its Adam, and the hash of the references it was trained with."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], lr: float, betas: tuple[float, float], digest: bytes
    ) -> None:
        self.parameters = parameters
        self.digest = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        # Where a gradient is 0 but for rounding (that of the last bias, say, while all hinges are active), the usual
        # eps of 1e-8 would make a whole step of it, one that differs with the size of batches.
        self.optimizer = torch.optim.Adam(parameters.values(), lr, betas, eps=1e-6)
        self.moments = of_optimizer(self.optimizer, parameters)
        for p in parameters.values():
            p.requires_grad_(False)  # the generator's own gradients pass through and leave none behind

    def step(
        self, lesson: Lesson, batches: Sequence[Compare], names: Sequence[str], when: Callable[[dict[str, float]], bool]
    ) -> tuple[bool, dict[str, float]]:
        """One Adam step on the mean loss over all images of all processes, if `when` says so of what is logged.

        Every process must call it, also one without images: it sums over processes exactly once. Returns whether the
        step was taken, and the means of "loss" and of `names`, all measured before it and alike on every process.
        """
        names = ["loss", *names]
        first = next(iter(self.parameters.values()))
        sums = torch.zeros(len(names), device=first.device)
        with self._learning():
            for compare in batches:
                losses, logged = compare()
                (losses.sum() / lesson.total).backward()
                columns = logged | {"loss": losses}
                sums += torch.stack([columns[name].detach().float().sum() for name in names]) / lesson.total
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters.values()]
            flat = lesson.sum(torch.cat([sums, *(g.flatten() for g in gradients)]))
        parts = flat.split([len(names), *(g.numel() for g in gradients)])
        means = dict(zip(names, parts[0].tolist(), strict=True))
        taken = when(means)
        if taken:
            for p, gradient in zip(self.parameters.values(), parts[1:], strict=True):
                p.grad = gradient.view_as(p)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return taken, means

    @contextmanager
    def _learning(self) -> Iterator[None]:
        for p in self.parameters.values():
            p.requires_grad_(True)
            p.grad = None
        try:
            with torch.enable_grad():
                yield
        finally:
            for p in self.parameters.values():
                p.requires_grad_(False)
                p.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        weights = {f"weights/{name}": p.detach().clone() for name, p in self.parameters.items()}
        moments = {f"adam/{name}": t.clone() for name, t in self.moments.collect().items()}
        return weights | moments | {"references": self.digest}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError for a state that another discriminator or other references left."""
        if not torch.equal(state["references"].cpu(), self.digest):
            raise ValueError(
                "the references are not those it was trained with, and with others its scores would change; put the "
                "old ones back, or start a new run in another output folder"
            )
        weights = {n.removeprefix("weights/"): t for n, t in state.items() if n.startswith("weights/")}
        if {n: t.shape for n, t in weights.items()} != {n: p.shape for n, p in self.parameters.items()}:
            raise ValueError("the weights are of another discriminator; are its model, layers and hidden the same?")
        for name, p in self.parameters.items():
            p.copy_(weights[name])
        self.moments.restore({n.removeprefix("adam/"): t.clone() for n, t in state.items() if n.startswith("adam/")})


def slices(count: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def spread(means: dict[str, float], name: str) -> dict[str, float]:
    """The logged means with the std of `name` in place of the mean of its square."""
    square = means[f"{name}_square"]
    rest = {key: value for key, value in means.items() if key != f"{name}_square"}
    return rest | {f"{name}_std": max(square - means[name] ** 2, 0.0) ** 0.5}
