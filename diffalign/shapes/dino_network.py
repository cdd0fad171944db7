"""The network of tiny-dino, its start from the image tower of tiny-clip, and the folder it is published as."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.rewards import _preprocess
from diffalign.rewards._preprocess import CLIP_MEAN, CLIP_STD
from diffalign.shapes import world
from diffalign.shapes.publish import replacing

if TYPE_CHECKING:
    from transformers import Dinov2Model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which DINOv2 uses
PATCH = 8


def normalise(images: Tensor) -> Tensor:
    """[N, 3, H, W] in [0, 1] -> what the model expects."""
    return _preprocess.normalise(images, MEAN, STD)


def clip_normalise(images: Tensor) -> Tensor:
    """[N, 3, H, W] in [0, 1] -> what tiny-clip expects."""
    return _preprocess.normalise(images)


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
    gain: Tensor = old["pre_layrnorm.weight"]
    offset: Tensor = old["pre_layrnorm.bias"]
    seen = vision.embeddings(clip_normalise(images.float() / 255))
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
