"""The CLIP of `pickscore_adversarial` at work: it scores images, and its last vision block learns from references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.rewards import Lesson
from diffalign.rewards._clip import Clip
from diffalign.rewards._discriminator import Trained, pairwise, slices, spread
from diffalign.rewards._preprocess import normalise
from diffalign.rewards._references import References
from diffalign.types import RewardOutput

if TYPE_CHECKING:
    from diffalign.rewards.pickscore_adversarial import PickscoreAdversarial

UNIT = 26  # by which Flow-GRPO and Adv-GRPO divide PickScore
LOGGED = ("accuracy", "score_real", "score", "score_square")


@dataclass(frozen=True)
class Pair:
    """What the last block is given of references and of images, [b, 1 + N, d] on the CPU, and the prompts [b, D]."""

    real: Tensor
    fake: Tensor
    text: Tensor


class Critic:
    """A :class:`diffalign.rewards.Learner`."""

    def __init__(
        self, options: PickscoreAdversarial, clip: Clip, references: References, device: torch.device | str
    ) -> None:
        self.options, self.clip, self.references, self.device = options, clip, references, device
        vision = clip.model.vision_model
        last = (vision.encoder.layers[-1], vision.post_layernorm, clip.model.visual_projection)
        self.block, self.norm, self.projection = (deepcopy(part).float() for part in last)
        parameters = dict(self.block.named_parameters())
        self.trained = Trained(parameters, options.lr, options.betas, references.digest)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        score = self.score(self.hidden(images), self.clip.texts(prompts))
        return RewardOutput(score / UNIT, {"raw": score.detach()})

    def hidden(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """What the last block is given, [B, 1 + N, d] fp32; images [B, 3, H, W], or B of any sizes."""
        side = self.clip.model.config.vision_config.image_size
        batch = [images] if isinstance(images, Tensor) else [image[None] for image in images]
        views = torch.cat([self.clip.view(x.to(self.device), side) for x in batch])
        pixels = normalise(views, self.clip.mean, self.clip.std).to(self.clip.model.dtype)
        seen = self.clip.model.vision_model(pixel_values=pixels, output_hidden_states=True)
        before: Tensor = seen.hidden_states[-2]
        return before.float()

    def score(self, hidden: Tensor, text: Tensor) -> Tensor:
        """exp(logit_scale) cos, [b]."""
        image = self.projection(self.norm(self.block(hidden, None)[:, 0]))
        return self.clip.scale * (F.normalize(image, dim=-1) * text).sum(-1)

    def learn(self, lesson: Lesson) -> tuple[bool, dict[str, float]]:
        pairs = [self.pair(lesson, rows) for rows in slices(len(lesson.images), lesson.batch)]
        batches = [partial(self.compare, pair) for pair in pairs]
        means: dict[str, float] = {}
        taken = 0
        for _ in range(self.options.d_steps):
            learned, means = self.trained.step(lesson, batches, LOGGED, lambda m: m["score_real"] < m["score"])
            if not learned:
                break
            taken += 1
        return self.options.reuse_rollouts or not taken, spread(means, "score") | {"steps": float(taken)}

    @torch.no_grad()
    def pair(self, lesson: Lesson, rows: slice) -> Pair:
        prompts = lesson.prompts[rows]
        references = self.references.pick(prompts, lesson.metadata[rows], lesson.seeds[rows])
        # All but the last block is frozen, so this serves all steps; like images, it waits in main memory.
        real, fake = (self.hidden(x).cpu() for x in (references, lesson.images[rows]))
        return Pair(real, fake, self.clip.texts(prompts))

    def compare(self, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [b] and what to log of them."""
        real, fake = (self.score(x.to(self.device), pair.text) for x in (pair.real, pair.fake))
        score = fake.detach() / UNIT
        logged = {
            "accuracy": (real > fake).float(),
            "score_real": real / UNIT,
            "score": score,
            "score_square": score.square(),
        }
        return pairwise(real, fake), logged

    def state_dict(self) -> dict[str, Tensor]:
        return self.trained.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.trained.load_state_dict(state)
