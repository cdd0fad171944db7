"""Tiny random-weight models for tests, written as the folders that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = "a an the red green blue yellow circle square triangle star above below two three and of photo".split()
TOKENS = 16  # CLIP's context


def clip_tokenizer() -> CLIPTokenizer:
    """Characters with byte-pair merges for WORDS, in CLIP's own format."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.-"
    vocab = {token: i for i, token in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair, pieces = (pieces[0], pieces[1]), [pieces[0] + pieces[1], *pieces[2:]]
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault("".join(pair), len(vocab))
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def clip_encoder(tokenizer: CLIPTokenizer, width: int, projection: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((f"▁{w}", -3.0) for w in WORDS)]
    pieces += [(c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz" if c not in dict(pieces)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    return tokenizer, T5EncoderModel(config).eval()


def vae(latent_channels: int = 4) -> AutoencoderKL:
    """Downsamples by 8, as SD3's."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def sd3_pipe(
    with_t5: bool = False, dynamic_shift: bool = False, heads: int = 2, seed: int = 0
) -> StableDiffusion3Pipeline:
    """An MMDiT with the parts of SD3.5-medium: dual attention first, rms qk norm, context_pre_only last."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=64,
        caption_projection_dim=16 * heads,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()
    with torch.no_grad():  # as initialised, the output hardly depends on time and text
        for p in transformer.parameters():
            p.mul_(1.6)
    tokenizer = clip_tokenizer()
    tokenizer_3, text_encoder_3 = t5() if with_t5 else (None, None)
    shift = {"use_dynamic_shifting": True} if dynamic_shift else {"shift": 3.0}
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=vae(),
        text_encoder=clip_encoder(tokenizer, 24, 24),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(tokenizer, 32, 16),
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def sd3_folder(folder: Path, with_t5: bool = False, dynamic_shift: bool = False, heads: int = 2, seed: int = 0) -> Path:
    sd3_pipe(with_t5, dynamic_shift, heads, seed).save_pretrained(folder)
    return folder
