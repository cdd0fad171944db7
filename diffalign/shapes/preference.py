"""`python -m diffalign.shapes.preference`: tiny-clip learns to prefer what the exact detector prefers.

PickScore's recipe (arXiv 2305.01569) without people. Of two pictures for one prompt the one with the higher
`geneval_dense` is preferred, and the Bradley-Terry loss is

    loss = softplus(-(s_w - s_l)),    s = exp(logit_scale) cos(image, text).

A pair says one bit. So that the image tower sees what the detector sees, linear heads on its patches and on its
pooled output also tell the detector's findings, which is far more to learn from; they are thrown away. Pictures come
recoloured, shifted and mirrored, with the prompt that then holds. A share of the contrastive loss on fresh scenes
keeps it a CLIP. It starts from the folder that `pretrain` wrote, so run it once after that; interrupted, it
continues.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.shapes import prompts, samples, world
from diffalign.shapes.corruptions import corrupt
from diffalign.shapes.dino import KINDS as OBJECTS
from diffalign.shapes.dino import patches
from diffalign.shapes.export import CLIP_MEAN, CLIP_STD
from diffalign.shapes.fitting import Fit, Losses, batches, fit
from diffalign.shapes.pretrain import Data, contrastive, draw_scenes
from diffalign.shapes.prompts import Metadata
from diffalign.shapes.publish import add_log, replacing
from diffalign.shapes.world import Object

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

STAGE = "preference"
PLAN = Fit(steps=1400, lr=1e-3, weight_decay=0.05, ema=0.995, save_every=100)
SCENES = 20_000
SEED = 20261122
GROUPS, OF_SAMPLES, OF_OTHERS, CONTRASTED = 16, 3, 2, 32  # prompts a step, pictures of each, scenes beside them
CONTRASTIVE, LOCAL, COUNTS = 0.5, 2.0, 4.0  # weights of the losses beside Bradley-Terry's
DRAWN = ("render", "render", "near", "near", "near", "broken", "broken", "broken sample")
_CLASSES = (*world.SHAPES, "")
KINDS = ("sample",) * len(samples.SETTINGS) + DRAWN


@dataclass(frozen=True)
class Bank:
    """Pictures of P prompts, `KINDS` telling what each of a prompt's K pictures is."""

    metas: list[Metadata]
    images: Tensor  # uint8 [P, K, 3, 64, 64]
    scores: Tensor  # [P, K]: geneval_dense of each for its prompt
    found: Tensor  # uint8 [P, K, 64, 64]: 0, or 1 + the shape whose box a pixel is in, 5 for malformed things
    counts: Tensor  # [P, K, 25]: objects of each of `OBJECTS`, and malformed things


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
                    found[i, j, y0:y1, x0:x1] = 1 + _CLASSES.index(shape)
                    counts[i, j, OBJECTS.index((shape, color)) if shape else -1] += 1
    return Bank(list(metas), every, scores, found, counts)


def _picture(objects: Sequence[Object]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(world.render(objects).transpose(2, 0, 1)))


def normalise(images: Tensor) -> Tensor:
    """uint8 -> what a CLIP image tower expects."""
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


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
    rolled = []
    for axis in (2, 1):
        line = ink.any(axis)
        first, last = line.float().argmax(1), size - 1 - line.flip(1).float().argmax(1)
        low, high = (margin - first).clamp(max=0), (size - 1 - margin - last).clamp(min=0)
        by = low + (draw[:, len(rolled)] * (high - low + 1)).long()
        rolled.append((torch.arange(size) - by[:, None]) % size)
    n, rows, columns = torch.arange(len(images))[:, None, None], rolled[0][:, :, None], rolled[1][:, None]
    return images[n, :, rows, columns].permute(0, 3, 1, 2), found[n, rows, columns]


def bradley_terry(s: Tensor, judged: Tensor) -> Tensor:
    """Mean of softplus(-(s_w - s_l)) over the pairs of a prompt whose judged scores differ; both are [prompts, K]."""
    wins = judged[:, :, None] > judged[:, None]
    return F.softplus(s[:, None] - s[:, :, None])[wins].mean()


