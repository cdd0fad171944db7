"""A discriminator on frozen DINO tokens that learns to tell images from references: Adv-GRPO (arXiv 2511.20256)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, Field, Strict, model_validator

from diffalign.rewards import Head, Reward
from diffalign.rewards._dino import OFFICIAL
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._loading import Dtype
from diffalign.shaping import STRICT

if TYPE_CHECKING:
    import torch

CLS_WEIGHT = 0.7
Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class MultiLayer(BaseModel):
    """Score by the best patches of several blocks, sigmoid(mean over blocks of the mean of the top logits / T)."""

    model_config = STRICT

    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Strict(False), Field(min_length=1)]
    """Blocks, counted from 0, whose outputs are judged, each by a head of its own; the reference takes [11]."""
    top: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the patches that count."""
    temperature: Positive = 1.0
    """T; the reference varies it from 0.2 to 2."""


class DinoAdversarial(Reward):
    """score = cls_weight D(CLS) + (1 - cls_weight) mean D(patch), a logit without bounds, D = Linear, GELU, Linear.

    D learns by the hinge loss H = (mean relu(1 - D(reference)) + mean relu(1 + D(image))) / 2 with H(CLS) +
    patch_weight H(patches), one reference for each image. Nothing in D sees the prompt: pairing, or a second reward
    about the prompt, must keep it. Logged are D's accuracy on both sides, its logits, and the std of the scores.
    Accuracies between 0.6 and 0.9 are healthy; near 1 with little spread within a prompt the signal is dead.

    Unlike in the reference, D is trained on the tokens it scores by (see feature_norm), and all patches count.
    """

    references: str
    """A JSON file {prompt: [file, ...]}, a folder for any prompt, or shapes-outline, -deep or -dusk (drawn)."""
    model: str = OFFICIAL
    """DINOv2, with registers or without, or DINOv3: an embedded name (tiny-dino), a folder or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    local_files_only: bool = False
    """Never reach for the network; use what is in the cache."""
    dtype: Dtype = "fp32"
    """Precision of the backbone; D is fp32."""
    size: Annotated[int, Field(ge=1)] | None = None
    """Side of the square the backbone sees, a multiple of its patches; by default the model's own (DINOv2: 518)."""
    hidden: int = Field(512, gt=0)
    """Width of D's hidden layer."""
    cls_weight: Annotated[float, Field(ge=0, le=1)] = CLS_WEIGHT
    """Weight of CLS in the score; the patches have the rest."""
    patch_weight: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the patches in D's loss."""
    patches: Literal["all"] | Annotated[int, Field(gt=0)] = "all"
    """all, or how many are drawn with replacement (at most as many as there are), anew for each step of D and alike for
    all scores of an epoch; the reference draws 64 for each image."""
    feature_norm: Literal["scaled", "raw", "published"] = "scaled"
    """scaled: tokens of norm sqrt(d); raw: as they are; published: D is trained on raw tokens and scores by those of
    norm 1, as in the reference, where its logits hardly differ."""
    multi_layer: MultiLayer | None = None
    """Score by patches of several blocks instead; D's loss is then the mean over the blocks."""
    lr: Positive = 1e-4
    """Learning rate of Adam."""
    betas: Annotated[tuple[Decay, Decay], Strict(False)] = (0.5, 0.999)
    """Decay of Adam's moments."""
    reuse_rollouts: bool = True
    """Every epoch's images train D and then the generator. Without it D and the generator take turns, as published, and
    the images that D is trained on are discarded."""
    generator_every: Annotated[int, Field(ge=2)] | None = None
    """Without reuse_rollouts, every so many epochs train the generator, all others D; by default 10, as published."""
    d_steps: Annotated[int, Field(gt=0)] | None = None
    """Steps of D in an epoch that trains it; by default 9 with reuse_rollouts and 1 without: nine for one epoch of the
    generator, as published."""
    seed: int = Field(0, ge=0)
    """Of D's first weights."""

    abstains: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    needs_prompt: ClassVar[bool] = False
    learns: ClassVar[bool] = True

    @model_validator(mode="after")
    def _fits_together(self) -> DinoAdversarial:
        if self.reuse_rollouts and self.generator_every is not None:
            raise ValueError("generator_every has no effect with reuse_rollouts; set reuse_rollouts: false")
        if self.multi_layer is not None and self.cls_weight != CLS_WEIGHT:
            raise ValueError("cls_weight has no effect with multi_layer, which scores by patches alone; remove one")
        return self

    @property
    def layers(self) -> Sequence[int]:
        return () if self.multi_layer is None else self.multi_layer.layers

    @property
    def schedule(self) -> tuple[int, int]:
        """(every so many epochs train the generator, steps of D in an epoch that trains D)."""
        every = 1 if self.reuse_rollouts else self.generator_every or 10
        return every, self.d_steps or (9 if self.reuse_rollouts else 1)

    def checkpoints(self) -> list[Checkpoint]:
        return [Checkpoint(self.model, self.revision)]

    def setup(self, device: torch.device | str) -> Head:
        from diffalign.rewards import _dino, _dino_critic, _references

        (checkpoint,) = self.checkpoints()
        backbone = _dino.load(checkpoint, self.size, self.dtype, device, self.local_files_only, self.layers)
        return _dino_critic.Critic(self, backbone, _references.load(self.references), device)
