"""GenEval's verifiable score (arXiv 2310.11513): of the shapes world by its exact detector, or of photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from diffalign.eval import geneval_logic
from diffalign.rewards import Head, Reward
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._mask2former import CLIP, DETECTOR, Mask2Former, load
from diffalign.rewards._shapes import Shapes, observe
from diffalign.types import RewardOutput, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Geneval", "observe"]
RELATIONS = ("left of", "right of", "above", "below")


class Geneval(Reward):
    """The four scores, from `prompts` metadata in GenEval's form; without its clauses the score is NaN, but for prompts
    of the shapes world, which are read from their text.

    correct: 1 if the official GenEval logic holds on the clean detections, else 0. Broken shapes are not seen, and
        objects that nobody asked for do no harm unless an exclude clause names them.
    strict: 1 if moreover every count is exact and nothing else is on the canvas, neither an object of another class
        nor a shape that the detector rejects as malformed. This is the metric reported for the shapes world.
    dense: partial credit in (-inf, 1] for training, 1 exactly where strict is 1; see `geneval_logic.geneval_dense`.
    flow_grpo: Flow-GRPO's training reward (arXiv 2505.05470) as published, its flaw with failed relations included.
    """

    mode: Literal["correct", "strict", "dense", "flow_grpo"] = "strict"
    """Which of the scores: strict to measure shapes, correct to measure photographs, dense to train."""
    detector: Literal["shapes", "mask2former"] = "shapes"
    """What finds the objects: the exact detector of the shapes world, or a Mask2Former and a CLIP for the 80 classes of
    COCO in photographs, whose scores are GenEval-compatible, not GenEval's own."""
    model: str = DETECTOR
    """The Mask2Former: a folder or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    clip: str = CLIP
    """The CLIP that tells colours: an embedded name, a folder or a hub id."""
    clip_revision: str | None = None
    """Likewise of the CLIP."""
    local_files_only: bool = False
    """Never reach for the network; use what is in the cache."""

    needs_prompt: ClassVar[bool] = True

    @model_validator(mode="after")
    def _apply(self) -> Geneval:
        idle = self.changed(("model", "revision", "clip", "clip_revision", "local_files_only"))
        if self.detector == "shapes" and idle:
            raise ValueError(f"{idle[0]} does not apply to the detector of shapes; leave it out, or use mask2former")
        return self

    def checkpoints(self) -> list[Checkpoint]:
        own = [Checkpoint(self.model, self.revision), Checkpoint(self.clip, self.clip_revision)]
        return [] if self.detector == "shapes" else own

    def setup(self, device: torch.device | str) -> Head:
        if self.detector == "shapes":
            return partial(self.judge, Shapes())
        model, clip = self.checkpoints()
        return partial(self.judge, load(model, clip, device, self.local_files_only))

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Any:
        return self.setup(images.device)(images, prompts, metadata)

    def judge(
        self,
        detector: Shapes | Mask2Former,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> RewardOutput:
        import torch

        decide = {
            "correct": geneval_logic.geneval_correct,
            "strict": geneval_logic.geneval_strict,
            "dense": geneval_logic.geneval_dense,
            "flow_grpo": geneval_logic.geneval_flow_grpo,
        }[self.mode]
        clauses = [self._clauses(m, p) for m, p in zip(metadata, prompts, strict=True)]
        rows = [i for i, wanted in enumerate(clauses) if wanted.get("include") or wanted.get("exclude")]
        asked = [clauses[i] for i in rows]
        for i, wanted in zip(rows, asked, strict=True):
            _check(wanted, prompts[i], detector)
        scores = torch.full((len(images),), float("nan"))
        found = detector.find(images[rows], asked) if rows else []
        for i, wanted, seen in zip(rows, asked, found, strict=True):
            scores[i] = float(decide(*seen, wanted))
        return RewardOutput(scores)

    def _clauses(self, metadata: Mapping[str, Any], prompt: str) -> Mapping[str, Any]:
        if self.detector != "shapes" or "include" in metadata or "exclude" in metadata:
            return metadata
        from diffalign.shapes.prompts import understood

        return understood(prompt) or metadata


def _check(metadata: Mapping[str, Any], prompt: str, detector: Shapes | Mask2Former) -> None:
    """A clause that no picture can satisfy is a mistake in the prompt set, not a score of 0."""
    where = f"the GenEval metadata of the prompt {prompt!r}"
    knows = f"the {type(detector).__name__.lower()} detector knows"
    for k, clause in enumerate([*metadata.get("include", []), *metadata.get("exclude", [])]):
        if not isinstance(clause, dict):
            raise UserError(f"{where} holds {clause!r} where a clause such as {{class: circle, count: 1}} is expected")
        if clause.get("class") not in detector.names:
            raise UserError(f"{where} asks for {clause.get('class')!r}; {knows} {', '.join(detector.names)}")
        if not isinstance(clause.get("count"), int) or clause["count"] < 1:
            raise UserError(f"{where} needs a whole 'count' of at least 1, got {clause.get('count')!r}")
        if "color" in clause and clause["color"] not in detector.colors:
            raise UserError(f"{where} asks for {clause['color']!r}; {knows} {', '.join(detector.colors)}")
        if "position" in clause:
            relation, target = (*clause["position"], None, None)[:2] if isinstance(clause["position"], list) else (0, 0)
            if relation not in RELATIONS or not isinstance(target, int) or not 0 <= target < k:
                raise UserError(f"{where} needs a 'position' of [relation, index of an earlier clause], got "
                                f"{clause['position']!r}; relations are {', '.join(RELATIONS)}")  # fmt: skip
