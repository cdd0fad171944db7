"""The sizes of the embedded models: the classes are those of real SD3.5, only smaller."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from diffalign.shapes.tokenizer import MAX_LENGTH
from diffalign.shapes.world import SIZE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import (
        CLIPModel,
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5EncoderModel,
        T5Tokenizer,
    )

LATENT_CHANNELS = 8
TEXT_WIDTH = 96  # per encoder; the transformer sees both, 192


def vae() -> AutoencoderKL:
    """64x64x3 -> 8x8x8, 0.8 M parameters."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
    )


def _text_config(tokenizer: CLIPTokenizer, layers: int, activation: str) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=3,
        max_position_embeddings=MAX_LENGTH,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The image tower and the first text encoder."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
    )
    text = _text_config(tokenizer, 3, "quick_gelu")
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH))


def text_encoder(tokenizer: CLIPTokenizer, layers: int, activation: str) -> CLIPTextModelWithProjection:
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(_text_config(tokenizer, layers, activation))


def silent_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 whose output is zero, as where StableDiffusion3Pipeline has none: diffusers loads no folder without one."""
    import string

    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((c, -5.0) for c in string.ascii_lowercase)]
    words = T5Tokenizer(vocab=pieces, extra_ids=0)
    model = T5EncoderModel(
        T5Config(vocab_size=len(words), d_model=2 * TEXT_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    )
    nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model.eval().requires_grad_(False), words


def transformer() -> SD3Transformer2DModel:
    """Six joint blocks of width 160 on 64 image tokens, 5.4 M parameters."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=SIZE // 8,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        num_attention_heads=2,
        attention_head_dim=80,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    # adaLN-zero (DiT, arXiv 2212.09748): every block starts as the identity and the output at zero.
    zeroed = [model.proj_out, model.norm_out.linear]
    for block in model.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    for layer in zeroed:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model
