"""What every reward head is promised: lookup, checks, micro-batches; and GenEval and JPEG on made pictures."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign import rewards
from diffalign.eval import geneval_logic
from diffalign.rewards.geneval import Geneval
from diffalign.rewards.jpeg import Jpeg
from diffalign.shapes.world import Object, render
from diffalign.types import RewardOutput, UserError

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"prompt {i}" for i in range(5)]
BLANK: list[dict[str, Any]] = [{}] * 5


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    assert len(images) == len(prompts) == len(metadata)
    return images.mean((1, 2, 3))


def as_list(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(image.mean()) for image in images]


def sometimes(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
    return RewardOutput(
        torch.tensor([math.nan if p.endswith("1") else 0.5 for p in prompts]), {"note": [p[-1] for p in prompts]}
    )


def fails_once(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
    failed = [p.endswith("3") for p in prompts]
    return RewardOutput(
        torch.zeros(len(prompts)), {"error": ["no" if f else None for f in failed]}, ~torch.tensor(failed)
    )


def short_extra(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
    return RewardOutput(torch.zeros(len(prompts)), {"map": torch.zeros(1)})


def explodes(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
    return [math.inf if p == "prompt 3" else 0.0 for p in prompts]


def abstains(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
    return [math.nan] * len(prompts)


def two_each(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.zeros(len(prompts), 2)


def words(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Any:
    return ["good"] * len(prompts)


class Redness(rewards.Reward):
    channel: int = 0

    def setup(self, device: torch.device | str) -> rewards.Head:
        weights = torch.eye(3, device=device)[self.channel]  # made once, as a head with a network would
        return lambda images, prompts, metadata: images.mean((2, 3)) @ weights


def here(name: str) -> str:
    return f"{__name__}.{name}"


def score_one(name: str, batch: int = 2) -> Tensor:
    scores = rewards.score(rewards.build([here(name)]), IMAGES, PROMPTS, BLANK, batch)
    return scores[name].scores


def test_import_is_free_of_torch() -> None:
    code = (
        "import sys, diffalign.rewards as r; r.resolve({'name': 'jpeg'}); r.resolve('geneval');"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


@pytest.mark.parametrize("name", ["brightness", "as_list"])
@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_plain_functions_are_rewards(name: str, batch: int) -> None:
    scores = score_one(name, batch)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, IMAGES.mean((1, 2, 3)))


def test_classes_by_dotted_path_load_once_and_take_options() -> None:
    built = rewards.build([{"name": here("Redness"), "channel": 2, "weight": 0.25, "label": "blueness"}])
    assert built["blueness"].reward.weight == 0.25
    scores = rewards.score(built, IMAGES, PROMPTS, BLANK, 2)["blueness"].scores
    torch.testing.assert_close(scores, IMAGES[:, 2].mean((1, 2)))


def test_scores_keep_gradients() -> None:
    images = IMAGES.clone().requires_grad_()
    scorer = rewards.build([here("brightness")])["brightness"]
    scorer(images, PROMPTS, BLANK).scores.sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / images[0].numel()))


def test_nan_means_does_not_apply_and_extra_is_kept() -> None:
    scores = score_one("sometimes")
    assert scores.isnan().tolist() == [False, True, False, False, False]
    output = rewards.build([here("sometimes")])["sometimes"](IMAGES, PROMPTS, BLANK)
    assert output.valid is not None and output.valid.all()
    whole = rewards.score(rewards.build([here("sometimes")]), IMAGES, PROMPTS, BLANK, 2)["sometimes"]
    assert output.extra == whole.extra == {"note": ["0", "1", "2", "3", "4"]}


def test_what_could_not_be_scored_is_left_out_and_never_zero() -> None:
    output = rewards.score(rewards.build([here("fails_once")]), IMAGES, PROMPTS, BLANK, 2)["fails_once"]
    assert output.valid is not None and output.valid.tolist() == [True, True, True, False, True]
    assert output.scores.isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("explodes", r"'explodes' gave an infinite score for the prompt 'prompt 3'"),
        ("two_each", r"'two_each' must return one real score an image, shape \[2\], .*\[2, 2\]"),
        ("short_extra", r"'short_extra', extra 'map' must have one entry an image, 2 in all"),
        ("words", r"'words' must return a tensor or a list of 2 numbers"),
    ],
)
def test_bad_scores_are_user_errors(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_one(name)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["genevil"], "unknown reward 'genevil'; did you mean 'geneval'"),
        ([{"name": "jpeg", "mode": "shrink"}], "reward 'jpeg', mode: .*'compress' or 'incompress'"),
        ([{"name": "jpeg", "qualty": 90}], "reward 'jpeg', qualty: there is no such option; did you mean 'quality'"),
        ([{"name": "jpeg", "weight": math.inf}], "weight: input should be a finite number"),
        (["jpeg", {"name": "jpeg", "mode": "incompress"}], "two rewards are called 'jpeg'; give one of them a label"),
        ([{"weight": 1.0}], "every reward needs a name"),
        ([here("PROMPTS")], "is a list; name a function or a Reward class"),
        (["nowhere.at_all"], "cannot import 'nowhere.at_all'"),
        (["hpsv2.1"], "no reward is called 'hpsv2.1'; write 'hpsv2' and set its options"),
    ],
)
def test_bad_entries_are_user_errors(entries: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rewards.build(entries)


def test_the_same_head_twice_by_label() -> None:
    built = rewards.build(["jpeg", {"name": "jpeg", "mode": "incompress", "label": "detail"}])
    scores = rewards.score(built, IMAGES, PROMPTS, BLANK, 2)
    torch.testing.assert_close(scores["jpeg"].scores, -scores["detail"].scores)


def test_a_new_head_is_one_new_file(tmp_path: Path) -> None:
    (tmp_path / "sharp_head.py").write_text(
        "from diffalign.rewards import Reward\n"
        "class Sharp(Reward):\n"
        "    power: float = 1.0\n"
        "    def __call__(self, images, prompts, metadata):\n"
        "        return images.diff(dim=-1).abs().mean((1, 2, 3)) ** self.power\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        built = rewards.build([{"name": "sharp_head.Sharp", "power": 2.0, "label": "sharp"}])
    finally:
        sys.path.remove(str(tmp_path))
    scores = rewards.score(built, IMAGES, PROMPTS, BLANK, 3)["sharp"].scores
    torch.testing.assert_close(scores, IMAGES.diff(dim=-1).abs().mean((1, 2, 3)) ** 2)


def test_jpeg_prefers_plain_pictures_when_compressing() -> None:
    flat = torch.full((1, 3, 8, 8), 0.5)
    head = Jpeg(name="jpeg")
    assert head(flat, [""], [{}]).scores > head(IMAGES[:1], [""], [{}]).scores
    worse = Jpeg(name="jpeg", quality=10)(IMAGES[:1], [""], [{}]).scores
    assert worse > head(IMAGES[:1], [""], [{}]).scores


def test_relations_are_antisymmetric_and_grow_fainter_with_size() -> None:
    small, right = (0.0, 0.0, 2.0, 2.0), (10.0, 0.0, 12.0, 2.0)
    assert geneval_logic.relations(right, small) == {"right of"}
    assert geneval_logic.relations(small, right) == {"left of"}
    assert geneval_logic.relations(small, small) == set()
    wide = (-70.0, -70.0, 74.0, 74.0)  # so large that the offset is within a tenth of the sizes
    assert geneval_logic.relations(right, wide) == set()


def test_dense_is_flow_grpo_without_the_flaw() -> None:
    above = {"include": [{"class": "a", "count": 1}, {"class": "b", "count": 1, "position": ["above", 0]}]}
    boxes = {"a": [(0, 0, 2, 2)], "b": [(0, 20, 2, 22)]}  # b lies below a
    colors = {"a": ["red"], "b": ["red"]}
    assert geneval_logic.geneval_flow_grpo(boxes, colors, above) == pytest.approx((1 + 1 + 0 + 1) / 4)
    assert geneval_logic.geneval_dense(boxes, colors, above) == pytest.approx((1 + 1 + 0) / 3)
    turned = {"a": boxes["b"], "b": boxes["a"]}
    assert geneval_logic.geneval_dense(turned, colors, above) == 1
    assert geneval_logic.geneval_flow_grpo(turned, colors, above) == 1
    surplus = turned | {"": [(40, 40, 42, 42)]}
    assert geneval_logic.geneval_dense(surplus, colors, above) == pytest.approx(1 - 1 / 2)
    missing = {"a": boxes["b"]}
    assert geneval_logic.geneval_dense(missing, colors, above) == pytest.approx((1 + 0 + 0) / 3)


RED_CIRCLE = Object("circle", "red", 16.0, 16.0, 12.0)
BLUE_STAR = Object("star", "blue", 46.0, 46.0, 12.0)
WANTED: dict[str, Any] = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "exclude": []}


def paint(*objects: Object) -> np.ndarray:
    return render(objects)


def geneval(mode: str, picture: np.ndarray, metadata: dict[str, Any]) -> float:
    image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255
    head = Geneval(name="geneval", mode=mode)  # type: ignore[arg-type]
    return head(image, ["a red circle"], [metadata]).scores.item()


def test_geneval_reads_pictures() -> None:
    for mode in ("correct", "strict", "dense", "flow_grpo"):
        assert geneval(mode, paint(RED_CIRCLE), WANTED) == 1
        assert geneval(mode, paint(BLUE_STAR), WANTED) < 1
    blue = {**WANTED, "include": [{"class": "circle", "count": 1, "color": "blue"}]}
    assert geneval("dense", paint(RED_CIRCLE), blue) == pytest.approx(0.5)


def test_only_strict_and_dense_mind_what_else_is_on_the_canvas() -> None:
    for clutter in (paint(RED_CIRCLE, BLUE_STAR), malformed()):
        assert [geneval(m, clutter, WANTED) for m in ("correct", "flow_grpo", "strict", "dense")] == [1, 1, 0, 0]


def malformed() -> np.ndarray:
    picture = paint(RED_CIRCLE).copy()
    picture[40:44, 34:62] = (50, 80, 220)  # a bar is none of the shapes
    picture[34:62, 46:50] = (50, 80, 220)
    return picture


def test_geneval_position_and_counts() -> None:
    picture = paint(RED_CIRCLE, BLUE_STAR)
    star = {"class": "star", "count": 1, "color": "blue"}

    def asks(relation: str) -> dict[str, Any]:
        return {"tag": "position", "include": [WANTED["include"][0], star | {"position": [relation, 0]}]}

    diagonal = {"below": 1, "right of": 1, "above": 0, "left of": 0}
    assert {r: geneval("strict", picture, asks(r)) for r in diagonal} == diagonal
    two = {
        "tag": "counting",
        "include": [{"class": "circle", "count": 2}],
        "exclude": [{"class": "circle", "count": 3}],
    }
    assert geneval("strict", paint(RED_CIRCLE), two) == 0
    assert geneval("dense", paint(RED_CIRCLE), two) == pytest.approx(0.5)
    pair = paint(RED_CIRCLE, Object("circle", "green", 46.0, 46.0, 12.0))
    assert geneval("strict", pair, two) == 1
    one = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}
    assert [geneval(m, pair, one) for m in ("correct", "strict", "dense")] == [1, 0, 0]


def test_geneval_without_its_metadata() -> None:
    """A prompt of the shapes world is read from its text, with and without an opening; any other has no score."""
    head = Geneval(name="geneval")
    image = torch.from_numpy(paint(RED_CIRCLE).copy()).permute(2, 0, 1)[None] / 255
    asked = ["a photo of a cat", "a red circle", "An image of a red circle.", "a blue circle", "two red circles"]
    scores = [float(head(image, [prompt], [{"prompt": prompt}]).scores) for prompt in asked]
    assert math.isnan(scores[0]) and scores[1:] == [1, 1, 0, 0]
    assert math.isnan(float(head(image, ["a red circle"], [{"include": []}]).scores))


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ({"class": "dog", "count": 1}, "asks for 'dog'; the shapes detector knows circle"),
        ({"class": "circle", "count": 0}, "whole 'count' of at least 1, got 0"),
        ({"class": "circle", "count": 1, "color": "pink"}, "asks for 'pink'"),
        ({"class": "circle", "count": 1, "position": ["above", 0]}, "index of an earlier clause"),
    ],
)
def test_impossible_metadata_is_a_user_error(clause: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        geneval("strict", paint(RED_CIRCLE), {"include": [clause]})


@pytest.mark.parametrize(
    "valid", [torch.ones(1, dtype=torch.bool), torch.ones(5, dtype=torch.int), torch.ones(5, 1, dtype=torch.bool)]
)
def test_what_is_valid_must_be_said_of_each_image(valid: Tensor) -> None:
    def head(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        return RewardOutput(torch.zeros(5), {}, valid)

    scorer = rewards.Scorer(Jpeg(name="jpeg"), head, "cpu")
    with pytest.raises(UserError, match="reward 'jpeg' must say of each image whether its score is valid, 5 booleans"):
        scorer(IMAGES, PROMPTS, BLANK)


def test_nan_is_a_failure_of_heads_that_do_not_abstain() -> None:
    def head(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        return RewardOutput(torch.tensor([1.0, math.nan, 2.0, math.nan, 3.0]), {"error": [None] * 3 + ["late", None]})

    failed = rewards.Scorer(Jpeg(name="jpeg"), head, "cpu")(IMAGES, PROMPTS, BLANK)
    assert failed.valid is not None and failed.valid.tolist() == [True, False, True, False, True]
    assert failed.extra["error"] == [None, "the score is not a number", None, "the score is not a number", None]
    abstained = rewards.Scorer(Geneval(name="geneval"), head, "cpu")(IMAGES, PROMPTS, BLANK)
    assert abstained.valid is not None and abstained.valid.all()
    assert abstained.scores.isnan().tolist() == failed.scores.isnan().tolist()
