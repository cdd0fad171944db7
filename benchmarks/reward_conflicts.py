"""How often a step works against one of its rewards: the smallest cosine between a mini-batch's step and any reward.

    python benchmarks/reward_conflicts.py shapes_marble --checkpoint runs/shapes_marble/checkpoints/0040 --epochs 4

The model of the checkpoint (or the one before training) samples the images of some epochs and is not trained. For every
mini-batch of `--batch` images at one noise level the gradient of each reward's own advantages is compared with four
steps: the weighted sum of the rewards (one advantage from one sum), equal shares of the rewards' advantages, MARBLE's
solution on this mini-batch, and MARBLE's mixture between solves, whose alpha comes from the mini-batches before. A
reward without any gradient in a mini-batch is left out of it. Prints a line for each.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor

from diffalign import loading, trainer
from diffalign.clock import Clock
from diffalign.interrupt import Interrupt
from diffalign.judging import advantages
from diffalign.multireward._min_norm import balance
from diffalign.multireward.marble import smoothed
from diffalign.overlap import Early
from diffalign.rewards import score
from diffalign.run import Run, prepare
from diffalign.types import Rollout
from diffalign.update import TrainedPolicy


def judged(run: Run) -> tuple[Rollout, Tensor]:
    """An epoch's images, and the advantages of the weighted sum of their rewards."""
    with Early({}) as early, Interrupt() as interrupt:
        rollout, _, _ = trainer.sample(run, Clock(run.pipeline.device), early, interrupt)
    assert rollout.images is not None
    with torch.no_grad():
        outputs = score(run.scorers, rollout.images, rollout.prompts, rollout.metadata, run.config.trainer.micro_batch)
    advantages(run, rollout, outputs)
    weights = {reward.key: reward.weight for reward in run.config.rewards}
    rewards = {name: r.double() for name, r in rollout.rewards.items()}
    total = run.config.advantage(rewards, weights, rollout.group, run.config.advantage.start())
    return rollout, total.nan_to_num(0.0).float()


def smallest(step: Tensor, own: Tensor) -> float:
    valid = own.norm(dim=1) > 0
    return float(torch.cosine_similarity(step[None], own[valid]).min())


def measure(run: Run, epochs: int, size: int) -> dict[str, list[float]]:
    worst: dict[str, list[float]] = {
        "weighted sum": [],
        "equal shares": [],
        "MARBLE, solved": [],
        "MARBLE, between": [],
    }
    parameters = list(run.parameters.values())
    alphas: Tensor | None = None
    for run.epoch in range(epochs):
        rollout, total = judged(run)
        policy = TrainedPolicy(run.pipeline, run.config.sampling, None)
        for rows in torch.arange(len(rollout)).split(size):
            batch = rollout[rows]
            for loss in run.config.algorithm.losses(policy, batch, run.memory):
                of = [a.nan_to_num(0.0) for a in batch.separate.values()]
                raw = [
                    torch.autograd.grad(loss.policy(a).mean(), parameters, retain_graph=True)
                    for a in [*of, total[rows]]
                ]
                flat = torch.stack([torch.cat([g.flatten() for g in gradient]) for gradient in raw]).double()
                own, weighted = flat[:-1], flat[-1]
                found = balance(own @ own.T)
                worst["weighted sum"].append(smallest(weighted, own))
                worst["equal shares"].append(smallest(own.mean(0), own))
                worst["MARBLE, solved"].append(smallest(found.coefficients @ own, own))
                if alphas is not None:
                    worst["MARBLE, between"].append(smallest(alphas @ own, own))
                alphas = found.alphas if alphas is None else smoothed(alphas, found.alphas, 0.7)
    return worst


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--checkpoint", help="the model as it is there; not given, before training")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    settings = [*args.overrides, "output=runs/conflicts", "evaluation.every=0"]
    run = prepare(loading.load(args.config, settings), args.checkpoint or "auto")
    print("| step | mini-batches | smallest cosine, mean | below 0 |\n|---|---|---|---|")
    for name, values in measure(run, args.epochs, args.batch).items():
        below = sum(v < -1e-6 for v in values) / len(values)
        print(f"| {name} | {len(values)} | {statistics.mean(values):.3f} | {below:.0%} |")
    run.tracker.close()
