"""Generation writes what it says, and an image depends on nothing but the model, its prompt and its indices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.generate import generate, native_size
from diffalign.images import grid, save_png
from diffalign.schedules import RectifiedFlow
from diffalign.sections import Sampling
from diffalign.types import Conditioning, UserError

SAMPLING = Sampling(steps=3, kernel="ode", eta=0.0, height=8, width=16)


class Direct:
    """A pipeline whose latents are pixels: x0 is the prompt's length plus a tenth of x, all in closed form."""

    schedule = RectifiedFlow()
    device = torch.device("cpu")
    lora_targets = ()
    trainable = torch.nn.Identity()

    def encode(self, prompts: Any) -> Conditioning:
        lengths = torch.tensor([[len(p) / 20] for p in prompts])
        return Conditioning({"length": lengths}, torch.arange(len(prompts)))

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return 3, height, width

    def denoiser(self, cond: Conditioning, guidance: float = 1.0, negative: Conditioning | None = None) -> Direct:
        self.length = cond.rows()["length"]
        return self

    def predict(self, x: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        x0 = self.length[:, :, None, None] + x / 10
        return x0, (x - (1 - s) * x0) / s

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(0, 1)


PROMPTS = [{"prompt": "a cat", "tag": "x"}, {"prompt": "../../etc <b>"}, {"prompt": "caf\xe9"}]


def pixels(folder: Path) -> dict[str, Any]:
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))}


def test_files_names_and_metadata(tmp_path: Path) -> None:
    path = generate(Direct(), PROMPTS, tmp_path / "out", SAMPLING, images=2, seed=3)
    names = [f"{p:04d}_{j:02d}.png" for p in range(3) for j in range(2)]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted([*names, "grid.png", "metadata.jsonl"])
    lines = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text("utf-8").splitlines()]
    assert [line["file_name"] for line in lines] == names
    assert [line["prompt"] for line in lines] == [m["prompt"] for m in PROMPTS for _ in range(2)]
    assert lines[0]["tag"] == "x" and "tag" not in lines[2]
    assert len({line["seed"] for line in lines}) == 6
    assert path == tmp_path / "out/grid.png" and Image.open(path).size == (2 * 16 + 2, 3 * 8 + 2 * 2)


def test_an_image_depends_on_its_indices_alone(tmp_path: Path) -> None:
    generate(Direct(), PROMPTS, tmp_path / "a", SAMPLING, images=2, micro_batch=8)
    generate(Direct(), PROMPTS[:2], tmp_path / "b", SAMPLING, images=3, micro_batch=1)
    generate(Direct(), PROMPTS[:2], tmp_path / "c", SAMPLING, images=1, seed=1)
    a, b, c = pixels(tmp_path / "a"), pixels(tmp_path / "b"), pixels(tmp_path / "c")
    for name in ("0000_00.png", "0000_01.png", "0001_00.png", "0001_01.png"):
        assert np.array_equal(a[name], b[name])
    assert not np.array_equal(a["0000_00.png"], a["0000_01.png"])
    assert not np.array_equal(a["0000_00.png"], c["0000_00.png"])


def test_a_folder_with_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.png").touch()
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        generate(Direct(), PROMPTS, tmp_path, SAMPLING)
    assert [f.name for f in tmp_path.iterdir()] == ["old.png"]


def test_grid_fills_row_by_row_on_white() -> None:
    out = grid(torch.arange(3.0)[:, None, None, None].expand(3, 3, 2, 2) / 4, columns=2, gap=1)
    expected = torch.tensor([
        [0.00, 0.00, 1.0, 0.25, 0.25],
        [0.00, 0.00, 1.0, 0.25, 0.25],
        [1.00, 1.00, 1.0, 1.00, 1.00],
        [0.50, 0.50, 1.0, 1.00, 1.00],
        [0.50, 0.50, 1.0, 1.00, 1.00],
    ])  # fmt: skip
    assert torch.equal(out, expected.expand(3, 5, 5))


def test_png_rounds_to_the_nearest_level(tmp_path: Path) -> None:
    levels = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 254.6 / 255, 1.0, -0.5, 1.5])
    save_png(levels.expand(3, 1, 8), tmp_path / "x.png")
    assert np.asarray(Image.open(tmp_path / "x.png"))[0, :, 1].tolist() == [0, 0, 1, 127, 255, 255, 0, 255]


def test_native_size() -> None:
    from types import SimpleNamespace

    assert native_size(SimpleNamespace(default_sample_size=8, vae_scale_factor=8)) == 64
