"""The share of signal in a policy gradient: the cosine between the gradients of two independent batches.

    python benchmarks/gradient_signal.py shapes_grpo --batches 16 --rows sampling.eta=0.4 "algorithm.window=null" ...

Every row is the configuration with its overrides (several are joined by a comma and a space). Nothing is trained: each
batch is one epoch's images from the model as it is, with other prompts and seeds. If g = signal + noise, two batches
have the expected cosine |signal|^2 / (|signal|^2 + |noise|^2): 0.01 means that it takes about a hundred such epochs
until what the weights have moved points as much along the signal as off it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign import loading, trainer
from diffalign.balancing import Meter, Work, back_propagate
from diffalign.clock import Clock
from diffalign.interrupt import Interrupt
from diffalign.judging import advantages
from diffalign.overlap import Early
from diffalign.rewards import score
from diffalign.run import Run, prepare
from diffalign.types import Rollout
from diffalign.update import TrainedPolicy, parts


def judged(run: Run) -> tuple[Rollout, int, int, dict[str, float]]:
    """An epoch's images with their advantages, the number of this process's first one, how many there are, the log."""
    with Early({}) as early, Interrupt() as interrupt:
        rollout, first, total = trainer.sample(run, Clock(run.pipeline.device), early, interrupt)
    assert rollout.images is not None
    with torch.no_grad():
        outputs = score(run.scorers, rollout.images, rollout.prompts, rollout.metadata, run.config.trainer.micro_batch)
    return rollout, first, total, advantages(run, rollout, outputs)


def gradient(run: Run) -> tuple[Tensor, dict[str, float]]:
    """Gradient of one epoch's loss at the current weights, flattened, and what the epoch logged of its rewards."""
    config = run.config
    rollout, first, total, logged = judged(run)
    negative = run.pipeline.encode([config.sampling.negative_prompt]) if config.sampling.guidance != 1 else None
    policy = TrainedPolicy(run.pipeline, config.sampling, negative)
    part = next(parts(run, rollout, first, total))
    work = [Work(batch, config.algorithm.losses(policy, batch, run.memory)) for batch in part.batches(rollout)]
    back_propagate(run.balancer, work, rollout.separate, total, Meter())
    flat = torch.cat([p.grad.flatten() for p in run.parameters.values() if p.grad is not None])
    run.optimizer.zero_grad()
    return flat, logged


def row(config: str, overrides: Sequence[str], batches: int) -> str:
    run = prepare(loading.load(config, [*overrides, "output=runs/signal", "evaluation.every=0"]), resume="auto")
    began, unit, norms, rewards = time.monotonic(), [], [], []
    for run.epoch in range(batches):
        flat, logged = gradient(run)
        norms.append(float(flat.norm()))
        unit.append(flat / flat.norm())
        rewards.append(logged[f"reward/{next(iter(run.scorers))}"])
    seconds = (time.monotonic() - began) / batches
    cosines = [float(a @ b) for a, b in itertools.combinations(unit, 2)]
    error = statistics.stdev(cosines) / len(cosines) ** 0.5
    run.tracker.close()
    name = ", ".join(overrides) or "as it is"
    return (
        f"| {name} | {statistics.mean(cosines):.4f} ± {error:.4f} | {statistics.mean(norms):.3g} | "
        f"{statistics.mean(rewards):.3f} | {seconds:.1f} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--rows", nargs="*", default=[], help="overrides; join several of one row by ', '")
    args = parser.parse_args()
    print("| changed | cosine of two batches | norm | reward | s/batch |\n| --- | --- | --- | --- | --- |", flush=True)
    for overrides in ["", *args.rows]:
        print(row(args.config, overrides.split(", ") if overrides else [], args.batches), flush=True)
