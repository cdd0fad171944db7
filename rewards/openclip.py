"""CLIPScore of any checkpoint that the open_clip library can load; needs the extra `openclip`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from diffalign.rewards import Head, Reward
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._loading import Dtype
from diffalign.rewards._open_clip_library import FOLDER, HUB, load, sources
from diffalign.rewards.clip_score import Variant, defined
from diffalign.types import RewardOutput

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Openclip(Reward):
    """The scores of clip_score for a checkpoint of open_clip's; pictures are prepared as it states, but in torch.

    A model of open_clip's list needs its weights named: `{model: ViT-H-14, pretrained: laion2b_s32b_b79k}`. A file does
    not say whether it was trained with QuickGELU, as OpenAI's were; choose the -quickgelu model for such. SigLIP's bias
    is left out of `logits`. Extra `cos` is cos(image, prompt).
    """

    model: str
    """A model of open_clip's list (ViT-H-14), `hf-hub:owner/name`, or `local-dir:FOLDER` with open_clip_config.json."""
    pretrained: str | None = None
    """Weights for a model of the list: one of its tags (laion2b_s32b_b79k) or a file."""
    revision: str | None = None
    """Branch, tag or commit of an `hf-hub:` model."""
    variant: Variant = "cos"
    """Which definition of the score, as in clip_score."""
    local_files_only: bool = False
    """Take weights from the cache alone; HF_HUB_OFFLINE=1 binds the tokenizers that some models load besides, too."""
    dtype: Dtype = "fp32"
    """Precision of the encoders; norms and dot products are fp32."""

    abstains: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    @model_validator(mode="after")
    def _one_source(self) -> Openclip:
        if self.model.startswith((HUB, FOLDER)) == (self.pretrained is not None):
            raise ValueError(
                "a model of open_clip's list needs 'pretrained', a tag or a file, and any other brings its own weights"
            )
        if self.revision is not None and not self.model.startswith(HUB):
            raise ValueError(f"'revision' is for {HUB}owner/name only; leave it out")
        return self

    def checkpoints(self) -> list[Checkpoint]:
        """The weights: where they are cached, else where they are sought first."""
        places = sources(self.model, self.pretrained, self.revision)
        return [next((place for place in places if place.cached()), places[0])]

    def setup(self, device: torch.device | str) -> Head:
        clip = load(self.model, self.pretrained, self.revision, self.dtype, device, self.local_files_only)

        def head(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
            cos = (clip.images(images) * clip.texts(prompts)).sum(-1)
            return RewardOutput(defined(cos, self.variant, clip.scale), {"cos": cos.detach()})

        return head
