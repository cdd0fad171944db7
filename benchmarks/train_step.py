"""Speed of a GRPO optimizer step, its memory, and how far training log-probs stray from those of the rollout.

    python benchmarks/train_step.py --model tiny-sd3 --dtype fp32 bf16
    python benchmarks/train_step.py --model random:sd35-medium --dtype bf16 --batch 8 --micro 4 --compile --checkpoint

A rollout stores transitions; the timed step scores them with gradients in micro-batches and updates a LoRA. `logp_gap`
is the mean |log p(training) - log p(rollout)| before any update: 0 in exact arithmetic, and to be small beside the clip
range. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from rollout import Stopwatch, arguments, build, peak_gib, table
from torch import Tensor

from diffalign.adapters import add_full, add_lora, trainable_parameters
from diffalign.samplers import denoise, step
from diffalign.types import Conditioning, UserError

ETA, CLIP = 0.7, 1e-4

# (x_i, x_{i+1}, s_i, s_{i+1}, log-prob of the rollout [B]) of each kept transition
Transitions = list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


@torch.no_grad()
def collect(
    pipeline: Any, cond: Conditioning, negative: Conditioning, options: argparse.Namespace, size: int
) -> Transitions:
    x = torch.randn((len(cond), *pipeline.latent_shape(size, size)), device=options.device)
    sigmas = pipeline.sigmas(options.steps, size, size).to(options.device)
    kept: Transitions = []
    denoiser = pipeline.denoiser(cond, options.guidance, negative)
    for i, taken in enumerate(denoise(denoiser, x, sigmas, "flow_sde", ETA)):
        kept.append((x, taken.next, sigmas[i], sigmas[i + 1], taken.log_prob))
        x = taken.next
    return kept[: options.train_steps]


def update(
    pipeline: Any,
    cond: Conditioning,
    negative: Conditioning,
    kept: Transitions,
    optimizer: torch.optim.Optimizer,
    options: argparse.Namespace,
    watch: Stopwatch,
) -> Tensor:
    """One optimizer step over all transitions; returns the mean |log-prob gap|."""
    batch = len(cond)
    advantages = torch.linspace(-1, 1, batch, device=options.device)
    gaps: list[Tensor] = []
    for x, following, s, s_next, old in kept:
        for part in torch.arange(batch).split(options.micro):
            denoiser = pipeline.denoiser(cond[part], options.guidance, negative)
            x0, eps = denoiser.predict(x[part], s)
            taken = step(denoiser.schedule, x0, eps, x[part], s, s_next, "flow_sde", ETA, next=following[part])
            log_ratio = taken.log_prob - old[part]
            ratio, a = log_ratio.exp(), advantages[part]
            loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP, 1 + CLIP)).sum() / (batch * len(kept))
            with watch.span("backward"):
                loss.backward()
            gaps.append(log_ratio.detach().abs())
    torch.nn.utils.clip_grad_norm_(trainable_parameters(pipeline), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return torch.cat(gaps).mean()


def measure(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    size = options.size or (512 if options.model.startswith("random:") else 64)
    torch.manual_seed(0)
    pipeline, cond, negative = build(options.model, options.batch, dtype, options.device)
    if options.full:
        add_full(pipeline)
    else:
        add_lora(pipeline, rank=32, alpha=64)
    if options.checkpoint:
        pipeline.network.enable_gradient_checkpointing()
    if options.compile:
        pipeline.compile_blocks()
    kept = collect(pipeline, cond, negative, options, size)
    optimizer = torch.optim.AdamW(trainable_parameters(pipeline), lr=3e-4)
    watch = Stopwatch(options.device)
    watch.forwards(pipeline.trainable, "forward")
    if torch.device(options.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    best: dict[str, float] = {}
    gap = 0.0
    for repeat in range(options.repeats + 1):
        with watch.span("total"):
            drift = update(pipeline, cond, negative, kept, optimizer, options, watch)
        spent = watch.seconds()
        if repeat == 0:
            gap = drift.item()  # only before the first update are the two policies the same
        elif not best or spent["total"] < best["total"]:
            best = spent
    total = best["total"]
    return {
        "model": options.model,
        "trained": "all" if options.full else "LoRA r32",
        "dtype": dtype,
        "compile": "blocks" if options.compile else "no",
        "checkpointing": "yes" if options.checkpoint else "no",
        "size": size,
        "batch": options.batch,
        "micro": options.micro,
        "trained steps": len(kept),
        "guidance": options.guidance,
        "s/step": f"{total:.3g}",
        "forward": f"{best['forward'] / total:.1%}",
        "backward": f"{best['backward'] / total:.1%}",
        "the rest": f"{1 - (best['forward'] + best['backward']) / total:.1%}",
        "peak GiB": f"{peak_gib(options.device):.2f}",
        "logp_gap": f"{gap:.1e}",
    }


def main() -> int:
    parser = arguments("Speed and memory of a GRPO optimizer step.")
    parser.add_argument("--micro", type=int, help="micro-batch; default half the batch, so that its shape differs")
    parser.add_argument("--train-steps", type=int, default=2, help="transitions trained on, from the first")
    parser.add_argument("--full", action="store_true", help="train all weights instead of a LoRA")
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    options = parser.parse_args()
    options.micro = options.micro or max(1, options.batch // 2)
    if not 1 <= options.train_steps < options.steps or options.repeats < 1:
        raise UserError("--train-steps must be at least 1 and below --steps, --repeats at least 1")
    print(table([measure(options, dtype) for dtype in options.dtype]))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
