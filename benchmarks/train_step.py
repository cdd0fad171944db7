"""Speed of a GRPO optimizer step, its memory, and how far training log-probs stray from those of the rollout.

    python benchmarks/train_step.py --model tiny-sd3 --dtype fp32 bf16
    python benchmarks/train_step.py --model random:sd35-medium --dtype bf16 --batch 8 --micro 4 --compile --checkpoint

A rollout stores transitions; the timed step scores them with gradients in micro-batches and updates a LoRA. `logp_gap`
is the mean |log p(training) - log p(rollout)| before any update: 0 in exact arithmetic, and to be small beside the clip
range. Prints a markdown table.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rollout import Stopwatch, arguments, build, image_size, peak_gib, report, roll

from diffalign.adapters import add_full, add_lora, trainable_parameters
from diffalign.algorithms import Memory
from diffalign.algorithms.grpo import GRPO
from diffalign.sections import Sampling
from diffalign.types import Rollout, UserError
from diffalign.update import TrainedPolicy


def update(
    policy: TrainedPolicy,
    rollout: Rollout,
    optimizer: torch.optim.Optimizer,
    options: argparse.Namespace,
    watch: Stopwatch,
) -> float:
    """One optimizer step over all stored transitions; returns the mean |log-prob gap|."""
    algorithm, memory, gap = GRPO(name="grpo"), Memory(), 0.0
    for index in torch.arange(len(rollout)).split(options.micro):
        for loss in algorithm.losses(policy, rollout[index], memory):
            with watch.span("backward"):
                (loss.per_sample.sum() / len(rollout)).backward()
            gap += float(loss.metrics["logp_gap"].sum()) / len(rollout)
    torch.nn.utils.clip_grad_norm_(trainable_parameters(policy.pipeline), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return gap


def measure(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    if not 1 <= options.train_steps < options.steps:
        raise UserError("--train-steps must be at least 1 and below --steps")
    torch.manual_seed(0)
    pipeline = build(options.model, dtype, options.device)
    if options.full:
        add_full(pipeline)
    else:
        add_lora(pipeline, rank=32, alpha=64)
    if options.checkpoint:
        pipeline.network.enable_gradient_checkpointing()
    if options.compile:
        pipeline.compile_blocks()
    rollout = roll(pipeline, options, range(options.train_steps))
    rollout.advantages = torch.linspace(-1, 1, options.batch, device=options.device)
    sampling = Sampling(steps=options.steps, kernel="cps", eta=0.7, guidance=options.guidance)
    policy = TrainedPolicy(pipeline, sampling, pipeline.encode([""]) if options.guidance != 1 else None)
    optimizer = torch.optim.AdamW(trainable_parameters(pipeline), lr=3e-4)
    watch = Stopwatch(options.device)
    watch.forwards(pipeline.trainable, "forward")
    if torch.device(options.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    best: dict[str, float] = {}
    gap = 0.0
    for repeat in range(options.repeats + 1):
        with watch.span("total"):
            drift = update(policy, rollout, optimizer, options, watch)
        spent = watch.seconds()
        if repeat == 0:
            gap = drift  # only before the first update are the two policies the same
        elif not best or spent["total"] < best["total"]:
            best = spent
    total = best["total"]
    return {
        "model": options.model,
        "trained": "all" if options.full else "LoRA r32",
        "dtype": dtype,
        "compile": "blocks" if options.compile else "no",
        "checkpointing": "yes" if options.checkpoint else "no",
        "size": image_size(options),
        "batch": options.batch,
        "micro": options.micro,
        "trained steps": options.train_steps,
        "guidance": options.guidance,
        "s/step": f"{total:.3g}",
        "forward": f"{best['forward'] / total:.1%}",
        "backward": f"{best['backward'] / total:.1%}",
        "the rest": f"{1 - (best['forward'] + best['backward']) / total:.1%}",
        "peak GiB": f"{peak_gib(options.device):.2f}",
        "logp_gap": f"{gap:.1e}",
    }


if __name__ == "__main__":
    parser = arguments("Speed and memory of a GRPO optimizer step.")
    parser.add_argument("--micro", type=int, help="micro-batch; default half the batch, so that its shape differs")
    parser.add_argument("--train-steps", type=int, default=2, help="transitions trained on, from the first")
    parser.add_argument("--full", action="store_true", help="train all weights instead of a LoRA")
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    options = parser.parse_args()
    options.micro = options.micro or max(1, options.batch // 2)
    report(options, measure)
