"""Curriculums: which prompts an epoch takes, and in which order processes see their images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.advantages.group import Group
from diffalign.curriculums import Curriculum, k_repeat
from diffalign.curriculums.uniform import Uniform
from diffalign.curriculums.variance import Variance
from diffalign.listing import available
from diffalign.types import UserError

UNIFORM, VARIANCE = Uniform(name="uniform"), Variance(name="variance")
ALL: list[Curriculum] = [UNIFORM, VARIANCE]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(curriculum: Curriculum, count: int, seed: int, state: dict[str, Tensor], prompts: int = 10) -> list[int]:
    return curriculum.draw(prompts, count, seeded(seed), state).tolist()


def taught(curriculum: Curriculum, scores: dict[int, list[float]], state: dict[str, Tensor]) -> None:
    """Let it learn from the scores of some prompts' images, mixed up as the processes bring them."""
    pairs = [(p, r) for p, values in scores.items() for r in values]
    group = torch.tensor([p for p, _ in pairs])
    rewards = torch.tensor([r for _, r in pairs], dtype=torch.float64)
    order = torch.randperm(len(pairs), generator=seeded(len(pairs)))
    curriculum.learn(group[order], torch.zeros(len(pairs)), rewards[order], state)


def frequencies(curriculum: Curriculum, count: int, state: dict[str, Tensor], epochs: int = 1500) -> Tensor:
    """[prompts] share of epochs that take each prompt, out of ten."""
    generator, hits = seeded(0), torch.zeros(10, dtype=torch.float64)
    for _ in range(epochs):
        hits[curriculum.draw(10, count, generator, state)] += 1
    return hits / epochs


def test_every_curriculum_is_tested_here() -> None:
    assert {c.name for c in ALL} == set(available("diffalign.curriculums"))


@pytest.mark.parametrize("curriculum", ALL, ids=lambda c: c.name)
def test_draws_are_different_prompts_and_repeatable(curriculum: Curriculum) -> None:
    state = curriculum.start(10)
    taught(curriculum, {0: [0.0, 1.0], 3: [0.5, 0.5]}, state)
    whole = drawn(curriculum, 10, 1, state)
    assert sorted(whole) == list(range(10))
    assert drawn(curriculum, 4, 1, state) == whole[:4]
    assert drawn(curriculum, 10, 2, state) != whole


@pytest.mark.parametrize("curriculum", ALL, ids=lambda c: c.name)
def test_more_prompts_than_there_are_is_refused(curriculum: Curriculum) -> None:
    with pytest.raises(UserError, match="11 prompts asked for an epoch, but there are 10; ask for 10 or fewer"):
        drawn(curriculum, 11, 0, curriculum.start(10))


@pytest.mark.parametrize("state", [VARIANCE.start(10), {"variance": torch.zeros(10, dtype=torch.float64)}])
def test_nothing_known_draws_all_alike(state: dict[str, Tensor]) -> None:
    share = frequencies(VARIANCE, 3, state)
    torch.testing.assert_close(share, torch.full_like(share, 0.3), atol=0.05, rtol=0)  # 4 standard errors


def test_informative_prompts_come_first() -> None:
    """Weights 1 and floor 0.1: of one draw, each informative prompt has its weight's share."""
    state = VARIANCE.start(10)
    taught(VARIANCE, {p: [0.0, 1.0, 0.0, 1.0] if p < 3 else [float(p)] * 4 for p in range(10)}, state)
    share = frequencies(VARIANCE, 1, state)
    expected = torch.tensor([1.0] * 3 + [0.1] * 7, dtype=torch.float64) / 3.7
    torch.testing.assert_close(share, expected, atol=0.05, rtol=0)
    several = frequencies(VARIANCE, 3, state, 500)
    assert several[:3].min() > 0.6 and 0 < several[3:].min() < several[3:].max() < 0.35, "none is lost for ever"


def test_unseen_prompts_are_as_promising_as_the_best() -> None:
    state = VARIANCE.start(10)
    taught(VARIANCE, {0: [0.0, 8.0], 1: [3.0, 3.0]}, state)
    share = frequencies(VARIANCE, 1, state)
    assert share[1] < 0.03
    torch.testing.assert_close(share[[0, *range(2, 10)]], torch.full((9,), 1 / 9.1).double(), atol=0.03, rtol=0)
    state = VARIANCE.start(10)
    taught(VARIANCE, {p: [1.0, 1.0] for p in range(8)}, state)
    share = frequencies(VARIANCE, 1, state)
    assert share[8:].min() > 0.25 > share[:8].max(), "so they are when all the others are without use"


