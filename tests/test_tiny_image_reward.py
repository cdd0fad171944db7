"""tiny-image-reward: the embedded BLIP of `image_reward`, its start from tiny-dino and what it was taught."""

from __future__ import annotations

import json
import random
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Dinov2Model
from transformers.activations import ACT2FN

from diffalign import cli, rewards
from diffalign.images import save_png
from diffalign.rewards.image_reward import MEAN, STD, TINY
from diffalign.shapes import (
    blip_network,
    dino_network,
    image_reward,
    preference,
    preference_data,
    prompts,
    questions,
    samples,
)
from diffalign.shapes.detector import detect
from diffalign.shapes.world import SHAPES, SIZE, Object, render

WEIGHTS = Path(str(files("diffalign.shapes"))) / "weights"


def scored(images: Tensor, texts: list[str], **options: Any) -> Tensor:
    (head,) = rewards.build([{"name": "image_reward", "model": TINY, **options}]).values()
    with torch.no_grad():
        return head(images, texts, [{}] * len(texts)).scores


def picture(*objects: Object) -> Tensor:
    return torch.from_numpy(render(list(objects)).copy()).permute(2, 0, 1) / 255


def test_the_folder_is_small_and_cannot_run_anything() -> None:
    assert {f.name for f in (WEIGHTS / TINY).iterdir()} == {
        "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert sum(f.stat().st_size for f in (WEIGHTS / TINY).iterdir()) < 3.5e6


def test_it_needs_no_other_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line; the right picture of a prompt scores above the other one's."""
    texts = ["a red circle", "two blue squares"]
    images = [picture(Object("circle", "red", 30, 34, 15))]
    images += [picture(Object("square", "blue", 18, 20, 12), Object("square", "blue", 44, 42, 12))]
    listed = [(k, text) for k in (0, 1) for text in texts]
    for i, (k, _) in enumerate(listed):
        save_png(images[k], tmp_path / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(text for _, text in listed))
    asked = ["--reward", f"image_reward:model={TINY}", "--images", str(tmp_path), "--device", "cpu"]
    output = tmp_path / "scores.jsonl"
    assert cli.main(["score", *asked, "--prompts", str(tmp_path / "prompts.txt"), "--output", str(output)]) == 0
    right, wrong, other, also = (json.loads(line)["scores"]["image_reward"] for line in output.read_text().splitlines())
    assert right > wrong + 1 and also > other + 1
    assert "image_reward" in capsys.readouterr().out


def test_it_ranks_pictures_as_the_detector_does(tmp_path: Path) -> None:
    """40 held-out prompts: samples under six settings against each other, and against renders and near-misses."""
    metas = prompts.test_prompts()[:40]
    bank = preference_data.fill(metas, samples.draw(metas, tmp_path / "samples.pt", 11), 12)
    texts = [m["prompt"] for m in metas for _ in preference_data.KINDS]
    found = scored(bank.images.flatten(0, 1) / 255, texts).view_as(bank.scores)
    result = preference.by_kinds(found, bank.scores)
    for name, least in LEAST.items():
        assert result[name] > least, (name, result)


LEAST = {"sample / sample": 0.7, "render / sample": 0.75, "overall": 0.75, "near-miss render / prompt render": 0.9}


def test_it_has_an_idea_of_places() -> None:
    """Renders of position prompts: the true relation is preferred to false ones, where chance is 0.5."""
    rng, every = random.Random(5), prompts.catalogue()["position"]
    images, true, false = [], [], []
    for _ in range(40):
        text, include = rng.choice(every)
        objects = prompts.scene(rng, include)
        for wrong in questions.near_misses(include, objects).get("relation", []):
            images.append(picture(*objects))
            true.append(text)
            false.append(wrong)
    assert len(images) > 80
    shown = torch.stack(images)
    assert (scored(shown, true) > scored(shown, false)).float().mean() > 0.65


def test_the_head_reads_what_the_recipe_writes(tmp_path: Path) -> None:
    """Random weights: scores of the exported folder are those of the network, standardised."""
    torch.manual_seed(0)
    words = blip_network.words()
    network = blip_network.Network(blip_network.vocabulary(words)).eval().half().float()
    blip_network.export(network, words, tmp_path / "blip")
    images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).mul(255).round()
    texts = ["a red circle", "three green stars", "an unheard word, 7"]
    assert "[UNK]" not in words.tokenize(" ".join(texts))
    file, spoken = str(tmp_path / "blip" / "model.safetensors"), str(tmp_path / "blip")
    found = scored(images / 255, texts, model=file, tokenizer=spoken, heads=[4, 4])
    whole = image_reward.score(network, words, images.byte()[:, None], texts)[:, 0]
    torch.testing.assert_close(found, (whole - MEAN) / STD, atol=1e-5, rtol=1e-5)
    assert found.unique().numel() == 3


