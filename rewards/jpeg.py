"""Size of the picture as a JPEG file (DDPO, arXiv 2305.13301): real, model-free and monotone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from diffalign.rewards import Reward
from diffalign.types import RewardOutput

if TYPE_CHECKING:
    from torch import Tensor


class Jpeg(Reward):
    """incompress: +bytes / 1000; compress: -bytes / 1000, and a further / 500 with `scale: flow_grpo`.

    Exact for a given libjpeg build. Pixels are rounded to 8 bits; no gradient.
    """

    mode: Literal["compress", "incompress"] = "compress"
    """Whether small files or large ones score high."""
    quality: int = Field(95, ge=1, le=100)
    """JPEG quality, chroma subsampled 4:2:0."""
    scale: Literal["raw", "flow_grpo"] = "raw"
    """raw: kilobytes, as DDPO; flow_grpo: compress is divided by 500, incompress is not."""

    abstains: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = False

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        import torch

        kilobytes = torch.tensor([jpeg_bytes(image, self.quality) / 1000 for image in images], dtype=torch.float64)
        if self.mode == "compress":
            kilobytes = -kilobytes / (500 if self.scale == "flow_grpo" else 1)
        return RewardOutput(kilobytes.float())


def jpeg_bytes(image: Tensor, quality: int) -> int:
    """Length in bytes of image [3, H, W] in [0, 1] as a JPEG file."""
    import torch
    from PIL import Image

    pixels = (image.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8).permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, format="JPEG", quality=quality)
    return buffer.tell()
