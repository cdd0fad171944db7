"""Numbers that drift when a model games its reward: colour, contrast, sharpness, clipping, noise, size, frames.

Each is of one image, from its pixels alone. What they mean is in :data:`MEANINGS`; luma is that of Rec. 601 in [0, 1].
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

MEANINGS = {
    "saturation": "mean over pixels of (max - min) / max of red, green and blue; 0 for grey and black",
    "contrast": "standard deviation of luma",
    "sharpness": "variance of luma's Laplacian: four neighbours minus four times the pixel, without the outermost ones",
    "clipped": "share of channel values that are 0 or 255",
    "high_frequency": "share of the energy of luma's spectrum, its mean left out, above a quarter cycle a pixel",
    "jpeg_bytes": "bytes a pixel of a JPEG file of quality 75, chroma subsampled 4:2:0",
    "border": "share of the energy of luma's gradient within a sixteenth of the shorter side from the edge",
}
QUALITY = 75
SMALLEST = 3  # pixels a side for which there is a Laplacian


def looks(pixels: np.ndarray) -> dict[str, float]:
    """The numbers of :data:`MEANINGS` for pixels [H, W, 3] uint8. Those that divide by an energy of zero are 0."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or min(pixels.shape[:2]) < SMALLEST:
        raise ValueError(
            f"pixels must be [H, W, 3] uint8 of at least {SMALLEST} a side, got {pixels.shape} {pixels.dtype}"
        )
    values = pixels.astype(np.float64) / 255
    # not a matrix product, whose rounding depends on the place: flat must stay flat
    y = 0.299 * values[..., 0] + 0.587 * values[..., 1] + 0.114 * values[..., 2]
    highest, lowest = values.max(2), values.min(2)
    return {
        "saturation": float(np.divide(highest - lowest, highest, out=np.zeros_like(highest), where=highest > 0).mean()),
        "contrast": float(y.std()),
        "sharpness": float(laplacian(y).var()),
        "clipped": float(((pixels == 0) | (pixels == 255)).mean()),
        "high_frequency": high_frequency(y),
        "jpeg_bytes": jpeg_bytes(pixels) / y.size,
        "border": border(y),
    }


def laplacian(y: np.ndarray) -> np.ndarray:
    """[H, W] -> [H - 2, W - 2]."""
    around: np.ndarray = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:]
    found: np.ndarray = around - 4 * y[1:-1, 1:-1]
    return found


def high_frequency(y: np.ndarray) -> float:
    """Share of |FFT(y - mean)|^2 where sqrt(fx^2 + fy^2) > 1/4 cycle a pixel, half of what the grid can hold."""
    if np.ptp(y) == 0:
        return 0.0
    energy = np.abs(np.fft.fft2(y - y.mean())) ** 2
    radius = np.hypot(np.fft.fftfreq(y.shape[0])[:, None], np.fft.fftfreq(y.shape[1])[None, :])
    return float(energy[radius > 0.25].sum() / energy.sum())


def jpeg_bytes(pixels: np.ndarray) -> int:
    """Exact for a given libjpeg build."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=QUALITY, subsampling="4:2:0")
    return buffer.tell()


def border(y: np.ndarray) -> float:
    """A frame, a vignette or noise along the edges raises it; an image alike everywhere has about the ring's area."""
    dy, dx = np.diff(y, axis=0), np.diff(y, axis=1)
    energy = np.zeros_like(y)
    # each difference belongs half to either pixel
    for part in (energy[1:], energy[:-1]):
        part += dy**2 / 2
    for part in (energy[:, 1:], energy[:, :-1]):
        part += dx**2 / 2
    total = energy.sum()
    ring = max(1, min(y.shape) // 16)
    return float(1 - energy[ring:-ring, ring:-ring].sum() / total) if total > 0 else 0.0
