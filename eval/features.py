"""Embeddings of images for diversity and distances between sets, by the backbones that reward heads use."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from diffalign.methods import Method, configured
from diffalign.reward_entries import yaml_value
from diffalign.rewards._dino import OFFICIAL as DINO
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._loading import Dtype
from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

USUAL = 224  # pixels
CLIP = "openai/clip-vit-large-patch14"
Embed = Callable[["Tensor"], "Tensor"]  # [B, 3, H, W] in [0, 1] -> [B, D] fp32, not normalised, without gradients


class Embedder(Method):
    """How images become vectors; see its two kinds. What it is called in text: `dino:model=tiny-dino,size=64`."""

    model: str
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    local_files_only: bool = False
    """Never reach for the network; use what is in the cache."""
    dtype: Dtype = "fp32"
    """Precision of the encoder; the vectors are fp32."""

    @staticmethod
    def parse(text: str) -> Embedder:
        """`NAME[:OPTION=VALUE[,OPTION=VALUE...]]`, NAME dino or clip, loading nothing. Raises UserError."""
        name, _, rest = text.partition(":")
        kinds: dict[str, type[Embedder]] = {"dino": DinoEmbedder, "clip": ClipEmbedder}
        kind = kinds.get(name.strip())
        if kind is None:
            raise UserError(f"unknown features '{name.strip()}'; use dino or clip, such as dino:model=tiny-dino")
        options: dict[str, Any] = {"name": name.strip()}
        for part in filter(None, (piece.strip() for piece in rest.split(","))):
            option = re.fullmatch(r"(\w+)\s*=\s*(.+)", part)
            if option is None:
                raise UserError(f"features '{text}': '{part}' is no option; write OPTION=VALUE after the colon")
            options[option[1]] = yaml_value(option[2])
        return configured(kind, options, "features")

    @classmethod
    def of(cls, text: str, device: torch.device | str = "cpu") -> Embed:
        """Load the encoder that `text` names; see :meth:`parse` and :data:`Embed`."""
        return cls.parse(text).setup(device)

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.model, self.revision)

    @abstractmethod
    def setup(self, device: torch.device | str) -> Embed:
        """Load the encoder."""


class DinoEmbedder(Embedder):
    """The CLS token after the last norm, of DINOv2 (arXiv 2304.07193) or DINOv3; the image is squeezed to a square."""

    model: str = DINO
    """An embedded name (tiny-dino), a folder or a hub id. This one takes 0.35 GB."""
    size: Annotated[int, Field(ge=1)] | None = None
    """Side of that square, a multiple of the model's patches; by default its own, but no more than the 224 pixels that
    distances between sets are published at (arXiv 2306.04675): DINOv2's 518 take seven times as long."""

    def setup(self, device: torch.device | str) -> Embed:
        from diffalign.rewards import _dino

        backbone = _dino.load(self.checkpoint(), self.size, self.dtype, device, self.local_files_only)
        if self.size is None:
            backbone = replace(backbone, side=min(backbone.side, USUAL - USUAL % backbone.model.config.patch_size))
        return partial(_plain, lambda images: backbone.tokens(images)[:, 0, 0])


class ClipEmbedder(Embedder):
    """The projected image features of CLIP (arXiv 2103.00020); the image is cropped to its middle square."""

    model: str = CLIP
    """An embedded name (tiny-clip), a folder or a hub id. This one takes 1.7 GB."""

    def setup(self, device: torch.device | str) -> Embed:
        from diffalign.rewards import _clip, _loading
        from diffalign.rewards._preprocess import CLIP_MEAN, CLIP_STD, cropped, normalise

        source = self.checkpoint().folder(self.local_files_only)
        model = _clip.from_folder(source, self.model).to(device, _loading.torch_dtype(self.dtype))
        mean, std = _loading.pixel_scale(source, CLIP_MEAN, CLIP_STD)
        side = model.config.vision_config.image_size

        def features(images: Tensor) -> Tensor:
            pixels = normalise(cropped(images.to(model.device), side), mean, std).to(model.dtype)
            found: Tensor = model.get_image_features(pixel_values=pixels).pooler_output
            return found.float()

        return partial(_plain, features)


def _plain(features: Embed, images: Tensor) -> Tensor:
    """Without gradients."""
    import torch

    with torch.no_grad():
        return features(images)
