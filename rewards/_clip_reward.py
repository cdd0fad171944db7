"""What the heads on a CLIP have in common: where its weights and its tokenizer come from."""

from __future__ import annotations

from typing import ClassVar

from diffalign.rewards import Reward
from diffalign.rewards._hub import TEXT, Checkpoint
from diffalign.rewards._loading import Dtype


class ClipReward(Reward):
    """A head on one CLIP, whose `model` and its default each head states for itself."""

    model: str
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    processor: str | None = None
    """Where the tokenizer comes from; by default the model, or LAION's ViT-H for official weights without one."""
    processor_revision: str | None = None
    """Likewise of the processor, where it is another hub id."""
    local_files_only: bool = False
    """Never reach for the network; use what is in the cache."""
    dtype: Dtype = "fp32"
    """Precision of the encoder; norms and dot products are fp32."""

    abstains: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    def parts(self, only: tuple[str, ...] = (), tokenizer: str | None = None) -> list[Checkpoint]:
        """The model, then where its tokenizer comes from: `processor`, else `tokenizer`, else the model."""
        own = Checkpoint(self.model, self.revision, only)
        words = self.processor or tokenizer
        return [own, Checkpoint(words, self.processor_revision, TEXT) if words else own]
