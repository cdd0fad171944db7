"""Pictures to prefer among: samples, renders, near-misses and broken pictures of a prompt, judged by the detector."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffalign.shapes import prompts, samples, world
from diffalign.shapes.corruptions import corrupt
from diffalign.shapes.dino import KINDS as OBJECTS
from diffalign.shapes.prompts import Metadata
from diffalign.shapes.world import Object

DRAWN = ("render", "render", "near", "near", "near", "broken", "broken", "broken sample")
CLASSES = (*world.SHAPES, "")
KINDS = ("sample",) * len(samples.SETTINGS) + DRAWN


@dataclass(frozen=True)
class Bank:
    """Pictures of P prompts, `KINDS` telling what each of a prompt's K pictures is."""

    metas: list[Metadata]
    images: Tensor  # uint8 [P, K, 3, 64, 64]
    scores: Tensor  # [P, K]: geneval_dense of each for its prompt
    found: Tensor  # uint8 [P, K, 64, 64]: 0, or 1 + the shape whose box a pixel is in, 5 for malformed things
    counts: Tensor  # [P, K, 25]: objects of each of `OBJECTS`, and malformed things


@dataclass(frozen=True)
class Draw:
    """What one step learns from: G prompts, K pictures of each."""

    prompts: list[str]
    images: Tensor  # [G K, 3, 64, 64] in 0 .. 255
    scores: Tensor  # [G, K]
    found: Tensor  # [G K, 64, 64]
    counts: Tensor  # [G K, 25]


def draw(bank: Bank, groups: int, of_samples: int, of_others: int, mirrored: bool, generator: torch.Generator) -> Draw:
    """Pictures of random prompts, samples and others, recoloured, shifted and perhaps mirrored, with what then holds
    of them."""
    split = len(samples.SETTINGS)
    p = torch.randint(len(bank.metas), (groups,), generator=generator)
    some = torch.rand(groups, split, generator=generator).argsort(1)[:, :of_samples]
    others = split + torch.rand(groups, len(DRAWN), generator=generator).argsort(1)[:, :of_others]
    k = torch.cat([some, others], 1)
    order = torch.rand(groups, len(world.COLORS), generator=generator).argsort(1)
    texts = [rename(bank.metas[i]["prompt"], o) for i, o in zip(p.tolist(), order.tolist(), strict=True)]
    order = order.repeat_interleave(k.shape[1], 0)
    pictures = recolour(bank.images[p[:, None], k].flatten(0, 1).float(), order)
    found = bank.found[p[:, None], k].flatten(0, 1).long()
    pictures, found = shift(pictures, found, torch.rand(len(pictures), 2, generator=generator))
    if mirrored:
        pictures, found, texts = pictures.flip(-1), found.flip(-1), [mirror(t) for t in texts]
    counts = bank.counts[p[:, None], k].flatten(0, 1)
    by_color = counts[:, :-1].unflatten(1, (len(world.SHAPES), -1))
    by_color = by_color.gather(2, order.argsort(1)[:, None].expand_as(by_color))
    counts = torch.cat([by_color.flatten(1), counts[:, -1:]], 1)
    return Draw(texts, pictures, bank.scores[p[:, None], k], found, counts)


def near_miss(objects: Sequence[Object], rng: random.Random) -> list[Object]:
    """The scene with one thing wrong: a colour, a shape, a number, or places swapped."""
    result = list(objects)
    k = rng.randrange(len(result))
    o = result[k]
    edit = rng.choice(("colour", "shape", "number", "places"))
    if edit == "colour":
        result[k] = Object(o.shape, rng.choice([c for c in world.COLORS if c != o.color]), o.x, o.y, o.r)
    elif edit == "shape":
        result[k] = Object(rng.choice([s for s in world.SHAPES if s != o.shape]), o.color, o.x, o.y, o.r)
    elif edit == "places" and len(result) == 2:
        a, b = result
        result = [Object(a.shape, a.color, b.x, b.y, b.r), Object(b.shape, b.color, a.x, a.y, a.r)]
    elif len(result) == max(world.RADIUS) or (len(result) > 1 and rng.random() < 0.5):
        del result[k]
    else:
        kinds = [(p.shape, p.color) for p in [*result, rng.choice([o, _anything(rng)])]]
        spots = world.place(rng, len(kinds))
        result = [Object(*kind, *spot) for kind, spot in zip(kinds, spots, strict=True)]
    return result


def _anything(rng: random.Random) -> Object:
    return Object(rng.choice(world.SHAPES), rng.choice(list(world.COLORS)), 0.0, 0.0, 0.0)


