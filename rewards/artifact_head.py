"""Freedom from visible faults, as a small head on frozen features tells it; `diffalign train-artifact` makes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffalign.rewards import Head, Reward
from diffalign.rewards._artifact import NOTE, WEIGHTS, check, load, logits
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._loading import Dtype
from diffalign.types import RewardOutput

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ArtifactHead(Reward):
    """r = 1 - p(artifact), with p = sigmoid(logit / T) and T fitted on validation pictures. The prompt is not used.

    Extra `map` [B, h, w] is p(artifact) of each patch, for overlays. The published reward (arXiv 2601.03468) asks a
    frozen vision-language model instead, see `artifact_vlm`; a head on features costs a thousandth of that, and its
    gradient may be followed, but it knows only the kinds of faults it was shown.
    """

    model: str = "tiny-artifact"
    """The head: an embedded name, a folder that train-artifact wrote, or a hub id of such a folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    local_files_only: bool = False
    """Never reach for the network; use what is in the cache."""
    dtype: Dtype = "fp32"
    """Precision of the backbone; the head itself is fp32."""
    scale: Literal["probability", "logit"] = "probability"
    """probability: 1 - p(artifact) in [0, 1]; logit: its log-odds, whose gradient does not vanish at clear cases."""

    abstains: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    needs_prompt: ClassVar[bool] = False

    def checkpoints(self) -> list[Checkpoint]:
        """The head; the backbone that it reads is named in it."""
        return [Checkpoint(self.model, self.revision, (WEIGHTS, NOTE))]

    def setup(self, device: torch.device | str) -> Head:
        (checkpoint,) = self.checkpoints()
        trained = load(checkpoint.folder(self.local_files_only), self.model)
        backbone = trained.features.load(self.dtype, device, self.local_files_only)
        check(trained, backbone, self.model)
        weights = {k: t.to(device) for k, t in trained.weights.items()}

        def head(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
            tokens = backbone.tokens(images)[:, 0]
            whole, _, patches = logits(weights, tokens)
            clean = -whole / weights["temperature"]
            faults = (patches.detach() / weights["temperature"]).sigmoid()
            square = faults.unflatten(1, (int(faults.shape[1] ** 0.5), -1))
            return RewardOutput(clean if self.scale == "logit" else clean.sigmoid(), {"map": square})

        return head
