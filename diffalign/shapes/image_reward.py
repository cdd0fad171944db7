"""`python -m diffalign.shapes.image_reward`: tiny-image-reward, a BLIP that prefers what the exact detector prefers.

ImageReward's recipe (arXiv 2304.05977) without people. BLIP is there first: the image tower is tiny-dino's, and a new
text encoder learns to look at its patches and to tell captions of a scene from near misses, by cross-entropy, while the
tower rests. Near misses that only swap two colours would be learnt late, so a linear head on the words must tell where
the shape that they name is and what colour it has. Then all of it learns from pairs of pictures for one prompt by the
Bradley-Terry loss on what the detector prefers, as tiny-clip does in `preference`, whose pictures these are; a linear
head on the patches tells what the detector finds in them, and captions go on. Both heads are thrown away. Run it after
`dino`; interrupted, it continues.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.rewards.image_reward import TINY
from diffalign.shapes import blip_network, card, preference, prompts, questions, samples, world
from diffalign.shapes.blip_network import Network
from diffalign.shapes.fitting import Fit, Losses, batches, fit
from diffalign.shapes.preference import accuracy, bradley_terry, local_loss, normalise
from diffalign.shapes.preference_data import CLASSES, Bank, draw, fill
from diffalign.shapes.publish import add_log
from diffalign.shapes.vlm import picture

if TYPE_CHECKING:
    from transformers import BertTokenizer

MATCH, STAGE = "image_reward_match", "image_reward"
MATCH_PLAN = Fit(steps=2500, lr=1.5e-3, weight_decay=0.05, save_every=200)
PLAN = Fit(steps=1600, lr=4e-4, weight_decay=0.05, ema=0.995, save_every=100)
SEED = 20261124
SCENES, SAID = 20_000, 3  # scenes; captions of each that are true, and as many that are not
MATCHED = 32  # scenes a step
GROUPS, OF_SAMPLES, OF_OTHERS, CAPTIONED = 16, 3, 2, 16  # prompts a step, pictures of each, scenes beside them
CAPTIONS, LOCAL = 0.5, 2.0  # weights of the losses beside Bradley-Terry's
WHERE, COLOR = 10.0, 0.5  # and of those beside the captions' own


@dataclass(frozen=True)
class Captions:
    """Scenes and what is said of them: first `SAID` true captions of each, then as many near misses."""

    images: Tensor  # uint8 [N, 3, 64, 64]
    texts: list[list[str]]
    where: Tensor  # [N, 4, 2]: centre of the one object of each shape, in [0, 1]; NaN if there is none or another
    color: Tensor  # [N, 4]: which colour it has


def captioned(n: int, seed: int) -> Captions:
    rng, catalogue = random.Random(seed), prompts.catalogue()
    images, texts = [], []
    where = torch.full((n, len(world.SHAPES), 2), float("nan"))
    color = torch.zeros(n, len(world.SHAPES), dtype=torch.long)
    for i in range(n):
        meta, objects = prompts.sample(rng, catalogue)
        true = [questions.caption(t) for t in questions.truths(objects)]
        wrong = questions.choose(rng, questions.near_misses(meta["include"], objects), SAID)
        said = [meta["prompt"], *(rng.choice(prompts.OPENINGS) + rng.choice(true) for _ in range(SAID - 1))]
        texts.append(said + [rng.choice(prompts.OPENINGS) + text for text in wrong])
        images.append((picture(objects) * 255).round().to(torch.uint8))
        shapes = [o.shape for o in objects]
        for o in objects:
            if shapes.count(o.shape) == 1:
                j = world.SHAPES.index(o.shape)
                where[i, j] = torch.tensor([o.x, o.y]) / world.SIZE
                color[i, j] = list(world.COLORS).index(o.color)
    return Captions(torch.stack(images), texts, where, color)


class Spoken:
    """Texts as the tokenizer gives them, each once."""

    def __init__(self, words: BertTokenizer, texts: Sequence[str]) -> None:
        self.words, self.row = words, {text: i for i, text in enumerate(dict.fromkeys(texts))}
        self.known = words(list(self.row), padding=True, return_tensors="pt")

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        rows = torch.tensor([self.row[text] for text in texts])
        found = {name: self.known[name][rows] for name in ("input_ids", "attention_mask")}
        longest = int(found["attention_mask"].sum(1).max())
        return {name: value[:, :longest] for name, value in found.items()}


def caption_loss(
    network: Network, pointer: nn.Linear, tokens: Tensor, data: Captions, k: Tensor, spoken: Spoken
) -> Losses:
    """Cross-entropy of "the caption is true" over all captions of the scenes k, whose image tokens are [N, 65, D]; and
    how well `pointer` tells from the word for a shape where that is, and its colour."""
    text = spoken([text for i in k.tolist() for text in data.texts[i]])
    scores, states = network.judge(tokens.repeat_interleave(2 * SAID, 0), text)
    s = scores.float().view(-1, 2, SAID)
    true = torch.tensor([1.0, 0.0]).view(1, 2, 1).expand_as(s)
    ids = torch.tensor(spoken.words.convert_tokens_to_ids(list(world.SHAPES)))
    row, column, shape = (text["input_ids"][..., None] == ids).nonzero(as_tuple=True)
    scene = k[row // (2 * SAID)]
    there = ~data.where[scene, shape, 0].isnan()
    told = pointer(states[row[there], column[there]]).float()
    scene, shape = scene[there], shape[there]
    losses = {
        "captions": F.binary_cross_entropy_with_logits(s, true),
        "where": F.mse_loss(told[:, :2], data.where[scene, shape]),
        "color": F.cross_entropy(told[:, 2:], data.color[scene, shape]),
    }
    right = ((s > 0) == (true > 0)).float().mean()
    total = losses["captions"] + WHERE * losses["where"] + COLOR * losses["color"]
    return {"loss": total, **losses, "right": right}


def match(network: Network, pointer: nn.Linear, spoken: Spoken, data: Captions, folder: Path) -> None:
    """The text encoder learns to look; the tower rests, so every picture passes it once."""
    seen = looked(network, data.images)

    def loss(step: int, generator: torch.Generator) -> Losses:
        k = torch.randint(len(seen), (MATCHED,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            return caption_loss(network, pointer, seen[k], data, k, spoken)

    parts = nn.ModuleDict({"text": network.text, "mlp": network.mlp, "pointer": pointer})
    fit(MATCH, parts, loss, MATCH_PLAN, folder)


@torch.no_grad()
def looked(network: Network, images: Tensor) -> Tensor:
    """bf16 image tokens of uint8 pictures [N, 3, 64, 64]."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([network.look(normalise(images[i])).bfloat16() for i in batches(len(images), 128)])