def tune(model: Any, words: CLIPTokenizer, bank: Bank, data: Data, folder: Path) -> None:
    texts = [m["prompt"] for m in bank.metas]
    scene_ids = _tokens(words, data.texts)
    split = len(samples.SETTINGS)
    width = model.config.vision_config.hidden_size
    parts = nn.ModuleDict(
        {
            "clip": model,
            "local": nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(_CLASSES))),
            "counts": nn.Linear(model.config.projection_dim, len(OBJECTS) + 1),
        }
    )

    def loss(step: int, generator: torch.Generator) -> Losses:
        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator)

        p = draw(len(bank.metas), GROUPS)
        some = torch.rand(GROUPS, split, generator=generator).argsort(1)[:, :OF_SAMPLES]
        others = split + torch.rand(GROUPS, len(DRAWN), generator=generator).argsort(1)[:, :OF_OTHERS]
        k = torch.cat([some, others], 1)
        order = torch.rand(GROUPS, len(world.COLORS), generator=generator).argsort(1)
        prompted = [rename(texts[i], o) for i, o in zip(p.tolist(), order.tolist(), strict=True)]
        order = order.repeat_interleave(k.shape[1], 0)
        pictures = recolour(bank.images[p[:, None], k].flatten(0, 1).float(), order)
        found = bank.found[p[:, None], k].flatten(0, 1).long()
        pictures, found = shift(pictures, found, torch.rand(len(pictures), 2, generator=generator))
        if step % 2:
            pictures, found, prompted = pictures.flip(-1), found.flip(-1), [mirror(t) for t in prompted]
        scenes = draw(len(data.images), CONTRASTED)
        pixels = normalise(torch.cat([pictures, data.images[scenes]]))
        tokens = torch.cat([_tokens(words, prompted), scene_ids[data.text[scenes]]])
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=tokens, pixel_values=pixels)
            vision = out.vision_model_output
            local = parts["local"](vision.last_hidden_state[: len(pictures), 1:]).float()
            counts = parts["counts"](vision.pooler_output[: len(pictures)]).float()  # the embedding, not normalised
        image, text = (F.normalize(e.float(), dim=-1) for e in (out.image_embeds, out.text_embeds))
        n = len(pictures)
        s = model.logit_scale.exp() * torch.einsum("pkd,pd->pk", image[:n].unflatten(0, (GROUPS, -1)), text[:GROUPS])
        judged = bank.scores[p[:, None], k]
        preference = bradley_terry(s, judged)
        same = data.meaning[scenes][:, None] == data.meaning[scenes][None]
        clip = contrastive(image[n:], text[GROUPS:], same, model.logit_scale)
        there = F.one_hot(found, len(_CLASSES) + 1)[..., 1:].permute(0, 3, 1, 2).float()
        seen = F.binary_cross_entropy_with_logits(local, patches(there).flatten(2).transpose(1, 2))
        wanted = bank.counts[p[:, None], k].flatten(0, 1)
        by_color = wanted[:, :-1].unflatten(1, (len(world.SHAPES), -1))
        by_color = by_color.gather(2, order.argsort(1)[:, None].expand_as(by_color))
        counted = F.mse_loss(counts, torch.cat([by_color.flatten(1), wanted[:, -1:]], 1))
        return {
            "loss": preference + CONTRASTIVE * clip + LOCAL * seen + COUNTS * counted,
            "preference": preference,
            "contrastive": clip,
            "local": seen,
            "counts": counted,
            "accuracy": accuracy(s.detach(), judged),
        }

    fit(STAGE, parts, loss, PLAN, folder)


def accuracy(s: Tensor, judged: Tensor, mask: Tensor | bool = True) -> Tensor:
    """Share of the pairs with different judged scores that s puts in the same order; mask [K, K] selects pairs."""
    pairs = (judged[:, :, None] > judged[:, None]) & mask
    return (s[:, :, None] > s[:, None])[pairs].float().mean()


