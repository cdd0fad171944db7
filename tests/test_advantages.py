"""Advantages: identities, edge cases and abstaining rewards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.advantages import Advantage
from diffalign.advantages._statistics import combined, group_advantages
from diffalign.advantages.buffered import Buffered
from diffalign.advantages.dpo import Dpo
from diffalign.advantages.gdpo import Gdpo
from diffalign.advantages.group import Group
from diffalign.advantages.rank import Rank
from diffalign.advantages.rwr import Rwr
from diffalign.advantages.sft import Sft
from diffalign.listing import available
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


def test_combined_leaves_out_what_does_not_apply() -> None:
    rewards = {"a": torch.tensor([1.0, math.nan, math.nan]), "b": torch.tensor([2.0, 4.0, math.nan])}
    total = combined(rewards, {"a": 0.5, "b": 2.0}, torch.tensor([0, 1, 2]))
    assert total[:2].tolist() == [4.5, 8.0]
    assert total[2].isnan()


def test_a_failed_judgement_is_not_a_low_one() -> None:
    """One image of a group lacks a reward that the others have: it is left out, and the others are as without it."""
    rewards = {"a": torch.ones(4), "b": torch.tensor([20.0, 21.0, 22.0, math.nan])}
    total = combined(rewards, {"a": 1.0, "b": 1.0}, torch.zeros(4, dtype=torch.long))
    assert total.isnan().tolist() == [False, False, False, True]
    advantages = group_advantages(total, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(advantages[:3], group_advantages(rewards["b"][:3], torch.zeros(3, dtype=torch.long)))


def test_unknown_std_is_refused() -> None:
    with pytest.raises(UserError, match="take group, global or none"):
        group_advantages(torch.zeros(6), GROUP, "batch")


GDPO, RTDMD = Gdpo(name="gdpo"), Gdpo(name="gdpo", std="global", eps=1e-4)
MIX = Gdpo(name="gdpo", ddof=1, eps=1e-8, whiten=False)
RANK, SFT, DPO, RWR = Rank(name="rank"), Sft(name="sft"), Dpo(name="dpo"), Rwr(name="rwr")
BUFFERED = Buffered(name="buffered", buffer_size=4, min_count=3)
FLOW = Group(name="group")
ALL: list[Advantage] = [FLOW, GDPO, RTDMD, MIX, RANK, SFT, DPO, RWR, BUFFERED]
PROMPT = torch.tensor([7, 3, 7, 3, 7, 3, 7, 3, 9, 9])


def name_of(method: Any) -> str:
    return repr(method)


def scores(seed: int, count: int = len(PROMPT)) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def judged(method: Advantage, rewards: dict[str, Tensor], group: Tensor = PROMPT, **weights: float) -> Tensor:
    return method(rewards, {name: weights.get(name, 1.0) for name in rewards}, group, method.start())


def same(actual: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)


def test_every_estimator_is_tested_here() -> None:
    assert {method.name for method in ALL} == set(available("diffalign.advantages"))


@pytest.mark.parametrize("method", ALL, ids=name_of)
def test_estimators_follow_their_images(method: Advantage) -> None:
    """Reordered images keep their advantages, renumbered prompts change nothing, and fp32 rewards give float64."""
    rewards = {"a": scores(0), "b": scores(1)}
    base = judged(method, rewards, b=0.5)
    order = torch.randperm(len(PROMPT), generator=torch.Generator().manual_seed(2))
    same(judged(method, {k: r[order] for k, r in rewards.items()}, PROMPT[order], b=0.5), base[order])
    same(judged(method, rewards, 100 - PROMPT, b=0.5), base)
    assert judged(method, {k: r.float() for k, r in rewards.items()}).dtype == torch.float64


@pytest.mark.parametrize("method", ALL, ids=name_of)
def test_what_does_not_apply_takes_no_part(method: Advantage) -> None:
    rewards = scores(3)
    rewards[[0, 3, 8, 9]] = torch.nan  # one image of two prompts, all of the third
    valid = ~rewards.isnan()
    actual = judged(method, {"a": rewards})
    assert actual.isnan().tolist() == rewards.isnan().tolist()
    same(actual[valid], judged(method, {"a": rewards[valid]}, PROMPT[valid]))


@pytest.mark.parametrize("method", [FLOW, GDPO, RTDMD, MIX, RANK, DPO], ids=name_of)
@pytest.mark.parametrize("value", [0.1, -1.4619, 1e6 + 0.1])
def test_images_that_are_all_alike_teach_nothing(method: Advantage, value: float) -> None:
    a, b = scores(4), scores(5)
    a[PROMPT == 7], b[PROMPT == 7] = value, value / 3
    actual = judged(method, {"a": a, "b": b}, a=0.3, b=-2.0)
    assert (actual[PROMPT == 7] == 0).all()
    assert (actual[PROMPT == 3] != 0).any()
    alone = judged(method, {"a": a}, torch.arange(len(a)))
    assert (alone == 0).all(), "an only image is compared with nothing"
    assert (judged(method, {"a": torch.full_like(a, value)}) == 0).all()


@pytest.mark.parametrize("method", [GDPO, Gdpo(name="gdpo", whiten=False), RANK, SFT, DPO], ids=name_of)
def test_scale_and_offset_of_the_reward_are_irrelevant(method: Advantage) -> None:
    rewards = scores(6)
    same(judged(method, {"a": 30 * rewards + 5}), judged(method, {"a": rewards}), 1e-9)


def test_gdpo_gives_each_reward_its_weight_whatever_its_scale() -> None:
    """Under a plain sum the reward of the larger scale decides; normalised first, both count alike."""
    a, b = scores(7), scores(8)
    same(judged(GDPO, {"a": a, "b": 1000 * b}), judged(GDPO, {"a": a, "b": b}), 1e-9)
    summed = judged(FLOW, {"a": a, "b": 1000 * b})
    same(summed, judged(FLOW, {"b": b}), 0.02)
    parts = [judged(MIX, {name: r}) for name, r in {"a": a, "b": b}.items()]
    same(judged(MIX, {"a": a, "b": b}, a=0.5, b=2.0), 0.5 * parts[0] + 2.0 * parts[1])


def test_gdpo_whitens_the_sum() -> None:
    rewards = {"a": scores(9), "b": scores(10), "c": scores(11)}
    whitened = judged(GDPO, rewards, c=4.0)
    assert whitened.mean().abs() < 1e-12
    assert whitened.std(correction=0).item() == pytest.approx(1.0)
    same(judged(GDPO, rewards, a=10.0, b=10.0, c=40.0), whitened)


def test_gdpo_leaves_out_a_reward_that_an_image_lacks() -> None:
    a, b = scores(12), scores(13)
    b[PROMPT == 3] = torch.nan
    b[0] = torch.nan
    plain = Gdpo(name="gdpo", whiten=False)
    actual = judged(plain, {"a": a, "b": b})
    same(actual[PROMPT == 3], judged(plain, {"a": a})[PROMPT == 3])
    same(actual[0], judged(plain, {"a": a})[0])
    assert not actual.isnan().any()


def test_rank_counts_places_only() -> None:
    group = torch.zeros(4, dtype=torch.long)
    actual = judged(RANK, {"a": torch.tensor([0.1, 0.3, 0.2, 1e9])}, group)
    same(actual, (torch.tensor([0.0, 2.0, 1.0, 3.0], dtype=torch.float64) - 1.5) / math.sqrt(1.25))
    assert actual.mean() == 0 and actual.std(correction=0).item() == pytest.approx(1.0)
    same(judged(RANK, {"a": scores(14).exp()}), judged(RANK, {"a": scores(14)}))


def test_ranks_of_each_reward_add_up_whatever_their_scales() -> None:
    group = torch.tensor([0, 0, 0, 1, 1])
    a, b = torch.tensor([1.0, 2, 3, 0, 5]), torch.tensor([9.0, 7, 8, math.nan, math.nan])
    each = Rank(name="rank", each=True)
    weights = {"a": 1.0, "b": 0.5}
    ranks = each({"a": a, "b": b}, weights, group, {})
    expected = each({"a": a}, weights, group, {}) + each({"b": b}, weights, group, {}).nan_to_num(0.0)
    torch.testing.assert_close(ranks, expected)
    torch.testing.assert_close(each({"a": a * 1e6, "b": b.exp()}, weights, group, {}), ranks)


def test_tied_images_share_their_rank() -> None:
    actual = judged(RANK, {"a": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])}, torch.zeros(5, dtype=torch.long))
    same(actual, torch.tensor([1.0, -1.5, 1.0, 1.0, -1.5], dtype=torch.float64) / math.sqrt(2.0))


def test_sft_takes_all_the_best_and_dpo_one_pair() -> None:
    rewards = {"a": torch.tensor([0.0, 1.0, 1.0, math.nan, 0.0, 2.0, 2.0])}
    group = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    nan = math.nan
    same(judged(SFT, rewards, group), torch.tensor([0, 1, 1, nan, 0, 1, 1], dtype=torch.float64))
    same(judged(DPO, rewards, group), torch.tensor([-1, 1, 0, nan, 0, 0, 0], dtype=torch.float64))
    ties = Dpo(name="dpo", pair_ties=True)
    same(judged(ties, rewards, group), torch.tensor([-1, 1, 0, nan, 0, -1, 1], dtype=torch.float64))
    assert judged(ties, {"a": torch.tensor([3.0])}, torch.tensor([0])).item() == 0


def test_rwr_is_the_combined_reward() -> None:
    a, b = scores(15), scores(16)
    same(judged(RWR, {"a": a, "b": b}, a=2.0, b=0.5), 2 * a + 0.5 * b)
    assert RWR.clip >= 100, "raw scores such as PickScore's 22 are not cut"


@pytest.mark.parametrize("kind", [Group, Rank, Sft, Dpo, Rwr, Buffered])
def test_min_is_decided_by_the_worst_reward(kind: Any) -> None:
    """However high the first reward climbs, the advantages are those of the second, which is always the lower."""
    method, alone = kind(name="x", combine="min"), kind(name="x")
    low = scores(17)
    expected = judged(alone, {"low": low})
    for hacked in (low + 1, low + 1e3 * scores(18).exp()):
        same(judged(method, {"hacked": hacked, "low": low}), expected)
    same(judged(method, {"low": low, "absent": torch.full_like(low, torch.nan)}), expected)
    weighted = judged(method, {"low": low.abs(), "other": 2 * low.abs()}, other=0.25)
    same(weighted, judged(alone, {"low": 0.5 * low.abs()}))


def test_min_of_rewards_is_not_their_sum() -> None:
    a, b = torch.tensor([0.0, 10.0, 4.0, 5.0]), torch.tensor([9.0, 0.5, 4.0, 3.0])
    best = judged(Sft(name="sft", combine="min"), {"a": a, "b": b}, torch.zeros(4, dtype=torch.long))
    assert best.tolist() == [0, 0, 1, 0]


def buffered_by_hand(epochs: list[tuple[Tensor, Tensor]], size: int, least: int) -> list[Tensor]:
    """DDPO's rule, written with lists."""
    past: dict[int, list[float]] = {}
    found = []
    for rewards, group in epochs:
        values = torch.zeros_like(rewards)
        for r, g in zip(rewards.tolist(), group.tolist(), strict=True):
            past[g] = [*past.get(g, []), r][-size:]
        for i, g in enumerate(group.tolist()):
            known = torch.tensor(past[g], dtype=torch.float64) if len(past[g]) >= least else rewards
            values[i] = (rewards[i] - known.mean()) / (known.std(correction=0) + 1e-6)
        found.append(values)
    return found


