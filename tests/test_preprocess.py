"""Pixels for reward encoders: equal to Pillow's, and differentiable."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards._preprocess import centre_crop, cropped, normalise, padded, resize, shortest, unit
from diffalign.types import UserError

LEVEL = 1 / 255
TALL = pytest.mark.skipif(PIL.__version__ < "13", reason="before Pillow 13 the width always comes first")


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    """Independent 8-bit pixels with black and white among them: the hardest picture for a resampler."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(-40, 296, (1, 3, height, width), generator=generator)
    return levels.clamp(0, 255) / 255


def soft(height: int, width: int) -> Tensor:
    """Far from 0 and 1, so that no clamp acts."""
    return 0.4 + 0.2 * noise(height, width)


def pillow(x: Tensor, size: tuple[int, int], method: str = "bicubic") -> Tensor:
    image = Image.fromarray((x[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    return (
        torch.from_numpy(np.array(image.resize((size[1], size[0]), Image.Resampling[method.upper()]))).permute(2, 0, 1)[
            None
        ]
        / 255
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((90, 70), (48, 37)),
        ((31, 64), (64, 64)),
        ((64, 31), (224, 108)),
        ((50, 50), (50, 20)),
        ((70, 90), (140, 45)),
        ((256, 256), (224, 224)),
        pytest.param((101, 50), (50, 25), marks=TALL),
        ((100, 50), (50, 25)),  # the height loses just twice the pixels of the width, so the width comes first
        pytest.param((60, 50), (59, 70), marks=TALL),
    ],
)
@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_resize_is_pillows(old: tuple[int, int], new: tuple[int, int], method: str) -> None:
    x = noise(*old)
    assert torch.equal(resize(x, new, method), pillow(x, new, method))


def test_one_pass_would_be_far_off() -> None:
    """What the two clamped passes are for."""
    x = (noise(96, 96) > 0.5).float()
    single = torch.nn.functional.interpolate(x, (41, 41), mode="bicubic", antialias=True).clamp(0, 1)
    expected = pillow(x, (41, 41))
    assert (single - expected).abs().max() > 3 * LEVEL
    assert torch.equal(resize(x, (41, 41)), expected)


@pytest.mark.parametrize("view", [cropped, padded])
def test_identity_and_constants(view) -> None:  # type: ignore[no-untyped-def]
    x = noise(40, 40)
    assert torch.equal(view(x, 40), x)
    constant = torch.full((1, 3, 57, 83), 77 / 255)
    result = view(constant, 40)
    inside = result[..., 10:30, :] if view is padded else result
    torch.testing.assert_close(inside, torch.full_like(inside, 77 / 255), atol=1e-6, rtol=0)


def test_crops_differ_where_the_middle_is_between_two_pixels() -> None:
    side = 6
    for n in range(side, side + 12):
        ramp = torch.arange(n).float().view(1, 1, n, 1).expand(1, 1, n, n)
        left = {rule: int(centre_crop(ramp, side, rule)[0, 0, 0, 0]) for rule in ("hf", "torchvision")}
        assert left["hf"] == (n - side) // 2
        assert left["torchvision"] == int(round((n - side) / 2.0))
        assert left["torchvision"] - left["hf"] == (1 if (n - side) % 4 == 3 else 0)
    with pytest.raises(ValueError, match="cannot crop 6 x 6 out of 9 x 5"):
        centre_crop(torch.zeros(1, 1, 5, 9), 6)


def test_longer_side_is_rounded_down() -> None:
    assert shortest(100, 150, 224) == (224, 336)
    assert shortest(420, 301, 224) == (312, 224)  # 312.56
    assert shortest(301, 420, 224) == (224, 312)
    assert shortest(64, 64, 224) == (224, 224)


@pytest.mark.parametrize(("height", "width", "band"), [(30, 60, (10, 10, 0, 0)), (60, 31, (0, 0, 9, 10))])
def test_padding_is_black_and_goes_right_and_down_when_odd(height: int, width: int, band: tuple[int, ...]) -> None:
    top, bottom, left, right = band
    result = padded(torch.ones(1, 3, height, width), 40)
    assert result.shape == (1, 3, 40, 40)
    expected = torch.zeros(40, 40)
    expected[top : 40 - bottom, left : 40 - right] = 1
    torch.testing.assert_close(result[0, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("view", [cropped, padded])
def test_gradient_is_that_of_the_map(view) -> None:  # type: ignore[no-untyped-def]
    """Away from 0 and 1 the map is linear, so a finite difference is exact."""
    x, direction = soft(45, 71), noise(45, 71, seed=1) - 0.5
    weight = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))

    def value(x: Tensor, quantize: bool) -> Tensor:
        return (view(x, 32, quantize=quantize) * weight).double().sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf, False), leaf)
    step = 0.05
    difference = (value(x + step * direction, False) - value(x - step * direction, False)) / (2 * step)
    assert float((gradient * direction).double().sum()) == pytest.approx(float(difference), rel=1e-3)
    (through,) = torch.autograd.grad(value(leaf, True), leaf)
    torch.testing.assert_close(through, gradient, atol=1e-5, rtol=1e-4)


def test_what_is_out_of_range_is_pushed_back() -> None:
    x = torch.tensor([-0.5, 0.2, 1.7]).view(1, 3, 1, 1).expand(1, 3, 8, 8).clone().requires_grad_()
    y = unit(x)
    assert y.min() == 0 and y.max() == 1
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
    (gradient,) = torch.autograd.grad(cropped(x, 4)[:, [0, 2]].sum(), x)
    assert gradient[:, [0, 2]].abs().sum() > 0


def test_half_precision_is_resized_in_full() -> None:
    x = soft(50, 70).to(torch.bfloat16)
    for view in (cropped, padded):
        result = view(x, 32)
        assert result.dtype == torch.float32
        assert torch.equal(result, view(x.float(), 32))


def test_values_are_the_same_with_and_without_gradients() -> None:
    x = noise(50, 70)
    leaf = x.clone().requires_grad_()
    plain, graded = resize(x, (32, 45)), resize(leaf, (32, 45))
    with torch.no_grad():
        stopped = resize(leaf, (32, 45))
    assert graded.requires_grad and not stopped.requires_grad
    assert torch.equal(plain, graded) and torch.equal(plain, stopped)


def test_normalise() -> None:
    result = normalise(torch.full((2, 3, 2, 2), 0.5), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    assert result[1, :, 0, 1].tolist() == pytest.approx([0.8, 1.2, 0.1])


@pytest.mark.parametrize("size", [(2, 3000), (3000, 2)])
@pytest.mark.parametrize("view", [cropped, padded])
def test_thin_strips_are_refused(view: Any, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="is too thin to score; crop it to at most 20:1"):
        view(torch.zeros(1, 3, *size), 224)
    assert view(torch.zeros(1, 3, 40, 4), 8).shape[2:] == (8, 8)
