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
from gradient_signal import judged
from torch import Tensor, nn

from diffalign import loading
from diffalign.algorithms import Loss
from diffalign.multireward._min_norm import balance
from diffalign.multireward.marble import Marble, smoothed
from diffalign.run import Run, prepare
from diffalign.types import Rollout
from diffalign.update import TrainedPolicy


def weighted_sum(run: Run, rollout: Rollout) -> Tensor:
    """[B] advantages of the weighted sum of the rewards."""
    weights = {reward.key: reward.weight for reward in run.config.rewards}
    rewards = {name: r.double() for name, r in rollout.rewards.items()}
    total = run.config.advantage(rewards, weights, rollout.group, run.config.advantage.start())
    return total.nan_to_num(0.0).float()


def smallest(step: Tensor, own: Tensor) -> float:
    return float(torch.cosine_similarity(step[None], own).min())


def flat(value: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Gradient of a loss, in one vector."""
    gradient = torch.autograd.grad(value, parameters, retain_graph=True)
    return torch.cat([g.flatten() for g in gradient]).double()


def masked(loss: Loss, advantages: Tensor) -> Tensor:
    """Mean policy loss over the images that a reward applies to, as training takes it."""
    valid = ~advantages.isnan()
    return loss.policy(advantages.nan_to_num(0.0)).where(valid, 0.0).sum() / valid.sum().clamp(min=1)


def measure(run: Run, epochs: int, size: int) -> dict[str, list[float]]:
    assert isinstance(run.config.multireward, Marble)
    worst: dict[str, list[float]] = {
        "weighted sum": [],
        "equal shares": [],
        "MARBLE, solved": [],
        "MARBLE, between": [],
    }
    parameters = list(run.parameters.values())
    average: Tensor | None = None
    for run.epoch in range(epochs):
        rollout, *_ = judged(run)
        total = weighted_sum(run, rollout)
        policy = TrainedPolicy(run.pipeline, run.config.sampling, None)
        for rows in torch.arange(len(rollout)).split(size):
            batch = rollout[rows]
            advantages = torch.stack(list(batch.separate.values()))
            if bool((advantages.nan_to_num(0.0) == 0).all()):
                continue
            for loss in run.config.algorithm.losses(policy, batch, run.memory):
                own = torch.stack([flat(masked(loss, a), parameters) for a in advantages])
                found = balance(own @ own.T)
                felt = own[found.valid]
                mixtures = {"weighted sum": total[rows], "equal shares": advantages.nan_to_num(0.0).mean(0)}
                if average is not None:
                    mixtures["MARBLE, between"] = (average.float()[:, None] * advantages.nan_to_num(0.0)).sum(0)
                for name, mixture in mixtures.items():
                    worst[name].append(smallest(flat(loss.policy(mixture).mean(), parameters), felt))
                worst["MARBLE, solved"].append(smallest(found.coefficients @ own, felt))
                momentum = run.config.multireward.momentum
                average = found.alphas if average is None else smoothed(average, found.alphas, momentum)
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
