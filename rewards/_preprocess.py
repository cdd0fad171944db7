"""Pixels as the encoders of reward heads were trained to see them: torch only, differentiable, equal to Pillow's.

Scores must not depend on which image libraries are installed, so none is used. Images are [B, 3, H, W] fp32, with
values in [0, 1] until they are normalised.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from diffalign.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

ONE = 1 << 22  # Pillow's weights are whole numbers of these parts
THIN = 20  # times as long as wide; more is no picture
Crop = Literal["hf", "torchvision"]
Method = Literal["bicubic", "bilinear"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def unit(x: Tensor, quantize: bool = True) -> Tensor:
    """fp32 copy of x clamped to [0, 1] and, if `quantize`, rounded to 8 bits; the gradient is that of the identity.

    So values that a VAE put outside the range are still pushed back by a reward.
    """
    x = x.float()
    y = x.detach().clamp(0, 1)
    return _through(x, _levels(y) if quantize else y)


def resize(x: Tensor, size: tuple[int, int], method: Method = "bicubic", quantize: bool = True) -> Tensor:
    """[B, C, H, W] -> [B, C, *size] in two passes, one for each side, each clamped to [0, 1].

    With `quantize` the values are those of Pillow (13 or later) to the bit, for x in 8-bit levels, and the gradient is
    that of the passes without rounding. One 2-D interpolation would be off by up to 10 grey levels at sharp edges, for
    want of the clamp in between.
    """
    import torch
    import torch.nn.functional as F

    x = x.float()
    graded = torch.is_grad_enabled() and x.requires_grad
    for dim in (2, 3) if _height_first(x.shape[2], x.shape[3], size) else (3, 2):
        shape = (size[0], x.shape[3]) if dim == 2 else (x.shape[2], size[1])
        if tuple(x.shape[2:]) == shape:
            continue
        levels = _resampled(x.detach(), dim, shape[dim - 2], method) if quantize else None
        if levels is None or graded:
            x = F.interpolate(x, shape, mode=method, align_corners=False, antialias=True).clamp(0, 1)
        if levels is not None:
            x = _through(x, levels) if graded else levels
    return x


def _height_first(height: int, width: int, size: tuple[int, int]) -> bool:
    """Pillow's order since version 13, to save work on tall pictures; older ones always begin with the width.

    It matters to heads: the two orders differ by some levels at sharp edges of a picture over twice as tall as wide.
    """
    return height - size[0] > 2 * max(width - size[1], 0)


def shortest(height: int, width: int, side: int) -> tuple[int, int]:
    """Size with the shorter side `side`; the longer one is rounded down. Raises UserError for a thin strip."""
    _check(height, width)
    if height <= width:
        return side, int(side * width / height)
    return int(side * height / width), side


def _check(height: int, width: int) -> None:
    """A thin strip would grow into a huge picture of which a small square is kept."""
    if max(height, width) > THIN * min(height, width):
        raise UserError(f"a picture of {width} x {height} is too thin to score; crop it to at most {THIN}:1")


def centre_crop(x: Tensor, side: int, rule: Crop = "hf") -> Tensor:
    """The middle [side, side]; where it is not unique, hf rounds the offset down and torchvision half to even."""
    height, width = x.shape[2:]
    if min(height, width) < side:
        raise ValueError(f"cannot crop {side} x {side} out of {width} x {height}")
    offset = {"hf": lambda n: (n - side) // 2, "torchvision": lambda n: round((n - side) / 2)}[rule]
    top, left = offset(height), offset(width)
    return x[:, :, top : top + side, left : left + side]


def normalise(x: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """(x - mean) / std per channel."""
    return (x - x.new_tensor(mean).view(-1, 1, 1)) / x.new_tensor(std).view(-1, 1, 1)


def cropped(x: Tensor, side: int, crop: Crop = "hf", quantize: bool = True, method: Method = "bicubic") -> Tensor:
    """CLIP's way: the shorter side to `side`, then the middle square. [B, 3, H, W] -> [B, 3, side, side] in [0, 1]."""
    x = unit(x, quantize)
    size = shortest(x.shape[2], x.shape[3], side)
    return centre_crop(resize(x, size, method, quantize), side, crop)


def padded(x: Tensor, side: int, antialias: bool = True, quantize: bool = True) -> Tensor:
    """HPSv2's way: the longer side to `side`, black borders. The resized values are neither rounded nor clamped."""
    import torch.nn.functional as F

    _check(x.shape[2], x.shape[3])
    x = unit(x, quantize)
    scale = side / max(x.shape[2:])
    height, width = (round(n * scale) for n in x.shape[2:])
    if scale != 1:
        x = F.interpolate(x, (height, width), mode="bicubic", align_corners=False, antialias=antialias)
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(x, (left, side - width - left, top, side - height - top))


def _levels(y: Tensor) -> Tensor:
    return (y * 255).round() / 255


def _through(x: Tensor, y: Tensor) -> Tensor:
    """Value y, gradient of x."""
    return y + (x - x.detach())


def _resampled(x: Tensor, dim: int, size: int, method: Method) -> Tensor:
    """One pass over dimension 2 or 3 in Pillow's integer arithmetic; float64 holds its sums exactly."""
    import torch

    weights = _weights(x.shape[dim], size, method).to(x.device)
    levels = (x * 255).round().double()
    total = levels @ weights.T if dim == 3 else weights @ levels
    return (torch.floor(total / ONE + 0.5).clamp(0, 255) / 255).float()


@functools.lru_cache(maxsize=64)
def _weights(old: int, new: int, method: Method) -> Tensor:
    """[new, old] whole numbers: Pillow's antialiased weights in units of 1 / ONE."""
    import torch

    scale = old / new
    widen = max(scale, 1.0)
    reach = {"bicubic": 2.0, "bilinear": 1.0}[method] * widen
    centre = (torch.arange(new, dtype=torch.float64)[:, None] + 0.5) * scale
    place = torch.arange(old, dtype=torch.float64)
    within = (place >= (centre - reach + 0.5).trunc()) & (place < (centre + reach + 0.5).trunc())
    d = ((place - centre + 0.5) * (1 / widen)).abs()
    if method == "bilinear":
        weights = (1 - d).clamp(min=0)
    else:  # Keys' cubic with a = -0.5
        near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
        weights = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    weights = weights * within
    weights = weights / weights.sum(1, keepdim=True) * ONE
    return torch.trunc(weights + torch.where(weights < 0, -0.5, 0.5))
