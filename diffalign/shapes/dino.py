"""`python -m diffalign.shapes.dino`: tiny-dino, a small Dinov2Model that knows the shapes world and its faults.

Distillation on the world. It starts as the image tower of tiny-clip, its teacher; then the renderer and the detector
say what is where, and linear heads on the patch features and on CLS must tell it. Patches learn how much of them each
colour and shape covers and how much of them is broken, CLS how many objects of each kind there are, whether the picture
is faulty and which embedding tiny-clip gives it. A quarter of the patches are hidden in every second picture and all
must give back their pixels, as in masked image modelling (arXiv 2111.06377), which keeps what no label asks for, such
as style. The heads are thrown away. Run it between `pretrain` and `preference`; interrupted, it continues.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.shapes import card, prompts, samples, world
from diffalign.shapes.corruptions import changed, corrupt
from diffalign.shapes.detector import detect
from diffalign.shapes.dino_network import PATCH, clip_normalise, export, from_clip, network, normalise
from diffalign.shapes.fitting import Fit, Losses, fit
from diffalign.shapes.publish import add_log
from diffalign.shapes.world import BACKGROUND, COLORS, SHAPES, Object

if TYPE_CHECKING:
    from transformers import Dinov2Model

STAGE = "dino"
GRID = world.SIZE // PATCH
PLAN = Fit(steps=1600, lr=6e-4, weight_decay=0.05, ema=0.995, save_every=100)
SEED = 20261123
SCENES, BROKEN, BROKEN_SAMPLES = 12_000, 6_000, 1_500
BATCH = (10, 6, 16, 10, 6)  # clean, restyled, broken, samples, broken samples
WEIGHTS = {"patch": 8.0, "pixels": 0.3, "counts": 4.0, "faulty": 2.0, "clip": 4.0}
KINDS = [(shape, color) for shape in SHAPES for color in COLORS]


@dataclass(frozen=True)
class Bank:
    """Pictures with what is known of them; NaN where nothing is."""

    images: Tensor  # uint8 [N, 3, 64, 64]
    cover: Tensor  # fp16 [N, 8, 8, 10]: share of each patch that colours, then shapes, cover
    broken: Tensor  # fp16 [N, 8, 8]: share of each patch that is broken
    counts: Tensor  # fp16 [N, 24]: objects of each of `KINDS`
    faulty: Tensor  # fp16 [N]: 1 where something in the picture is broken


def patches(x: Tensor) -> Tensor:
    """[..., 64, 64] -> the mean of each patch, [..., 8, 8]."""
    blocks: Tensor = x.unflatten(-2, (GRID, PATCH)).unflatten(-1, (GRID, PATCH))
    return blocks.mean((-3, -1))


def describe(objects: list[Object]) -> tuple[Tensor, Tensor]:
    """cover [8, 8, 10] and counts [24] of a scene."""
    cover, counts = torch.zeros(GRID, GRID, len(COLORS) + len(SHAPES)), torch.zeros(len(KINDS))
    for o in objects:
        line = np.array(COLORS[o.color], np.float32) - BACKGROUND
        seen = (world.render([o]).astype(np.float32) - BACKGROUND) @ line / (line @ line)
        share = patches(torch.from_numpy(seen))
        cover[..., list(COLORS).index(o.color)] += share
        cover[..., len(COLORS) + SHAPES.index(o.shape)] += share
        counts[KINDS.index((o.shape, o.color))] += 1
    return cover, counts


def clean(n: int, seed: int) -> Bank:
    rng, catalogue = random.Random(seed), prompts.catalogue()
    images, cover, counts = [], [], []
    for _ in range(n):
        _, objects = prompts.sample(rng, catalogue)
        images.append(torch.from_numpy(world.render(objects).transpose(2, 0, 1).copy()))
        known = describe(objects)
        cover.append(known[0].half())
        counts.append(known[1].half())
    whole = torch.zeros(n, GRID, GRID, dtype=torch.float16)
    return Bank(torch.stack(images), torch.stack(cover), whole, torch.stack(counts), whole[:, 0, 0])


def broken(whole: Bank, seed: int, only: bool = True) -> Bank:
    """Each picture with faults; patches that changed have no known cover. `only`: `whole` had no faults of its own."""
    images, where = [], []
    for i, image in enumerate(whole.images):
        before = image.float() / 255
        after = corrupt(before, random.Random(f"{seed} {i}"))
        images.append((after * 255).round().to(torch.uint8))
        where.append(patches(changed(before, after).float()))
    hurt = torch.stack(where)
    cover = whole.cover.masked_fill((hurt > 0)[..., None], float("nan"))
    unknown = torch.full_like(whole.counts, float("nan"))
    hurt = hurt.half() if only else torch.full_like(hurt, float("nan")).half()
    return Bank(torch.stack(images), cover, hurt, unknown, torch.ones_like(whole.faulty))


def sampled(images: Tensor) -> Bank:
    """Samples [N, 3, 64, 64], of which the detector says what they hold."""
    n = len(images)
    counts, faulty = torch.zeros(n, len(KINDS)), torch.zeros(n)
    for i, image in enumerate(images.permute(0, 2, 3, 1).contiguous().numpy()):
        for found in detect(image):
            if found.shape and found.color:
                counts[i, KINDS.index((found.shape, found.color))] += 1
            else:
                faulty[i] = 1
    unknown = torch.full((n, GRID, GRID, len(COLORS) + len(SHAPES)), float("nan"), dtype=torch.float16)
    return Bank(images, unknown, unknown[..., 0], counts.half(), faulty.half())


def _first(bank: Bank, n: int) -> Bank:
    return Bank(*(getattr(bank, f.name)[:n] for f in fields(Bank)))


def restyle(images: Tensor, generator: torch.Generator) -> Tensor:
    """Other styles [N, 3, 64, 64] in [0, 1]: channels permuted and bent; every second picture in outlines."""
    plain = (torch.tensor(BACKGROUND) / 255).view(3, 1, 1)
    ink = ((images - plain).norm(dim=1, keepdim=True) / 0.5).clamp(0, 1)
    inside = 1 - F.max_pool2d(1 - ink, 5, 1, 2)
    outlined = images + inside * (plain - images)
    x = torch.where(torch.arange(len(images)).view(-1, 1, 1, 1) % 2 == 0, outlined, images)
    order = torch.rand(len(x), 3, generator=generator).argsort(1)
    x = x.gather(1, order[:, :, None, None].expand_as(x))
    bend = (torch.rand(len(x), 3, 1, 1, generator=generator) * 2 - 1).exp()
    return x.clamp(0, 1) ** bend


def train(start: Dinov2Model, clip: Any, banks: list[Bank], folder: Path) -> Any:
    """`banks`: clean, broken, samples, broken samples. `clip` teaches."""
    width = 128
    model = nn.ModuleDict(
        {
            "backbone": start,
            "patch": nn.Linear(width, len(COLORS) + len(SHAPES) + 1),
            "pixels": nn.Linear(width, 3 * PATCH**2),
            "whole": nn.Linear(width, len(KINDS) + 1),
            "taught": nn.Linear(width, clip.config.projection_dim),
        }
    )
    sources = [banks[0], banks[0], *banks[1:]]
    restyled = slice(BATCH[0], BATCH[0] + BATCH[1])

    def loss(step: int, generator: torch.Generator) -> Losses:
        rows = [torch.randint(len(b.images), (n,), generator=generator) for b, n in zip(sources, BATCH, strict=True)]
        part = {
            f.name: torch.cat([getattr(b, f.name)[k] for b, k in zip(sources, rows, strict=True)]).float()
            for f in fields(Bank)
        }
        images, cover, hurt = part["images"] / 255, part["cover"], part["broken"]
        images[restyled] = restyle(images[restyled], generator)
        for unknown in (cover[..., : len(COLORS)], hurt, part["counts"], part["faulty"]):
            unknown[restyled] = float("nan")
        if step % 2:
            images, cover, hurt = images.flip(-1), cover.flip(2), hurt.flip(2)
        x = normalise(images)
        hidden = torch.rand(len(x), GRID**2, generator=generator) < 0.25
        hidden[::2] = False
        with torch.autocast("cpu", torch.bfloat16):
            out = model["backbone"](pixel_values=x, bool_masked_pos=hidden).last_hidden_state
            local, drawn, whole = model["patch"](out[:, 1:]), model["pixels"](out[:, 1:]), model["whole"](out[:, 0])
            told = model["taught"](out[:, 0])
            with torch.no_grad():
                seen = clip.vision_model(pixel_values=clip_normalise(images))
                taught = clip.visual_projection(seen.pooler_output)
        target = torch.cat([cover, hurt[..., None]], -1).flatten(1, 2).clamp(0, 1)
        target = target.masked_fill(hidden[..., None], float("nan"))
        wanted = F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)
        losses = {
            "patch": _known(F.binary_cross_entropy_with_logits, local.float(), target),
            "pixels": F.mse_loss(drawn.float(), wanted),
            "counts": _known(F.mse_loss, whole[:, :-1].float(), part["counts"]),
            "faulty": _known(F.binary_cross_entropy_with_logits, whole[:, -1].float(), part["faulty"]),
            "clip": 1 - F.cosine_similarity(told.float(), taught.float()).mean(),
        }
        return {"loss": torch.stack([WEIGHTS[k] * loss for k, loss in losses.items()]).sum(), **losses}

    fit(STAGE, model, loss, PLAN, folder)
    return model["backbone"]


def _known(loss: Any, prediction: Tensor, target: Tensor) -> Tensor:
    """`loss` where the target is not NaN."""
    there = ~target.isnan()
    result: Tensor = loss(prediction[there], target[there])
    return result


def main() -> None:
    from transformers import CLIPModel

    from diffalign.shapes.dino_probe import measure

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="samples, checkpoints and log")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights", help="gets tiny-dino")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)

    whole = clean(SCENES, SEED)
    drawn = sampled(samples.draw(samples.prompted(), arguments.work / "samples-train.pt", 1).flatten(0, 1))
    some = [_first(whole, BROKEN), _first(drawn, BROKEN_SAMPLES)]
    clip = CLIPModel.from_pretrained(arguments.output / "tiny-clip", dtype=torch.float32).eval()
    start = from_clip(clip.vision_model, whole.images[:512])
    banks = [whole, broken(some[0], SEED), drawn, broken(some[1], SEED + 1, only=False)]
    model = train(start, clip, banks, arguments.work)
    export(model, arguments.output / "tiny-dino")
    test = samples.draw(prompts.test_prompts(), arguments.work / "samples-test.pt", 2).flatten(0, 1)
    found = {"untrained": measure(network().eval(), test), "trained": measure(model.float().eval(), test)}
    add_log(STAGE, arguments.work / "log.jsonl", arguments.output, found)
    card.write(arguments.output)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
