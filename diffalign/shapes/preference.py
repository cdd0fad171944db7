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
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.rewards import _preprocess
from diffalign.shapes import card, prompts, samples
from diffalign.shapes.dino import KINDS as OBJECTS
from diffalign.shapes.dino import patches
from diffalign.shapes.fitting import Fit, Losses, batches, fit
from diffalign.shapes.preference_data import CLASSES, KINDS, Bank, draw, fill
from diffalign.shapes.pretrain import Data, contrastive, draw_scenes
from diffalign.shapes.publish import add_log, replacing

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

STAGE = "preference"
PLAN = Fit(steps=3000, lr=1e-3, weight_decay=0.05, ema=0.995, save_every=100)
SCENES = 20_000
SEED = 20261122
GROUPS, OF_SAMPLES, OF_OTHERS, CONTRASTED = 16, 3, 2, 32  # prompts a step, pictures of each, scenes beside them
CONTRASTIVE, LOCAL, COUNTS = 0.5, 2.0, 4.0  # weights of the losses beside Bradley-Terry's


def normalise(images: Tensor) -> Tensor:
    """uint8 -> what a CLIP image tower expects."""
    return _preprocess.normalise(images.float() / 255)


def bradley_terry(s: Tensor, judged: Tensor) -> Tensor:
    """Mean of softplus(-(s_w - s_l)) over the pairs of a prompt whose judged scores differ; both are [prompts, K]."""
    wins = judged[:, :, None] > judged[:, None]
    return F.softplus(s[:, None] - s[:, :, None])[wins].mean()


def tune(model: Any, words: CLIPTokenizer, bank: Bank, data: Data, folder: Path) -> None:
    scene_ids = _tokens(words, data.texts)
    width = model.config.vision_config.hidden_size
    parts = nn.ModuleDict(
        {
            "clip": model,
            "local": nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(CLASSES))),
            "counts": nn.Linear(model.config.projection_dim, len(OBJECTS) + 1),
        }
    )

    def loss(step: int, generator: torch.Generator) -> Losses:
        drawn = draw(bank, GROUPS, OF_SAMPLES, OF_OTHERS, bool(step % 2), generator)
        n = len(drawn.images)
        scenes = torch.randint(len(data.images), (CONTRASTED,), generator=generator)
        pixels = normalise(torch.cat([drawn.images, data.images[scenes]]))
        tokens = torch.cat([_tokens(words, drawn.prompts), scene_ids[data.text[scenes]]])
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=tokens, pixel_values=pixels)
            vision = out.vision_model_output
            local = parts["local"](vision.last_hidden_state[:n, 1:]).float()
            counts = parts["counts"](vision.pooler_output[:n]).float()  # the embedding, not normalised
        image, text = (F.normalize(e.float(), dim=-1) for e in (out.image_embeds, out.text_embeds))
        s = model.logit_scale.exp() * torch.einsum("pkd,pd->pk", image[:n].unflatten(0, (GROUPS, -1)), text[:GROUPS])
        preference = bradley_terry(s, drawn.scores)
        same = data.meaning[scenes][:, None] == data.meaning[scenes][None]
        clip = contrastive(image[n:], text[GROUPS:], same, model.logit_scale)
        seen = local_loss(local, drawn.found)
        counted = F.mse_loss(counts, drawn.counts)
        return {
            "loss": preference + CONTRASTIVE * clip + LOCAL * seen + COUNTS * counted,
            "preference": preference,
            "contrastive": clip,
            "local": seen,
            "counts": counted,
            "accuracy": accuracy(s.detach(), drawn.scores),
        }

    fit(STAGE, parts, loss, PLAN, folder)


def local_loss(logits: Tensor, found: Tensor) -> Tensor:
    """Cross-entropy of `CLASSES` on each patch, logits [N, 64, 5], with the share of it that each covers in `found`."""
    there = F.one_hot(found, len(CLASSES) + 1)[..., 1:].permute(0, 3, 1, 2).float()
    return F.binary_cross_entropy_with_logits(logits, patches(there).flatten(2).transpose(1, 2))


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
    scale: Tensor = model.logit_scale.exp()
    return torch.cat(parts) * scale


def measure(model: Any, words: CLIPTokenizer, bank: Bank, scenes: Data) -> dict[str, float]:
    """:func:`by_kinds`, and 64-way prompt retrieval of scenes."""
    s = score(model, words, bank.images, [m["prompt"] for m in bank.metas])
    return by_kinds(s, bank.scores) | {"retrieval of 64": retrieval(model, words, scenes)}


def by_kinds(s: Tensor, judged: Tensor) -> dict[str, float]:
    """Preference accuracy by kinds of the two pictures; both [P, K].

    "overall" is the mean of sample against sample and of render against sample, where renders are of the prompt and of
    near-misses.
    """
    result = {}
    kinds = {"sample": ["sample"], "prompt render": ["render"], "near-miss render": ["near"]}
    kinds |= {"render": ["render", "near"], "broken": ["broken", "broken sample"]}
    member = {name: torch.tensor([kind in of for kind in KINDS]) for name, of in kinds.items()}
    sides = [(k, "sample") for k in kinds] + [("near-miss render", "prompt render"), ("broken", "prompt render")]
    for a, b in sides:
        mask = member[a][:, None] & member[b][None]
        result[f"{a} / {b}"] = float(accuracy(s, judged, mask | mask.T))
    result["overall"] = (result["sample / sample"] + result["render / sample"]) / 2
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
    after = measure(load(arguments.output / "tiny-clip")[0].eval(), words, test, scenes)
    found = {"before": before, "after": after}
    add_log(STAGE, arguments.work / "log.jsonl", arguments.output, found)
    card.write(arguments.output)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
