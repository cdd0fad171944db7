"""tiny-clip prefers what the exact detector prefers, on held-out prompts, and is still a CLIP."""

from __future__ import annotations

import math
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.eval.geneval_logic import geneval_dense
from diffalign.rewards.geneval import observe
from diffalign.shapes import preference, preference_data, prompts, samples, world
from diffalign.shapes.pretrain import draw_scenes

FOLDER = Path(str(files("diffalign.shapes"))) / "weights" / "tiny-clip"


def test_the_folder_is_a_small_clip() -> None:
    assert {f.name for f in FOLDER.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 3e6
    model, words = preference.load(FOLDER)
    assert type(model).__name__ == "CLIPModel"
    assert words("a red circle").input_ids[0] == words.bos_token_id


def test_it_ranks_pictures_as_the_detector_does(tmp_path: Path) -> None:
    """40 held-out prompts: samples under six settings against each other, and against renders and near-misses."""
    metas = prompts.test_prompts()[:40]
    bank = preference_data.fill(metas, samples.draw(metas, tmp_path / "samples.pt", 11), 12)
    assert torch.equal(samples.draw(metas, tmp_path / "samples.pt", 11), bank.images[:, :6])  # as stored
    model, words = preference.load(FOLDER)
    result = preference.measure(model.eval(), words, bank, draw_scenes(256, 13))
    for name, least in LEAST.items():
        assert result[name] > least, (name, result)


LEAST = {"sample / sample": 0.75, "render / sample": 0.75, "overall": 0.78, "retrieval of 64": 0.8}


def test_loss_is_bradley_terry_over_decided_pairs() -> None:
    s = torch.tensor([[1.0, 3.0, 0.5], [2.0, 2.0, 2.0]])
    judged = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.5]])  # two decided pairs in the first row, none in the second
    expected = (math.log1p(math.exp(-2.0)) + math.log1p(math.exp(-2.5))) / 2
    assert preference.bradley_terry(s, judged).item() == pytest.approx(expected, abs=1e-6)
    assert preference.accuracy(s, judged) == 1
    assert preference.accuracy(-s, judged) == 0
    mask = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert preference.accuracy(torch.tensor([[0.0, 1.0, 2.0]]), judged[:1], mask) == 1


def test_near_misses_are_worse_than_the_scene() -> None:
    """Where every clause names colours, a change of colour, shape, number or place is a mistake."""
    rng, catalogue = random.Random(0), prompts.catalogue()
    worse = 0
    for _ in range(60):
        tag = rng.choice(("colors", "counting", "position"))
        prompt, include = rng.choice(catalogue[tag])
        meta = prompts.metadata(tag, prompt, include)
        objects = prompts.scene(rng, include)
        image = world.render(preference_data.near_miss(objects, rng))
        worse += geneval_dense(*observe(image), meta) < 1
    assert worse >= 55


@pytest.mark.parametrize("text", ["a red star left of a blue circle", "a drawing of two green squares"])
def test_a_mirrored_picture_shows_the_mirrored_prompt(text: str) -> None:
    every: dict[str, Any] = {p: (tag, include) for tag, group in prompts.catalogue().items() for p, include in group}
    bare = text.removeprefix("a drawing of ")
    tag, include = every[bare]
    image = world.render(prompts.scene(random.Random(1), include))[:, ::-1].copy()
    tag, include = every[preference_data.mirror(bare)]
    assert geneval_dense(*observe(image), prompts.metadata(tag, bare, include)) == 1
    assert preference_data.mirror(preference_data.mirror(text)) == text


def test_training_prompts_are_none_of_the_test() -> None:
    metas = samples.prompted(200)
    assert not {m["prompt"] for m in metas} & {m["prompt"] for m in prompts.test_prompts()}
    assert not any(map(prompts.is_held_out, metas))
