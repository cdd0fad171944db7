"""HPSv2 and HPSv2.1 (arXiv 2306.09341): CLIP ViT-H trained on which pictures people prefer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffalign.rewards import Head
from diffalign.rewards._clip_reward import ClipReward
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._preprocess import padded
from diffalign.types import RewardOutput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OFFICIAL = "xswu/HPSv2"
LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
HEADS = (16, 16)  # attention heads of ViT-H's two towers


class Hpsv2(ClipReward):
    """score = cos(image, prompt), about 0.20 to 0.35; compare within one prompt and one version only.

    Pictures are fitted whole into CLIP's square with black borders, as by the official code, and not cropped. Numbers
    of other repositories differ by up to 0.005, for they resize otherwise. The official files are in open_clip's format
    and are read without it. A folder in transformers' format is taken too: `model: tiny-clip` runs on a CPU.
    """

    version: Literal["v2", "v2.1"] = "v2.1"
    """Which of the official weights; their scores are not comparable."""
    model: str = OFFICIAL
    """The official weights (2 GB), a folder or file with them, or a CLIP in transformers' format."""
    antialias: bool = True
    """False shrinks as torchvision before 0.17 did, the version behind older published numbers."""

    @property
    def original(self) -> bool:
        """The weights are in open_clip's format."""
        path = Path(self.model).expanduser()
        return self.model == OFFICIAL or path.is_file() or (path / FILES[self.version]).is_file()

    def checkpoints(self) -> list[Checkpoint]:
        if not self.original:
            return self.parts()
        return self.parts((FILES[self.version],), LAION)

    def setup(self, device: torch.device | str) -> Head:
        from diffalign.rewards import _clip

        weights, processor = self.checkpoints()
        words, view = processor.folder(self.local_files_only), partial(padded, antialias=self.antialias)
        if self.original:
            model = from_file(weights.file(self.local_files_only), HEADS)
        else:
            model = _clip.from_folder(weights.folder(self.local_files_only), self.model)
        clip = _clip.ready(model, words, view, self.dtype, device)

        def head(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
            return RewardOutput(clip.cosine(images, prompts))

        return head


def from_file(path: Path, heads: tuple[int, int]) -> Any:
    """CLIPModel, fp32 and frozen, from a checkpoint in open_clip's format, bare or under the key `state_dict`."""
    from transformers import CLIPModel

    from diffalign.rewards import _loading, _open_clip

    held: Mapping[str, Any] = _loading.weights(path)
    state = held.get("state_dict", held)
    return _loading.pretrained(
        CLIPModel, path.name, config=_open_clip.config(state, heads), state=_open_clip.renamed(state)
    )
