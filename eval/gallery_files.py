"""What lies in the places of an evaluation's images: whether it is what was made and scored, and can be shown."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffalign.eval.gallery import Gallery
from diffalign.eval.records import Key, digest_of

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Found:
    """A file in the place of an image.

    Attributes:
        digest: of its bytes; '' when they could not be read.
        size: width and height; None: no picture.
        same: it is the file that was made and scored.
    """

    digest: str
    size: tuple[int, int] | None
    same: bool


Files = Mapping[str, Mapping[Key, Found]]  # by contestant; those that were made and are not there are left out


def inspect(gallery: Gallery) -> Files:
    """Every file once. Those that are not what was made are decoded, so that half a picture counts as none."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looked = {
            name: (
                list(entry.made),
                pool.map(look, map(entry.image, entry.made), [m.digest for m in entry.made.values()]),
            )
            for name, entry in gallery.entries.items()
        }
        return {
            name: {key: file for key, file in zip(keys, files, strict=True) if file is not None}
            for name, (keys, files) in looked.items()
        }


def look(path: Path, made: str) -> Found | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError:
        return Found("", None, False)
    digest, size = digest_of(data), None
    with suppress(*UNREADABLE), Image.open(io.BytesIO(data)) as image:
        if digest != made:
            image.load()
        size = image.size
    return Found(digest, size, digest == made)
