"""The prompt grammar in GenEval's six categories, its metadata, and the train and test splits of alignment.

Metadata has GenEval's own form (arXiv 2310.11513): `tag`, `include`, `exclude`, `prompt`. Pre-training sees every
combination; alignment trains on `train_prompts()`, where some (colour, shape), (count, shape) and (relation, shape,
shape) combinations never occur, and is judged on `test_prompts()`, 39 % of which contain one of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import permutations, product
from typing import Any

from diffalign.shapes.world import COLORS, RELATIONS, SHAPES, Object, place

Metadata = dict[str, Any]

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNTS = {2: "two", 3: "three", 4: "four"}
OPENINGS = ("", "a picture of ", "a drawing of ", "an image of ")
HELD_OUT_COLOR_SHAPE = {("red", "star"), ("green", "square"), ("blue", "triangle"), ("orange", "circle")}
HELD_OUT_COUNT_SHAPE = {(3, "circle"), (4, "triangle"), (2, "star")}
HELD_OUT_RELATION = {  # each in both wordings
    ("left of", "circle", "star"),
    ("right of", "star", "circle"),
    ("right of", "square", "triangle"),
    ("left of", "triangle", "square"),
    ("above", "triangle", "circle"),
    ("below", "circle", "triangle"),
    ("below", "star", "square"),
    ("above", "square", "star"),
}
TEST_COUNTS = {"single_object": 8, "two_object": 24, "counting": 52, "colors": 52, "position": 52, "color_attr": 52}
TRAIN_COUNTS = {"single_object": 8, "two_object": 24, "counting": 80, "colors": 44, "position": 160, "color_attr": 160}


def _noun(shape: str, color: str | None = None) -> str:
    words = f"{color} {shape}" if color else shape
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _clause(shape: str, color: str | None = None, count: int = 1) -> Metadata:
    return {"class": shape, "count": count} | ({"color": color} if color else {})


def _all(tag: str) -> Iterator[tuple[str, list[Metadata]]]:
    """Every (prompt, include clauses) of a category, without openings."""
    if tag == "single_object":
        for s in SHAPES:
            yield _noun(s), [_clause(s)]
    elif tag == "colors":
        for c, s in product(COLORS, SHAPES):
            yield _noun(s, c), [_clause(s, c)]
    elif tag == "counting":
        for n, c, s in product(COUNTS, COLORS, SHAPES):
            yield f"{COUNTS[n]} {c} {s}s", [_clause(s, c, n)]
    elif tag == "two_object":
        for a, b in permutations(SHAPES, 2):
            yield f"{_noun(a)} and {_noun(b)}", [_clause(a), _clause(b)]
    else:
        for (a, b), (c, d) in product(permutations(SHAPES, 2), permutations(COLORS, 2)):
            if tag == "color_attr":
                yield f"{_noun(a, c)} and {_noun(b, d)}", [_clause(a, c), _clause(b, d)]
            else:  # GenEval states the relation on the second clause: [relation, index of the reference clause]
                for relation in RELATIONS:
                    first = _clause(a, c) | {"position": [relation, 0]}
                    yield f"{_noun(a, c)} {relation} {_noun(b, d)}", [_clause(b, d), first]


def metadata(tag: str, prompt: str, include: list[Metadata]) -> Metadata:
    exclude = [{"class": i["class"], "count": i["count"] + 1} for i in include] if tag == "counting" else []
    return {"tag": tag, "include": include, "exclude": exclude, "prompt": prompt}


def is_held_out(meta: Metadata) -> bool:
    """Does the prompt contain a combination that alignment never trains on?"""
    include = meta["include"]
    if any((i.get("color"), i["class"]) in HELD_OUT_COLOR_SHAPE for i in include):
        return True
    if any((i["count"], i["class"]) in HELD_OUT_COUNT_SHAPE for i in include):
        return True
    related = [i for i in include if "position" in i]
    return any((i["position"][0], i["class"], include[0]["class"]) in HELD_OUT_RELATION for i in related)


def _split() -> tuple[list[Metadata], list[Metadata]]:
    """Up to half of each category's test prompts hold a held-out combination, as far as there are any; the rest are
    unseen wordings of seen combinations. Both lists alternate between categories, so that any beginning is balanced."""
    rng = random.Random(20261121)
    train: dict[str, list[Metadata]] = {}
    test: dict[str, list[Metadata]] = {}
    for tag in TAGS:
        every = [metadata(tag, o + p, i) for p, i in _all(tag) for o in OPENINGS]
        rng.shuffle(every)
        held = [m for m in every if is_held_out(m)]
        seen = [m for m in every if not is_held_out(m)]
        n = min(TEST_COUNTS[tag] // 2, len(held))
        m = TEST_COUNTS[tag] - n
        test[tag] = held[:n] + seen[:m]
        rng.shuffle(test[tag])
        train[tag] = seen[m : m + TRAIN_COUNTS[tag]]
    return _alternate(train), _alternate(test)


def _alternate(by_tag: dict[str, list[Metadata]]) -> list[Metadata]:
    longest = max(map(len, by_tag.values()))
    return [by_tag[tag][i] for i in range(longest) for tag in TAGS if i < len(by_tag[tag])]


def train_prompts() -> list[Metadata]:
    """The prompts that alignment may train on, as GenEval metadata; the text is under "prompt"."""
    return _split()[0]


def test_prompts() -> list[Metadata]:
    """240 held-out prompts, none of them in `train_prompts()`."""
    return _split()[1]


def scene(rng: random.Random, include: list[Metadata]) -> list[Object]:
    """A random layout that satisfies the clauses, with colours drawn where none is asked for."""
    n = sum(i["count"] for i in include)
    relation = next((i["position"][0] for i in include if "position" in i), None)
    clauses = include if relation is None else include[::-1]  # the subject of the relation is placed first
    spots = iter(place(rng, n, relation))
    return [
        Object(i["class"], i.get("color") or rng.choice(list(COLORS)), *next(spots))
        for i in clauses
        for _ in range(i["count"])
    ]


def sample(rng: random.Random, catalogue: dict[str, list[tuple[str, list[Metadata]]]]) -> tuple[Metadata, list[Object]]:
    """A random prompt of a random category with a scene: one pre-training example."""
    tag = rng.choice(TAGS)
    prompt, include = rng.choice(catalogue[tag])
    meta = metadata(tag, rng.choice(OPENINGS) + prompt, include)
    return meta, scene(rng, include)


def catalogue() -> dict[str, list[tuple[str, list[Metadata]]]]:
    """All prompts of all categories without openings: what pre-training draws from."""
    return {tag: list(_all(tag)) for tag in TAGS}


@cache
def _by_text() -> dict[str, tuple[str, list[Metadata]]]:
    return {text: (tag, include) for tag, every in catalogue().items() for text, include in every}


def understood(prompt: str) -> Metadata | None:
    """The metadata of a prompt of this grammar as a user writes it; None for any other text."""
    words = " ".join(prompt.lower().rstrip(" .").split())
    for opening in sorted(OPENINGS, key=len, reverse=True):
        found = _by_text().get(words.removeprefix(opening))
        if found is not None:
            return metadata(found[0], prompt, found[1])
    return None
