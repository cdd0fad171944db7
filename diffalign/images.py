"""Images as files: 8-bit PNGs written whole or not at all, and grids."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image
from torch import Tensor


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """[N, 3, H, W] -> one image [3, rows (H + gap) - gap, columns (W + gap) - gap], filled row by row on white."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    out = images.new_ones(c, rows * (h + gap) - gap, columns * (w + gap) - gap)
    for i, image in enumerate(images):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        out[:, top : top + h, left : left + w] = image
    return out


def save_png(image: Tensor, path: Path) -> None:
    """Write [3, H, W] in [0, 1] as 8-bit PNG, whole or not at all."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    temporary = path.with_name(path.name + ".tmp")
    Image.fromarray(pixels).save(temporary, format="PNG")
    os.replace(temporary, path)
