"""Stable Diffusion 3 and 3.5: a diffusers StableDiffusion3Pipeline as samplers and trainers see it (arXiv 2403.03206).

The network predicts the velocity v = eps - x0 of x_s = (1 - s) x0 + s eps and is told the time as 1000 s. The
deterministic path equals `StableDiffusion3Pipeline.__call__`: same sigmas, same time, same guidance, same decode.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.few_steps import FewSteps
from diffalign.pipelines import DECODE_BATCH, DECODED_PIXELS, ENCODE_BATCH, GRADED_PIXELS, SD3_LORA_TARGETS
from diffalign.schedules import RectifiedFlow
from diffalign.types import Conditioning, UserError

SERVES = ("StableDiffusion3Pipeline",)
LORA_TARGETS = SD3_LORA_TARGETS

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
REMEMBERED = 8  # prompts encoded on their own, such as negative prompts, that are not encoded again
MOST_TOKENS = 512  # of T5, as in diffusers


def unused(max_sequence_length: int | None) -> tuple[str, ...]:
    """Parts of the pipeline that need not be loaded."""
    return ("text_encoder_3", "tokenizer_3") if max_sequence_length == 0 else ()


def wrap(
    pipe: Any,
    dtype: torch.dtype,
    device: torch.device,
    max_sequence_length: int | None,
    source: tuple[str, str | None] | None = None,
    offload: bool = False,
) -> SD3:
    tokens = 256 if max_sequence_length is None else max_sequence_length
    return SD3(pipe, dtype, device, tokens, source, offload)


def _placed(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Frozen, in eval mode, on the device; cast only when needed, since diffusers warns of a cast after loading."""
    model = model.requires_grad_(False).eval().to(device)
    return model if model.dtype == dtype else model.to(dtype)


