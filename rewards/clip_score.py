"""CLIPScore (arXiv 2104.08718): how well a picture fits its prompt, in each of the definitions that go by this name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from diffalign.rewards import Head
from diffalign.rewards._clip_reward import ClipReward
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._preprocess import Crop, cropped
from diffalign.types import RewardOutput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Variant = Literal["cos", "logits", "paper", "torchmetrics"]


class ClipScore(ClipReward):
    """Four scores that share a name and cannot be compared with each other, of c = cos(image, prompt):

        cos            c                            Flow-Factory
        logits         exp(logit_scale) c / 100     DiffusionNFT, logits_per_image / 100
        paper          2.5 max(c, 0)                arXiv 2104.08718
        torchmetrics   100 max(c, 0)                torchmetrics

    Typical c: 0.15 to 0.35. Extra `cos` is c. `model: tiny-clip` runs on a CPU.
    """

    variant: Variant = "cos"
    """Which definition."""
    model: str = "openai/clip-vit-large-patch14"
    """The CLIP: an embedded name (tiny-clip), a folder or a hub id. This one takes 1.7 GB; the paper's is ViT-B/32."""
    crop: Crop = "hf"
    """Which pixel the middle begins at where two are as good: as transformers or as torchvision decides."""
    pixels: Literal["bicubic", "bilinear"] = "bicubic"
    """bicubic on 8 bits, as CLIP was trained, or bilinear without rounding, as DiffusionNFT's scorer."""

    def checkpoints(self) -> list[Checkpoint]:
        return self.parts()

    def setup(self, device: torch.device | str) -> Head:
        from diffalign.rewards import _clip

        view = partial(cropped, crop=self.crop, method=self.pixels, quantize=self.pixels == "bicubic")
        model, processor = self.checkpoints()
        clip = _clip.load(model, processor, view, self.dtype, device, self.local_files_only)

        def head(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
            cos = clip.cosine(images, prompts)
            return RewardOutput(defined(cos, self.variant, clip.scale), {"cos": cos.detach()})

        return head


def defined(cos: Tensor, variant: Variant, scale: float) -> Tensor:
    """The score of that definition; scale = exp(logit_scale)."""
    if variant == "logits":
        return scale * cos / 100
    if variant == "paper":
        return 2.5 * cos.clamp(min=0)
    return 100 * cos.clamp(min=0) if variant == "torchmetrics" else cos
