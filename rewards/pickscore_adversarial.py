"""PickScore whose last vision block learns to prefer references: the other adversary of Adv-GRPO (arXiv 2511.20256)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, Strict

from diffalign.rewards import Head
from diffalign.rewards._clip_reward import ClipReward
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._preprocess import Crop, cropped
from diffalign.rewards.pickscore import LAION, OFFICIAL

if TYPE_CHECKING:
    import torch

Decay = Annotated[float, Field(ge=0, lt=1)]


class PickscoreAdversarial(ClipReward):
    """score = exp(logit_scale) cos(image, prompt) / 26 with a CLIP whose last vision block is trained during the run.

    It learns by mean softplus(s_image - s_reference), s = exp(logit_scale) cos: that the reference is picked, one for
    each image and of its prompt. It learns only while it scores the references below the images on average. Logged are
    the loss, how often the reference is preferred, both mean scores and the std of the images' scores.
    """

    references: str
    """A JSON file {prompt: [file, ...]}, a folder of pictures that suit any prompt, or a style of the shapes world:
    shapes-outline, shapes-deep, shapes-dusk."""
    model: str = OFFICIAL
    """The CLIP to begin with: an embedded name (tiny-clip), a folder or a hub id."""
    crop: Crop = "hf"
    """Which pixel the middle begins at where two are as good: as transformers or as torchvision decides."""
    lr: Annotated[float, Field(gt=0)] = 5e-6
    """Learning rate of Adam."""
    betas: Annotated[tuple[Decay, Decay], Strict(False)] = (0.5, 0.999)
    """Decay of Adam's moments."""
    reuse_rollouts: bool = True
    """Every epoch's images train the generator, also those that the CLIP learned from. Without it the images of an
    epoch in which it learned are discarded, as published."""
    d_steps: int = Field(1, gt=0)
    """At most so many steps of the CLIP in an epoch, each only if references still score below images."""

    learns: ClassVar[bool] = True

    def checkpoints(self) -> list[Checkpoint]:
        return self.parts(tokenizer=LAION if self.model == OFFICIAL else None)

    def setup(self, device: torch.device | str) -> Head:
        from diffalign.rewards import _clip, _clip_critic, _references

        view = partial(cropped, crop=self.crop)
        model, processor = self.checkpoints()
        clip = _clip.load(model, processor, view, self.dtype, device, self.local_files_only)
        return _clip_critic.Critic(self, clip, _references.load(self.references), device)
