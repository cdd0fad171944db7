"""Curriculums: which prompts an epoch takes, and in which order processes see their images."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.advantages.group import Group
from diffalign.curriculums import Curriculum, k_repeat
from diffalign.curriculums.stratified import Stratified, quotas, rounded
from diffalign.curriculums.uniform import Uniform
from diffalign.curriculums.variance import Variance
from diffalign.listing import available
from diffalign.methods import configured
from diffalign.types import UserError

UNIFORM, VARIANCE, STRATIFIED = Uniform(name="uniform"), Variance(name="variance"), Stratified(name="stratified")
ALL: list[Curriculum] = [UNIFORM, VARIANCE, STRATIFIED]
TEN = [{"prompt": f"prompt {p}", "source": "ab"[p % 2], "tag": "xxxxxxyyzz"[p]} for p in range(10)]


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
    state = curriculum.start(TEN)
    taught(curriculum, {0: [0.0, 1.0], 3: [0.5, 0.5]}, state)
    whole = drawn(curriculum, 10, 1, state)
    assert sorted(whole) == list(range(10))
    some = drawn(curriculum, 4, 1, state)
    assert len(set(some)) == 4 and some == drawn(curriculum, 4, 1, state)
    assert drawn(curriculum, 10, 2, state) != whole


@pytest.mark.parametrize("curriculum", ALL, ids=lambda c: c.name)
def test_more_prompts_than_there_are_is_refused(curriculum: Curriculum) -> None:
    with pytest.raises(UserError, match="11 prompts asked for an epoch, but there are 10; ask for 10 or fewer"):
        drawn(curriculum, 11, 0, curriculum.start(TEN))


@pytest.mark.parametrize("state", [VARIANCE.start(TEN), {"variance": torch.zeros(10, dtype=torch.float64)}])
def test_nothing_known_draws_all_alike(state: dict[str, Tensor]) -> None:
    share = frequencies(VARIANCE, 3, state)
    torch.testing.assert_close(share, torch.full_like(share, 0.3), atol=0.05, rtol=0)  # 4 standard errors


def test_informative_prompts_come_first() -> None:
    """Weights 1 and floor 0.1: of one draw, each informative prompt has its weight's share."""
    state = VARIANCE.start(TEN)
    taught(VARIANCE, {p: [0.0, 1.0, 0.0, 1.0] if p < 3 else [float(p)] * 4 for p in range(10)}, state)
    share = frequencies(VARIANCE, 1, state)
    expected = torch.tensor([1.0] * 3 + [0.1] * 7, dtype=torch.float64) / 3.7
    torch.testing.assert_close(share, expected, atol=0.05, rtol=0)
    several = frequencies(VARIANCE, 3, state, 500)
    assert several[:3].min() > 0.6 and 0 < several[3:].min() < several[3:].max() < 0.35, "none is lost for ever"


def test_unseen_prompts_are_as_promising_as_the_best() -> None:
    state = VARIANCE.start(TEN)
    taught(VARIANCE, {0: [0.0, 8.0], 1: [3.0, 3.0]}, state)
    share = frequencies(VARIANCE, 1, state)
    assert share[1] < 0.03
    torch.testing.assert_close(share[[0, *range(2, 10)]], torch.full((9,), 1 / 9.1).double(), atol=0.03, rtol=0)
    state = VARIANCE.start(TEN)
    taught(VARIANCE, {p: [1.0, 1.0] for p in range(8)}, state)
    share = frequencies(VARIANCE, 1, state)
    assert share[8:].min() > 0.25 > share[:8].max(), "so they are when all the others are without use"


def test_only_ratios_of_variance_matter() -> None:
    small, large = VARIANCE.start(TEN), VARIANCE.start(TEN)
    for p in range(0, 10, 2):
        taught(VARIANCE, {p: [0.0, p / 100]}, small)
        taught(VARIANCE, {p: [5.0, 5.0 + p * 100]}, large)
    for seed in range(20):
        assert drawn(VARIANCE, 6, seed, small) == drawn(VARIANCE, 6, seed, large)


def test_floor_one_draws_all_alike() -> None:
    even = Variance(name="variance", floor=1.0)
    state = even.start(TEN)
    taught(even, {0: [0.0, 1.0], 1: [0.0, 0.0]}, state)
    for seed in range(10):
        assert drawn(even, 5, seed, state) == drawn(even, 5, seed, even.start(TEN))