def test_only_ratios_of_variance_matter() -> None:
    small, large = VARIANCE.start(10), VARIANCE.start(10)
    for p in range(0, 10, 2):
        taught(VARIANCE, {p: [0.0, p / 100]}, small)
        taught(VARIANCE, {p: [5.0, 5.0 + p * 100]}, large)
    for seed in range(20):
        assert drawn(VARIANCE, 6, seed, small) == drawn(VARIANCE, 6, seed, large)


def test_floor_one_draws_all_alike() -> None:
    even = Variance(name="variance", floor=1.0)
    state = even.start(10)
    taught(even, {0: [0.0, 1.0], 1: [0.0, 0.0]}, state)
    for seed in range(10):
        assert drawn(even, 5, seed, state) == drawn(even, 5, seed, even.start(10))


def test_variance_is_a_moving_average_over_what_was_judged() -> None:
    state = VARIANCE.start(4)
    taught(VARIANCE, {0: [0.0, 2.0, math.nan], 1: [math.nan, 5.0], 2: [math.nan, math.nan]}, state)
    assert state["variance"][0] == 1.0 and state["variance"][1:].isnan().all(), "one score has no variance"
    taught(VARIANCE, {0: [0.0, 4.0], 3: [0.1] * 3}, state)
    assert state["variance"][0].item() == pytest.approx(VARIANCE.decay * 1 + (1 - VARIANCE.decay) * 4)
    assert state["variance"][3] == 0


def test_variance_resumes_exactly(tmp_path: Path) -> None:
    def epoch(state: dict[str, Tensor], number: int) -> list[int]:
        chosen = drawn(VARIANCE, 4, number, state)
        noise = torch.randn(4, 3, generator=seeded(100 + number)).tolist()
        taught(VARIANCE, dict(zip(chosen, noise, strict=True)), state)
        return chosen

    whole = VARIANCE.start(10)
    expected = [epoch(whole, n) for n in range(6)]
    state = VARIANCE.start(10)
    for n in range(6):
        assert epoch(state, n) == expected[n]
        save_file(state, tmp_path / "state.safetensors")
        state = load_file(tmp_path / "state.safetensors")
    assert torch.equal(state["variance"].nan_to_num(-1.0), whole["variance"].nan_to_num(-1.0))


def test_another_set_of_prompts_is_refused() -> None:
    with pytest.raises(UserError, match=r"remembers 10 prompts, but there are 12; resume with the prompts"):
        VARIANCE.draw(12, 3, seeded(0), VARIANCE.start(10))


@pytest.mark.parametrize(("count", "k", "processes"), [(6, 4, 3), (1, 8, 2), (5, 3, 1)])
def test_k_repeat_gives_every_image_once(count: int, k: int, processes: int) -> None:
    def order(seed: int) -> Any:
        generator = seeded(seed)
        return k_repeat(UNIFORM.draw(10, count, generator, {}), k, generator)

    images = order(3)
    assert len(images.chunk(processes)[0]) == count * k // processes
    numbers, copies = images.unique(return_counts=True)
    assert len(numbers) == count and (copies == k).all()
    assert torch.equal(images, order(3))
    assert count == 1 or not torch.equal(images, order(4))
    blocks = images.reshape(count, k)
    assert count == 1 or (blocks != blocks[:, :1]).any(), "the copies of a prompt are spread"


def test_a_curriculum_judges_prompts_by_the_reward_that_is_trained_on() -> None:
    """With `combine: min` the first prompt teaches nothing, however much one of its rewards varies."""
    rewards = {"a": torch.tensor([0.0, 0, 0.4, 0.6]), "b": torch.tensor([0.0, 9, 5, 5])}
    weights, group = {"a": 1.0, "b": 1.0}, torch.tensor([0, 0, 1, 1])
    method, state = Group(name="group", combine="min"), VARIANCE.start(2)
    VARIANCE.learn(group, torch.zeros(4), method.overall(rewards, weights, group), state)
    assert [VARIANCE.draw(2, 1, seeded(s), state).item() for s in range(50)].count(1) > 25
