"""Advantages: identities, edge cases and abstaining rewards."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.advantages import group_advantages, weighted_sum
from diffalign.types import UserError

GROUP = torch.tensor([7, 7, 7, 3, 3, 3])


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_a_group_without_variance_gives_exactly_zero(std: str) -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0, 0.5])
    advantages = group_advantages(rewards, GROUP, std)
    assert advantages[:3].tolist() == [0.0, 0.0, 0.0]
    assert advantages[4] > 0 > advantages[3]
    assert advantages[3:].sum().abs() < 1e-12


def test_a_single_valid_sample_is_compared_with_nothing() -> None:
    rewards = torch.tensor([math.nan, 0.4, math.nan, 0.0, 1.0, 0.5])
    advantages = group_advantages(rewards, GROUP)
    assert advantages[1] == 0
    assert advantages[[0, 2]].isnan().all()


def test_abstaining_samples_take_no_part_in_the_statistics() -> None:
    rewards = torch.tensor([0.2, 0.9, math.nan, 0.0, 1.0, 0.5])
    valid = ~rewards.isnan()
    for std in ("group", "global", "none"):
        alone = group_advantages(rewards[valid], GROUP[valid], std)
        torch.testing.assert_close(group_advantages(rewards, GROUP, std)[valid], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("std", ["group", "global"])
def test_affine_changes_of_the_reward_change_nothing(std: str) -> None:
    rewards = torch.randn(6, generator=torch.Generator().manual_seed(0)).double()
    base = group_advantages(rewards, GROUP, std, eps=1e-12)
    torch.testing.assert_close(group_advantages(3 * rewards + 5, GROUP, std, eps=1e-12), base, rtol=0, atol=1e-9)


def test_order_of_samples_is_irrelevant() -> None:
    rewards, order = torch.tensor([0.3, 0.2, 0.9, 0.0, 1.0, 0.5]), torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = group_advantages(rewards[order], GROUP[order])
    torch.testing.assert_close(shuffled, group_advantages(rewards, GROUP)[order], rtol=0, atol=1e-12)


def test_weighted_sum_leaves_out_what_does_not_apply() -> None:
    rewards = {"a": torch.tensor([1.0, math.nan, math.nan]), "b": torch.tensor([2.0, 4.0, math.nan])}
    total = weighted_sum(rewards, {"a": 0.5, "b": 2.0}, torch.tensor([0, 1, 2]))
    assert total[:2].tolist() == [4.5, 8.0]
    assert total[2].isnan()


def test_a_failed_judgement_is_not_a_low_one() -> None:
    """One image of a group lacks a reward that the others have: it is left out, and the others are as without it."""
    rewards = {"a": torch.ones(4), "b": torch.tensor([20.0, 21.0, 22.0, math.nan])}
    total = weighted_sum(rewards, {"a": 1.0, "b": 1.0}, torch.zeros(4, dtype=torch.long))
    assert total.isnan().tolist() == [False, False, False, True]
    advantages = group_advantages(total, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(advantages[:3], group_advantages(rewards["b"][:3], torch.zeros(3, dtype=torch.long)))


def test_unknown_std_is_refused() -> None:
    with pytest.raises(UserError, match="take group, global or none"):
        group_advantages(torch.zeros(6), GROUP, "batch")