def test_the_image_tower_begins_as_tiny_dino() -> None:
    dino: Any = Dinov2Model.from_pretrained(WEIGHTS / "tiny-dino", dtype=torch.float32).eval()
    network = blip_network.from_dino(dino, 100).eval()
    images = torch.stack([picture(Object("star", "green", 20, 24, 12)), torch.rand(3, SIZE, SIZE)])
    with torch.no_grad():
        theirs = dino(pixel_values=dino_network.normalise(images)).last_hidden_state
        near = network.look(dino_network.clip_normalise(images))
        for layer in network.vision.encoder.layers:
            layer.mlp.activation_fn = ACT2FN["quick_gelu"]
        same = network.look(dino_network.clip_normalise(images))
    torch.testing.assert_close(same, theirs, atol=1e-4, rtol=1e-4)
    assert 0 < (near - theirs).norm() / theirs.norm() < 0.1


def test_captions_and_places_are_true() -> None:
    data = image_reward.captioned(60, 5)
    told = 0
    for image, texts, where in zip(data.images, data.texts, data.where, strict=True):
        assert len(texts) == 2 * image_reward.SAID
        said = [re.sub(r"^an? (picture|drawing|image) of ", "", text) for text in texts]
        assert set(said[: image_reward.SAID]).isdisjoint(said[image_reward.SAID :])
        found = detect(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        for shape, at in zip(SHAPES, where, strict=True):
            same = [f for f in found if f.shape == shape]
            assert (len(same) == 1) == bool(at.isfinite().all())
            if len(same) == 1:
                x0, y0, x1, y1 = same[0].box
                centre = torch.tensor([x0 + x1, y0 + y1]) / 2 / SIZE
                assert (centre - at).abs().max() < 0.1  # a triangle's box is not around its centre
                told += 1
    assert told > 40


def test_the_losses_of_captions() -> None:
    """A network that says nothing and a pointer that knows: log 2, and the pointer's own errors."""
    torch.manual_seed(0)
    words, data = blip_network.words(), image_reward.captioned(8, 6)
    network = blip_network.Network(blip_network.vocabulary(words))
    nn.init.zeros_(network.mlp.weight)
    nn.init.zeros_(network.mlp.bias)
    pointer = nn.Linear(blip_network.WIDTH, 8)
    nn.init.zeros_(pointer.weight)
    nn.init.zeros_(pointer.bias)
    spoken = image_reward.Spoken(words, [t for texts in data.texts for t in texts])
    k = torch.tensor([3, 0, 5, 1, 2])
    with torch.no_grad():
        tokens = image_reward.looked(network, data.images[k]).float()
        losses = image_reward.caption_loss(network, pointer, tokens, data, k, spoken)
    said = [(i, SHAPES.index(w)) for i in k.tolist() for t in data.texts[i] for w in t.split() if w in SHAPES]
    squares = torch.stack([data.where[i, j] for i, j in said if data.where[i, j].isfinite().all()]).square()
    assert losses["captions"].item() == pytest.approx(np.log(2), abs=1e-6)
    assert losses["where"].item() == pytest.approx(squares.mean().item(), abs=1e-6)
    assert losses["color"].item() == pytest.approx(np.log(6), abs=1e-6)
    assert losses["right"].item() == 0.5
