"""`only`: a reward for some prompts. Its head sees no others, and everything that reads scores goes on working."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from scored_pictures import grey, lines, score_into
from torch import Tensor

from diffalign import reward_entries, rewards
from diffalign.steer import Steer
from diffalign.types import RewardOutput, UserError

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"prompt {i}" for i in range(6)]
METADATA: list[dict[str, Any]] = [
    {"tag": "counting", "level": 1},
    {"tag": "colors", "level": 1},
    {"tag": "counting", "level": 2, "fails": True},
    {},
    {"tag": "position", "level": True},
    {"tag": None, "level": "1"},
]
seen: list[list[str]] = []


def noting(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
    """Brightness, with extras of every kind; it fails where the metadata says so."""
    assert len(images) == len(prompts) == len(metadata) > 0
    seen.append(list(prompts))
    fails = [bool(m.get("fails")) for m in metadata]
    extra = {
        "error": ["no" if f else None for f in fails],
        "words": [[p] for p in prompts],
        "count": torch.arange(len(prompts)),
        "map": images[:, 0].detach(),
    }
    return RewardOutput(images.mean((1, 2, 3)), extra, ~torch.tensor(fails))


class Sure(rewards.Reward):
    """One that always applies: NaN of its own is a failure."""

    differentiable: ClassVar[bool] = True

    abstains: ClassVar[bool] = False

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return images.mean((1, 2, 3)).masked_fill(torch.tensor([p == "prompt 2" for p in prompts]), math.nan)


class Learning(rewards.Reward):
    learns: ClassVar[bool] = True


def here(name: str) -> str:
    return f"{__name__}.{name}"


def scorer(only: dict[str, Any], name: str = "noting") -> rewards.Scorer:
    seen.clear()
    return rewards.build([{"name": here(name), "only": only}])[name]


@pytest.mark.parametrize(
    ("only", "chosen"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"tag": "counting"}, [0, 2]),
        ({"tag": ["colors", "counting"]}, [0, 1, 2]),
        ({"tag": ["colors", "counting"], "level": "1"}, [0, 1]),
        ({"level": "1"}, [0, 1, 5]),  # the number 1 and the text
        ({"level": "true"}, [4]),
    ],
)
def test_the_head_sees_the_chosen_and_no_other(only: dict[str, Any], chosen: list[int]) -> None:
    output = scorer(only)(IMAGES, PROMPTS, METADATA)
    assert seen == [[PROMPTS[i] for i in chosen]]
    whole = rewards.build([here("noting")])["noting"](IMAGES, PROMPTS, METADATA)
    expected = torch.full((6,), math.nan).index_copy(0, torch.tensor(chosen), whole.scores[chosen])
    torch.testing.assert_close(output.scores, expected, equal_nan=True, rtol=0, atol=0)
    assert output.valid is not None and output.valid.tolist() == [not (i == 2 and i in chosen) for i in range(6)]


@pytest.mark.parametrize("batch", [1, 2, 4, 6])
def test_extra_says_nothing_of_the_others(batch: int) -> None:
    """Whatever the batches are, also where the first of them has no image to score."""
    for only, chosen in (({"tag": "counting"}, [0, 2]), ({"tag": "position"}, [4])):
        output = rewards.score({"noting": scorer(only)}, IMAGES, PROMPTS, METADATA, batch)["noting"]
        assert [p for prompts in seen for p in prompts] == [PROMPTS[i] for i in chosen]
        assert output.extra["words"] == [[PROMPTS[i]] if i in chosen else None for i in range(6)]
        assert output.extra["error"] == ["no" if i == 2 and i in chosen else None for i in range(6)]
        assert [n is None for n in output.extra["count"]] == [i not in chosen for i in range(6)]
        assert all(torch.equal(output.extra["map"][i], IMAGES[i, 0]) for i in chosen)
        assert output.scores.isnan().tolist() == [i not in chosen or i == 2 for i in range(6)]


def test_a_batch_without_any_is_not_scored() -> None:
    output = scorer({"tag": "counting"})(IMAGES[3:], PROMPTS[3:], METADATA[3:])
    assert seen == [] and output.extra == {}
    assert output.valid is not None and output.valid.all() and output.scores.isnan().all()
    assert output.scores.dtype == torch.float32


def test_left_out_is_no_failure_even_of_a_head_that_always_applies() -> None:
    output = scorer({"tag": ["counting"]}, "Sure")(IMAGES, PROMPTS, METADATA)
    assert output.valid is not None and output.valid.tolist() == [True, True, False, True, True, True]
    assert output.extra["error"] == [None, None, "the score is not a number", None, None, None]


@pytest.mark.parametrize("only", [{"tag": "counting"}, {"tag": "none"}])
def test_gradients_reach_the_chosen_images_and_are_0_elsewhere(only: dict[str, str]) -> None:
    images = IMAGES.clone().requires_grad_()
    scores = scorer(only)(images, PROMPTS, METADATA).scores
    scores.nan_to_num(0.0).sum().backward()
    expected = torch.zeros_like(images)
    if only["tag"] == "counting":
        expected[0] = 1 / images[0].numel()  # image 2 has no valid score
    assert images.grad is not None
    torch.testing.assert_close(images.grad, expected)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"name": "jpeg", "only": {"tag": 3}}, "reward 'jpeg', only.tag.text: input should be a valid string"),
        ({"name": "jpeg", "only": {"tag": []}}, "only: no value is given for 'tag'; name one, or leave the key out"),
        ({"name": "jpeg", "only": "tag"}, "reward 'jpeg', only: input should be a valid dictionary"),
        ({"name": here("Learning"), "only": {"tag": "x"}}, "only: a reward that is trained during the run learns from"),
    ],
)
def test_mistakes(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        rewards.resolve(entry)


@pytest.mark.parametrize(
    ("only", "said"),
    [
        ({"tag": "count"}, "none has the tag 'count'; did you mean 'counting'?"),
        ({"tag": ["x", "y"]}, "none has the tag 'x' or 'y'; known: colors, counting, position"),
        ({"level": "3"}, "none has the level '3'; known: 1, 2, true"),
        ({"tga": "counting"}, "`only` asks for their 'tga', and none has one; did you mean 'tag'?"),
        ({"tag": "colors", "level": "2"}, "none has the tag and the level of `only` together; ask for less"),
    ],
)
def test_a_reward_for_no_training_prompt_is_refused(only: dict[str, Any], said: str) -> None:
    given = [rewards.resolve("jpeg"), rewards.resolve({"name": "jpeg", "label": "some", "only": only})]
    with pytest.raises(UserError) as caught:
        rewards.check_prompts(given, METADATA)
    assert str(caught.value) == f"reward 'some' scores no training prompt: {said}"
    rewards.check_prompts(given, [*METADATA, {"tag": "count", "level": 3}, {"tag": ["x"]}, {"tga": "counting"},
                                  {"tag": "colors", "level": 2}, {"tag": "y"}])  # fmt: skip


def test_score_leaves_them_out_of_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = grey(tmp_path / "images", a=0, b=90, c=255)
    tags = ("counting", "colors", "counting")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": "p", "tag": tag}) + "\n" for tag in tags))
    texts = [f"{here('noting')}:only={{tag: counting}}"]
    assert reward_entries.parse(texts)[0].only == {"tag": "counting"}
    output = tmp_path / "scores.jsonl"
    for batch in ("1", "3"):
        asked = ["--prompts", str(tmp_path / "p.jsonl"), "--batch", batch]
        assert score_into(output, texts[0], folder, *asked) == 0
        assert capsys.readouterr().out.splitlines()[1].split() == ["noting", "2", "0.5", "0.7071", "0", "1", "1", "0"]
        found = lines(output)
        assert [line["scores"]["noting"] for line in found] == [0.0, None, 1.0]
        assert all(line["valid"]["noting"] for line in found) and found[1]["details"] == {}
        assert found[2]["details"]["noting"].keys() == {"words", "count", "map"}


@pytest.mark.parametrize("method", [{"name": "fk", "particles": 2, "lam": 1.0}, {"name": "das", "particles": 2, "lam": 1.0}])  # fmt: skip
def test_steering_by_it_where_it_applies_and_where_not(method: dict[str, Any]) -> None:
    from diffalign import pipelines

    tiny = pipelines.load("tiny-sd3", device="cpu")
    plain = Steer(tiny, {"name": here("Sure")}, method)("a circle", 3, 0)
    some = Steer(tiny, [{"name": here("Sure"), "only": {"tag": "x"}}], method)
    steered = some("a circle", 3, 0, metadata={"tag": "x"})
    assert torch.equal(steered.pixels, plain.pixels) and torch.equal(steered.rewards, plain.rewards)
    with pytest.raises(UserError, match=r"the reward is NaN for all 2 images .*; check that it applies to this prompt"):
        some("a circle", 3, 0, metadata={"tag": "y"})
