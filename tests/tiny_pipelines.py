"""Tiny random text-to-image pipelines of diffusers, one for each way that they differ in.

`ALL[name]()` gives (pipeline, arguments of its call): the embeddings of one prompt in place of text encoders, guidance,
and a size of 32 x 32. Weights and embeddings are the same each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

Tiny = tuple[Any, dict[str, Any]]
SIZE = {"height": 32, "width": 32}
TOKENS = 7
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


def embeddings(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(build: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def vae(channels: int, blocks: int = 1, shift: float | None = 0.06) -> AutoencoderKL:
    """Downsamples by 2 ** (blocks - 1)."""
    return seeded(
        lambda: AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=(DOWN,) * blocks,
            up_block_types=(UP,) * blocks,
            block_out_channels=(8,) * blocks,
            layers_per_block=1,
            latent_channels=channels,
            norm_num_groups=2,
            sample_size=32,
            scaling_factor=1.5,
            shift_factor=shift,
        )
    )


def ddim(**settings: Any) -> DDIMScheduler:
    """As SD1.5 and SDXL have it."""
    usual = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **{**usual, **settings})


def unet(**settings: Any) -> UNet2DConditionModel:
    return seeded(
        lambda: UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            norm_num_groups=2,
            **settings,
        )
    )


def sd15(**scheduler: Any) -> Tiny:
    pipe = StableDiffusionPipeline(
        unet=unet(cross_attention_dim=8),
        scheduler=ddim(),
        vae=vae(4, blocks=2, shift=None),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.scheduler = ddim(**scheduler)  # the constructor overrides some settings, such as steps_offset
    prompts = {"prompt_embeds": embeddings(1, 1, TOKENS, 8), "negative_prompt_embeds": embeddings(2, 1, TOKENS, 8)}
    return quiet(pipe), {**prompts, "guidance_scale": 5.0, **SIZE}


def sdxl() -> Tiny:
    network = unet(
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
        use_linear_projection=True,
    )
    pipe = StableDiffusionXLPipeline(
        unet=network,
        scheduler=ddim(),
        vae=vae(4, blocks=2, shift=None),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )
    prompts = {
        "prompt_embeds": embeddings(1, 1, TOKENS, 16),
        "negative_prompt_embeds": embeddings(2, 1, TOKENS, 16),
        "pooled_prompt_embeds": embeddings(3, 1, 12),
        "negative_pooled_prompt_embeds": embeddings(4, 1, 12),
    }
    return quiet(pipe), {**prompts, "guidance_scale": 5.0, **SIZE}


def sd3() -> Tiny:
    network = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=12,
            pos_embed_max_size=16,
        )
    )
    pipe = StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, blocks=2),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    prompts = {
        "prompt_embeds": embeddings(1, 1, TOKENS, 16),
        "negative_prompt_embeds": embeddings(2, 1, TOKENS, 16),
        "pooled_prompt_embeds": embeddings(3, 1, 12),
        "negative_pooled_prompt_embeds": embeddings(4, 1, 12),
    }
    return quiet(pipe), {**prompts, "guidance_scale": 4.5, **SIZE}


def flux(true_cfg: bool = False) -> Tiny:
    network = seeded(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=12,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )
    )
    pipe = FluxPipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(4, blocks=2),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    prompts = {"prompt_embeds": embeddings(1, 1, TOKENS, 16), "pooled_prompt_embeds": embeddings(3, 1, 12)}
    negative = {
        "negative_prompt_embeds": embeddings(2, 1, TOKENS, 16),
        "negative_pooled_prompt_embeds": embeddings(4, 1, 12),
        "true_cfg_scale": 2.0,
    }
    return quiet(pipe), {**prompts, **(negative if true_cfg else {}), "guidance_scale": 3.5, **SIZE}


def flux2() -> Tiny:
    network = seeded(
        lambda: Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        )
    )
    autoencoder = seeded(
        lambda: AutoencoderKLFlux2(
            down_block_types=(DOWN, DOWN),
            up_block_types=(UP, UP),
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=32,
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = Flux2Pipeline(transformer=network, scheduler=scheduler, vae=autoencoder, text_encoder=None, tokenizer=None)
    return quiet(pipe), {"prompt_embeds": embeddings(1, 1, TOKENS, 16), "guidance_scale": 2.5, **SIZE}


def qwen() -> Tiny:
    network = seeded(
        lambda: QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        )
    )
    autoencoder = seeded(
        lambda: AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.1, 0.2, 0.0],
            latents_std=[0.8, 1.0, 1.2, 1.0],
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    pipe = QwenImagePipeline(
        transformer=network, scheduler=scheduler, vae=autoencoder, text_encoder=None, tokenizer=None
    )
    mask = torch.tensor([[1] * (TOKENS - 2) + [0, 0]])
    prompts = {
        "prompt_embeds": embeddings(1, 1, TOKENS, 16),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": embeddings(2, 1, TOKENS, 16),
        "negative_prompt_embeds_mask": torch.ones_like(mask),
    }
    return quiet(pipe), {**prompts, "true_cfg_scale": 4.0, **SIZE}


def zimage() -> Tiny:
    network = seeded(
        lambda: ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[64, 32, 32],
        )
    )
    for padding in (network.x_pad_token, network.cap_pad_token):  # not initialised
        padding.data.fill_(0.5)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = ZImagePipeline(
        transformer=network, scheduler=scheduler, vae=vae(4, blocks=2), text_encoder=None, tokenizer=None
    )
    prompts = {"prompt_embeds": [embeddings(1, 5, 16)], "negative_prompt_embeds": [embeddings(2, 4, 16)]}
    return quiet(pipe), {**prompts, "guidance_scale": 4.0, **SIZE}


def pixart() -> Tiny:
    """Its loop cannot be told to skip an iteration, and its network predicts a variance too."""
    network = seeded(
        lambda: PixArtTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            use_additional_conditions=False,
        )
    )
    pipe = PixArtSigmaPipeline(
        transformer=network, scheduler=ddim(), vae=vae(4, blocks=2, shift=None), text_encoder=None, tokenizer=None
    )
    prompts = {
        "prompt_embeds": embeddings(1, 1, TOKENS, 16),
        "prompt_attention_mask": torch.ones(1, TOKENS),
        "negative_prompt_embeds": embeddings(2, 1, TOKENS, 16),
        "negative_prompt_attention_mask": torch.ones(1, TOKENS),
        "negative_prompt": None,
        "use_resolution_binning": False,
    }
    return quiet(pipe), {**prompts, "guidance_scale": 4.5, **SIZE}


ALL: dict[str, Callable[[], Tiny]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "flux_true_cfg": lambda: flux(true_cfg=True),
    "flux2": flux2,
    "qwen": qwen,
    "zimage": zimage,
}
