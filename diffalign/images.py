"""Images as files: 8-bit PNGs written whole or not at all, and grids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def grid(images: Tensor | Sequence[Tensor], columns: int, gap: int = 2) -> Tensor:
    """N x [3, H, W] -> one image [3, rows (H + gap) - gap, columns (W + gap) - gap], filled row by row on white."""
    n, (c, h, w) = len(images), images[0].shape
    rows = -(-n // columns)
    out = images[0].new_ones(c, rows * (h + gap) - gap, columns * (w + gap) - gap)
    for i, image in enumerate(images):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        out[:, top : top + h, left : left + w] = image
    return out


def thumbnail(image: Tensor, side: int) -> Tensor:
    """[3, H, W] scaled down so that neither side is longer than `side`; a smaller image stays as it is."""
    h, w = image.shape[1:]
    scale = side / max(h, w)
    if scale >= 1:
        return image
    size = (max(1, round(h * scale)), max(1, round(w * scale)))
    return torch.nn.functional.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]


def to_pixels(image: Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] -> uint8 [H, W, 3]."""
    pixels: np.ndarray = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return pixels


def save_png(image: Tensor, path: Path) -> None:
    """Write [3, H, W] in [0, 1] as 8-bit PNG, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    Image.fromarray(to_pixels(image)).save(temporary, format="PNG")
    os.replace(temporary, path)
