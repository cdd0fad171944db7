"""What linear probes read from tiny-dino: shapes, colours and faults, on pictures that nothing was trained on."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.artifact_training import auroc
from diffalign.shapes.dino import SEED, Bank, broken, clean, sampled
from diffalign.shapes.dino_network import normalise
from diffalign.shapes.fitting import batches
from diffalign.shapes.world import COLORS, SHAPES


@torch.no_grad()
def features(model: Any, images: Tensor) -> Tensor:
    """uint8 [N, 3, 64, 64] -> [N, 65, 128], CLS first."""
    parts = [model(pixel_values=normalise(images[i].float() / 255)).last_hidden_state for i in batches(len(images), 64)]
    return torch.cat(parts)


def probe(x: Tensor, y: Tensor, new: Tensor) -> Tensor:
    """Ridge regression of y [N, K] on features x [N, D], applied to `new` [M, D]: scores [M, K]."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, new = ((F.pad((z - mean) / std, (0, 1), value=1.0)).double() for z in (x, new))
    weight = torch.linalg.solve(x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1]).double(), x.T @ y.double())
    scores: Tensor = new @ weight
    return scores.float()


def measure(model: Any, images: Tensor, n: int = 600, seed: int = SEED + 10) -> dict[str, float]:
    """Linear probes, fitted on one half and judged on the other: 2 n fresh scenes, faults of unseen seeds, and
    `images` uint8 [M, 3, 64, 64], samples for held-out prompts.

    shapes, colours: which are in the picture, from CLS, all of them right. patch_shape, patch_colour: of patches that
    one object covers by half. faults: AUROC of [CLS, mean patch] for broken against whole renders; sample_faults:
    likewise for broken samples against whole ones; sample_detector: of the detector's malformed samples against its
    clean ones.
    """
    whole = clean(2 * n, seed)
    first = torch.arange(2 * n) % 2 == 0
    z = features(model, whole.images)
    result = {}
    counts = whole.counts.float().unflatten(1, (len(SHAPES), len(COLORS)))
    for name, axis in (("shapes", 2), ("colours", 1)):
        there = counts.sum(axis) > 0
        told = probe(z[first, 0], there[first].float(), z[~first, 0]) > 0.5
        result[name] = float((told == there[~first]).all(1).float().mean())
    for name, part in (("patch_shape", slice(len(COLORS), None)), ("patch_colour", slice(0, len(COLORS)))):
        cover = whole.cover[..., part].float().flatten(1, 2)
        inside = cover.max(-1).values > 0.5
        one_hot = F.one_hot(cover.argmax(-1), cover.shape[-1]).float()
        told = probe(z[first, 1:][inside[first]], one_hot[first][inside[first]], z[~first, 1:][inside[~first]])
        result[name] = float((told.argmax(-1) == cover.argmax(-1)[~first][inside[~first]]).float().mean())
    drawn = sampled(images)
    good = Bank(*(getattr(drawn, f.name)[drawn.faulty == 0] for f in fields(Bank)))
    for name, bank in (("faults", whole), ("sample_faults", good)):
        half = torch.arange(len(bank.images)) % 2 == 0
        result[name] = _tells(model, bank.images, broken(bank, seed + 1).images, half, half)
    faulty = drawn.faulty > 0
    result["sample_detector"] = _tells(
        model, images[~faulty], images[faulty], *(torch.arange(int(k.sum())) % 2 == 0 for k in (~faulty, faulty))
    )
    return result


def _tells(model: Any, whole: Tensor, bad: Tensor, whole_first: Tensor, bad_first: Tensor) -> float:
    z = features(model, torch.cat([whole, bad]))
    z = torch.cat([z[:, 0], z[:, 1:].mean(1)], -1)
    y, first = torch.arange(len(z)) >= len(whole), torch.cat([whole_first, bad_first])
    return auroc(probe(z[first], y[first, None].float(), z[~first])[:, 0], y[~first])
