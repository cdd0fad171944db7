"""The recipe that makes tiny-sd3 and tiny-clip from nothing: `python -m diffalign.shapes.pretrain`.

Scenes -> VAE -> two CLIP text encoders with an image tower -> rectified-flow transformer -> diffusers folder. About
two hours on two CPU cores. Interrupt it at any time and run it again: it continues.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.rewards._preprocess import normalise
from diffalign.shapes import card, networks, prompts, tokenizer, world
from diffalign.shapes.export import export, first_text_encoder, measure, pipeline
from diffalign.shapes.fitting import Fit, Losses, atomic_save, batches, fit
from diffalign.shapes.publish import add_log

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SCENES = 100_000
SEED = 20261121
PLANS = {
    "vae": Fit(steps=1800, lr=2e-3, save_every=300),
    "clip": Fit(steps=1500, lr=1e-3, weight_decay=0.05, save_every=300),
    "transformer": Fit(steps=12_000, lr=1e-3, warmup=300, decay=0.4, betas=(0.9, 0.99), ema=0.999),
}


@dataclass(frozen=True)
class Data:
    images: Tensor  # [N, 3, 64, 64] uint8
    texts: list[str]  # unique prompts
    text: Tensor  # [N] row of each scene in `texts`
    meaning: Tensor  # [N] equal for prompts that differ only in their opening words


def draw_scenes(n: int, seed: int) -> Data:
    rng, catalogue = random.Random(seed), prompts.catalogue()
    images = np.empty((n, 3, world.SIZE, world.SIZE), np.uint8)
    rows: dict[str, int] = {}
    meanings: dict[str, int] = {}
    text, meaning = [], []
    for i in range(n):
        meta, objects = prompts.sample(rng, catalogue)
        images[i] = world.render(objects).transpose(2, 0, 1)
        text.append(rows.setdefault(meta["prompt"], len(rows)))
        meaning.append(meanings.setdefault(str(meta["include"]), len(meanings)))
    return Data(torch.from_numpy(images), list(rows), torch.tensor(text), torch.tensor(meaning))


def fit_vae(data: Data, folder: Path) -> Any:
    """L1 + MSE reconstruction with a light KL, then latents are scaled to zero mean and unit variance."""
    vae = networks.vae().to(memory_format=torch.channels_last)

    def loss(step: int, generator: torch.Generator) -> Losses:
        x = data.images[torch.randint(len(data.images), (32,), generator=generator)].float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            reconstruction = vae.decode(z).sample.float()
        l1, mse = F.l1_loss(reconstruction, x), F.mse_loss(reconstruction, x)
        kl = posterior.kl().mean() / z[0].numel()
        return {"loss": l1 + 0.5 * mse + 1e-4 * kl, "l1": l1, "kl": kl}

    fit("vae", vae, loss, PLANS["vae"], folder)
    return vae.eval().requires_grad_(False)


def contrastive(image: Tensor, text: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE; `same` [B, B] marks pairs whose prompts mean the same, which share the target."""
    logits = scale.exp() * F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
    target = same.float() / same.sum(1, keepdim=True)
    return -(target * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1).mean() / 2


def fit_clip(data: Data, ids: Tensor, words: CLIPTokenizer, folder: Path) -> Any:
    """Two text encoders of different depth and activation against one image tower."""
    models: Any = nn.ModuleDict({"clip": networks.clip(words), "second": networks.text_encoder(words, 4, "gelu")})
    clip, second = models["clip"], models["second"]

    def loss(step: int, generator: torch.Generator) -> Losses:
        k = torch.randint(len(data.images), (128,), generator=generator)
        pixels = normalise(data.images[k].float() / 255)
        same = data.meaning[k][:, None] == data.meaning[k][None]
        with torch.autocast("cpu", torch.bfloat16):
            out = clip(input_ids=ids[data.text[k]], pixel_values=pixels)
            other = second(input_ids=ids[data.text[k]]).text_embeds
        first = contrastive(out.image_embeds, out.text_embeds, same, clip.logit_scale)
        also = contrastive(out.image_embeds, other, same, clip.logit_scale)
        hit = same.gather(1, out.logits_per_image.argmax(1, keepdim=True)).float().mean()
        return {"loss": first + also, "first": first, "second": also, "top1": hit}

    fit("clip", models, loss, PLANS["clip"], folder)
    return models.eval().requires_grad_(False)


