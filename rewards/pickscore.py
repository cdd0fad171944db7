"""PickScore (arXiv 2305.01569): a CLIP trained on which of two pictures people picked for a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffalign.rewards import Head, Reward
from diffalign.rewards._hub import TEXT, Checkpoint
from diffalign.rewards._loading import Dtype
from diffalign.rewards._preprocess import Crop, cropped
from diffalign.types import RewardOutput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OFFICIAL = "yuvalkirstain/PickScore_v1"
LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # whose processor PickScore's own code loads


class Pickscore(Reward):
    """score = exp(logit_scale) cos(image, prompt), about 18 to 25 for the official weights; compare within one prompt.

    The softmax of the scores of several pictures for one prompt is the probability that each is picked. Extra `raw` is
    the score before `scale`. `model: tiny-clip` is the embedded head for the shapes world and runs on a CPU.
    """

    model: str = OFFICIAL
    """The CLIP: an embedded name (tiny-clip), a folder or a hub id. The official one takes 3.9 GB."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    processor: str | None = None
    """Where the tokenizer comes from; by default the model, for the official one LAION's ViT-H as in its own code."""
    processor_revision: str | None = None
    """Likewise of the processor, where it is another hub id."""
    local_files_only: bool = False
    """Never reach for the network; use what is in the cache."""
    dtype: Dtype = "fp32"
    """Precision of the encoder; norms and dot products are fp32."""
    crop: Crop = "hf"
    """Which pixel the middle begins at where two are as good: as transformers or as torchvision decides."""
    scale: Literal["raw", "flow_grpo"] = "raw"
    """flow_grpo divides by 26, as Flow-GRPO and others do: a convention, not a bound."""

    abstains: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    def checkpoints(self) -> list[Checkpoint]:
        """The model, then where its tokenizer comes from."""
        own = Checkpoint(self.model, self.revision)
        words = self.processor or (LAION if self.model == OFFICIAL else None)
        return [own, Checkpoint(words, self.processor_revision, TEXT) if words else own]

    def setup(self, device: torch.device | str) -> Head:
        from diffalign.rewards import _clip

        view = partial(cropped, crop=self.crop)
        model, processor = self.checkpoints()
        clip = _clip.load(model, processor, view, self.dtype, device, self.local_files_only)

        def head(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
            raw = clip.scale * clip.cosine(images, prompts)
            return RewardOutput(raw / 26 if self.scale == "flow_grpo" else raw, {"raw": raw.detach()})

        return head
