"""Images on the disk with their prompts: folders that `generate` wrote, plain folders, and JSON lists of both."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign import prompts
from diffalign.types import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LIST = "metadata.jsonl"
_ORIENTATION = 0x0112  # EXIF's; 1 is upright
_SIDEWAYS = range(5, 9)  # its values that exchange height and width


@dataclass(frozen=True)
class Listed:
    """An image file and what is known of it; `size` is (height, width)."""

    path: Path
    size: tuple[int, int]
    name: str  # as its list or folder calls it
    metadata: dict[str, Any] = field(default_factory=dict)  # the text itself under "prompt", where there is one


def find(images: str, prompt_file: str | None = None) -> list[Listed]:
    """The images that `images` names, in its order, with their prompts.

    `images` is a folder, or a list: a .json array or .jsonl lines of objects with a path relative to the list under
    "image" or "file_name", and a "prompt". A folder that holds metadata.jsonl, as `generate` writes it, is that list.
    Other folders are taken in the order of their file names, numbers in them compared as numbers.

    `prompt_file` is read by :func:`diffalign.prompts.load`. To the images of a plain folder it gives its prompts in
    order, one each. To a list it gives the metadata of equal prompts, or of equal "file_name"s where it has them.

    Raises UserError for what is missing, empty, unreadable or does not match, naming it.
    """
    source = Path(images).expanduser()
    if source.is_dir() and (source / LIST).is_file():
        source = source / LIST
    if not source.exists():
        raise UserError(f"no folder or file '{images}'; give a folder of images, or a .json or .jsonl list of them")
    plain = source.is_dir()
    found = [(p.name, p, {}) for p in _inside(source)] if plain else list(_records(source))
    if not found:
        raise UserError(f"'{images}' holds no image ({', '.join(SUFFIXES)})" if plain else f"'{images}' lists no image")
    strange = next((name for name, *_ in found if not _is_text(name)), None)
    if strange is not None:
        raise UserError(f"the file name {strange!r} in '{images}' is not UTF-8; rename it")
    if prompt_file is not None:
        found = _with_prompts(found, prompts.load(prompt_file), plain, prompt_file)
    return [Listed(path, _size(path), name, metadata) for name, path, metadata in found]


def read(listed: Listed) -> Tensor:
    """[3, H, W] fp32 in [0, 1]; transparency is dropped. Raises UserError for a damaged file."""
    import numpy as np
    import torch
    from PIL import ImageOps

    with _opened(listed.path) as image:
        upright = ImageOps.exif_transpose(image) if _turned(image) else image
        pixels = np.array(upright.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def batches(images: Sequence[Listed], size: int) -> list[list[int]]:
    """Indices of at most `size` images of equal height and width; every index once."""
    same: dict[tuple[int, int], list[int]] = {}
    for i, image in enumerate(images):
        same.setdefault(image.size, []).append(i)
    return [group[k : k + size] for group in same.values() for k in range(0, len(group), size)]


def _inside(folder: Path) -> list[Path]:
    """Image files, not hidden, in natural order: 2.png before 10.png."""
    try:
        files = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read the folder '{folder}': {error.strerror}") from error
    return sorted(files, key=lambda p: ([(t, int(d)) for t, d in re.findall(r"(\D*)(\d+)", p.name)], p.name))


def _records(path: Path) -> Iterable[tuple[str, Path, dict[str, Any]]]:
    """(name, path, metadata) of each entry of a list."""
    try:
        text = path.read_text("utf-8")
        lines = path.suffix.lower() == ".jsonl"
        entries = [prompts.parse(line) for line in text.split("\n") if line.strip()] if lines else prompts.parse(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read '{path}': {error}") from error
    except ValueError as error:
        raise UserError(f"'{path}' is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise UserError(f'\'{path}\' must hold a list of objects such as {{"image": "a.png", "prompt": "a cat"}}')
    for k, entry in enumerate(entries, 1):
        where = f"'{path}', entry {k}"
        name = entry.get("image", entry.get("file_name")) if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise UserError(f'{where}: expected an object with a path under "image" or "file_name"')
        if not isinstance(entry.get("prompt", ""), str):
            raise UserError(f'{where}: the "prompt" must be text, got {entry["prompt"]!r}')
        yield name, path.parent / name, entry


def _with_prompts(
    found: Sequence[tuple[str, Path, dict[str, Any]]], records: Sequence[dict[str, Any]], plain: bool, source: str
) -> list[tuple[str, Path, dict[str, Any]]]:
    named = {str(r["file_name"]): r for r in records if "file_name" in r}
    if named:
        wanted = [named.get(name) for name, _, _ in found]
        missing = [name for (name, _, _), record in zip(found, wanted, strict=True) if record is None]
        if missing:
            raise UserError(
                f"'{source}' has no line with the \"file_name\" {missing[0]!r}; add it, or use another file"
            )
    elif plain:
        if len(found) != len(records):
            raise UserError(
                f"{len(found)} images, but {len(records)} prompts in '{source}'; one is needed for each image, in the "
                f'order of the file names, or a JSONL file whose lines name theirs under "file_name"'
            )
        wanted = list(records)
    else:
        known = {r["prompt"]: r for r in records}
        wanted = [known.get(metadata.get("prompt", "")) for _, _, metadata in found]
        strange = [m.get("prompt", "") for (_, _, m), record in zip(found, wanted, strict=True) if record is None]
        if strange:
            raise UserError(
                f"'{source}' lacks the prompt {strange[0]!r} that the images were listed with; leave it out"
            )
    return [(name, path, {**m, **(record or {})}) for (name, path, m), record in zip(found, wanted, strict=True)]


def _size(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        if image.mode.startswith(("I", "F")):
            raise UserError(f"'{path}' has more than 8 bits a channel; save it as an 8-bit image")
        width, height = image.size
        return (width, height) if _turned(image) in _SIDEWAYS else (height, width)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Raises UserError for what cannot be read; what Pillow warns of can be, such as odd EXIF."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(_unreadable(path, error)) from error


def _turned(image: Image.Image) -> int:
    """The EXIF orientation, 0 for none. PNGs are upright: theirs may follow the pixels, which would all be read."""
    turned = 0 if image.format == "PNG" else image.getexif().get(_ORIENTATION, 0)
    return turned if isinstance(turned, int) else 0


def _is_text(name: str) -> bool:
    """Not so are file names of other encodings, whose bytes Python keeps as surrogates."""
    return name.encode("utf-8", "ignore").decode("utf-8") == name


def _unreadable(path: Path, error: Exception) -> str:
    if not path.is_file():
        return f"there is no image file '{path}'"
    return f"cannot read the image '{path}' ({type(error).__name__}); remove it, or save it again"
