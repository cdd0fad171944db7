"""The recipe of `tiny-vlm`, a small Qwen3-VL that knows shapes: `python -m diffalign.shapes.vlm`.

It learns to caption a picture and to answer two kinds of question about it, whether it shows a prompt and whether
anything in it is broken, from rendered scenes alone. About half an hour on one CPU core; interrupt it at any time and
run it again: it continues.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.shapes import card, chat, prompts, questions, world
from diffalign.shapes.chat import END, GRID, IMAGE, MERGE, PAD, PATCH, SIDE, TIME, VIDEO, VISION_END, VISION_START, Chat
from diffalign.shapes.corruptions import changed, corrupt
from diffalign.shapes.fitting import Fit, Losses, batches, fit
from diffalign.shapes.publish import add_log, replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

    from diffalign.shapes.world import Object

NAME = "tiny-vlm"
SEED = 20261122
VISION_PLAN = Fit(steps=800, lr=1.5e-3, decay=0.3, weight_decay=0.05, save_every=100)
PLAN = Fit(steps=1800, lr=1.2e-3, decay=0.5, betas=(0.9, 0.98), weight_decay=0.05, ema=0.997, save_every=100)
BATCH, TALKS = 32, 16  # pictures a step, of each stage
CAPTIONS = 3  # at most, per picture
CLUTTER, BROKEN = 0.06, 0.18  # shares of pictures that no prompt describes, and that are corrupted
CLASSES = (len(world.COLORS) + 1, len(world.SHAPES) + 1, 2, SIDE, SIDE, 4)  # of the first columns of `questions.cells`


def network(vocabulary: int) -> Qwen3VLForConditionalGeneration:
    """A vision tower of four blocks on 8x8 patches, 16 image tokens, one DeepStack level, a decoder of four layers."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "pad_token_id": PAD,
        "initializer_range": 0.04,
    }
    vision = {
        "depth": 4,
        "initializer_range": 0.04,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TIME,
        "out_hidden_size": 128,
        "num_position_embeddings": GRID * GRID,
        "deepstack_visual_indexes": [1],
    }
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    ids |= {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [END, PAD]
    model.generation_config.pad_token_id = PAD
    return model


def picture(objects: Sequence[Object]) -> Tensor:
    return torch.tensor(world.render(objects)).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Example:
    image: Tensor  # [3, 64, 64] in [0, 1]
    tree: chat.Tree
    what: list[list[float]]  # `questions.cells`, one row an image token
    fault: Tensor  # bool [tokens]: the tokens that show a fault


def draw(rng: random.Random, catalogue: Any, talk: Chat) -> Example:
    """A picture with its captions, or a cluttered or a broken one, and questions with their answers."""
    kind = rng.random()
    opening = rng.choice(prompts.OPENINGS)
    sound = torch.zeros(SIDE * SIDE, dtype=torch.bool)
    faults = [(questions.ask(rng, questions.FAULTY), False)] if rng.random() < 0.3 else []
    if kind < CLUTTER:
        objects, part = questions.clutter(rng)
        tree = talk.tree([], [(_match(rng, opening + part), False), *faults], rng)
        return Example(picture(objects), tree, questions.cells(objects, SIDE), sound)
    meta, objects = prompts.sample(rng, catalogue)
    what, image = questions.cells(objects, SIDE), picture(objects)
    if kind < CLUTTER + BROKEN:
        broken = corrupt(image, rng)
        fault = F.avg_pool2d(changed(image, broken).float()[None], PATCH * MERGE).flatten() > 0.01
        return Example(broken, talk.tree([], [(questions.ask(rng, questions.FAULTY), True)], rng), what, fault)
    said = [questions.caption(t) for t in questions.truths(objects)]
    captions = [rng.choice(prompts.OPENINGS) + text for text in rng.sample(said, min(CAPTIONS, len(said)))]
    misses = questions.near_misses(meta["include"], objects)
    wrong = questions.choose(rng, misses, 1 + (rng.random() < 0.5))
    answers = [(_match(rng, opening + text), False) for text in wrong]
    answers += [(_match(rng, rng.choice(prompts.OPENINGS) + rng.choice(said)), True) for _ in range(3 - len(wrong))]
    return Example(image, talk.tree(captions, answers + faults, rng), what, sound)


def _match(rng: random.Random, prompt: str) -> str:
    return questions.ask(rng, questions.MATCH).replace("{}", prompt)


def roughen(images: Tensor, generator: torch.Generator) -> Tensor:
    """Slight noise and, for one in three, slight blur: what a good sample of a diffusion model has as well."""
    n = len(images)
    blur = torch.rand(n, 1, 1, 1, generator=generator) * (torch.rand(n, 1, 1, 1, generator=generator) < 0.33)
    images = torch.lerp(images, F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), 0.6 * blur)
    scale = 0.025 * torch.rand(n, 1, 1, 1, generator=generator)
    return (images + scale * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def probe(width: int) -> nn.Linear:
    """What an image token says by itself; only training has it."""
    return nn.Linear(width, sum(CLASSES) + 5)


def seeing(said: Tensor, examples: Sequence[Example]) -> Losses:
    """Errors of the probe [tokens of all images, ...]; what a broken object is remains unasked."""
    fault = torch.stack([e.fault for e in examples])
    whole = ~fault.any(1, keepdim=True).expand_as(fault).flatten()
    truth = torch.tensor([e.what for e in examples]).flatten(0, 1)[whole]
    *classes, away, broken = said.float().split([*CLASSES, 4, 1], dim=1)
    errors = [F.cross_entropy(c[whole], truth[:, k].long()) for k, c in enumerate(classes)]
    errors += [F.mse_loss(away[whole], truth[:, -4:])]
    errors += [F.binary_cross_entropy_with_logits(broken[:, 0], fault.flatten().float())]
    return dict(zip(("color", "shape", "middle", "row", "column", "count", "away", "fault"), errors, strict=True))


def fit_vision(model: Qwen3VLForConditionalGeneration, head: nn.Linear, talk: Chat, folder: Path, plan: Fit) -> None:
    """The vision tower alone first: far cheaper than learning to see through captions."""
    catalogue = prompts.catalogue()
    parts: Any = nn.ModuleDict({"visual": model.model.visual, "head": head})
    grid = torch.tensor([[1, GRID, GRID]]).expand(BATCH, -1)

    def loss(step: int, generator: torch.Generator) -> Losses:
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        drawn = [draw(rng, catalogue, talk) for _ in range(BATCH)]
        images = roughen(torch.stack([e.image for e in drawn]), generator)
        with torch.autocast("cpu", torch.bfloat16):
            said = head(parts["visual"](chat.patchify(images), grid_thw=grid).pooler_output)
        errors = seeing(said, drawn)
        return {"loss": torch.stack(list(errors.values())).sum(), **errors}

    fit("vlm_vision", parts, loss, plan, folder)


def fit_vlm(model: Qwen3VLForConditionalGeneration, head: nn.Linear, talk: Chat, folder: Path, plan: Fit) -> None:
    """Cross-entropy of captions, that of answers, whose two spellings share the probability, and the probe's errors."""
    model.model.language_model.config._attn_implementation = "eager"  # faster than sdpa with a mask on a CPU
    catalogue = prompts.catalogue()
    body, grid = model.model, torch.tensor([[1, GRID, GRID]]).expand(TALKS, -1)

    def loss(step: int, generator: torch.Generator) -> Losses:
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        drawn = sorted((draw(rng, catalogue, talk) for _ in range(TALKS)), key=lambda e: len(e.tree.ids))
        images = roughen(torch.stack([e.image for e in drawn]), generator)
        parts = []
        for at in batches(TALKS, TALKS // 2):  # the short ones first: less padding
            batch = chat.pack([e.tree for e in drawn[at]], len(talk.head))
            label, other = batch.pop("label"), batch.pop("other")
            with torch.autocast("cpu", torch.bfloat16):
                seen = body.get_image_features(chat.patchify(images[at]), grid[at], return_dict=True)
                out = body(**batch, mm_encoder_outputs={"image": seen}, use_cache=False).last_hidden_state
                logits, said = model.lm_head(out[label >= 0]), head(torch.cat(seen.pooler_output))
            parts.append((logits, label[label >= 0], other[label >= 0], said))
        logits, label, other, said = (torch.cat(p) for p in zip(*parts, strict=True))
        logp = logits.float().log_softmax(-1)
        nats = -(logp.gather(1, label[:, None]) + logp.gather(1, other[:, None]))[:, 0] / 2
        answer = label != other
        caption, answers = nats[~answer].mean(), nats[answer].mean() - math.log(2)
        best = logp[answer].argmax(1)
        right = ((best == label[answer]) | (best == other[answer])).float().mean()
        sight = torch.stack(list(seeing(said, drawn).values())).sum()
        total = caption + answers + 0.3 * sight
        return {"loss": total, "caption": caption, "answer": answers, "right": right, "sight": sight}

    fit("vlm", nn.ModuleDict({"vlm": model, "head": head}), loss, plan, folder)


def measure(model: Any, talk: Chat, per_tag: int, seed: int) -> dict[str, dict[str, float]]:
    """Shares of right decisions on new pictures, by category.

    echo: the prompt has the highest mean log-probability of 8, of which 7 are near misses. match: yes to the prompt and
    no to a near miss. broken: no for the picture and yes for it corrupted.
    """
    rng, catalogue = random.Random(f"held out {seed}"), prompts.catalogue()
    right: dict[str, dict[str, float]] = {"echo": {}, "match": {}, "broken": {}}
    for tag in prompts.TAGS:
        images, eight = [], []
        for _ in range(per_tag):
            text, include = rng.choice(catalogue[tag])
            objects = prompts.scene(rng, include)
            opening = rng.choice(prompts.OPENINGS)
            misses = questions.choose(rng, questions.near_misses(include, objects), 7)
            images.append(picture(objects))
            eight.append([opening + t for t in [text, *misses]])
        clean, spoilt = torch.stack(images), torch.stack([corrupt(image, rng) for image in images])
        n, faulty = len(images), [questions.FAULTY[0] + questions.ANSWER]
        asked = [[questions.MATCH[0].replace("{}", e[k]) + questions.ANSWER for e in eight] for k in (0, 1)]
        best, yes, no, whole, broken = [], [], [], [], []
        for at in batches(n, 16):
            m = len(clean[at])
            scores = chat.echo(model, talk, clean[at].repeat_interleave(8, 0), [t for e in eight[at] for t in e])
            best.append(scores.view(m, 8).argmax(1) == 0)
            yes.append(chat.says_yes(model, talk, clean[at], asked[0][at]) > 0.5)
            no.append(chat.says_yes(model, talk, clean[at], asked[1][at]) < 0.5)
            whole.append(chat.says_yes(model, talk, clean[at], faulty * m) < 0.5)
            broken.append(chat.says_yes(model, talk, spoilt[at], faulty * m) > 0.5)
        for name, hits in (("echo", best), ("match", yes + no), ("broken", whole + broken)):
            right[name][tag] = round(float(torch.cat(hits).float().mean()), 4)
    return {name: by_tag | {"mean": round(sum(by_tag.values()) / len(by_tag), 4)} for name, by_tag in right.items()}


def export(model: Any, words: PreTrainedTokenizerFast, folder: Path) -> None:
    """A folder in transformers' form with fp16 weights."""
    from transformers import Qwen2VLImageProcessorPil

    half = network(len(words))
    half.load_state_dict(model.state_dict())
    pixels = world.SIZE * world.SIZE
    processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=TIME,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": pixels, "longest_edge": pixels},
    )
    with replacing(folder) as temporary:
        for part in (half.half(), words, processor):
            part.save_pretrained(temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="checkpoint and log")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights", help="finished models")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    words = chat.tokenizer()
    talk, model = Chat(words), network(len(words))
    head = probe(model.config.text_config.hidden_size)
    fit_vision(model, head, talk, arguments.work, VISION_PLAN)
    fit_vlm(model, head, talk, arguments.work, PLAN)
    export(model.eval(), words, arguments.output / NAME)
    scores = measure(chat.load(arguments.output / NAME), talk, 200, SEED)
    for stage in ("vlm_vision", "vlm"):
        add_log(stage, arguments.work / "log.jsonl", arguments.output, scores if stage == "vlm" else None)
    card.write(arguments.output)
    for name, by_tag in scores.items():
        print(f"{name}: " + ", ".join(f"{tag} {value:.3f}" for tag, value in by_tag.items()))


if __name__ == "__main__":
    main()
