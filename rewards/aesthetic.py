"""LAION's aesthetic predictor v2: how much people like the look of a picture, whatever its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffalign.rewards import Head, Reward
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._loading import Dtype
from diffalign.rewards._preprocess import Crop, cropped
from diffalign.types import RewardOutput, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OFFICIAL = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")  # sac+logos+ava1-l14-linearMSE
EMBEDDED = {"tiny-clip": ("tiny-aesthetic", "model.safetensors")}


class Aesthetic(Reward):
    """score = w.e + b of e = image features of CLIP ViT-L/14 over their norm; about 4 to 7.5, fitted to ratings 1-10.

    The published head is five linear layers with nothing between them; they are multiplied out at loading.
    `model: tiny-clip` brings an embedded head in which whole shapes score 1 and broken ones 0; it runs on a CPU.
    """

    model: str = "openai/clip-vit-large-patch14"
    """The CLIP: an embedded name (tiny-clip), a folder or a hub id. This one takes 1.7 GB."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    head: str | None = None
    """The affine head, 3.7 MB: a file, or a folder or hub id with `head_file`; by default the one for the model."""
    head_file: str | None = None
    """Name of the head's file in its folder."""
    head_revision: str | None = None
    """Branch, tag or commit of a hub id of the head."""
    local_files_only: bool = False
    """Never reach for the network; use what is in the cache."""
    dtype: Dtype = "fp32"
    """Precision of the encoder; the norm and the head are fp32."""
    crop: Crop = "hf"
    """Which pixel the middle begins at where two are as good: as transformers or as torchvision decides."""

    abstains: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    needs_prompt: ClassVar[bool] = False

    def checkpoints(self) -> list[Checkpoint]:
        """The CLIP, then the head."""
        head, file = EMBEDDED.get(self.model, OFFICIAL)
        return [
            Checkpoint(self.model, self.revision),
            Checkpoint(self.head or head, self.head_revision, (self.head_file or file,)),
        ]

    def setup(self, device: torch.device | str) -> Head:
        from diffalign.rewards import _affine, _clip, _loading

        clip, head = self.checkpoints()
        encoder = _clip.load(clip, clip, partial(cropped, crop=self.crop), self.dtype, device, self.local_files_only)
        path = head.file(self.local_files_only)
        w, b = (t.to(device) for t in _affine.collapsed(_loading.weights(path), Path(head.model).name))
        if len(w) != encoder.model.config.projection_dim:
            raise UserError(
                f"the aesthetic head '{head.model}' reads {len(w)} features and '{self.model}' has "
                f"{encoder.model.config.projection_dim}; set head to one fitted to this model"
            )

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
            return RewardOutput(encoder.images(images) @ w + b)

        return score
