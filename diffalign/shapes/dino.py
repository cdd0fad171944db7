"""`python -m diffalign.shapes.dino`: tiny-dino, a small Dinov2Model that knows the shapes world and its faults.

Distillation on the world. It starts as the image tower of tiny-clip; then the renderer and the detector say what is
where, and linear heads on the patch features and on CLS must tell it. Patches learn how much of them each colour and
shape covers and how much of them is broken, CLS how many objects of each kind there are and whether the picture is
faulty. A quarter of the patches are hidden in every second picture and all must give back their pixels, as in masked
image modelling (arXiv 2111.06377), which keeps what no label asks for, such as style. The heads are thrown away. Run
it after `preference`; interrupted, it continues.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.shapes import prompts, samples, world
from diffalign.shapes.corruptions import changed, corrupt
from diffalign.shapes.detector import detect
from diffalign.shapes.export import CLIP_MEAN, CLIP_STD
from diffalign.shapes.fitting import Fit, Losses, batches, fit
from diffalign.shapes.publish import add_log, replacing
from diffalign.shapes.world import BACKGROUND, COLORS, SHAPES, Object

if TYPE_CHECKING:
    from transformers import Dinov2Model

STAGE = "dino"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which DINOv2 uses
PATCH, GRID = 8, world.SIZE // 8
PLAN = Fit(steps=500, lr=3e-4, weight_decay=0.05, ema=0.99, save_every=100)
SEED = 20261123
SCENES, BROKEN, BROKEN_SAMPLES = 12_000, 6_000, 1_500
BATCH = (10, 6, 16, 10, 6)  # clean, restyled, broken, samples, broken samples
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
    return x.unflatten(-2, (GRID, PATCH)).unflatten(-1, (GRID, PATCH)).mean((-3, -1))


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


def normalise(images: Tensor) -> Tensor:
    """[N, 3, H, W] in [0, 1] -> what the model expects."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def network() -> Dinov2Model:
    """Five layers of width 128 on 64 patches and CLS, 0.9 M parameters."""
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(
        Dinov2Config(
            image_size=world.SIZE,
            patch_size=PATCH,
            hidden_size=128,
            num_hidden_layers=5,
            num_attention_heads=4,
            mlp_ratio=3,
            hidden_act="quick_gelu",
        )
    )


@torch.no_grad()
def from_clip(vision: Any, images: Tensor) -> Dinov2Model:
    """`network()` with the weights of CLIP's image tower, whose four layers are built like those of Dinov2.

    CLIP's other colour statistics and the norm before its first layer are folded into the embeddings, the norm with the
    spread that patches of `images` uint8 [N, 3, 64, 64] have there on average. The fifth layer is new and starts small.
    """
    model = network()
    old, new = vision.state_dict(), model.state_dict()
    mean, std, clip_mean, clip_std = (torch.tensor(t).view(3, 1, 1) for t in (MEAN, STD, CLIP_MEAN, CLIP_STD))
    weight, place = old["embeddings.patch_embedding.weight"], old["embeddings.position_embedding.weight"]
    gain, offset = old["pre_layrnorm.weight"], old["pre_layrnorm.bias"]
    seen = vision.embeddings((images.float() / 255 - clip_mean) / clip_std)
    spread = seen.std(-1).mean(0)
    spread = torch.cat([spread[:1], spread[1:].mean().expand(len(spread) - 1)])

    def folded(x: Tensor, by: Tensor) -> Tensor:
        return gain * (x - x.mean(-1, keepdim=True)) / by

    kernel = (weight * std / clip_std).flatten(1)
    new["embeddings.patch_embeddings.projection.weight"] = folded(kernel.T, spread[1]).T.view_as(weight)
    shift = (weight * (mean - clip_mean) / clip_std).sum((1, 2, 3))
    new["embeddings.patch_embeddings.projection.bias"] = folded(shift, spread[1])
    new["embeddings.position_embeddings"] = (folded(place, spread[:, None]) + offset)[None]
    new["embeddings.cls_token"] = folded(old["embeddings.class_embedding"], spread[0]).view(1, 1, -1)
    for i in range(vision.config.num_hidden_layers):
        a, b = f"encoder.layers.{i}.", f"encoder.layer.{i}."
        names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        names |= {f"self_attn.{k}": f"attention.{k}" for k in ("q_proj", "k_proj", "v_proj")}
        for x, y in (names | {"self_attn.out_proj": "attention.o_proj"}).items():
            for kind in (".weight", ".bias"):
                new[b + y + kind] = old[a + x + kind]
    last = f"encoder.layer.{vision.config.num_hidden_layers}."
    for k in ("layer_scale1", "layer_scale2"):
        new[f"{last}{k}.lambda1"] = torch.full_like(new[f"{last}{k}.lambda1"], 0.1)
    for kind in ("weight", "bias"):
        new[f"layernorm.{kind}"] = old[f"post_layernorm.{kind}"]
    model.load_state_dict(new)
    return model


