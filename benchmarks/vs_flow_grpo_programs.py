"""yifan123/flow_grpo and diffalign behind the same three calls, for vs_flow_grpo.py.

`Theirs` imports their sampler and their step from a checkout on `sys.path` and calls them in the order of their
training scripts, whose lines (commit 9745241) are named; set-up and the PPO loss are written anew. `Ours` is the
product's own rollout and loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from rollout import DTYPES, Stopwatch
from torch import Tensor

from diffalign import pipelines
from diffalign.adapters import add_lora, trainable_parameters
from diffalign.algorithms import Memory
from diffalign.algorithms.grpo import GRPO
from diffalign.pipelines.sd3 import LORA_TARGETS
from diffalign.rollout import collect
from diffalign.sections import Sampling
from diffalign.types import Rollout
from diffalign.update import TrainedPolicy

STEPS, SIZE, GROUP = 10, 64, 8
CLIP, LR, RANK, ALPHA = 1e-4, 3e-4, 32, 64
ALGORITHM = GRPO(name="grpo", clip=CLIP)


@dataclass(frozen=True)
class Setting:
    """How images are sampled; `window` 0 trains on every step but the last."""

    name: str
    kernel: str
    eta: float
    guidance: float
    window: int

    @property
    def trained(self) -> int:
        return self.window or STEPS - 1


SETTINGS = (
    Setting("Flow-GRPO, CFG 4.5", "flow_sde", 0.7, 4.5, 0),
    Setting("Flow-GRPO, no CFG", "flow_sde", 0.7, 1.0, 0),
    Setting("Fast, no CFG", "cps", 0.8, 1.0, 3),
)
DEFAULT = Setting("preset shapes_demo", "cps", 0.7, 1.0, 2)


class ProcessorTime(Stopwatch):
    """Seconds that this process computed: with one thread, what an idle machine would take, whatever else runs."""

    def _now(self) -> float:
        return time.process_time()


class Theirs:
    """Their functions on objects made as in scripts/train_sd3.py, 377-471 and 540-559."""

    program = "flow_grpo"

    def __init__(self, model: str, dtype: str, watch: Stopwatch) -> None:
        patch = "flow_grpo.diffusers_patch.sd3_"
        self.plain = import_module(patch + "pipeline_with_logprob").pipeline_with_logprob
        self.fast = import_module(patch + "pipeline_with_logprob_fast").pipeline_with_logprob
        self.step = import_module(patch + "sde_with_logprob").sde_step_with_logprob
        AcceleratorState._reset_state(True)  # else one process may hold accelerators of one precision only
        self.accelerator = Accelerator(mixed_precision="no" if dtype == "fp32" else dtype, cpu=True)
        folder = pipelines.embedded_path(model)
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
        for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.transformer):
            part.requires_grad_(False)
        pipe.text_encoder.to(dtype=DTYPES[dtype])
        pipe.text_encoder_2.to(dtype=DTYPES[dtype])
        pipe.set_progress_bar_config(disable=True)
        adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS))
        pipe.transformer = get_peft_model(pipe.transformer, adapter)
        optimizer = torch.optim.AdamW([p for p in pipe.transformer.parameters() if p.requires_grad], LR)
        self.pipe = pipe
        self.transformer, self.optimizer = self.accelerator.prepare(pipe.transformer, optimizer)
        self.network = self.transformer
        self.negative = self.encode([""])
        self.watch = watch

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Every prompt of a batch, repeated ones too (621). Not by their encode_prompt, which wants 77 CLIP tokens and
        a T5; this model has 14 tokens and no T5."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
        return embeds, pooled

    def sample(self, texts: list[str], setting: Setting) -> dict[str, Tensor]:
        """One batch: 618-687 of train_sd3.py, or 624-692 of train_sd3_fast.py for a window."""
        self.pipe.transformer.eval()
        embeds, pooled = self.encode(texts)
        self.pipe.tokenizer(texts, padding="max_length", max_length=256, truncation=True, return_tensors="pt")
        negative, negative_pooled = self.negative
        arguments: dict[str, Any] = {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": negative.repeat(len(texts), 1, 1),
            "negative_pooled_prompt_embeds": negative_pooled.repeat(len(texts), 1),
            "num_inference_steps": STEPS,
            "guidance_scale": setting.guidance,
            "output_type": "pt",
            "height": SIZE,
            "width": SIZE,
            "noise_level": setting.eta,
        }
        if setting.window:
            arguments |= {"sde_window_size": setting.window, "sde_window_range": (0, STEPS // 2), "sde_type": "cps"}
            images, latents, log_probs, times = self.fast(self.pipe, **arguments)
            timesteps = torch.stack(times)
        else:
            images, latents, log_probs = self.plain(self.pipe, **arguments)
            timesteps = self.pipe.scheduler.timesteps
        states = torch.stack(latents, dim=1)
        return {
            "images": images,
            "embeds": embeds,
            "pooled": pooled,
            "timesteps": timesteps.repeat(len(texts), 1),
            "latents": states[:, :-1],
            "next_latents": states[:, 1:],
            "log_probs": torch.stack(log_probs, dim=1),
        }

    def rollout(self, texts: list[str], setting: Setting, batch: int) -> dict[str, Tensor]:
        """All batches, joined (703-712)."""
        parts = [self.sample(texts[i : i + batch], setting) for i in range(0, len(texts), batch)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def log_prob(self, sample: dict[str, Tensor], j: int, setting: Setting) -> Tensor:
        """compute_log_prob, 181-215."""
        x, t = sample["latents"][:, j], sample["timesteps"][:, j]
        embeds, pooled, copies = sample["embeds"], sample["pooled"], 1
        if setting.guidance > 1:
            embeds = torch.cat([self.negative[0].repeat(len(x), 1, 1), embeds])
            pooled = torch.cat([self.negative[1].repeat(len(x), 1), pooled])
            copies = 2
        v = self.transformer(
            hidden_states=torch.cat([x] * copies),
            timestep=torch.cat([t] * copies),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        if copies == 2:
            unguided, guided = v.chunk(2)
            v = unguided + setting.guidance * (guided - unguided)
        kind = "cps" if setting.kernel == "cps" else "sde"
        following = sample["next_latents"][:, j].float()
        result: Tensor = self.step(
            self.pipe.scheduler, v.float(), t, x.float(), prev_sample=following, noise_level=setting.eta, sde_type=kind
        )[1]
        return result

    def train(self, samples: dict[str, Tensor], advantages: Tensor, setting: Setting, batch: int) -> None:
        """834-944: one optimizer step over all samples and trained steps."""
        self.backward(samples, advantages, setting, batch, self.update)

    def update(self) -> None:
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.transformer.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(
        self, samples: dict[str, Tensor], advantages: Tensor, setting: Setting, batch: int, after: Callable[[], None]
    ) -> None:
        self.pipe.transformer.train()
        order = torch.randperm(len(advantages))
        shuffled = {name: t[order] for name, t in samples.items()}
        shuffled["advantages"] = advantages[order]
        self.accelerator.step = 0  # settings with other numbers of steps ran before
        self.accelerator.gradient_accumulation_steps = setting.trained * -(-len(order) // batch)
        for i in range(0, len(order), batch):
            sample = {name: t[i : i + batch] for name, t in shuffled.items()}
            for j in range(setting.trained):
                with self.accelerator.accumulate(self.transformer):
                    ratio = torch.exp(self.log_prob(sample, j, setting) - sample["log_probs"][:, j])
                    a = sample["advantages"].clamp(-5, 5)
                    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
                    with self.watch.span("backward"):
                        self.accelerator.backward(loss)
                    after()


class Ours:
    """The product's own rollout and loss."""

    program = "diffalign"

    def __init__(self, model: str, dtype: str, watch: Stopwatch) -> None:
        self.pipeline = pipelines.load(model, dtype=dtype, device="cpu")
        add_lora(self.pipeline, RANK, ALPHA)
        self.pipe, self.network = self.pipeline.pipe, self.pipeline.network
        self.optimizer = torch.optim.AdamW(trainable_parameters(self.pipeline), LR)
        self.watch = watch

    def sampling(self, setting: Setting) -> Sampling:
        return Sampling(
            steps=STEPS, kernel=setting.kernel, eta=setting.eta, guidance=setting.guidance, height=SIZE, width=SIZE
        )

    def rollout(self, texts: list[str], setting: Setting, batch: int) -> Rollout:
        metadata: list[dict[str, Any]] = [{"prompt": text} for text in texts]
        group, seeds = torch.arange(len(texts)) // GROUP, torch.arange(len(texts))
        kept = range(setting.trained)
        return collect(self.pipeline, metadata, group, seeds, self.sampling(setting), kept, batch)

    def train(self, rollout: Rollout, advantages: Tensor, setting: Setting, batch: int) -> None:
        self.backward(rollout, advantages, setting, batch)
        torch.nn.utils.clip_grad_norm_(trainable_parameters(self.pipeline), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def policy(self, setting: Setting) -> TrainedPolicy:
        negative = self.pipeline.encode([""]) if setting.guidance > 1 else None
        return TrainedPolicy(self.pipeline, self.sampling(setting), negative)

    def backward(self, rollout: Rollout, advantages: Tensor, setting: Setting, batch: int) -> None:
        rollout.advantages = advantages
        policy, memory = self.policy(setting), Memory()
        for index in torch.arange(len(rollout)).split(batch):
            for loss in ALGORITHM.losses(policy, rollout[index], memory):
                with self.watch.span("backward"):
                    (loss.per_sample.sum() / len(rollout)).backward()
