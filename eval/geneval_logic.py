"""GenEval's decisions (arXiv 2310.11513) as pure functions over detections; no detector and no torch in here.

`objects` maps a class to its boxes (x0, y0, x1, y1[, confidence]), most confident first; `colors` maps a class to the
colour of each box in the same order. `metadata` is GenEval's `{"tag": ..., "include": [clause], "exclude": [clause]}`
with clauses `{"class": "circle", "count": 2, "color": "red", "position": ["left of", 0]}`; a position names a relation
and the index of an earlier clause.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Box = Sequence[float]
Objects = Mapping[str, Sequence[Box]]
Colors = Mapping[str, Sequence[str]]
Metadata = Mapping[str, Any]

POSITION_THRESHOLD = 0.1


def relations(a: Box, b: Box) -> set[str]:
    """Where a lies relative to b: a subset of {left of, right of, above, below}.

    With centre offset o, every component is first shrunk by 0.1 of the summed sizes along that axis, then divided by
    the length of the unshrunk o; a component beyond 0.5 counts. Image axes: y grows downwards.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    size = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    shrunk = [math.copysign(max(abs(o) - POSITION_THRESHOLD * s, 0.0), o) for o, s in zip(offset, size, strict=True)]
    if all(abs(o) < 1e-3 for o in shrunk):
        return set()
    dx, dy = (o / math.hypot(*offset) for o in shrunk)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, true in holds.items() if true}


def iou(a: Box, b: Box) -> float:
    """Intersection over union of boxes whose corners are pixels that belong to them (hence the + 1)."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0.0) * max(y1 - y0 + 1, 0.0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a[:4]) + area(*b[:4]) - both
    return both / union if union else 0.0


def geneval_correct(objects: Objects, colors: Colors, metadata: Metadata) -> bool:
    """The official metric: every include clause holds for its `count` most confident boxes, no exclude clause does.

    Surplus objects are allowed unless an exclude clause forbids them.
    """
    groups: list[Sequence[Box] | None] = []
    for clause in metadata.get("include", []):
        name, count = clause["class"], clause["count"]
        groups.append(_match(clause, objects.get(name, [])[:count], colors.get(name, [])[:count], groups))
    excluded = any(len(objects.get(c["class"], [])) >= c["count"] for c in metadata.get("exclude", []))
    return None not in groups and not excluded


def geneval_exact(objects: Objects, colors: Colors, metadata: Metadata) -> bool:
    """Flow-GRPO's `strict_correct` (arXiv 2505.05470): counts must be equal; exclude clauses are not read."""
    return None not in _exact_groups(objects, colors, metadata)


def geneval_strict(objects: Objects, colors: Colors, metadata: Metadata) -> bool:
    """Official and exact, and nothing else is in the picture: no object of a class that no clause asks for."""
    return (
        geneval_correct(objects, colors, metadata)
        and geneval_exact(objects, colors, metadata)
        and strays(objects, metadata) == 0
    )


def geneval_flow_grpo(objects: Objects, colors: Colors, metadata: Metadata) -> float:
    """Flow-GRPO's training reward: the mean of 1 - |count - found| / count and the like, which may be negative.

    Kept with its flaw for comparison with published runs: a relation that fails gives 0 and then also 1.
    """
    return _mean(_partial_scores(objects, colors, metadata, failed_relation=[0.0, 1.0]))


def geneval_dense(objects: Objects, colors: Colors, metadata: Metadata) -> float:
    """Partial credit for training: Flow-GRPO's mean with failed relations worth 0, less strays / (objects asked for).

    An object that nobody asked for thus costs what a missing one does. At most 1, and 1 exactly when every clause holds
    with equal counts and nothing else is in the picture.
    """
    asked: int = sum(clause["count"] for clause in metadata.get("include", []))
    penalty = strays(objects, metadata) / max(asked, 1)
    return _mean(_partial_scores(objects, colors, metadata, failed_relation=[0.0])) - penalty


def strays(objects: Objects, metadata: Metadata) -> int:
    """The number of objects of classes that no include clause asks for."""
    asked = {clause["class"] for clause in metadata.get("include", [])}
    return sum(len(boxes) for name, boxes in objects.items() if name not in asked)


def _match(
    clause: Mapping[str, Any], boxes: Sequence[Box], colours: Sequence[str], groups: Sequence[Sequence[Box] | None]
) -> Sequence[Box] | None:
    """The boxes if all of them satisfy the clause, else None."""
    if len(boxes) != clause["count"]:
        return None
    if "color" in clause and any(colour != clause["color"] for colour in colours):
        return None
    if "position" in clause and not _related(boxes, clause["position"], groups):
        return None
    return boxes


def _related(boxes: Sequence[Box], position: Sequence[Any], groups: Sequence[Sequence[Box] | None]) -> bool:
    relation, target = position
    others = groups[target]
    return others is not None and all(relation in relations(a, b) for a in boxes for b in others)


def _exact_groups(objects: Objects, colors: Colors, metadata: Metadata) -> list[Sequence[Box] | None]:
    groups: list[Sequence[Box] | None] = []
    for clause in metadata.get("include", []):
        name = clause["class"]
        groups.append(_match(clause, objects.get(name, []), colors.get(name, []), groups))
    return groups


def _partial_scores(objects: Objects, colors: Colors, metadata: Metadata, failed_relation: list[float]) -> list[float]:
    groups = _exact_groups(objects, colors, metadata)
    scores: list[float] = []
    for clause in metadata.get("include", []):
        boxes, count = objects.get(clause["class"], []), clause["count"]
        scores.append(1 - abs(count - len(boxes)) / count)
        if len(boxes) != count:
            # One zero for both attributes, which cannot be judged on the wrong number of objects.
            scores += [0.0] if "color" in clause or "position" in clause else []
            continue
        if "color" in clause:
            coloured = list(colors.get(clause["class"], [])).count(clause["color"])
            scores.append(1 - abs(count - coloured) / count)
            if coloured != count:
                continue
        if "position" in clause:
            if groups[clause["position"][1]] is None:
                scores.append(0.0)
            else:
                scores += [1.0] if _related(boxes, clause["position"], groups) else failed_relation
    return scores


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0