def prefer(network: Network, pointer: nn.Linear, spoken: Spoken, bank: Bank, data: Captions, folder: Path) -> None:
    local = nn.Linear(blip_network.WIDTH, len(CLASSES))

    def loss(step: int, generator: torch.Generator) -> Losses:
        drawn = draw(bank, GROUPS, OF_SAMPLES, OF_OTHERS, bool(step % 2), generator)
        n, each = len(drawn.images), OF_SAMPLES + OF_OTHERS
        k = torch.randint(len(data.images), (CAPTIONED,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = network.look(normalise(torch.cat([drawn.images, data.images[k]])))
            asked = spoken.words([t for t in drawn.prompts for _ in range(each)], padding=True, return_tensors="pt")
            s = network.judge(tokens[:n], asked)[0].float().view(GROUPS, each)
            captions = caption_loss(network, pointer, tokens[n:], data, k, spoken)
            seen = local_loss(local(tokens[:n, 1:]).float(), drawn.found)
        preferred = bradley_terry(s, drawn.scores)
        total = preferred + CAPTIONS * captions["loss"] + LOCAL * seen
        of_pairs = {"preference": preferred, "local": seen, "accuracy": accuracy(s.detach(), drawn.scores)}
        return {**captions, **of_pairs, "loss": total}

    parts = nn.ModuleDict({"network": network, "pointer": pointer, "local": local})
    fit(STAGE, parts, loss, PLAN, folder)


@torch.no_grad()
def score(network: Network, words: BertTokenizer, images: Tensor, texts: Sequence[str]) -> Tensor:
    """Of pictures uint8 [P, K, 3, 64, 64] for P texts, before it is standardised, [P, K]."""
    parts = []
    for i in batches(len(texts), 32):
        tokens = network.look(normalise(images[i].flatten(0, 1)))
        asked = words([t for t in texts[i] for _ in range(images.shape[1])], padding=True, return_tensors="pt")
        parts.append(network.judge(tokens, asked)[0].view(-1, images.shape[1]))
    return torch.cat(parts)


@torch.no_grad()
def measure(network: Network, words: BertTokenizer, bank: Bank, data: Captions) -> dict[str, float]:
    """Preference accuracy by kinds of the two pictures, and how often a true caption beats a near miss."""
    found = preference.by_kinds(score(network, words, bank.images, [m["prompt"] for m in bank.metas]), bank.scores)
    wins = []
    for i in batches(len(data.texts), 32):
        asked = words([t for texts in data.texts[i] for t in texts], padding=True, return_tensors="pt")
        tokens = network.look(normalise(data.images[i])).repeat_interleave(2 * SAID, 0)
        s = network.judge(tokens, asked)[0].view(-1, 2, SAID)
        wins.append((s[:, 0] > s[:, 1]).float())
    return found | {"caption / near miss": float(torch.cat(wins).mean())}


def main() -> None:
    from transformers import Dinov2Model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="samples, checkpoints and log")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights", help=f"gets {TINY}")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)

    words = blip_network.words()
    dino: Any = Dinov2Model.from_pretrained(arguments.output / "tiny-dino", dtype=torch.float32)
    network = blip_network.from_dino(dino, blip_network.vocabulary(words))
    data, fresh = captioned(SCENES, SEED), captioned(1000, SEED + 1)
    spoken = Spoken(words, [t for texts in data.texts for t in texts])
    metas = samples.prompted()
    pointer = nn.Linear(blip_network.WIDTH, 2 + len(world.COLORS))
    match(network, pointer, spoken, data, arguments.work)
    test, _ = preference.held_out(arguments.work)
    found = {"captions alone": measure(network.eval(), words, test, fresh)}
    bank = fill(metas, samples.draw(metas, arguments.work / "samples-train.pt", 1), preference.SEED)
    prefer(network.train(), pointer, spoken, bank, data, arguments.work)
    blip_network.export(network, words, arguments.output / TINY)
    found["preferences"] = measure(network.eval(), words, test, fresh)
    for stage in (MATCH, STAGE):
        add_log(stage, arguments.work / "log.jsonl", arguments.output, found if stage == STAGE else None)
    card.write(arguments.output)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
