"""tiny-dino tells shapes, colours and faults apart, loaded by plain transformers; the faults it is judged by."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, Dinov2Model

from diffalign import pipelines
from diffalign.rollout import collect
from diffalign.sections import Sampling
from diffalign.shapes import dino, dino_network, dino_probe, prompts, publish, world
from diffalign.shapes.corruptions import CORRUPTIONS, MIN_CHANGED, changed, corrupt, corrupt_all
from diffalign.shapes.detector import detect

FOLDER = Path(str(files("diffalign.shapes"))) / "weights" / "tiny-dino"


def scenes(n: int, seed: int = 0) -> torch.Tensor:
    rng, catalogue = random.Random(seed), prompts.catalogue()
    pictures = [world.render(prompts.sample(rng, catalogue)[1]).copy() for _ in range(n)]
    return torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in pictures])


@pytest.fixture(scope="module")
def model() -> Any:
    return Dinov2Model.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_the_folder_is_plain_transformers_and_small(model: Any) -> None:
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 3e6
    assert sum(p.numel() for p in model.parameters()) < 1.5e6
    images = scenes(2)
    processor = AutoImageProcessor.from_pretrained(FOLDER)
    pixels = processor([im.permute(1, 2, 0).numpy() for im in images], return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, dino_network.normalise(images.float() / 255), rtol=0, atol=1e-5)
    with torch.no_grad():
        out = model(pixel_values=pixels)
    assert out.last_hidden_state.shape == (2, 65, 128)
    torch.testing.assert_close(out.pooler_output, dino_probe.features(model, images)[:, 0])


def test_it_knows_more_than_it_was_born_with(model: Any) -> None:
    """Linear probes on fresh scenes and faults, and on samples for held-out prompts, against an untrained network."""
    pipe = pipelines.load("tiny-sd3", device="cpu")
    sampling = Sampling(steps=6, kernel="ode", eta=0.0, height=64, width=64)
    metas = prompts.test_prompts()[:96]
    images = collect(pipe, metas, torch.arange(96), torch.arange(96), sampling, (), 48).images
    assert images is not None
    drawn = (images * 255).round().to(torch.uint8)
    knows = dino_probe.measure(model, drawn, n=300, seed=77)
    torch.manual_seed(0)
    born = dino_probe.measure(dino_network.network().eval(), drawn, n=300, seed=77)
    for name, least in LEAST.items():
        assert knows[name] > least, (name, knows)
        assert knows[name] > born[name], (name, knows, born)


LEAST = {"shapes": 0.85, "colours": 0.85, "patch_shape": 0.85, "patch_colour": 0.95, "faults": 0.95}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_each_fault_shows_and_follows_from_its_seed(kind: str) -> None:
    images = scenes(16, seed=3).float() / 255
    kept = images.clone()
    once, again, other = (
        [CORRUPTIONS[kind](x, random.Random(s + i)) for i, x in enumerate(images)] for s in (0, 0, 99)
    )
    assert torch.equal(images, kept)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert sum(torch.equal(a, b) for a, b in zip(once, other, strict=True)) <= 1
    result = torch.stack(once)
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1
    share = changed(images, result).float().mean((1, 2))
    assert (share > 0).float().mean() > 0.9
    assert share.max() < 0.6


def test_faults_are_seen_by_the_detector() -> None:
    images = scenes(60, seed=5).float() / 255
    broken = corrupt_all(images, seed=4)
    assert torch.equal(broken, corrupt_all(images, seed=4))
    assert torch.equal(broken[:3], corrupt_all(images[:3], seed=4))  # whatever else is in the batch
    assert (changed(images, broken).float().mean((1, 2)) >= MIN_CHANGED).all()

    def clean(image: torch.Tensor) -> bool:
        found = detect((image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
        return all(d.shape and d.color for d in found)

    assert sum(map(clean, images)) == 60
    assert sum(map(clean, broken)) <= 12  # a shape cut to a smaller one of its kind, or cut away, is clean


@pytest.mark.parametrize("size", [(48, 96), (128, 128)])
def test_faults_fit_other_sizes_and_empty_pictures(size: tuple[int, int]) -> None:
    empty = (torch.tensor(world.BACKGROUND) / 255).view(3, 1, 1).expand(3, *size).clone()
    full = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    for image in (empty, full):
        for seed in range(8):
            result = corrupt(image, random.Random(seed))
            assert result.shape == image.shape
            assert result.isfinite().all()


def test_what_is_known_of_a_scene() -> None:
    """A square that fills patches wholly: its colour and shape cover them, nothing else does."""
    r = 12 * 2**0.5
    cover, counts = dino.describe([world.Object("square", "blue", 28.0, 28.0, r)])  # 16 .. 40 px
    blue, square = list(world.COLORS).index("blue"), 6 + world.SHAPES.index("square")
    expected = torch.zeros(8, 8, 10)
    expected[2:5, 2:5, [blue, square]] = 1
    assert (cover - expected).abs().max() < 0.02 + 1 / 8
    assert counts.sum() == counts[dino.KINDS.index(("square", "blue"))] == 1


def test_publishing_replaces_a_folder_or_leaves_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(RuntimeError), publish.replacing(folder) as new:
        (new / "half").write_text("x")
        raise RuntimeError
    assert [p.name for p in folder.iterdir()] == ["old"]
    with publish.replacing(folder) as new:
        (new / "new").write_text("x")
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_stage_replaces_its_own_lines_in_the_log(tmp_path: Path) -> None:
    work = tmp_path / "log.jsonl"
    (tmp_path / publish.LOG).write_text('{"stage": "a", "step": 1}\n{"stage": "b", "step": 1}\n')
    work.write_text('{"stage": "b", "step": 2}\n{"stage": "c", "step": 2}\n')
    publish.add_log("b", work, tmp_path, {"right": 0.5})
    lines = [json.loads(line) for line in (tmp_path / publish.LOG).read_text().splitlines()]
    assert lines == [{"stage": "a", "step": 1}, {"stage": "b", "step": 2}, {"stage": "b", "held_out": {"right": 0.5}}]