@pytest.mark.parametrize(("size", "least"), [(4, 3), (16, 16), (2, 1), (40, 5)])
def test_buffered_compares_with_the_past_and_resumes_exactly(size: int, least: int, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(19)
    epochs = [(scores(20 + e, 9), torch.randint(5, (9,), generator=draw)) for e in range(6)]
    method = Buffered(name="buffered", buffer_size=size, min_count=least)
    state = method.start()
    for (rewards, group), expected in zip(epochs, buffered_by_hand(epochs, size, least), strict=True):
        same(method({"a": rewards}, {"a": 1.0}, group, state), expected, 1e-9)
        save_file(state, tmp_path / "state.safetensors")  # also while it is empty of some prompts
        restored = load_file(tmp_path / "state.safetensors")
        assert restored.keys() == method.start().keys()
        assert all(torch.equal(restored[k], state[k]) for k in state)
        state = restored
    assert state["group"].bincount().max() <= size


def test_an_empty_buffer_can_be_saved(tmp_path: Path) -> None:
    save_file(BUFFERED.start(), tmp_path / "state.safetensors")
    state = load_file(tmp_path / "state.safetensors")
    same(BUFFERED({"a": scores(0)}, {"a": 1.0}, PROMPT, state), judged(BUFFERED, {"a": scores(0)}))


def test_buffered_sees_that_a_prompt_improves() -> None:
    """Three equal images that beat the past have positive advantages, where the group alone gives 0."""
    group, state = torch.zeros(3, dtype=torch.long), BUFFERED.start()
    assert (BUFFERED({"a": torch.full((3,), 0.1)}, {"a": 1.0}, group, state) == 0).all()
    assert (BUFFERED({"a": torch.full((3,), 0.7)}, {"a": 1.0}, group, state) > 0).all()
    BUFFERED({"a": torch.full((3,), torch.nan)}, {"a": 1.0}, group, state)
    assert len(state["reward"]) == 4 and not state["reward"].isnan().any()


def test_a_buffer_that_can_never_fill_is_refused() -> None:
    with pytest.raises(ValidationError, match="buffer_size of 4 never holds min_count 16"):
        Buffered(name="buffered", buffer_size=4)