def train(start: Dinov2Model, banks: list[Bank], folder: Path) -> Any:
    """`banks`: clean, broken, samples, broken samples."""
    width = 128
    model = nn.ModuleDict(
        {
            "backbone": start,
            "patch": nn.Linear(width, len(COLORS) + len(SHAPES) + 1),
            "pixels": nn.Linear(width, 3 * PATCH**2),
            "whole": nn.Linear(width, len(KINDS) + 1),
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
        target = torch.cat([cover, hurt[..., None]], -1).flatten(1, 2).clamp(0, 1)
        target = target.masked_fill(hidden[..., None], float("nan"))
        wanted = F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)
        losses = {
            "patch": _known(F.binary_cross_entropy_with_logits, local.float(), target),
            "pixels": F.mse_loss(drawn.float(), wanted),
            "counts": _known(F.mse_loss, whole[:, :-1].float(), part["counts"]),
            "faulty": _known(F.binary_cross_entropy_with_logits, whole[:, -1].float(), part["faulty"]),
        }
        total = 8 * losses["patch"] + 0.3 * losses["pixels"] + 4 * losses["counts"] + 2 * losses["faulty"]
        return {"loss": total, **losses}

    fit(STAGE, model, loss, PLAN, folder)
    return model["backbone"]


def _known(loss: Any, prediction: Tensor, target: Tensor) -> Tensor:
    """`loss` where the target is not NaN."""
    there = ~target.isnan()
    result: Tensor = loss(prediction[there], target[there])
    return result


def export(model: Any, folder: Path) -> None:
    """fp16 weights and a processor, which plain `Dinov2Model.from_pretrained` and `AutoImageProcessor` load."""
    from transformers import BitImageProcessor

    side = {"height": world.SIZE, "width": world.SIZE}
    processor = BitImageProcessor(
        size={"shortest_edge": world.SIZE}, crop_size=side, image_mean=MEAN, image_std=STD, resample=3
    )
    with replacing(folder) as temporary:
        model.half().save_pretrained(temporary)
        processor.save_pretrained(temporary)


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
    return (new @ weight).float()


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores above a negative, ties counting half."""
    a, b = scores[positive][:, None], scores[~positive][None]
    return float(((a > b).float() + 0.5 * (a == b).float()).mean())


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


def main() -> None:
    from transformers import CLIPModel

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="samples, checkpoints and log")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights", help="gets tiny-dino")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)

    whole = clean(SCENES, SEED)
    drawn = sampled(samples.draw(samples.prompted(), arguments.work / "samples-train.pt", 1).flatten(0, 1))
    some = [
        Bank(*(getattr(b, f.name)[:n] for f in fields(Bank))) for b, n in ((whole, BROKEN), (drawn, BROKEN_SAMPLES))
    ]
    clip = CLIPModel.from_pretrained(arguments.output / "tiny-clip", dtype=torch.float32)
    start = from_clip(clip.vision_model, whole.images[:512])
    banks = [whole, broken(some[0], SEED), drawn, broken(some[1], SEED + 1, only=False)]
    model = train(start, banks, arguments.work)
    export(model, arguments.output / "tiny-dino")
    add_log(STAGE, arguments.work / "log.jsonl", arguments.output)
    test = samples.draw(prompts.test_prompts(), arguments.work / "samples-test.pt", 2).flatten(0, 1)
    trained, untrained = measure(model.float().eval(), test), measure(network().eval(), test)
    print(f"{'':16}untrained  trained")
    for name, value in trained.items():
        print(f"{name:16}{untrained[name]:9.3f}{value:9.3f}")


if __name__ == "__main__":
    main()
