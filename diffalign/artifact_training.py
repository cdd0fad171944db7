"""Training of `artifact_head`: frozen features once, a small network on them, and what it is worth elsewhere."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor
from tqdm import tqdm

from diffalign.image_lists import Listed, batches, read
from diffalign.rewards import _artifact
from diffalign.rewards._dino import Backbone
from diffalign.types import UserError

FEWEST = 10  # pictures of each kind
USEFUL = 0.6  # AUROC below which nothing was learnt that one could tell from chance
PATIENCE = 60  # halvings of the interval that holds the best temperature


@dataclass(frozen=True)
class Plan:
    """AdamW with a cosine to zero; every class weighs as much as the other, however many pictures it has."""

    steps: int = 1000
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    hidden: int = 128
    validation: float = 0.2  # share of the pictures that only measure
    seed: int = 0


def stem(name: str) -> str:
    """A picture's name without its ending."""
    return str(PurePosixPath(name).with_suffix(""))


def held_out(clean: Sequence[str], artifact: Sequence[str], share: float, seed: int) -> set[str]:
    """Stems of the names of the pictures to measure with.

    Pictures of one stem, such as clean/07.png and artifact/07.png, may be two states of one picture, and so are never
    parted; of the stems in both folders, and of those in either alone, the same share is held out.
    """
    a, b = ({stem(name) for name in names} for names in (clean, artifact))
    rng, held = random.Random(seed), set[str]()
    for kind in (a & b, a - b, b - a):
        order = sorted(kind)
        rng.shuffle(order)
        held.update(order[: round(len(order) * share)])
    return held


@torch.no_grad()
def extract(backbone: Backbone, images: Sequence[Listed], batch: int) -> Tensor:
    """Features of every picture, fp16 [N, 1 + patches, C] in main memory, in the order given."""
    found: list[Tensor] = [torch.empty(0)] * len(images)
    with tqdm(total=len(images), desc="features", disable=not sys.stderr.isatty()) as bar:
        for part in batches(images, batch):
            tokens = backbone.tokens(torch.stack([read(images[i]) for i in part]))[:, 0].to("cpu", torch.float16)
            for i, one in zip(part, tokens, strict=True):
                found[i] = one
            bar.update(len(part))
    return torch.stack(found)


def fit(tokens: Tensor, artifact: Tensor, plan: Plan, device: torch.device | str) -> _artifact.Weights:
    """tokens [N, 1 + patches, C], artifact bool [N] -> weights with temperature 1.

    Minimises binary cross-entropy of the picture's logit, and of its highest patches alone, which are told nothing but
    whether there is a fault somewhere: so that the map shows where.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    weights = _artifact.initial(tokens.shape[-1], plan.hidden, generator)
    cls, patches = tokens[:, 0].float(), tokens[:, 1:]
    weights["mean"] = torch.stack([cls.mean(0), patches.float().mean((0, 1))])
    weights["std"] = torch.stack([cls.std(0), patches.float().flatten(0, 1).std(0)]).clamp(min=1e-4)
    weights = {k: t.to(device) for k, t in weights.items()}
    learnt = [weights[k].requires_grad_() for k in weights if k.startswith(("whole", "patch"))]
    optimizer = torch.optim.AdamW(learnt, plan.lr, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)
    balance, order = class_weights(artifact), torch.empty(0, dtype=torch.long)
    for _ in tqdm(range(plan.steps), "head", disable=not sys.stderr.isatty()):
        if len(order) < min(plan.batch, len(tokens)):  # a new pass; every one has another order
            order = torch.cat([order, torch.randperm(len(tokens), generator=generator)])
        rows, order = order[: plan.batch], order[plan.batch :]
        whole, highest, _ = _artifact.logits(weights, tokens[rows].to(device))
        target, weight = artifact[rows].float().to(device), balance[rows].to(device)
        loss = F.binary_cross_entropy_with_logits(whole, target, weight)
        loss = loss + F.binary_cross_entropy_with_logits(highest, target, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {k: t.detach().cpu() for k, t in weights.items()}


def class_weights(artifact: Tensor) -> Tensor:
    """[N] with mean 1, such that both classes have the same sum."""
    n, positive = len(artifact), int(artifact.sum())
    return torch.where(artifact, n / (2 * positive), n / (2 * (n - positive)))


def temperature(logits: Tensor, artifact: Tensor) -> float:
    """T > 0 that minimises the class-balanced cross-entropy of sigmoid(logits / T).

    Targets are Platt's, (n + 1) / (n + 2) and 1 / (n + 2), so that T stays finite when the classes are told apart.
    """
    n = [int((~artifact).sum()), int(artifact.sum())]
    target = torch.where(artifact, (n[1] + 1) / (n[1] + 2), 1 / (n[0] + 2)).double()
    weight, z = class_weights(artifact).double(), logits.double()

    def loss(log_t: float) -> float:
        return float(F.binary_cross_entropy_with_logits(z / math.exp(log_t), target, weight))

    low, high = -8.0, 8.0  # the loss is convex in 1 / T, hence falls and then rises in log T
    for _ in range(PATIENCE):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return math.exp((low + high) / 2)


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores above a negative, ties counting half."""
    ranks = torch.from_numpy(rankdata(scores.double().numpy()))
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


