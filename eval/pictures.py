"""The pictures of a report: re-encoded as WebP, in files beside the page or inside it."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
from PIL import Image

from diffalign.types import UserError
from diffalign.writing import put

Mode = Literal["folder", "single"]
FOLDER = "img"
QUALITY, EFFORT = 80, 0
SMALL = 128  # px; pictures up to this side are stored exactly: WebP's blocks would show in them, and they cost little
RECENT = 32  # pictures held in memory, for another use
FORMAT = f"{QUALITY}.{EFFORT}.{SMALL}"  # part of a picture's name, so that another encoding is another file


@dataclass
class Pictures:
    """Encodes each picture once, in threads. Only pixels get into the page, whatever else the files hold."""

    folder: Path  # of the page
    mode: Mode = "folder"
    _work: dict[str, Future[None]] = field(default_factory=dict)  # name -> when it is in its file
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2 * (os.cpu_count() or 1)))
    _recent: dict[Path, Image.Image] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def file(self, path: Path, digest: str, side: int) -> str:
        """The address of a picture in a file of this digest, at most `side` px wide and high.

        Raises UserError when it is missing or damaged, here or in `finish`.
        """
        return self.later(f"picture {digest}", partial(self.opened, path), side)

    def pixels(self, values: np.ndarray, side: int) -> str:
        """The same of pixels [H, W, 3] uint8."""
        return self._address(values.tobytes() + str(values.shape).encode(), partial(Image.fromarray, values), side)

    def later(self, of: str, draw: Callable[[], Image.Image], side: int) -> str:
        """The address of an RGB picture that a thread draws, unless an earlier page had it already.

        `of` names what it is drawn from and how: equal names are equal pictures.
        """
        return self._address(of.encode(), draw, side)

    def opened(self, path: Path) -> Image.Image:
        """A picture of the evaluation, RGB, not to be changed. The last few are kept, for what else is drawn from them.

        Raises UserError when the file is missing or damaged.
        """
        with self._lock:
            if path in self._recent:
                return self._recent[path]
        try:
            with Image.open(path) as image:
                image.load()
                picture: Image.Image = image if image.mode == "RGB" else image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's for damaged files
            raise UserError(f"{path} is not a readable picture; delete it and run the evaluation again") from error
        with self._lock:
            self._recent[path] = picture
            while len(self._recent) > RECENT:
                self._recent.pop(next(iter(self._recent)))
        return picture

    def _address(self, data: bytes, opened: Callable[[], Image.Image], side: int) -> str:
        if self.mode == "single":
            return "data:image/webp;base64," + base64.b64encode(encoded(opened(), side)).decode()
        name = sha256(data + f"{side}.{FORMAT}".encode()).hexdigest()[:20] + ".webp"
        if name not in self._work:
            self._work[name] = self._pool.submit(self._store, opened, side, name)
        return f"{FOLDER}/{name}"

    def finish(self) -> None:
        """Wait until all files are there. Raises OSError when one could not be written."""
        try:
            for work in self._work.values():
                work.result()
        finally:
            self.close()

    def close(self) -> None:
        """Leave out what has not begun."""
        self._pool.shutdown(cancel_futures=True)

    def sweep(self) -> None:
        """Remove pictures of older pages; to be called when the page that needed them is gone."""
        for path in (self.folder / FOLDER).glob("*.webp"):
            if path.name not in self._work:
                path.unlink()

    def _store(self, opened: Callable[[], Image.Image], side: int, name: str) -> None:
        target = self.folder / FOLDER / name
        if not target.is_file():  # the name is a digest of what is in it
            target.parent.mkdir(exist_ok=True)
            put(target, encoded(opened(), side))


def encoded(picture: Image.Image, side: int) -> bytes:
    """Of the pixels alone, which stay as they are."""
    scale = min(1.0, side / max(picture.size))
    width, height = (max(1, round(scale * length)) for length in picture.size)
    # whole factors by boxes first, which is faster; a picture that is small enough is copied
    small = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=1.0)
    buffer = io.BytesIO()
    exact = max(small.size) <= SMALL
    small.save(buffer, "WEBP", lossless=exact, quality=QUALITY, method=EFFORT, icc_profile="")
    return buffer.getvalue()
