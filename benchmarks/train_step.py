"""Speed and memory of an optimizer step of each method, and how far GRPO's log-probs stray from those of the rollout.

    python benchmarks/train_step.py --model tiny-sd3 --dtype fp32 bf16
    python benchmarks/train_step.py --model random:sd35-medium --dtype bf16 --batch 8 --micro 4 --compile --checkpoint
    python benchmarks/train_step.py --method grpo nft nft-apart marble marble-solve marble-full

A rollout is drawn once and its advantages are made up, so the step is all that is timed: gradients in micro-batches and
an update of a LoRA. GRPO trains on `--levels` stored transitions of each image, the others at as many noise levels.
`nft` trains on policy; `nft-apart` has an old policy that lags and a KL, so two more forward passes. MARBLE has five
rewards: `marble` is a step between solves, `marble-solve` one that splits one noise level by reward, `marble-full` one
that splits all. `logp_gap` is the mean |log p(training) - log p(rollout)| before any update: 0 in exact arithmetic, and
to be small beside the clip range. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rollout import Stopwatch, arguments, build, image_size, peak_gib, report, roll
from torch import Tensor

from diffalign.adapters import add_full, add_lora, trainable_parameters
from diffalign.algorithms import Algorithm
from diffalign.algorithms._shadow import Decay
from diffalign.algorithms._timesteps import Timesteps
from diffalign.algorithms.grpo import GRPO
from diffalign.algorithms.nft import NFT
from diffalign.balancing import Balancer, Meter, Work, back_propagate
from diffalign.multireward.marble import Marble
from diffalign.sections import Sampling
from diffalign.types import UserError
from diffalign.update import TrainedPolicy

REWARDS = 5
LAGS = Decay(rate=1.0, cap=0.5)


def nft(levels: int, apart: bool = False) -> NFT:
    old, kl = (LAGS, 1e-4) if apart else (Decay(rate=0), 0.0)
    return NFT(name="nft", timesteps=Timesteps(count=levels), old=old, kl=kl)


METHODS: dict[str, Callable[[int], tuple[Algorithm, Marble | None]]] = {
    "grpo": lambda levels: (GRPO(name="grpo"), None),
    "nft": lambda levels: (nft(levels), None),
    "nft-apart": lambda levels: (nft(levels, apart=True), None),
    "marble": lambda levels: (nft(levels), Marble(name="marble", every=10**6)),
    "marble-solve": lambda levels: (nft(levels), Marble(name="marble", every=1, warmup=0)),
    "marble-full": lambda levels: (nft(levels), Marble(name="marble", every=1, losses=None)),
}


def made_up(batch: int, device: str) -> dict[str, Tensor]:
    """Advantages [B] of five rewards."""
    generator = torch.Generator().manual_seed(0)
    return {f"reward {k}": torch.randn(batch, generator=generator).to(device) for k in range(REWARDS)}


def measure(options: argparse.Namespace, dtype: str, method: str) -> dict[str, Any]:
    if not 1 <= options.levels < options.steps:
        raise UserError("--levels must be at least 1 and below --steps")
    gc.collect()  # what the last row leaves behind would count as this one's memory
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
    algorithm, multireward = METHODS[method](options.levels)
    guidance = options.guidance if algorithm.trajectory else 1.0
    rollout = roll(pipeline, options, range(options.levels) if algorithm.trajectory else [], guidance)
    rollout.separate = made_up(options.batch, options.device) if multireward else {}
    rollout.advantages = torch.linspace(-1, 1, options.batch, device=options.device)
    sampling = Sampling(steps=options.steps, kernel="cps", eta=0.7, guidance=guidance)
    policy = TrainedPolicy(pipeline, sampling, pipeline.encode([""]) if guidance != 1 else None)
    parameters = trainable_parameters(pipeline)
    memory = algorithm.start(pipeline, {str(i): p for i, p in enumerate(parameters)})
    weights = dict.fromkeys(rollout.separate, 1.0)
    balancer = Balancer.of(multireward, 0, weights, parameters, lambda t: t, main=True) if multireward else None
    optimizer = torch.optim.AdamW(parameters, lr=3e-4)

    def update() -> float:
        """One optimizer step and the end of its epoch; returns the mean |log-prob gap|."""
        meter = Meter()
        batches = [rollout[index] for index in torch.arange(len(rollout)).split(options.micro)]
        work = [Work(batch, algorithm.losses(policy, batch, memory)) for batch in batches]
        back_propagate(balancer, work, rollout.separate, len(rollout), meter)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        memory.after_step()
        memory.after_epoch()
        return meter.means().get("logp_gap", torch.nan)

    watch = Stopwatch(options.device)
    watch.forwards(pipeline.trainable, "forward")
    gap = update()  # the warm-up; only before the first update are the two policies the same
    watch.seconds()
    if torch.device(options.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    spent = []
    for _ in range(options.repeats):
        with watch.span("total"):
            update()
        spent.append(watch.seconds())
    best = min(spent, key=lambda seconds: seconds["total"])
    return {
        "method": method,
        "model": options.model,
        "trained": "all" if options.full else "LoRA r32",
        "dtype": dtype,
        "compile": "blocks" if options.compile else "no",
        "checkpointing": "yes" if options.checkpoint else "no",
        "size": image_size(options),
        "batch": options.batch,
        "micro": options.micro,
        "levels": options.levels,
        "guidance": guidance,
        "s/step": f"{best['total']:.3g}",
        "forward": f"{best['forward'] / best['total']:.1%}",
        "the rest": f"{1 - best['forward'] / best['total']:.1%}",
        "peak GiB": f"{peak_gib(options.device):.2f}",
        "logp_gap": "" if gap != gap else f"{gap:.1e}",
    }


if __name__ == "__main__":
    parser = arguments("Speed and memory of an optimizer step.")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["grpo"], help="one row each")
    parser.add_argument("--micro", type=int, help="micro-batch; default half the batch, so that its shape differs")
    parser.add_argument("--levels", type=int, default=2, help="transitions or noise levels trained on for each image")
    parser.add_argument("--full", action="store_true", help="train all weights instead of a LoRA")
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    options = parser.parse_args()
    options.micro = options.micro or max(1, options.batch // 2)
    rows = [(dtype, method) for dtype in options.dtype for method in options.method]
    report(options, [partial(measure, options, dtype, method) for dtype, method in rows])
