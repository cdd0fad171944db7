"""PickScore (arXiv 2305.01569): a CLIP trained on which of two pictures people picked for a prompt."""

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

OFFICIAL = "yuvalkirstain/PickScore_v1"
LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # whose processor PickScore's own code loads


class Pickscore(ClipReward):
    """score = exp(logit_scale) cos(image, prompt), about 18 to 25 for the official weights; compare within one prompt.

    The softmax of the scores of several pictures for one prompt is the probability that each is picked. Extra `raw` is
    the score before `scale`. `model: tiny-clip` is the embedded head for the shapes world and runs on a CPU.
    """

    model: str = OFFICIAL
    """The CLIP: an embedded name (tiny-clip), a folder or a hub id. The official one takes 3.9 GB."""
    crop: Crop = "hf"
    """Which pixel the middle begins at where two are as good: as transformers or as torchvision decides."""
    scale: Literal["raw", "flow_grpo"] = "raw"
    """flow_grpo divides by 26, as Flow-GRPO and others do: a convention, not a bound."""

    def checkpoints(self) -> list[Checkpoint]:
        return self.parts(tokenizer=LAION if self.model == OFFICIAL else None)

    def setup(self, device: torch.device | str) -> Head:
        from diffalign.rewards import _clip

        view = partial(cropped, crop=self.crop)
        model, processor = self.checkpoints()
        clip = _clip.load(model, processor, view, self.dtype, device, self.local_files_only)

        def head(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
            raw = clip.scale * clip.cosine(images, prompts)
            return RewardOutput(raw / 26 if self.scale == "flow_grpo" else raw, {"raw": raw.detach()})

        return head
