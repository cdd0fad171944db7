"""ImageReward's BLIP in transformers' modules, by a map of names; see rewards/image_reward.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffalign.rewards import _loading
from diffalign.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

UNUSED = ("vision_proj.*", "text_proj.*", "text_encoder.embeddings.position_ids")  # of BLIP's own pre-training
VISION = "visual_encoder."
TEXT = "text_encoder."
NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
PARTS = {
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Blip:
    """The two encoders."""

    vision: Any
    text: Any

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> [B, T, D]."""
        tokens: Tensor = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        return tokens

    def hidden(self, tokens: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [B, L, D] of the prompts that look at the image tokens; attention among words is two-way."""
        states: Tensor = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=tokens,
            encoder_attention_mask=ids.new_ones(tokens.shape[:2]),
            is_decoder=False,  # or the mask would be causal; the layers themselves are a decoder's
        ).last_hidden_state
        return states


def build(state: Mapping[str, Tensor], name: str, heads: tuple[int, int] | None = None) -> Blip:
    """From the tensors named as in ImageReward.pt without the prefix `blip.`; fp32 and frozen.

    heads: of (vision, text), which shapes do not tell; by default one for every 64 channels, as BLIP has.
    Raises UserError when a key is missing or unexpected.
    """
    from transformers import BlipTextModel, BlipVisionModel

    vision, text, rest = divided(state)
    _loading.complain(f"'{name}'", [], rest, [])
    vision_config, text_config = configs(vision, text, heads)
    return Blip(
        _loading.pretrained(BlipVisionModel, name, config=vision_config, state=vision),
        _loading.pretrained(BlipTextModel, name, config=text_config, state=text, more={"add_pooling_layer": False}),
    )


def divided(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """(tensors of BlipVisionModel, tensors of BlipTextModel, keys of neither)."""
    kept = _loading.without(state, UNUSED)
    vision = {renamed(k.removeprefix(VISION)): t for k, t in kept.items() if k.startswith(VISION)}
    text = {k.removeprefix(TEXT): t for k, t in kept.items() if k.startswith(TEXT)}
    return vision, text, [k for k in kept if not k.startswith((VISION, TEXT))]


def renamed(key: str) -> str:
    """A key of the visual encoder as transformers names it; an unknown one stays, so that loading complains of it."""
    block = BLOCK.fullmatch(key)
    if block and block[2] in PARTS:
        return f"encoder.layers.{block[1]}.{PARTS[block[2]]}.{block[3]}"
    return NAMES.get(key, key)


def configs(vision: Mapping[str, Tensor], text: Mapping[str, Tensor], heads: tuple[int, int] | None) -> tuple[Any, Any]:
    """The configurations of both encoders, from the shapes of their tensors."""
    from transformers import BlipTextConfig, BlipVisionConfig

    try:
        width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
        places = vision["embeddings.position_embedding"].shape[1] - 1
        vocabulary, text_width = text["embeddings.word_embeddings.weight"].shape
        positions = text["embeddings.position_embeddings.weight"].shape[0]
        inner = vision["encoder.layers.0.mlp.fc1.weight"].shape[0]
        text_inner = text["encoder.layer.0.intermediate.dense.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"the checkpoint has no {error}, so it is not ImageReward's; give ImageReward.pt") from error
    vision_heads, text_heads = heads or (width // 64, text_width // 64)
    return (
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=_layers(vision, "encoder.layers."),
            num_attention_heads=vision_heads,
            image_size=round(places**0.5) * patch,
            patch_size=patch,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        ),
        BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=text_inner,
            num_hidden_layers=_layers(text, "encoder.layer."),
            num_attention_heads=text_heads,
            max_position_embeddings=positions,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            bos_token_id=None,  # unused, and by default beyond a small vocabulary
            is_decoder=True,  # else the layers would have no attention to the image
        ),
    )


def _layers(state: Mapping[str, Tensor], stem: str) -> int:
    return 1 + max((int(k.removeprefix(stem).split(".")[0]) for k in state if k.startswith(stem)), default=0)
