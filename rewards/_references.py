"""Reference pictures of heads that compare with them: paired with prompts, an unpaired folder, or an embedded style."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.prompts import parse
from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
EMBEDDED = "shapes-"  # shapes-outline, shapes-deep, shapes-dusk: see diffalign.shapes.styles
_ENDS = 4096  # bytes at either end of a file that its hash covers, so that 60 GB of references do not delay the start


@dataclass(frozen=True)
class Picture:
    """One reference; `read` gives it as [3, H, W] fp32 in [0, 1], the key tells it from all others."""

    key: str
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class References:
    """The references of each prompt, never none of them, and a hash of the whole set."""

    of: Callable[[str, Mapping[str, Any]], Sequence[Picture]]
    digest: bytes  # 32 bytes

    def pick(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], seeds: Tensor) -> list[Tensor]:
        """One reference [3, H, W] for each image, drawn by its seed among those of its prompt."""
        import torch

        chosen = []
        for prompt, entry, seed in zip(prompts, metadata, seeds.tolist(), strict=True):
            pictures = self.of(prompt, entry)
            k = int(torch.randint(len(pictures), (), generator=generator(seed, 0)))
            chosen.append(pictures[k].read())
        return chosen


def load(source: str) -> References:
    """References from a style of the shapes world ('shapes-outline'), a JSON file or a folder.

    The JSON file is {prompt: [file, ...]}; the files are relative to its own folder. A folder, with all it holds, is
    not paired: each of its pictures may stand for any prompt. UserError names what is missing.
    """
    if source.startswith(EMBEDDED) and not Path(source).exists():
        return _rendered(source.removeprefix(EMBEDDED))
    path = Path(source).expanduser()
    if path.is_dir():
        return _unpaired(path)
    if path.suffix == ".json" and path.is_file():
        return _paired(path)
    raise UserError(
        f"references '{source}' are neither a .json file of {{prompt: [file, ...]}} nor a folder of pictures nor one "
        f"of {', '.join(_styles())}"
    )


def generator(seed: int, *purpose: int) -> torch.Generator:
    """Random numbers that are a function of an image's seed and of what they are for."""
    import numpy as np
    import torch

    words = np.random.SeedSequence([seed, *purpose]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


def _styles() -> list[str]:
    from diffalign.shapes.styles import STYLES

    return [EMBEDDED + name for name in STYLES]


def _rendered(name: str) -> References:
    from diffalign.shapes.styles import STYLES, VARIATIONS

    if name not in STYLES:
        raise UserError(f"the shapes world has no style '{name}'; take one of {', '.join(_styles())}")

    def of(prompt: str, metadata: Mapping[str, Any]) -> list[Picture]:
        if not metadata.get("include"):
            raise UserError(
                f"references '{EMBEDDED}{name}' cannot draw the prompt {prompt!r}, which has no GenEval metadata; use "
                "prompts: shapes-train or give your own references"
            )
        return [Picture(f"{prompt} {k}", partial(_draw, name, metadata, k)) for k in range(VARIATIONS)]

    return References(of, hashlib.sha256(f"{name} {VARIATIONS} {STYLES[name]}".encode()).digest())


def _draw(style: str, metadata: Mapping[str, Any], number: int) -> Tensor:
    import torch

    from diffalign.shapes.styles import picture

    return torch.from_numpy(picture(style, metadata, number).copy()).permute(2, 0, 1).float() / 255


def _unpaired(folder: Path) -> References:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"the references folder '{folder}' holds no picture ({', '.join(SUFFIXES)})")
    every = [_picture(p) for p in files]
    return References(lambda prompt, metadata: every, _digest(folder, {"": files}))


def _paired(path: Path) -> References:
    try:
        table = parse(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"the references '{path}' are not JSON: {error}") from error
    if not isinstance(table, dict) or not table:
        raise UserError(f"the references '{path}' must be {{prompt: [file, ...]}} with at least one prompt")
    files: dict[str, list[Path]] = {}
    for prompt, names in table.items():
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise UserError(f"the references '{path}' must give the prompt {prompt!r} a list of at least one file")
        files[prompt] = [path.parent / name for name in names]
        missing = next((p for p in files[prompt] if not p.is_file()), None)
        if missing is not None:
            raise UserError(f"the reference '{missing}' of the prompt {prompt!r} in '{path}' does not exist")
    pictures = {prompt: [_picture(p) for p in paths] for prompt, paths in files.items()}

    def of(prompt: str, metadata: Mapping[str, Any]) -> list[Picture]:
        if prompt not in pictures:
            raise UserError(
                f"the references '{path}' have no picture for the prompt {prompt!r}; add some, or train on the prompts "
                "that have them"
            )
        return pictures[prompt]

    return References(of, _digest(path.parent, files))


def _picture(path: Path) -> Picture:
    return Picture(str(path), partial(read, path))


def read(path: Path) -> Tensor:
    """[3, H, W] fp32 in [0, 1], upright. Raises UserError when it is no picture."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"the reference '{path}' cannot be read as a picture; replace or remove it") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _digest(root: Path, files: Mapping[str, Sequence[Path]]) -> bytes:
    """Of prompts, names, sizes and either end of every file; the place of the folder does not matter."""
    total = hashlib.sha256()
    for prompt in sorted(files):
        for path in files[prompt]:
            size = path.stat().st_size
            with path.open("rb") as file:
                ends = file.read(_ENDS)
                file.seek(max(size - _ENDS, 0))
                ends += file.read(_ENDS)
            name = path.relative_to(root) if path.is_relative_to(root) else path
            total.update(json.dumps([prompt, name.as_posix(), size, hashlib.sha256(ends).hexdigest()]).encode())
    return total.digest()