def fill(metas: Sequence[Metadata], sampled: Tensor, seed: int) -> Bank:
    """Samples [P, S, 3, 64, 64] and beside them renders, near-misses and broken pictures, judged by the detector."""
    from diffalign.eval.geneval_logic import geneval_dense
    from diffalign.rewards.geneval import observe

    every = torch.empty(len(metas), len(KINDS), *sampled.shape[2:], dtype=torch.uint8)
    scores = torch.empty(every.shape[:2])
    found = torch.zeros(*scores.shape, *every.shape[3:], dtype=torch.uint8)
    counts = torch.zeros(*scores.shape, len(OBJECTS) + 1)
    for i, meta in enumerate(metas):
        rng = random.Random(f"{seed} {i}")
        every[i, : sampled.shape[1]] = sampled[i]
        for j, kind in enumerate(KINDS):
            if kind == "sample":
                continue
            scene = prompts.scene(rng, meta["include"])
            picture = _picture(near_miss(scene, rng) if kind == "near" else scene)
            if kind == "broken sample":
                picture = rng.choice(list(sampled[i]))
            if "broken" in kind:
                picture = (corrupt(picture.float() / 255, rng) * 255).round().to(torch.uint8)
            every[i, j] = picture
        for j, image in enumerate(every[i].permute(0, 2, 3, 1).contiguous().numpy()):
            objects, colors = observe(image)
            scores[i, j] = geneval_dense(objects, colors, meta)
            for shape, boxes in objects.items():
                for box, color in zip(boxes, colors[shape], strict=True):
                    x0, y0, x1, y1 = (max(round(edge), 0) for edge in box[:4])
                    found[i, j, y0:y1, x0:x1] = 1 + CLASSES.index(shape)
                    counts[i, j, OBJECTS.index((shape, color)) if shape else -1] += 1
    return Bank(list(metas), every, scores, found, counts)


def _picture(objects: Sequence[Object]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(world.render(objects).transpose(2, 0, 1)))


def mirror(text: str) -> str:
    """What the mirrored picture shows."""
    swap = {"left": "right", "right": "left"}
    return " ".join(swap.get(word, word) for word in text.split())


def rename(text: str, order: Sequence[int]) -> str:
    """The prompt of a recoloured picture: colour k becomes colour order[k]."""
    names = list(world.COLORS)
    words = [names[order[names.index(word)]] if word in names else word for word in text.split()]
    for i, word in enumerate(words[1:]):
        if words[i] in ("a", "an") and word in names:
            words[i] = "an" if word[0] in "aeiou" else "a"
    return " ".join(words)


def recolour(images: Tensor, order: Tensor) -> Tensor:
    """Pixels on the line from the background to colour k move to that of colour order[k], as far along, keeping their
    distance from it; images [N, 3, H, W] in 0 .. 255, order [N, 6]."""
    plain = torch.tensor(world.BACKGROUND, dtype=torch.float32)
    lines = torch.tensor(list(world.COLORS.values())) - plain
    d = images - plain.view(3, 1, 1)
    length = (lines**2).sum(1).view(6, 1, 1)
    along = torch.einsum("nchw,kc->nkhw", d, lines) / length
    foot = along.clamp(0, 1)
    nearest = ((foot - 2 * along) * foot * length).argmin(1)  # the squared distance less that from the background
    cover = foot.gather(1, nearest[:, None])
    target = order.gather(1, nearest.flatten(1)).view_as(nearest)
    return (images + cover * (lines[target] - lines[nearest]).permute(0, 3, 1, 2)).clamp(0, 255)


def shift(images: Tensor, found: Tensor, draw: Tensor, margin: int = 2) -> tuple[Tensor, Tensor]:
    """Move what is in each picture as a whole, with its map; `draw` [N, 2] in [0, 1) says how far, rows then columns,
    between the two places where it comes to lie `margin` px from an edge."""
    size = images.shape[-1]
    ink = (images - torch.tensor(world.BACKGROUND).view(3, 1, 1)).abs().amax(1) > 25
    rolled: list[Tensor] = []
    for axis in (2, 1):
        line = ink.any(axis)
        first, last = line.float().argmax(1), size - 1 - line.flip(1).float().argmax(1)
        low, high = (margin - first).clamp(max=0), (size - 1 - margin - last).clamp(min=0)
        by = low + (draw[:, len(rolled)] * (high - low + 1)).long()
        rolled.append((torch.arange(size) - by[:, None]) % size)
    n, rows, columns = torch.arange(len(images))[:, None, None], rolled[0][:, :, None], rolled[1][:, None]
    return images[n, :, rows, columns].permute(0, 3, 1, 2), found[n, rows, columns]
