"""Each number of a picture's looks against a picture for which it is known."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from diffalign.eval.looks import MEANINGS, border, high_frequency, laplacian, looks

RNG = np.random.default_rng(5)
NOISE = RNG.integers(1, 255, (64, 48, 3), np.uint8)  # neither 0 nor 255


def grey(y: np.ndarray) -> np.ndarray:
    """[H, W] in [0, 1] -> [H, W, 3] uint8."""
    return np.repeat(np.round(y * 255).astype(np.uint8)[..., None], 3, 2)


def flat(*colour: int) -> np.ndarray:
    return np.full((20, 30, 3), colour, np.uint8)


def test_a_flat_grey_has_none_of_it() -> None:
    found = looks(flat(120, 120, 120))
    assert list(found) == list(MEANINGS)
    assert found.pop("jpeg_bytes") > 0
    assert found == pytest.approx(dict.fromkeys(found, 0.0), abs=1e-12)


def test_saturation_is_that_of_hsv() -> None:
    assert looks(grey(RNG.random((16, 16))))["saturation"] == 0
    assert looks(flat(0, 0, 0))["saturation"] == 0
    assert looks(flat(200, 0, 0))["saturation"] == 1
    assert looks(flat(200, 150, 50))["saturation"] == pytest.approx(0.75)
    expected = np.asarray(Image.fromarray(NOISE).convert("HSV"))[..., 1].mean() / 255
    assert looks(NOISE)["saturation"] == pytest.approx(expected, abs=0.003)


def test_contrast_of_two_halves() -> None:
    y = np.zeros((10, 10))
    y[:, 5:] = 1
    assert looks(grey(y))["contrast"] == pytest.approx(0.5)
    assert looks(flat(255, 0, 0))["contrast"] == pytest.approx(0, abs=1e-12)


def test_clipped_is_an_exact_share() -> None:
    assert looks(NOISE)["clipped"] == 0
    pixels = NOISE.copy()
    pixels.reshape(-1)[:100] = 0
    pixels.reshape(-1)[100:250] = 255
    assert looks(pixels)["clipped"] == 250 / pixels.size
    assert looks(flat(255, 0, 7))["clipped"] == pytest.approx(2 / 3)


def test_sharpness_of_a_ramp_a_parabola_and_a_checkerboard() -> None:
    x = np.arange(12.0)
    assert laplacian(np.tile(3 * x, (9, 1))) == pytest.approx(np.zeros((7, 10)))
    assert laplacian(np.tile(x**2, (9, 1))) == pytest.approx(np.full((7, 10), 2.0))
    board = np.indices((10, 10)).sum(0) % 2
    assert looks(grey(board))["sharpness"] == pytest.approx(16)  # the Laplacian is 4 or -4
    blurred = np.asarray(Image.fromarray(NOISE).filter(ImageFilter.GaussianBlur(1)))
    assert looks(blurred)["sharpness"] < looks(NOISE)["sharpness"] / 4


def test_high_frequency_of_waves() -> None:
    x = np.arange(64)
    for cycles, expected in (4, 0.0), (15, 0.0), (17, 1.0), (32, 1.0):  # of the 64 pixels; 16 is a quarter a pixel
        wave = np.tile(np.cos(2 * math.pi * cycles * x / 64), (64, 1))
        assert high_frequency(wave) == pytest.approx(expected, abs=1e-12)
        assert high_frequency(wave.T) == pytest.approx(expected, abs=1e-12)
    both = np.cos(2 * math.pi * 4 * x / 64)[:, None] + 2 * np.cos(2 * math.pi * 20 * x / 64)[None, :]
    assert high_frequency(both) == pytest.approx(0.8)
    noise = high_frequency(RNG.normal(size=(256, 256)))
    assert noise == pytest.approx(1 - math.pi / 16, abs=0.01)  # white: the area beyond the circle


def test_jpeg_bytes_are_those_of_the_file() -> None:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "JPEG", quality=75)
    assert looks(NOISE)["jpeg_bytes"] == len(buffer.getvalue()) / (64 * 48)


def test_border_is_the_share_of_the_ring() -> None:
    inside, frame = np.zeros((64, 64)), np.zeros((64, 64))
    inside[20:40, 20:40] = 1
    frame[:2], frame[-2:], frame[:, :2], frame[:, -2:] = 1, 1, 1, 1
    assert border(inside) == pytest.approx(0, abs=1e-12)
    assert border(frame) == pytest.approx(1)
    assert border(RNG.normal(size=(320, 320))) == pytest.approx(1 - (14 / 16) ** 2, abs=0.02)
    assert looks(grey(frame))["border"] == pytest.approx(1)


def test_over_saturated_pictures_show() -> None:
    photo = np.clip(RNG.normal(128, 30, (64, 64, 3)), 0, 255).astype(np.uint8)
    vivid = np.clip((photo.astype(float) - 128) * 4 + 128, 0, 255).astype(np.uint8)
    before, after = looks(photo), looks(vivid)
    assert all(after[name] > before[name] for name in ("saturation", "contrast", "clipped", "sharpness"))


def test_small_and_wrong_pictures() -> None:
    assert all(math.isfinite(value) for value in looks(NOISE[:3, :3]).values())
    for wrong in (NOISE[:2], NOISE[..., 0], NOISE / 255.0, NOISE[..., :2]):
        with pytest.raises(ValueError, match="uint8"):
            looks(wrong)
