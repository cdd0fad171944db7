"""GenEval's verifiable score (arXiv 2310.11513) of the embedded shapes world, read by its exact detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffalign.eval import geneval_logic
from diffalign.rewards import Reward
from diffalign.types import RewardOutput, UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Geneval(Reward):
    """The four scores, from `prompts` metadata in GenEval's form; metadata without its clauses scores NaN.

    correct: 1 if the official GenEval logic holds on the clean detections, else 0. Broken shapes are not seen, and
        objects that nobody asked for do no harm unless an exclude clause names them.
    strict: 1 if moreover every count is exact and nothing else is on the canvas, neither an object of another class
        nor a shape that the detector rejects as malformed. This is the metric reported for the shapes world.
    dense: partial credit in (-inf, 1] for training, 1 exactly where strict is 1; see `geneval_logic.geneval_dense`.
    flow_grpo: Flow-GRPO's training reward (arXiv 2505.05470) as published, its flaw with failed relations included.
    """

    mode: Literal["correct", "strict", "dense", "flow_grpo"] = "strict"
    """Which of the scores: strict to measure, dense to train."""
    detector: Literal["shapes"] = "shapes"
    """What finds the objects."""

    needs_prompt: ClassVar[bool] = True

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        import torch

        from diffalign.shapes.world import SIZE

        if images.shape[2:] != (SIZE, SIZE):
            raise UserError(
                f"the shapes detector reads {SIZE}x{SIZE} images, got {images.shape[3]}x{images.shape[2]}; set "
                f"sampling.height and sampling.width to {SIZE}"
            )
        pixels = (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1)
        decide = {
            "correct": geneval_logic.geneval_correct,
            "strict": geneval_logic.geneval_strict,
            "dense": geneval_logic.geneval_dense,
            "flow_grpo": geneval_logic.geneval_flow_grpo,
        }[self.mode]
        scores = torch.full((len(images),), float("nan"))
        for i, (image, wanted) in enumerate(zip(pixels.numpy(), metadata, strict=True)):
            if wanted.get("include") or wanted.get("exclude"):
                _check(wanted, prompts[i])
                scores[i] = float(decide(*observe(image), wanted))
        return RewardOutput(scores)


def observe(image: np.ndarray) -> tuple[dict[str, list[tuple[float, ...]]], dict[str, list[str]]]:
    """image uint8 [H, W, 3] -> (objects, colors) in GenEval's form; malformed or two-coloured ones have class ""."""
    from diffalign.shapes.detector import detect

    objects: dict[str, list[tuple[float, ...]]] = {}
    colors: dict[str, list[str]] = {}
    for found in sorted(detect(image), key=lambda d: -d.score):
        name = found.shape if found.color else ""
        objects.setdefault(name, []).append((*found.box, found.score))
        colors.setdefault(name, []).append(found.color)
    return objects, colors


def _check(metadata: Mapping[str, Any], prompt: str) -> None:
    """A clause that no picture can satisfy is a mistake in the prompt set, not a score of 0."""
    from diffalign.shapes.world import COLORS, RELATIONS, SHAPES

    for k, clause in enumerate([*metadata.get("include", []), *metadata.get("exclude", [])]):
        where = f"the GenEval metadata of the prompt {prompt!r}"
        if not isinstance(clause, dict):
            raise UserError(f"{where} holds {clause!r} where a clause such as {{class: circle, count: 1}} is expected")
        if clause.get("class") not in SHAPES:
            raise UserError(f"{where} asks for {clause.get('class')!r}; the shapes detector knows {', '.join(SHAPES)}")
        if not isinstance(clause.get("count"), int) or clause["count"] < 1:
            raise UserError(f"{where} needs a whole 'count' of at least 1, got {clause.get('count')!r}")
        if "color" in clause and clause["color"] not in COLORS:
            raise UserError(f"{where} asks for {clause['color']!r}; the shapes detector knows {', '.join(COLORS)}")
        if "position" in clause:
            relation, target = (*clause["position"], None, None)[:2] if isinstance(clause["position"], list) else (0, 0)
            if relation not in RELATIONS or not isinstance(target, int) or not 0 <= target < k:
                raise UserError(f"{where} needs a 'position' of [relation, index of an earlier clause], got "
                                f"{clause['position']!r}; relations are {', '.join(RELATIONS)}")  # fmt: skip