def test_variance_is_a_moving_average_over_what_was_judged() -> None:
    state = VARIANCE.start(TEN[:4])
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

    whole = VARIANCE.start(TEN)
    expected = [epoch(whole, n) for n in range(6)]
    state = VARIANCE.start(TEN)
    for n in range(6):
        assert epoch(state, n) == expected[n]
        save_file(state, tmp_path / "state.safetensors")
        state = load_file(tmp_path / "state.safetensors")
    assert torch.equal(state["variance"].nan_to_num(-1.0), whole["variance"].nan_to_num(-1.0))


def test_another_set_of_prompts_is_refused() -> None:
    with pytest.raises(UserError, match=r"remembers 10 prompts, but there are 12; resume with the prompts"):
        VARIANCE.draw(12, 3, seeded(0), VARIANCE.start(TEN))


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
    method, state = Group(name="group", combine="min"), VARIANCE.start(TEN[:2])
    VARIANCE.learn(group, torch.zeros(4), method.overall(rewards, weights, group), state)
    assert [VARIANCE.draw(2, 1, seeded(s), state).item() for s in range(50)].count(1) > 25


def stratified(**options: Any) -> Stratified:
    return configured(Stratified, {"name": "stratified", **options}, "curriculum")


def strata(curriculum: Stratified, count: int, prompts: list[dict[str, Any]] = TEN, seed: int = 0) -> Counter[str]:
    """How many of the drawn prompts each stratum gave."""
    chosen = drawn(curriculum, count, seed, curriculum.start(prompts), len(prompts))
    assert len(set(chosen)) == count
    return Counter(str(prompts[p][curriculum.by]) for p in chosen)


@pytest.mark.parametrize(
    ("sizes", "weights", "count", "expected"),
    [
        ((9, 9, 9), (1, 1, 1), 6, ["2", "2", "2"]),
        ((9, 9, 9), (1, 1, 1), 5, ["5/3", "5/3", "5/3"]),
        ((9, 9, 9), (1, 2, 3), 9, ["3/2", "3", "9/2"]),
        ((9, 9), (0, 3), 4, ["0", "4"]),
        ((1, 9, 9), (1, 1, 1), 8, ["1", "7/2", "7/2"]),  # what is missing goes to the others, by the same rule
        ((2, 9, 9), (1, 1, 1), 7, ["2", "5/2", "5/2"]),  # also if it is less than one prompt
        ((1, 2, 9), (4, 2, 1), 10, ["1", "2", "7"]),  # even when they too are then too small
        ((1, 2, 9, 9), (4, 2, 1, 0), 12, ["1", "2", "9", "0"]),
        ((3, 3), (1, 1), 6, ["3", "3"]),
    ],
)
def test_quotas(sizes: tuple[int, ...], weights: tuple[int, ...], count: int, expected: list[str]) -> None:
    assert quotas(sizes, [Fraction(w) for w in weights], count) == [Fraction(share) for share in expected]


def test_quotas_are_rounded_to_a_neighbour_and_right_on_average() -> None:
    """Exactly, over offsets spaced evenly as finely as the shares themselves."""
    generator = seeded(5)
    for count in range(12):
        weights = [Fraction(int(w)) for w in torch.randint(1, 6, (5,), generator=generator)]
        shares = quotas([99] * 5, weights, count)
        parts = int(sum(weights))
        found = [rounded(shares, Fraction(2 * i + 1, 2 * parts)) for i in range(parts)]
        assert {sum(taken) for taken in found} == {count}
        for share, taken in zip(shares, zip(*found, strict=True), strict=True):
            assert Fraction(sum(taken), parts) == share
            assert set(taken) <= {math.floor(share), math.ceil(share)}


@pytest.mark.parametrize(
    ("shares", "count"), [({}, 4), ({}, 2), ({}, 16), ({"c": 0.05, "a": 2, "f": 0}, 4), ({"a": 0.001}, 6)]
)
def test_every_stratum_has_its_share_over_epochs(shares: dict[str, float], count: int) -> None:
    """With fewer prompts than strata too; within an epoch it is less than a prompt from it."""
    names = [name for name in "abcdef" for _ in range(8)]
    prompts = [{"prompt": f"prompt {i}", "source": name} for i, name in enumerate(names)]
    weights = {name: shares.get(name, 1.0) for name in "abcdef"}
    curriculum = stratified(shares=weights if shares else {})
    state, generator, epochs = curriculum.start(prompts), seeded(1), 1200
    total, pairs = Counter[str](), set()
    for _ in range(epochs):
        taken = Counter(names[p] for p in curriculum.draw(len(prompts), count, generator, state).tolist())
        for name, weight in weights.items():
            assert abs(taken[name] - count * weight / sum(weights.values())) < 1
        total += taken
        pairs |= {frozenset((a, b)) for a in taken for b in taken if a != b}
    for name, weight in weights.items():
        expected = count * weight / sum(weights.values())
        assert total[name] / epochs == pytest.approx(expected, abs=0.06)  # 4 standard errors
    assert shares or len(pairs) == 15, "every two strata meet"


