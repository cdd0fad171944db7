"""Pruning against TTSnap's official simulation (golden vectors): who survives, what is found, what it costs.

The simulation's `ids` are mislabelled: it looks the winner's place among the survivors, which are in their first order,
up in a list that np.argpartition has shuffled, stage after stage. The rewards it reports are those of the true winner.
Here the winner and the survivors are ours, and that look-up is repeated to arrive at the published labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import cases, close, f64
from torch import Tensor

from diffalign.steering.prune import charged, standing, survivors


def pruned(columns: Tensor, shares: Sequence[float], steps: Sequence[int], combine: str) -> tuple[int, int]:
    """(the candidate that pruning ends with, its label in the simulation), of rewards [n, T, R]."""
    alive = torch.arange(len(columns))
    labels = np.arange(len(columns))
    for share, step in zip(shares, steps, strict=True):
        kept = survivors(columns[alive, step], share, combine)
        heights = standing(columns[alive, step], combine).numpy()
        labels = labels[np.argpartition(heights, -len(kept))[-len(kept) :]]
        alive = alive[kept]
    place = int(np.argmax(standing(columns[alive, -1], combine).numpy()))
    return int(alive[place]), int(labels[place])


def fractions(shares: Sequence[float]) -> list[float]:
    """Of one candidate before each pruning and after the last."""
    left = [1.0]
    for share in shares:
        left.append(left[-1] * share)
    return left


@pytest.mark.parametrize("case", cases("steering", "ttsnap_prune"))
def test_pruning(case: dict[str, Any]) -> None:
    rewards = f64(case["rewards"])[..., None]
    found = [pruned(r, case["alphas"], case["steps"], "sum") for r in rewards]
    assert [label for _, label in found] == case["ids"]
    close(torch.stack([r[k, -1, 0] for r, (k, _) in zip(rewards, found, strict=True)]).mean(), case["mean_final"])
    close(rewards[:, :, -1, 0].amax(1).mean(), case["bon"])
    steps = rewards.shape[2]
    close(charged(fractions(case["alphas"]), case["steps"], steps, 9.9, 1.2), case["cost"])
    close(steps * 9.9 + 1.2, case["bon_cost"])
    several = f64(case["rewards_multi"])
    found = [pruned(r, case["alphas"], case["steps"], "rank") for r in several]
    assert [label for _, label in found] == case["multi_ids"]
    close(torch.stack([r[k, -1] for r, (k, _) in zip(several, found, strict=True)]).mean(0), case["multi_mean"])


@pytest.mark.parametrize("case", cases("rewards", "ttsnap"))
def test_published_schedules(case: dict[str, Any]) -> None:
    rewards = f64(case["r"])[..., None]
    found = [pruned(r, case["alpha"], case["steps"], "sum") for r in rewards]
    assert [label for _, label in found] == case["ids"]
    close(torch.stack([r[k, -1, 0] for r, (k, _) in zip(rewards, found, strict=True)]).mean(), case["mean_best"])
    close(rewards[:, :, -1, 0].amax(1).mean(), case["bon"])
    close(charged(fractions(case["alpha"]), case["steps"], rewards.shape[2], 2.0, 0.5), case["cost"])
    close(rewards.shape[2] * 2.0 + 0.5, case["bon_cost"])
