"""Pictures to score, and rewards that fail in ways of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign import cli
from diffalign.types import RewardOutput


def moody(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
    """Brightness; fails on the prompt "fail", does not apply to "skip"; its features are too many for a text file."""
    failed = [p == "fail" for p in prompts]
    scores = images.mean((1, 2, 3)).masked_fill(torch.tensor([p == "skip" for p in prompts]), torch.nan)
    error = ["out of order" if f else None for f in failed]
    extra = {
        "error": error,
        "size": torch.tensor([images.shape[3]] * len(prompts)),
        "map": torch.tensor([[1 / 3, 0.0]]).expand(len(prompts), 2),
        "features": torch.zeros(len(prompts), 5000),
    }
    return RewardOutput(scores, extra, ~torch.tensor(failed))


def together(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.full((len(images),), float(len(images)))


def fragile(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """Ctrl-C at white."""
    if images.max() == 1:
        raise KeyboardInterrupt
    return images.mean((1, 2, 3))


def here(name: str) -> str:
    """The dotted path of one of these rewards."""
    return f"{__name__}.{name}"


def grey(folder: Path, **levels: int) -> Path:
    folder.mkdir(exist_ok=True)
    for name, level in levels.items():
        Image.new("RGB", (8, 6), (level,) * 3).save(folder / f"{name}.png")
    return folder


def truncated(path: Path) -> Path:
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def score_into(output: Path, reward: str, images: Path, *more: str) -> int:
    return cli.main(
        ["score", "--reward", reward, "--images", str(images), "--output", str(output), "--device", "cpu", *more]
    )
