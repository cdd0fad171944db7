"""Weights in open_clip's format as the tensors of transformers' CLIPModel, by a map of names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffalign.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
} | {
    f"{theirs}.{part}": f"{ours}.{part}"
    for theirs, ours in {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }.items()
    for part in ("weight", "bias")
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under CLIPModel's names: projections transposed, joint q, k, v split.

    A name that the map does not know keeps its own, so that loading complains of it.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = BLOCK.fullmatch(name.replace("attn.in_proj_", "attn.in_proj."))
        if name in TRANSPOSED:
            result[TRANSPOSED[name]] = tensor.T.contiguous()
        elif block is None:
            result[WHOLE.get(name, name)] = tensor
        else:
            tower, number, part, kind = block.groups()
            layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
            if part == "attn.in_proj":
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    result[f"{layer}.self_attn.{letter}_proj.{kind}"] = third
            else:
                result[f"{layer}.{PARTS[part]}.{kind}" if part in PARTS else name] = tensor
    return result


def config(state: Mapping[str, Tensor], heads: tuple[int, int], act: str = "gelu") -> Any:
    """The CLIPConfig of a state in open_clip's format. heads: (vision, text), which shapes do not tell.

    act: gelu for the models trained by LAION, quick_gelu for OpenAI's.
    """
    from transformers import CLIPConfig

    try:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        places = state["visual.positional_embedding"].shape[0] - 1
        vocabulary, text_width = state["token_embedding.weight"].shape
        context, projection = state["positional_embedding"].shape[0], state["text_projection"].shape[1]
        inner = [state[f"{tower}transformer.resblocks.0.mlp.c_fc.weight"].shape[0] for tower in ("visual.", "")]
    except KeyError as error:
        raise UserError(
            f"the checkpoint has no {error}, so it is not a CLIP in open_clip's format; give one"
        ) from error
    return CLIPConfig(
        projection_dim=projection,
        vision_config={
            "hidden_size": width,
            "intermediate_size": inner[0],
            "num_hidden_layers": _layers(state, "visual."),
            "num_attention_heads": heads[0],
            "image_size": round(places**0.5) * patch,
            "patch_size": patch,
            "hidden_act": act,
            "projection_dim": projection,
        },
        text_config={
            "hidden_size": text_width,
            "intermediate_size": inner[1],
            "num_hidden_layers": _layers(state, ""),
            "num_attention_heads": heads[1],
            "max_position_embeddings": context,
            "vocab_size": vocabulary,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,  # its place in a prompt is where the embedding is read
            "pad_token_id": 0,
            "hidden_act": act,
            "projection_dim": projection,
        },
    )


def _layers(state: Mapping[str, Tensor], tower: str) -> int:
    found = (BLOCK.match(name) for name in state)
    return 1 + max(int(block[2]) for block in found if block and (block[1] or "") == tower)
