"""What can be said and asked about a picture of shapes: true captions, near misses, questions to answer yes or no."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from diffalign.shapes.prompts import COUNTS
from diffalign.shapes.world import COLORS, RELATIONS, SHAPES, SIZE, Object, place

Clauses = list[dict[str, Any]]  # the `include` of GenEval metadata

DESCRIBE = "Describe this image in detail."
ANSWER = " Answer yes or no."
# The first of each is the one to use, the others keep the model from learning it by rote. {} is the prompt.
MATCH = (
    "Does this image show {}?",
    "Does this picture show {}?",
    "Is this {}?",
    "Does the image match the description: {}?",
    'Does this image match the prompt "{}"?',
)
FAULTY = (
    "Are there broken or malformed shapes?",
    "Are there visual artifacts in this image?",
    "Does this image contain artifacts, distortions or malformed shapes?",
    "Is anything in this picture broken, blurred or distorted?",
)


def cells(objects: Sequence[Object], side: int) -> list[list[float]]:
    """What is where. Per cell of a grid of side x side: colour and shape of the object that covers it (or none), is the
    object's centre in it, the cell's row and column, the number of objects; then, in cells, the way from the cell's
    centre to the object's, and from there to the mean of the other objects."""
    size, rows = SIZE / side, []
    for row, column in product(range(side), repeat=2):
        y, x = (row + 0.5) * size, (column + 0.5) * size
        o = min(objects, key=lambda o: math.hypot(o.x - x, o.y - y) - o.r)
        others = [p for p in objects if p is not o] or [o]
        mean_x, mean_y = (sum(c) / len(others) for c in zip(*((p.x, p.y) for p in others), strict=True))
        away = [o.x - x, o.y - y, mean_x - o.x, mean_y - o.y]
        if math.hypot(away[0], away[1]) < o.r + 3:
            middle = float(max(abs(away[0]), abs(away[1])) < size / 2)
            here = [list(COLORS).index(o.color), SHAPES.index(o.shape), middle, row, column, len(objects) - 1]
            rows.append([*here, *(a / size for a in away)])
        else:
            rows.append([len(COLORS), len(SHAPES), 0, row, column, len(objects) - 1, 0, 0, 0, 0])
    return rows


def ask(rng: random.Random, templates: Sequence[str]) -> str:
    """The first template in half of all cases, nearly always with the request to answer yes or no."""
    return rng.choice((templates[0], rng.choice(templates))) + (ANSWER if rng.random() < 0.8 else "")


def caption(include: Clauses) -> str:
    """The grammar's wording of the clauses, without an opening."""
    if len(include) == 1:
        clause = include[0]
        return (
            f"{COUNTS[clause['count']]} {clause['color']} {clause['class']}s" if clause["count"] > 1 else _noun(clause)
        )
    first, second = include
    if "position" in second:
        return f"{_noun(second)} {second['position'][0]} {_noun(first)}"
    return f"{_noun(first)} and {_noun(second)}"


def truths(objects: Sequence[Object]) -> list[Clauses]:
    """Everything the grammar can say about the whole picture; nothing when it has no words for it."""
    kinds = {(o.shape, o.color) for o in objects}
    if len(objects) > 1 and len(kinds) == 1:
        return [[_clause(objects[0], len(objects))]]
    if len(objects) == 1:
        return [[_bare(objects[0])], [_clause(objects[0])]]
    if len(objects) > 2 or objects[0].shape == objects[1].shape:
        return []
    said = []
    for a, b in (objects, objects[::-1]):
        said.append([_bare(a), _bare(b)])
        if a.color != b.color:
            said.append([_clause(a), _clause(b)])
            said += [[_clause(b), _clause(a) | {"position": [r, 0]}] for r in RELATIONS if leaning(r, a, b) > 0]
    return said


def leaning(relation: str, a: Object, b: Object) -> float:
    """How clearly `a` is in this relation to `b`: positive when it is the main direction, below -1 when it is false
    under GenEval's threshold too, and in between on the diagonal, where a picture should not be judged by it."""
    dx, dy = b.x - a.x, b.y - a.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    if along > abs(across) + 4:
        return 1.0
    return -2.0 if along <= 0.5 * (dx * dx + dy * dy) ** 0.5 else -0.5


def near_misses(include: Clauses, objects: Sequence[Object]) -> dict[str, list[str]]:
    """Captions one change away from a true one, by what changed, which the picture does not show.

    `objects` come in the order of the scene: the subject of a relation first, else as in `include`.
    """
    found: dict[str, list[str]] = {}
    edits = list(_edits(include, objects))
    if "color" not in include[0]:  # a wrong colour or count needs the coloured wording
        edits += [edit for edit in _edits([_clause(o) for o in objects], objects) if edit[0] in ("color", "count")]
    for kind, changed in edits:
        text = caption(changed)
        if text not in found.setdefault(kind, []):
            found[kind].append(text)
    return found


def choose(rng: random.Random, misses: dict[str, list[str]], n: int) -> list[str]:
    """n of them, in turn from every kind, so that each kind is there."""
    piles = [rng.sample(m, len(m)) for _, m in sorted(misses.items())]
    rng.shuffle(piles)
    turns = [pile[i] for i in range(max(map(len, piles))) for pile in piles if i < len(pile)]
    return turns[:n]


def clutter(rng: random.Random) -> tuple[list[Object], str]:
    """A picture that the grammar cannot describe, and a caption that is true of a part of it only."""
    while True:
        n = rng.choice((2, 3, 3, 4))
        objects = [Object(rng.choice(SHAPES), rng.choice(list(COLORS)), *spot) for spot in place(rng, n)]
        if not truths(objects):
            break
    part = rng.sample(objects, rng.choice((1, 1, 2)))
    if part[0].shape == part[-1].shape:
        part = part[:1]
    return objects, caption(rng.choice(truths(part)))


def _edits(include: Clauses, objects: Sequence[Object]) -> Iterator[tuple[str, Clauses]]:
    for k, clause in enumerate(include):
        others = include[:k] + include[k + 1 :]
        for shape in SHAPES:
            if shape not in [c["class"] for c in include]:
                yield "shape", _with(include, k, {"class": shape})
        for color in COLORS:
            if "color" in clause and color != clause["color"] and color not in [c.get("color") for c in others]:
                yield "color", _with(include, k, {"color": color})
        for count in (1, *COUNTS):
            if "color" in clause and not others and count != clause["count"]:
                yield "count", _with(include, k, {"count": count})
    if len(include) == 2:
        first, second = include
        if "color" in first and first["color"] != second["color"]:
            yield "binding", [first | {"color": second["color"]}, second | {"color": first["color"]}]
        if "position" in second:
            a, b = objects
            for relation in RELATIONS:
                if leaning(relation, a, b) < -1:
                    yield "relation", [first, second | {"position": [relation, 0]}]


def _with(include: Clauses, k: int, change: dict[str, Any]) -> Clauses:
    return [clause | change if i == k else clause for i, clause in enumerate(include)]


def _clause(o: Object, count: int = 1) -> dict[str, Any]:
    return {"class": o.shape, "count": count, "color": o.color}


def _bare(o: Object) -> dict[str, Any]:
    return {"class": o.shape, "count": 1}


def _noun(clause: dict[str, Any]) -> str:
    words = f"{clause['color']} {clause['class']}" if "color" in clause else clause["class"]
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