def balanced_accuracy(logits: Tensor, positive: Tensor) -> float:
    """Mean over both classes of the share told right at p = 1/2."""
    right = (logits > 0) == positive
    return float((right[positive].float().mean() + right[~positive].float().mean()) / 2)


def measured(logits: Tensor, artifact: Tensor) -> dict[str, Any]:
    """What logits are worth; of which neither AUROC nor accuracy depends on the temperature."""
    return {
        "auroc": auroc(logits, artifact),
        "balanced_accuracy": balanced_accuracy(logits, artifact),
        "clean": int((~artifact).sum()),
        "artifact": int(artifact.sum()),
    }


@torch.no_grad()
def applied(weights: _artifact.Weights, tokens: Tensor, batch: int = 256) -> Tensor:
    """Logits [N] divided by the temperature, high = artifact."""
    return torch.cat([_artifact.logits(weights, part)[0] for part in tokens.split(batch)]) / weights["temperature"]


def train(
    backbone: Backbone,
    clean: Sequence[Listed],
    artifact: Sequence[Listed],
    plan: Plan,
    batch: int,
    device: torch.device | str,
) -> tuple[_artifact.Weights, Mapping[str, Any]]:
    """(weights, report). Raises UserError for fewer than 10 pictures of either kind.

    The report holds AUROC and balanced accuracy on pictures that were held out, and how many there were of each kind;
    the temperature is the only number that was fitted on them.
    """
    for images, kind in ((clean, "clean"), (artifact, "artifact")):
        if len(images) < FEWEST:
            raise UserError(f"{len(images)} {kind} pictures are too few, at least {FEWEST} are needed; 200 are useful")
    images = [*clean, *artifact]
    label = torch.arange(len(images)) >= len(clean)
    held = held_out([i.name for i in clean], [i.name for i in artifact], plan.validation, plan.seed)
    aside = torch.tensor([stem(i.name) in held for i in images])
    if not all((part & kind).any() for part in (aside, ~aside) for kind in (label, ~label)):
        raise UserError("the pictures have too few different file names to hold some out; rename them")
    tokens = extract(backbone, images, batch)
    weights = fit(tokens[~aside], label[~aside], plan, device)
    logits = applied(weights, tokens[aside])
    weights["temperature"] = torch.tensor(temperature(logits, label[aside]))
    weights["probe"] = _artifact.probe(backbone)
    report = {
        "validation": measured(logits, label[aside]),
        "training": measured(applied(weights, tokens[~aside]), label[~aside]),
        "temperature": weights["temperature"].item(),
    }
    return weights, report


def sentence(report: Mapping[str, Any]) -> str:
    found, seen = report["validation"], report["training"]
    useless = "; little better than chance: do not use it as a reward, give more pictures, or another --features"
    return (
        f"AUROC {found['auroc']:.3f}, balanced accuracy {found['balanced_accuracy']:.3f} on {found['clean']} clean and "
        f"{found['artifact']} artifact pictures held out of training on {seen['clean']} and {seen['artifact']} "
        f"(there {seen['auroc']:.3f} and {seen['balanced_accuracy']:.3f}); temperature {report['temperature']:.2f}"
        f"{useless if found['auroc'] < USEFUL else ''}"
    )