class SD3:
    """A StableDiffusion3Pipeline with frozen weights. Latents are [B, C, H/8, W/8], scaled and shifted for the network.

    Args:
        pipe: the diffusers pipeline; `text_encoder_3` (T5) may be None.
        dtype: bf16 or fp16 casts the frozen network and runs it under autocast; step maths stays fp32.
        max_sequence_length: T5 tokens of a prompt. Without T5, diffusers appends so many zero tokens; 0 is allowed.
        source: (path, revision) the pipeline was loaded from; an export reads released text encoders from it.
        offload: text encoders wait in main memory and are on the device during `encode` alone.
    """

    lora_targets: tuple[str, ...] = LORA_TARGETS

    def __init__(
        self,
        pipe: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_sequence_length: int = 256,
        source: tuple[str, str | None] | None = None,
        offload: bool = False,
    ) -> None:
        if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            name = type(pipe.scheduler).__name__
            raise UserError(f"the scheduler is a {name}; SD3 needs the FlowMatchEulerDiscreteScheduler it came with")
        least = 0 if pipe.text_encoder_3 is None else 1
        if not least <= max_sequence_length <= MOST_TOKENS:
            allowed = f"{least} to {MOST_TOKENS}"
            raise UserError(f"max_sequence_length must be {allowed} for this model, got {max_sequence_length}")
        self.pipe = pipe
        self.schedule = RectifiedFlow()
        self.dtype = dtype
        self.device = torch.device(device)
        self.max_sequence_length: int | None = max_sequence_length
        self.source = source
        self.offload = offload
        self.few_steps: FewSteps | None = None  # of a distilled model: how it is sampled unless one says otherwise
        self.decode_batch = DECODE_BATCH  # images a VAE forward decodes at most: a memory knob
        self.network: Any = _placed(pipe.transformer, self.device, dtype)  # never wrapped
        self.trainable: torch.nn.Module = self.network  # what is called; a trainer may put its wrapped form here
        self.frozen: torch.nn.Module | None = None  # initial weights of a full fine-tuning; see diffalign.adapters
        _placed(pipe.vae, self.device, torch.float32)
        for encoder in self._encoders().values():
            encoder.requires_grad_(False).eval()
        self.encoders_to("cpu" if offload else self.device)
        # Prompts encoded on their own: guidance needs the empty one even after the encoders are gone.
        self._alone: dict[str, dict[str, Tensor]] = {}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Each unique prompt once: 'embeds' [U, L, D], 'pooled' [U, P], index [B]. Raises UserError for no prompts."""
        if not prompts:
            raise UserError("there are no prompts to encode; give at least one")
        unique = list(dict.fromkeys(prompts))
        remembered = len(unique) == 1 and {"", *unique} <= self._alone.keys()
        with nullcontext() if remembered else self._encoders_here():
            self._one("")
            if len(unique) == 1:
                tensors = self._one(unique[0])
            else:
                chunks = [self._encode(unique[i : i + ENCODE_BATCH]) for i in range(0, len(unique), ENCODE_BATCH)]
                tensors = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        where = {prompt: row for row, prompt in enumerate(unique)}
        return Conditioning(tensors, torch.tensor([where[prompt] for prompt in prompts]))

    def _one(self, prompt: str) -> dict[str, Tensor]:
        # Encoded alone: were its last bits to depend on the prompts beside it, a resumed run would differ.
        if prompt not in self._alone:
            encoded = self._encode([prompt])
            if len(self._alone) == REMEMBERED:
                del self._alone[next(p for p in self._alone if p)]
            self._alone[prompt] = encoded
        return self._alone[prompt]

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        if self.pipe.text_encoder is None or self.pipe.text_encoder_2 is None:
            raise UserError("the text encoders were released; encode every prompt before release_encoders()")
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            device=self.pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds.to(self.device), "pooled": pooled.to(self.device)}

    def _encoders(self) -> dict[str, torch.nn.Module]:
        return {name: e for name in ENCODERS if (e := self.pipe.components[name]) is not None}

    def encoders_to(self, device: torch.device | str) -> None:
        """Move the text encoders; without offload, `encode` runs where they are. Its tensors are on self.device."""
        for encoder in self._encoders().values():
            encoder.to(device)

    @contextmanager
    def _encoders_here(self) -> Iterator[None]:
        """Inside, offloaded text encoders are on the device."""
        if not self.offload:
            yield
            return
        self.encoders_to(self.device)
        try:
            yield
        finally:
            self.encoders_to("cpu")
            self._free()

    def release_encoders(self) -> None:
        """Drop the text encoders and free their memory; encode the empty prompt first, for guidance."""
        self.encode([""])
        self.pipe.register_modules(**dict.fromkeys(ENCODERS))
        self._free()

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, height / f, width / f). Raises UserError for a size that the network cannot patch."""
        config, factor = self.pipe.transformer.config, self.pipe.vae_scale_factor
        unit, most = factor * config.patch_size, factor * config.patch_size * config.pos_embed_max_size
        if min(height, width) < unit or height % unit or width % unit or max(height, width) > most:
            raise UserError(f"height and width must be multiples of {unit} up to {most}, got {height} x {width}")
        return config.in_channels, height // factor, width // factor

    def sigmas(self, steps: int | Sequence[float], height: int, width: int) -> Tensor:
        """[T + 1] fp32, last 0: exactly those of the model's own scheduler, dynamic shifting included.

        `steps` is their number, or the timesteps of a few-step generator as they are before the scheduler's shift.
        """
        count = steps if isinstance(steps, int) else len(steps)
        if count < 1:
            raise UserError(f"sampling needs at least one step, got {count}")
        scheduler = copy.deepcopy(self.pipe.scheduler)
        config, patch = scheduler.config, self.pipe.transformer.config.patch_size
        mu = None
        if config.use_dynamic_shifting:
            _, h, w = self.latent_shape(height, width)
            span = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
            mu = calculate_shift((h // patch) * (w // patch), *span)
        if isinstance(steps, int):
            scheduler.set_timesteps(steps, mu=mu)
        else:
            scheduler.set_timesteps(sigmas=[t / scheduler.config.num_train_timesteps for t in steps], mu=mu)
        sigmas: Tensor = scheduler.sigmas
        return sigmas

    def denoiser(self, cond: Conditioning, guidance: float = 1.0, negative: Conditioning | None = None) -> SD3Denoiser:
        """Denoiser of len(cond) samples. guidance 1 is off; above 1 it doubles the batch as diffusers does.

        `negative` has one row for all samples or one each; by default the empty prompt.
        """
        if guidance < 1:
            raise UserError(f"guidance must be at least 1 (1 turns it off), got {guidance}")
        if guidance == 1:
            return SD3Denoiser(self, len(cond), self._rows(cond), 1.0)
        if negative is None:
            negative = self.encode([""])
        if len(negative) == 1:
            negative = negative[torch.zeros(len(cond), dtype=torch.long)]
        if len(negative) != len(cond):
            raise UserError(f"{len(negative)} negative prompts for {len(cond)} prompts; give one, or one each")
        wanted, unwanted = self._rows(cond), self._rows(negative)
        rows = {name: torch.cat([unwanted[name], wanted[name]]) for name in wanted}
        return SD3Denoiser(self, len(cond), rows, guidance)

    def _rows(self, cond: Conditioning) -> dict[str, Tensor]:
        return {name: t.to(self.device) for name, t in cond.rows().items()}

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] fp32 in [0, 1]; gradients flow when enabled.

        Then many images are decoded a few at a time, and again in the backward pass, so that one part's activations are
        in memory and not those of all.
        """
        vae = self.pipe.vae
        z = latents.to(self.device, torch.float32) / vae.config.scaling_factor + vae.config.shift_factor
        pixels = z.shape[-2] * z.shape[-1] * self.pipe.vae_scale_factor**2
        graded = torch.is_grad_enabled() and z.requires_grad
        batch = min(self.decode_batch, max(1, (GRADED_PIXELS if graded else DECODED_PIXELS) // pixels))
        parts = z.split(batch)
        again = graded and len(parts) > 1 and len(z) * pixels > GRADED_PIXELS
        images = torch.cat(
            [checkpoint(self._decode, z, use_reentrant=False) if again else self._decode(z) for z in parts]
        )
        return (images * 0.5 + 0.5).clamp(0, 1)

    def _decode(self, z: Tensor) -> Tensor:
        images: Tensor = self.pipe.vae.decode(z, return_dict=False)[0]
        return images

    def compile_blocks(self) -> None:
        """Regional torch.compile: one graph shared by all transformer blocks. Add adapters first."""
        for block in self.pipe.transformer.transformer_blocks:
            block.compile()


@dataclass(frozen=True)
class SD3Denoiser:
    """predict(x, s) for one batch of prompts; calls `pipeline.trainable`, so that switched adapters take effect."""

    pipeline: SD3
    batch: int
    rows: dict[str, Tensor]  # 'embeds', 'pooled': [B, ...], or [2 B, ...] as [negative, positive] when guided
    guidance: float

    @property
    def schedule(self) -> RectifiedFlow:
        return self.pipeline.schedule

    def predict(self, x: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        """x [B, C, h, w], s scalar or [B] -> (x0, eps), fp32 (float64 for a float64 x).

        v = v_u + g (v_c - v_u) from one forward of [negative, positive].
        """
        if len(x) != self.batch:
            raise ValueError(f"{len(x)} latents for the {self.batch} prompts of this denoiser")
        copies = 1 if self.guidance == 1 else 2
        # diffusers multiplies in fp32, and the network's sinusoid sees every bit of it
        time = 1000 * torch.as_tensor(s).to(x.device, torch.float32).expand(len(x))
        with self.pipeline.autocast():
            output = self.pipeline.trainable(
                hidden_states=x.float().repeat(copies, 1, 1, 1),
                timestep=time.repeat(copies),
                encoder_hidden_states=self.rows["embeds"],
                pooled_projections=self.rows["pooled"],
                return_dict=False,
            )[0]
        v = output.to(torch.promote_types(x.dtype, torch.float32))
        if copies == 2:
            unguided, guided = v.chunk(2)
            v = unguided + self.guidance * (guided - unguided)
        return self.schedule.to_x0_eps(v, x.to(v.dtype), s)
