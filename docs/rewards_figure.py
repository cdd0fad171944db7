"""What the heads see, for docs/rewards.md: `python -m docs.rewards_figure` writes docs/images/rewards.png."""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffalign import pipelines, rewards
from diffalign.rollout import collect, sample_seed
from diffalign.sections import Sampling
from diffalign.shapes import corruptions, prompts, world
from diffalign.shapes.world import Object
from docs.figures import FOLDER, GAP, SIDE

PROMPT = "a green star above a blue circle"
HEADS = [
    {"name": "pickscore", "model": "tiny-clip"},
    {"name": "vlm_echo", "model": "tiny-vlm"},
    {"name": "artifact_head", "model": "tiny-artifact"},
]
STAR, CIRCLE = Object("star", "green", 30, 18, 12), Object("circle", "blue", 34, 46, 11)
RED = np.array([214, 40, 40])
TEXT = 84


def picture(*objects: Object) -> Tensor:
    return torch.from_numpy(world.render(list(objects)).copy()).permute(2, 0, 1) / 255


def pictures() -> tuple[list[str], Tensor]:
    """Names and images [6, 3, 64, 64]: right, three ways of being wrong, two samples."""
    right = picture(STAR, CIRCLE)
    swapped = picture(Object("star", "green", 34, 46, 12), Object("circle", "blue", 30, 18, 11))
    color = picture(STAR, Object("circle", "red", 34, 46, 11))
    broken = corruptions.corrupt(right, random.Random(4))
    metas = [prompts.metadata("position", PROMPT, [])] * 2
    sampling = Sampling(steps=20, kernel="ode", eta=0.0, height=world.SIZE, width=world.SIZE)
    seeds = torch.tensor([sample_seed(0, 0, 0, k) for k in range(2)])
    drawn = collect(pipelines.load("tiny-sd3", device="cpu"), metas, torch.arange(2), seeds, sampling, (), 2).images
    assert drawn is not None
    names = ["right", "places swapped", "wrong colour", "broken", "sample of tiny-sd3", "sample of tiny-sd3"]
    return names, torch.cat([torch.stack([right, swapped, color, broken]), drawn])


def enlarged(image: Tensor) -> Image.Image:
    pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def overlay(image: Tensor, faults: Tensor) -> Image.Image:
    """The picture in grey, patches red as far as p(artifact) is high."""
    heat = Image.fromarray((faults * 255).byte().numpy()).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    alpha = np.asarray(heat)[..., None] / 255 * 0.8
    grey = np.asarray(enlarged(image).convert("L").convert("RGB"))
    return Image.fromarray((grey * (1 - alpha) + RED * alpha).astype(np.uint8))


def main() -> None:
    names, images = pictures()
    texts = [PROMPT] * len(images)
    with torch.no_grad():
        found = rewards.score(rewards.build(HEADS), images, texts, [{}] * len(images), 8)
    sheet = Image.new("RGB", (len(images) * (SIDE + GAP) + GAP, 2 * (SIDE + GAP) + TEXT + 24), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for k, image in enumerate(images):
        x, y = GAP + k * (SIDE + GAP), 24
        draw.text((x, 6), names[k], "#222", font)
        sheet.paste(enlarged(image), (x, y))
        sheet.paste(overlay(image, found["artifact_head"].extra["map"][k]), (x, y + SIDE + 4))
        y += 2 * SIDE + 10
        echo = found["vlm_echo"].extra
        at = x
        for token, nats in zip(echo["tokens"][k], echo["log_probs"][k], strict=True):
            doubt = min(-nats / 5, 1.0)
            word = token.strip()
            if at + draw.textlength(word, font) > x + SIDE:
                at, y = x, y + 13
            draw.text((at, y), word, tuple((RED * doubt + np.array([40, 40, 40]) * (1 - doubt)).astype(int)), font)
            at += draw.textlength(word + " ", font)
        pick, told, clean = (float(found[h["name"]].scores[k]) for h in HEADS)
        draw.text((x, y + 15), f"pickscore {pick:.1f}\necho {told:.2f}\nno artifact {clean:.2f}", "#555", font)
    FOLDER.mkdir(exist_ok=True)
    sheet.save(FOLDER / "rewards.png", optimize=True)


if __name__ == "__main__":
    main()