def test_strata_are_alike_or_as_they_are_weighed() -> None:
    some = [strata(STRATIFIED, 5, seed=seed) for seed in range(20)]
    assert all(taken in ({"a": 3, "b": 2}, {"a": 2, "b": 3}) for taken in some) and some.count(some[0]) < 20
    assert strata(stratified(by="tag"), 6) == {"x": 2, "y": 2, "z": 2}
    assert strata(stratified(by="tag"), 9) == {"x": 5, "y": 2, "z": 2}
    assert strata(stratified(by="tag", shares={"x": 1, "z": 1, "y": 0}), 4) == {"x": 2, "z": 2}
    assert strata(stratified(shares={"b": 0.1, "a": 0.3}), 4) == {"a": 3, "b": 1}, "0.1 + 0.3 is 0.4"
    numbers = [{"prompt": "p", "level": level} for level in (1, 1, 2, True)]
    assert strata(stratified(by="level", shares={"1": 1, "2": 0, "true": 1}), 2, numbers) == {"1": 1, "True": 1}


def test_within_a_stratum_all_are_drawn_alike() -> None:
    curriculum = stratified(by="tag")
    share = frequencies(curriculum, 3, curriculum.start(TEN))
    expected = torch.tensor([1 / 6] * 6 + [0.5] * 4, dtype=torch.float64)
    torch.testing.assert_close(share, expected, atol=0.055, rtol=0)  # 4 standard errors


def test_strata_that_hold_too_few() -> None:
    curriculum = stratified(by="tag", shares={"x": 0, "y": 1, "z": 2})
    assert strata(curriculum, 4) == {"y": 2, "z": 2}
    with pytest.raises(UserError, match="5 prompts asked for an epoch, but the strata with a share hold 4; ask for 4"):
        strata(curriculum, 5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": "kind"}, "every prompt needs a kind, and 'prompt 0' has none; add it to their metadata, or take"),
        ({"shares": {"a": 1, "b": 1, "c": 1}}, "no prompt has the source 'c'; known: a, b"),
        ({"by": "tag", "shares": {"x": 1, "z": 1}}, "the tag 'y' is left out; give it a weight, 0 for none of its"),
        ({"shares": {"a": 0, "b": 0}}, "every stratum has weight 0; raise one"),
        ({"shares": {"a": -1, "b": 1}}, "shares.a: input should be greater than or equal to 0"),
        ({"shares": {"a": math.inf, "b": 1}}, "shares.a: input should be a finite number"),
    ],
)
def test_strata_that_do_not_suit_the_prompts(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        stratified(**options).start(TEN)


def test_the_first_prompt_without_a_source_is_named() -> None:
    prompts = [*TEN, {"prompt": "a cat", "source": None}, {"prompt": "a dog"}]
    with pytest.raises(UserError, match="every prompt needs a source, and 'a cat' has none; list several files in"):
        STRATIFIED.start(prompts)


def test_strata_are_remembered(tmp_path: Path) -> None:
    """A resumed run draws by the strata of its checkpoint, and refuses those of other prompts or of another key."""
    curriculum = stratified(by="tag")
    state = curriculum.start(TEN)
    (stratum,) = state.values()
    assert stratum.dtype == torch.int64 and stratum.tolist() == [0] * 6 + [1] * 2 + [2] * 2
    save_file(state, tmp_path / "state.safetensors")
    assert drawn(curriculum, 6, 3, load_file(tmp_path / "state.safetensors")) == drawn(curriculum, 6, 3, state)
    with pytest.raises(UserError, match="remembers 10 prompts in 3 strata, which are not those that there are"):
        drawn(curriculum, 6, 3, state, prompts=11)
    with pytest.raises(UserError, match="remembers 10 prompts in 3 strata, which are not those that there are"):
        drawn(stratified(by="tag", shares={"x": 1, "y": 2}), 6, 3, state)
    with pytest.raises(UserError, match="strata by another key than 'source'; resume with the curriculum.by that"):
        drawn(STRATIFIED, 6, 3, state)
