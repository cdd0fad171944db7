"""Likeness to reference pictures: the cosine of DINOv2's CLS features (arXiv 2304.07193)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from diffalign.rewards import Head, Reward
from diffalign.rewards._dino import OFFICIAL
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._loading import Dtype
from diffalign.types import RewardOutput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffalign.rewards._dino import Backbone
    from diffalign.rewards._references import Picture

BATCH = 16  # references encoded at once


class Dino(Reward):
    """score = max over the references of the image's prompt of cos(CLS(image), CLS(reference)), in [-1, 1].

    Adv-GRPO (arXiv 2511.20256) reports it, with the maximum over all references of a batch; here a picture is compared
    with those of its own prompt only. Where references are an unpaired folder, with all of them.
    """

    references: str
    """A JSON file {prompt: [file, ...]}, a folder of pictures, or a style of the shapes world: shapes-outline,
    shapes-deep, shapes-dusk."""
    model: str = OFFICIAL
    """DINOv2, with registers or without, or DINOv3: an embedded name (tiny-dino), a folder or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    local_files_only: bool = False
    """Never reach for the network; use what is in the cache."""
    dtype: Dtype = "fp32"
    """Precision of the backbone; norms and dot products are fp32."""
    size: Annotated[int, Field(ge=1)] | None = None
    """Side of the square the backbone sees, a multiple of its patches; by default the model's own (DINOv2: 518)."""

    differentiable: ClassVar[bool] = True

    def checkpoints(self) -> list[Checkpoint]:
        return [Checkpoint(self.model, self.revision)]

    def setup(self, device: torch.device | str) -> Head:
        import torch
        import torch.nn.functional as F

        from diffalign.rewards import _dino, _references

        (checkpoint,) = self.checkpoints()
        backbone = _dino.load(checkpoint, self.size, self.dtype, device, self.local_files_only)
        references = _references.load(self.references)
        known: dict[str, Tensor] = {}

        def head(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
            own = [references.of(prompt, entry) for prompt, entry in zip(prompts, metadata, strict=True)]
            learn({p.key: p for pictures in own for p in pictures if p.key not in known}, backbone, known)
            seen = F.normalize(backbone.tokens(images)[:, 0, 0], dim=-1)
            stacks = {id(pictures): torch.stack([known[p.key] for p in pictures]) for pictures in own}
            cosines = [stacks[id(pictures)] @ one for pictures, one in zip(own, seen, strict=True)]
            return RewardOutput(torch.stack([c.max() for c in cosines]))

        return head


def learn(new: Mapping[str, Picture], backbone: Backbone, known: dict[str, Tensor]) -> None:
    """Encode references that were not met before: unit vectors [D] fp32, by key."""
    import torch
    import torch.nn.functional as F

    keys = list(new)
    with torch.no_grad():
        for i in range(0, len(keys), BATCH):
            part = keys[i : i + BATCH]
            vectors = F.normalize(backbone.tokens([new[key].read() for key in part])[:, 0, 0], dim=-1)
            known.update(zip(part, vectors, strict=True))