def encode_text(models: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As StableDiffusion3Pipeline does: penultimate hidden states side by side, pooled projections side by side."""
    encoders = [first_text_encoder(models["clip"]), models["second"]]
    hidden, pooled = [], []
    for encoder in encoders:
        parts = [encoder(input_ids=ids[i], output_hidden_states=True) for i in batches(len(ids), 512)]
        hidden.append(torch.cat([p.hidden_states[-2] for p in parts]))
        pooled.append(torch.cat([p.text_embeds for p in parts]))
    return torch.cat(hidden, -1), torch.cat(pooled, -1)


def fit_transformer(latents: Tensor, data: Data, hidden: Tensor, pooled: Tensor, folder: Path, compiled: bool) -> Any:
    """Rectified flow, logit-normal times, one prompt in ten dropped (the last row of `hidden` is the empty prompt).

    Every 32nd batch sees the 256 zero tokens that StableDiffusion3Pipeline appends when there is no T5, so that a plain
    `pipe(prompt)` works; elsewhere they are left out, which is about three times as fast.
    """
    model = networks.transformer()
    if compiled:
        for block in model.transformer_blocks:
            block.compile(dynamic=False)  # two kinds of block, two lengths of context

    def loss(step: int, generator: torch.Generator) -> Losses:
        size = 64 if step % 32 else 16
        k = torch.randint(len(latents), (size,), generator=generator)
        x0 = latents[k].float()
        eps = torch.randn(x0.shape, generator=generator)
        s = torch.randn(size, generator=generator).sigmoid()
        at = s.view(-1, 1, 1, 1)
        row = data.text[k].masked_fill(torch.rand(size, generator=generator) < 0.1, len(hidden) - 1)
        context = hidden[row]
        if step % 32 == 0:
            context = F.pad(context, (0, 0, 0, 256))
        with torch.autocast("cpu", torch.bfloat16):
            v = model(
                hidden_states=(1 - at) * x0 + at * eps,
                timestep=1000 * s,
                encoder_hidden_states=context,
                pooled_projections=pooled[row],
                return_dict=False,
            )[0]
        return {"loss": F.mse_loss(v.float(), eps - x0)}

    fit("transformer", model, loss, PLANS["transformer"], folder)
    return model.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="checkpoints and log")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights", help="finished models")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks (needs a C++ compiler)")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)

    data = draw_scenes(SCENES, SEED)
    words = tokenizer.build()
    texts = [*data.texts, ""]
    ids = words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    vae = fit_vae(data, arguments.work)
    models = fit_clip(data, ids, words, arguments.work)
    stored = arguments.work / "latents.pt"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        if not stored.exists():
            parts = [vae.encode(data.images[i].float() / 127.5 - 1).latent_dist.mean for i in batches(SCENES, 256)]
            atomic_save(torch.cat(parts).float(), stored)
        latents = torch.load(stored, weights_only=True)
        hidden, pooled = (t.float() for t in encode_text(models, ids))
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    transformer = fit_transformer((latents - shift) * scale, data, hidden, pooled, arguments.work, arguments.compile)
    pipe = pipeline(words, vae, models, transformer, shift, scale)
    export(arguments.output, pipe, models, words, arguments.work / "log.jsonl")
    scores = measure(arguments.output / "tiny-sd3")
    add_log("transformer", arguments.work / "log.jsonl", arguments.output, scores)
    card.write(arguments.output)
    print(f"wrote {arguments.output}; held-out GenEval {scores['strict']['overall']:.3f}")


if __name__ == "__main__":
    main()
