"""Random vision-language models that speak the shapes' vocabulary, and pictures and prompts to ask them about."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from diffalign.rewards._preprocess import CLIP_MEAN, CLIP_STD
from diffalign.rewards._vlm import Look, Vlm
from diffalign.rewards.vlm_echo import VlmEcho
from diffalign.shapes import chat

IMAGES = torch.rand(4, 3, 32, 64, generator=torch.Generator().manual_seed(3)).mul(255).round() / 255
PROMPTS = ["a red circle", "two blue squares", "a green star above a red circle", "a red circle"]
BLANK: list[dict[str, Any]] = [{}] * 4
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 16,
    "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
}  # fmt: skip


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Vlm:
    """A random model of the family with the vocabulary of shapes, two layers each way."""
    words = chat.tokenizer()
    ids = {
        "image_token_id": chat.IMAGE, "video_token_id": chat.VIDEO, "vision_start_token_id": chat.VISION_START,
        "vision_end_token_id": chat.VISION_END,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = TEXT | {"model_type": f"{family}_text", "vocab_size": len(words), "rope_parameters": rope}
    vision: dict[str, Any] = VISION
    if family == "qwen3_vl":
        text["rope_parameters"] = rope | {"mrope_interleaved": True}
    else:
        vision = {"depth": 2, "patch_size": 14, "num_heads": 2}
        vision |= {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [0]}
        if family == "qwen2_vl":
            vision = {"depth": 2, "patch_size": 14, "num_heads": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, **ids)
    torch.manual_seed(5)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():  # far from the uniform answers of a fresh model
            parameter.add_(0.08 * torch.randn_like(parameter))
    patch = config.vision_config.patch_size
    mean, std = ((0.5,) * 3, (0.5,) * 3) if family == "qwen3_vl" else (CLIP_MEAN, CLIP_STD)
    return Vlm(model, words, Look(patch, 2, 2, mean, std, low=16 * patch**2, high=64 * patch**2))


def echo(asked: Any, prompts: list[str] = PROMPTS, images: Tensor = IMAGES, **options: Any) -> Any:
    return VlmEcho(name="vlm_echo", **options).score(asked, images[: len(prompts)], prompts)