def _tokens(words: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    ids: Tensor = words(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


@torch.no_grad()
def score(model: Any, words: CLIPTokenizer, images: Tensor, texts: Sequence[str]) -> Tensor:
    """exp(logit_scale) cos(image, text) of images [P, K, 3, 64, 64] for P texts, [P, K]."""
    parts = []
    for i in batches(len(texts), 32):
        out = model(input_ids=_tokens(words, texts[i]), pixel_values=normalise(images[i].flatten(0, 1)))
        image, text = (F.normalize(e, dim=-1) for e in (out.image_embeds, out.text_embeds))
        parts.append(torch.einsum("pkd,pd->pk", image.unflatten(0, (len(text), -1)), text))
    return torch.cat(parts) * model.logit_scale.exp()


def measure(model: Any, words: CLIPTokenizer, bank: Bank, scenes: Data) -> dict[str, float]:
    """Preference accuracy by kinds of the two pictures, and 64-way prompt retrieval of scenes.

    "overall" is the mean of sample against sample and of render against sample, where renders are of the prompt and of
    near-misses.
    """
    texts = [m["prompt"] for m in bank.metas]
    s = score(model, words, bank.images, texts)
    result = {}
    kinds = {"sample": ["sample"], "prompt render": ["render"], "near-miss render": ["near"]}
    kinds |= {"render": ["render", "near"], "broken": ["broken", "broken sample"]}
    member = {name: torch.tensor([kind in of for kind in KINDS]) for name, of in kinds.items()}
    sides = [(k, "sample") for k in kinds] + [("near-miss render", "prompt render"), ("broken", "prompt render")]
    for a, b in sides:
        mask = member[a][:, None] & member[b][None]
        result[f"{a} / {b}"] = float(accuracy(s, bank.scores, mask | mask.T))
    result["overall"] = (result["sample / sample"] + result["render / sample"]) / 2
    result["retrieval of 64"] = retrieval(model, words, scenes)
    return result


@torch.no_grad()
def retrieval(model: Any, words: CLIPTokenizer, scenes: Data, among: int = 64) -> float:
    """Share of scenes whose own prompt, or one that means the same, scores highest among those of `among` scenes."""
    hits = []
    for i in batches(len(scenes.images), among):
        texts = [scenes.texts[t] for t in scenes.text[i].tolist()]
        out = model(input_ids=_tokens(words, texts), pixel_values=normalise(scenes.images[i]))
        hits.append(scenes.meaning[i][out.logits_per_image.argmax(1)] == scenes.meaning[i])
    return float(torch.cat(hits).float().mean())


def load(folder: Path) -> tuple[Any, CLIPTokenizer]:
    from transformers import CLIPModel, CLIPTokenizer

    return CLIPModel.from_pretrained(folder, dtype=torch.float32), CLIPTokenizer.from_pretrained(folder)


def export(model: Any, words: CLIPTokenizer, folder: Path) -> None:
    """fp16 weights with the tokenizer and the image processor, as `pretrain` writes them."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(folder)
    with replacing(folder) as temporary:
        for part in (model.half(), processor, words):
            part.save_pretrained(temporary)


def held_out(work: Path) -> tuple[Bank, Data]:
    """Pictures of the test prompts, and fresh scenes."""
    test = prompts.test_prompts()
    return fill(test, samples.draw(test, work / "samples-test.pt", 2), SEED + 1), draw_scenes(1024, SEED + 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="samples, checkpoints and log")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights", help="holds tiny-clip")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)

    model, words = load(arguments.output / "tiny-clip")
    metas = samples.prompted()
    bank = fill(metas, samples.draw(metas, arguments.work / "samples-train.pt", 1), SEED)
    test, scenes = held_out(arguments.work)
    before = measure(model.eval(), words, test, scenes)
    tune(model.train(), words, bank, draw_scenes(SCENES, SEED), arguments.work)
    export(model, words, arguments.output / "tiny-clip")
    add_log(STAGE, arguments.work / "log.jsonl", arguments.output)
    after = measure(load(arguments.output / "tiny-clip")[0].eval(), words, test, scenes)
    print(f"{'':36}before  after")
    for name, value in after.items():
        print(f"{name:36}{before[name]:.3f}   {value:.3f}")


if __name__ == "__main__":
    main()
