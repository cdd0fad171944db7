"""Pictures with texts that a model is trained on beside its own images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.prompts import parse
from diffalign.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDED = "shapes-train"
VARIATIONS = 8  # scenes of each prompt


@dataclass(frozen=True)
class Pairs:
    """Texts, and the picture of each: `read[i]()` gives [3, H, W] fp32 in [0, 1]."""

    texts: list[str]
    read: Sequence[Callable[[], Tensor]]

    def __len__(self) -> int:
        return len(self.texts)

    def latents(self, pipeline: Any, rows: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The network's latents [B, *shape] of the pictures numbered `rows`, cut to the shape of its images.

        Raises UserError for a model whose latents are not those of a plain image autoencoder.
        """
        import torch

        pipe, (height, width) = pipeline.pipe, shape[-2:]
        if type(pipe.vae).__name__ != "AutoencoderKL" or len(shape) != 3:
            raise UserError(
                f"pictures cannot be encoded for a {type(pipe).__name__} yet; set algorithm.pretraining.weight to 0"
            )
        factor, config = pipe.vae_scale_factor, pipe.vae.config
        images = torch.stack([covering(self.read[i](), height * factor, width * factor) for i in rows])
        with torch.no_grad():
            z: Tensor = pipe.vae.encode(images.to(pipeline.device) * 2 - 1).latent_dist.mode()
        scaled: Tensor = (z - config.shift_factor) * config.scaling_factor
        return scaled


def covering(image: Tensor, height: int, width: int) -> Tensor:
    """The middle of [3, H, W], as much of it as has the new shape, in the new size."""
    from diffalign.rewards._preprocess import resize

    scale = max(height / image.shape[1], width / image.shape[2])
    size = max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    whole: Tensor = resize(image[None], size)[0]
    return whole[:, top : top + height, left : left + width]


def load(source: str) -> Pairs:
    """Pairs from shapes-train, a .jsonl file of {"prompt", "file"} or a .json file of {prompt: [file, ...]}.

    Files are relative to the folder of that file. UserError for what is missing or no pair, naming it.
    """
    from diffalign.rewards._references import read

    if source == EMBEDDED and not Path(source).exists():
        return _rendered()
    path = Path(source).expanduser()
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        raise UserError(
            f"pretraining.pairs '{source}' is neither a .jsonl nor a .json file of prompts and pictures nor {EMBEDDED}"
        )
    named = _lines(path) if path.suffix == ".jsonl" else _table(path)
    if not named:
        raise UserError(f"pretraining.pairs '{source}' holds no pair")
    files = [path.parent / file for _, file in named]
    missing = next((f for f in files if not f.is_file()), None)
    if missing is not None:
        raise UserError(f"the picture '{missing}' that '{source}' names does not exist")
    return Pairs([prompt for prompt, _ in named], [partial(read, f) for f in files])


def _lines(path: Path) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = parse(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from error
        prompt, file = (entry.get("prompt"), entry.get("file")) if isinstance(entry, dict) else (None, None)
        if not isinstance(prompt, str) or not isinstance(file, str):
            raise UserError(f'{path}:{number}: expected {{"prompt": text, "file": picture}}')
        found.append((prompt, file))
    return found


def _table(path: Path) -> list[tuple[str, str]]:
    try:
        table = parse(_text(path))
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON: {error}") from error
    lists = isinstance(table, dict) and all(isinstance(files, list) for files in table.values())
    if not lists or not all(isinstance(f, str) for files in table.values() for f in files):
        raise UserError(f"'{path}' must be {{prompt: [file, ...]}}")
    return [(prompt, file) for prompt, files in table.items() for file in files]


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text") from error


def _rendered() -> Pairs:
    from diffalign.shapes.prompts import train_prompts

    entries = [entry for entry in train_prompts() for _ in range(VARIATIONS)]
    read = [partial(_draw, entry, number) for number, entry in enumerate(entries)]
    return Pairs([entry["prompt"] for entry in entries], read)


def _draw(entry: dict[str, Any], number: int) -> Tensor:
    import random

    import torch

    from diffalign.shapes.prompts import scene
    from diffalign.shapes.world import render

    picture = render(scene(random.Random(f"{entry['prompt']} {number}"), entry["include"]))
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255
