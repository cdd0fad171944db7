"""Checkpoints in other projects' formats, of any size: names and shapes as those projects write them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tower:
    width: int
    layers: int
    inner: int


@dataclass(frozen=True)
class OpenClip:
    vision: Tower
    text: Tower
    image: int
    patch: int
    vocabulary: int
    context: int
    projection: int


@dataclass(frozen=True)
class ImageReward:
    vision: Tower
    text: Tower
    image: int
    patch: int
    vocabulary: int
    positions: int


VIT_H = OpenClip(Tower(1280, 32, 5120), Tower(1024, 24, 4096), 224, 14, 49408, 77, 1024)
TINY_OPEN_CLIP = OpenClip(Tower(32, 2, 64), Tower(32, 2, 64), 32, 8, 178, 14, 16)
BLIP_LARGE = ImageReward(Tower(1024, 24, 4096), Tower(768, 12, 3072), 224, 16, 30524, 512)
TINY_BLIP = ImageReward(Tower(64, 2, 128), Tower(64, 2, 128), 32, 8, 40, 64)


def filled(shapes: Shapes, device: str = "cpu") -> dict[str, Tensor]:
    """Random tensors, or empty ones on the meta device."""
    if device == "meta":
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _linear(name: str, out: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, width)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def open_clip(size: OpenClip) -> Shapes:
    def block(name: str, tower: Tower) -> Iterator[tuple[str, tuple[int, ...]]]:
        w = tower.width
        yield from (
            (f"{name}.attn.in_proj_weight", (3 * w, w)),
            (f"{name}.attn.in_proj_bias", (3 * w,)),
            *_linear(f"{name}.attn.out_proj", w, w),
            *_norm(f"{name}.ln_1", w),
            *_norm(f"{name}.ln_2", w),
            *_linear(f"{name}.mlp.c_fc", tower.inner, w),
            *_linear(f"{name}.mlp.c_proj", w, tower.inner),
        )

    v, t = size.vision.width, size.text.width
    shapes: Shapes = {
        "logit_scale": (),
        "positional_embedding": (size.context, t),
        "text_projection": (t, size.projection),
        "token_embedding.weight": (size.vocabulary, t),
        "visual.class_embedding": (v,),
        "visual.positional_embedding": ((size.image // size.patch) ** 2 + 1, v),
        "visual.proj": (v, size.projection),
        "visual.conv1.weight": (v, 3, size.patch, size.patch),
    }
    shapes |= dict([*_norm("ln_final", t), *_norm("visual.ln_pre", v), *_norm("visual.ln_post", v)])
    for stem, tower in (("", size.text), ("visual.", size.vision)):
        for i in range(tower.layers):
            shapes |= dict(block(f"{stem}transformer.resblocks.{i}", tower))
    return shapes


def image_reward(size: ImageReward) -> Shapes:
    v, t = size.vision, size.text
    eyes, words = "blip.visual_encoder", "blip.text_encoder"
    shapes: Shapes = {
        f"{eyes}.cls_token": (1, 1, v.width),
        f"{eyes}.pos_embed": (1, (size.image // size.patch) ** 2 + 1, v.width),
        f"{eyes}.patch_embed.proj.weight": (v.width, 3, size.patch, size.patch),
        f"{eyes}.patch_embed.proj.bias": (v.width,),
        f"{words}.embeddings.position_ids": (1, size.positions),
        f"{words}.embeddings.word_embeddings.weight": (size.vocabulary, t.width),
        f"{words}.embeddings.position_embeddings.weight": (size.positions, t.width),
    }
    shapes |= dict([*_norm(f"{eyes}.norm", v.width), *_norm(f"{words}.embeddings.LayerNorm", t.width)])
    shapes |= dict([*_linear("blip.vision_proj", 16, v.width), *_linear("blip.text_proj", 16, t.width)])
    for i in range(v.layers):
        name = f"{eyes}.blocks.{i}"
        shapes |= dict([
            *_linear(f"{name}.attn.qkv", 3 * v.width, v.width),
            *_linear(f"{name}.attn.proj", v.width, v.width),
            *_norm(f"{name}.norm1", v.width),
            *_norm(f"{name}.norm2", v.width),
            *_linear(f"{name}.mlp.fc1", v.inner, v.width),
            *_linear(f"{name}.mlp.fc2", v.width, v.inner),
        ])  # fmt: skip
    for i in range(t.layers):
        name = f"{words}.encoder.layer.{i}"
        for kind, seen in (("attention", t.width), ("crossattention", v.width)):
            shapes |= dict(_linear(f"{name}.{kind}.self.query", t.width, t.width))
            shapes |= dict(
                [part for k in ("key", "value") for part in _linear(f"{name}.{kind}.self.{k}", t.width, seen)]
            )
            shapes |= dict(_linear(f"{name}.{kind}.output.dense", t.width, t.width))
            shapes |= dict(_norm(f"{name}.{kind}.output.LayerNorm", t.width))
        shapes |= dict(_linear(f"{name}.intermediate.dense", t.inner, t.width))
        shapes |= dict(
            [*_linear(f"{name}.output.dense", t.width, t.inner), *_norm(f"{name}.output.LayerNorm", t.width)]
        )
    return shapes | {f"mlp.{name}": shape for name, shape in head(t.width).items()}


def head(width: int, widths: tuple[int, ...] = (1024, 128, 64, 16, 1)) -> Shapes:
    """The five linear layers of LAION's and ImageReward's heads."""
    shapes: Shapes = {}
    for number, out in zip((0, 2, 4, 6, 7), widths, strict=True):
        shapes |= dict(_linear(f"layers.{number}", out, width))
        width = out
    return shapes
