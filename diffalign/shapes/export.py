"""From trained networks to the folders that ship: `tiny-sd3` (diffusers), `tiny-clip` (transformers)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffalign.pipelines import SIDECAR
from diffalign.rewards._preprocess import CLIP_MEAN, CLIP_STD
from diffalign.shapes import networks, prompts, world
from diffalign.shapes.prompts import TAGS

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline
    from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

IMAGES_PER_PROMPT, STEPS = 4, 20  # of the evaluation on the card


def first_text_encoder(clip: CLIPModel) -> CLIPTextModelWithProjection:
    """The text half of a CLIP as the class that StableDiffusion3Pipeline expects."""
    from transformers import CLIPTextModelWithProjection

    encoder = CLIPTextModelWithProjection(clip.config.text_config)
    wanted = encoder.state_dict().keys()
    encoder.load_state_dict({k: v for k, v in clip.state_dict().items() if k in wanted})
    return encoder.eval().requires_grad_(False)


def pipeline(
    words: CLIPTokenizer, vae: Any, models: Any, transformer: Any, shift: float, scale: float
) -> StableDiffusion3Pipeline:
    """The trained parts as a diffusers pipeline; latents are shifted and scaled to zero mean and unit variance."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    text_encoder_3, tokenizer_3 = networks.silent_t5()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    parts = {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),
        "vae": vae,
        "text_encoder": first_text_encoder(models["clip"]),
        "tokenizer": words,
        "text_encoder_2": models["second"],
        "tokenizer_2": words,
        "text_encoder_3": text_encoder_3,
        "tokenizer_3": tokenizer_3,
    }
    return StableDiffusion3Pipeline(**parts)


def export(output: Path, pipe: StableDiffusion3Pipeline, models: Any, words: CLIPTokenizer, log: Path) -> None:
    """Write all folders beside `output` and put them in its place when they are complete.

    Weights have fp16 precision. The text encoders are stored as fp32 all the same: transformers loads them as stored,
    and the pipeline would mix types.
    """
    from transformers import CLIPImageProcessor

    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.transformer.half()
    pipe.vae.half()
    pipe.text_encoder.half().float()
    pipe.text_encoder_2.half().float()
    pipe.save_pretrained(temporary / "tiny-sd3")
    (temporary / "tiny-sd3" / SIDECAR).write_text(json.dumps({"max_sequence_length": 0}) + "\n")
    side = {"height": world.SIZE, "width": world.SIZE}
    processor = CLIPImageProcessor(
        size={"shortest_edge": world.SIZE}, crop_size=side, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    for part in (models["clip"].half(), processor, words):
        part.save_pretrained(temporary / "tiny-clip")
    shutil.copy(log, temporary / "pretrain_log.jsonl")
    if output.exists():
        shutil.rmtree(output)
    os.replace(temporary, output)


def measure(folder: Path, micro_batch: int = 64) -> dict[str, dict[str, float]]:
    """{'strict' | 'correct': {tag: mean, 'overall': mean of the tags}} of 240 held-out prompts x 4 images."""
    from diffalign import pipelines, rewards
    from diffalign.rollout import collect, sample_seed
    from diffalign.sections import Sampling

    loaded = pipelines.load(folder)
    sampling = Sampling(steps=STEPS, kernel="ode", eta=0.0, height=world.SIZE, width=world.SIZE)
    test = prompts.test_prompts()
    pairs = [(p, j) for p in range(len(test)) for j in range(IMAGES_PER_PROMPT)]
    seeds = torch.tensor([sample_seed(0, 0, p, j) for p, j in pairs])
    metadata = [test[p] for p, _ in pairs]
    rollout = collect(loaded, metadata, torch.tensor([p for p, _ in pairs]), seeds, sampling, (), micro_batch)
    assert rollout.images is not None
    result = {}
    for mode in ("strict", "correct"):
        scorer = rewards.build([{"name": "geneval", "mode": mode}])
        scores = rewards.score(scorer, rollout.images, rollout.prompts, metadata, micro_batch)["geneval"].scores
        means = {tag: float(scores[[m["tag"] == tag for m in metadata]].mean()) for tag in TAGS}
        result[mode] = means | {"overall": sum(means.values()) / len(means)}
    return result
