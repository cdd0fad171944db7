"""The discriminator of `dino_adversarial` at work: it scores images, and learns from those of an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.rewards import Lesson
from diffalign.rewards._dino import Backbone
from diffalign.rewards._discriminator import (
    Trained,
    draw,
    heads,
    layered_reward,
    raw,
    scaled,
    slices,
    spread,
    token_loss,
    token_reward,
    unit,
)
from diffalign.rewards._references import References
from diffalign.types import RewardOutput

if TYPE_CHECKING:
    from diffalign.rewards.dino_adversarial import DinoAdversarial

TRANSFORMS = {  # feature_norm -> (what D is trained on, what it scores by)
    "scaled": (scaled, scaled),
    "raw": (raw, raw),
    "published": (raw, unit),
}
LOGGED = ("accuracy", "accuracy_real", "accuracy_fake", "logit_real", "logit_fake", "score", "score_square")
REAL, FAKE, SCORE = 1, 2, 3  # what random patches are drawn for


@dataclass(frozen=True)
class Pair:
    """Tokens [b, L, 1 + N, d] of references and of images, on the CPU, and the images' seeds."""

    real: Tensor
    fake: Tensor
    seeds: Tensor


class Critic:
    """A :class:`diffalign.rewards.Learner`."""

    def __init__(
        self, options: DinoAdversarial, backbone: Backbone, references: References, device: torch.device | str
    ) -> None:
        self.options, self.backbone, self.references, self.device = options, backbone, references, device
        self.heads = heads(backbone.width, options.hidden, max(len(options.layers), 1), options.seed).to(device)
        parameters = dict(self.heads.named_parameters())
        self.trained = Trained(parameters, options.lr, options.betas, references.digest)
        self.learn_on, self.score_by = TRANSFORMS[options.feature_norm]
        self.epoch = 0  # of the last lesson: drawn patches are those of this epoch

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        logits = self.logits(self.score_by(self.backbone.tokens(images, self.options.layers)))
        shown = logits.detach().mean(1)
        return RewardOutput(self.score(logits), {"cls": shown[:, 0], "patches": shown[:, 1:]})

    def logits(self, tokens: Tensor) -> Tensor:
        """[b, L, 1 + N, d] -> [b, L, 1 + N], each layer by its own head."""
        return torch.stack([head(tokens[:, i]) for i, head in enumerate(self.heads)], 1)

    def score(self, logits: Tensor) -> Tensor:
        """[b, L, 1 + N] -> [b]."""
        o = self.options
        if o.multi_layer is not None:
            return layered_reward(logits, o.multi_layer.top, o.multi_layer.temperature)
        rows = self.drawn(torch.tensor([self.epoch]), logits, SCORE)
        return token_reward(logits[:, 0], o.cls_weight, None if rows is None else rows.expand(len(logits), -1))

    def drawn(self, seeds: Tensor, logits: Tensor, *purpose: int) -> Tensor | None:
        if self.options.patches == "all":
            return None
        patches = logits.shape[-1] - 1
        return draw(seeds, patches, min(self.options.patches, patches), *purpose).to(logits.device)

    def learn(self, lesson: Lesson) -> tuple[bool, dict[str, float]]:
        o = self.options
        self.epoch = lesson.epoch
        every, d_steps = o.schedule
        generators_turn = (lesson.epoch + 1) % every == 0
        own_turn = o.reuse_rollouts or not generators_turn
        count = d_steps if own_turn else 1  # without a turn it only measures
        pairs = [self.pair(lesson, rows) for rows in slices(len(lesson.images), lesson.batch)]
        means: dict[str, float] = {}
        for k in range(count):
            batches = [partial(self.compare, pair, k) for pair in pairs]
            _, means = self.trained.step(lesson, batches, LOGGED, lambda measured: own_turn)
        return generators_turn, spread(means, "score")

    @torch.no_grad()
    def pair(self, lesson: Lesson, rows: slice) -> Pair:
        seeds = lesson.seeds[rows]
        references = self.references.pick(lesson.prompts[rows], lesson.metadata[rows], seeds)
        images = lesson.images[rows].to(self.device)
        # The backbone is frozen, so its tokens serve all steps of D; like images, they wait in main memory.
        real, fake = (self.backbone.tokens(x, self.options.layers).cpu() for x in (references, images))
        return Pair(real, fake, seeds)

    def compare(self, pair: Pair, k: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [b] of step k and what to log of them."""
        both = [x.to(self.device) for x in (pair.real, pair.fake)]
        real, fake = (self.logits(self.learn_on(x)) for x in both)
        drawn = [self.drawn(pair.seeds, real, REAL, k), self.drawn(pair.seeds, real, FAKE, k)]
        rows = None if drawn[0] is None or drawn[1] is None else (drawn[0], drawn[1])
        layers = range(real.shape[1])
        weight = self.options.patch_weight
        loss = torch.stack([token_loss(real[:, i], fake[:, i], weight, rows) for i in layers]).mean(0)
        with torch.no_grad():
            right = [(real[..., 0] > 0).float().mean(1), (fake[..., 0] < 0).float().mean(1)]
            alike = self.score_by is self.learn_on
            score = self.score(fake if alike else self.logits(self.score_by(both[1])))
            logged = {
                "accuracy": (right[0] + right[1]) / 2,
                "accuracy_real": right[0],
                "accuracy_fake": right[1],
                "logit_real": real[..., 0].mean(1),
                "logit_fake": fake[..., 0].mean(1),
                "score": score,
                "score_square": score.square(),
            }
        return loss, logged

    def state_dict(self) -> dict[str, Tensor]:
        return self.trained.state_dict() | {"epoch": torch.tensor(self.epoch)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        rest = dict(state)
        epoch = int(rest.pop("epoch"))
        self.trained.load_state_dict(rest)
        self.epoch = epoch
