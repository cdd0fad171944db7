"""The renderer, the prompts and the tokenizer of the embedded world; the detector has a file of its own."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import numpy as np
import pytest
from shape_outlines import outline

from diffalign.shapes import prompts, tokenizer
from diffalign.shapes.world import BACKGROUND, COLORS, RADIUS, RELATIONS, SHAPES, SIZE, Object, place, render

TRAIN, TEST = prompts.train_prompts(), prompts.test_prompts()


def test_the_renderer_is_deterministic_and_leaves_the_ground_alone() -> None:
    objects = [Object("star", "red", 20, 20, 12), Object("square", "blue", 45, 45, 10)]
    image = render(objects)
    assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, render(objects))
    assert tuple(image[0, 0]) == BACKGROUND and tuple(image[45, 45]) == COLORS["blue"]
    assert (render([]) == BACKGROUND).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_anti_aliased_and_the_area_is_that_of_the_outline(shape: str) -> None:
    for x, y, r in ((30.1, 33.7, 9.3), (32.0, 32.0, 20.0)):
        image = render([Object(shape, "blue", x, y, r)]).astype(float)
        ground, blue = np.array(BACKGROUND), np.array(COLORS["blue"])
        coverage = (image - ground) @ (blue - ground) / ((blue - ground) ** 2).sum()
        assert np.abs(image - ground - coverage[..., None] * (blue - ground)).max() < 1.5  # mixtures of the two only
        partial = ((coverage > 0.05) & (coverage < 0.95)).sum()
        assert partial > r
        px, py = np.array(outline(shape, x, y, r)).T
        area = abs(px @ np.roll(py, 1) - py @ np.roll(px, 1)) / 2
        assert coverage.sum() == pytest.approx(area, rel=0.06)


@pytest.mark.parametrize("relation", [None, *RELATIONS])
def test_places_do_not_overlap_and_satisfy_the_relation(relation: str | None) -> None:
    rng = random.Random(3)
    for _ in range(100):
        n = 2 if relation else rng.choice(list(RADIUS))
        spots = place(rng, n, relation)
        assert len(spots) == n
        for i, (x, y, r) in enumerate(spots):
            assert RADIUS[n][0] <= r <= RADIUS[n][1] and min(x, y, SIZE - x, SIZE - y) > r
            assert all(math.hypot(x - a, y - b) > r + c for a, b, c in spots[:i])
        if relation:
            (x1, y1, _), (x2, y2, _) = spots
            ahead = {"left of": x2 - x1, "right of": x1 - x2, "above": y2 - y1, "below": y1 - y2}[relation]
            assert ahead > (abs(y1 - y2) if relation in ("left of", "right of") else abs(x1 - x2))


# Prompts

NOUN = rf"an? (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
OPENING = "(?:" + "|".join(prompts.OPENINGS) + ")"


def parse(prompt: str) -> tuple[str, list[tuple[str | None, str, int]], str | None]:
    """What the words say: category, (colour, shape, count) of each noun phrase, relation of first to second."""
    if m := re.fullmatch(rf"{OPENING}(two|three|four) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})s", prompt):
        return "counting", [(m[2], m[3], {"two": 2, "three": 3, "four": 4}[m[1]])], None
    if m := re.fullmatch(OPENING + NOUN, prompt):
        return ("colors" if m[1] else "single_object"), [(m[1], m[2], 1)], None
    m = re.fullmatch(rf"{OPENING}{NOUN} (and|{'|'.join(RELATIONS)}) {NOUN}", prompt)
    assert m, prompt
    nouns = [(m[1], m[2], 1), (m[4], m[5], 1)]
    if m[3] != "and":
        return "position", nouns, m[3]
    return ("color_attr" if m[1] else "two_object"), nouns, None


def held_out(prompt: str) -> bool:
    _, nouns, relation = parse(prompt)
    return (
        any((color, shape) in prompts.HELD_OUT_COLOR_SHAPE for color, shape, _ in nouns)
        or any((count, shape) in prompts.HELD_OUT_COUNT_SHAPE for _, shape, count in nouns)
        or (relation is not None and (relation, nouns[0][1], nouns[1][1]) in prompts.HELD_OUT_RELATION)
    )


def test_splits_are_disjoint_and_only_the_test_has_held_out_combinations() -> None:
    train, test = ({m["prompt"] for m in split} for split in (TRAIN, TEST))
    assert len(test) == len(TEST) == 240 and len(train) == len(TRAIN) > 240
    assert not train & test
    assert Counter(m["tag"] for m in TEST) == prompts.TEST_COUNTS
    assert Counter(m["tag"] for m in TRAIN) == prompts.TRAIN_COUNTS
    assert not any(held_out(p) for p in train)
    assert sum(held_out(p) for p in test) >= len(test) / 3
    for tag in ("colors", "counting", "position", "color_attr"):
        of_tag = [held_out(m["prompt"]) for m in TEST if m["tag"] == tag]
        assert 0.3 * len(of_tag) <= sum(of_tag) < len(of_tag)


def test_splits_are_always_the_same_and_any_beginning_has_every_category() -> None:
    assert prompts.test_prompts() == TEST and prompts.train_prompts() == TRAIN
    for split in (TRAIN, TEST):
        assert {m["tag"] for m in split[:6]} == set(prompts.TAGS)


def test_metadata_says_in_genevals_form_what_the_words_say() -> None:
    for meta in TRAIN + TEST:
        tag, nouns, relation = parse(meta["prompt"])
        assert list(meta) == ["tag", "include", "exclude", "prompt"] and meta["tag"] == tag
        clauses = [{"class": s, "count": n} | ({"color": c} if c else {}) for c, s, n in nouns]
        if relation:  # the subject comes second and names its relation to clause 0
            clauses = [clauses[1], clauses[0] | {"position": [relation, 0]}]
        assert meta["include"] == clauses
        too_many = [{"class": nouns[0][1], "count": nouns[0][2] + 1}]
        assert meta["exclude"] == (too_many if tag == "counting" else [])
        assert prompts.is_held_out(meta) == held_out(meta["prompt"])


# The tokenizer


def test_every_word_of_every_prompt_is_one_token_and_none_is_cut() -> None:
    t = tokenizer.build()
    every = [o + p for tag in prompts.catalogue().values() for p, _ in tag for o in prompts.OPENINGS]
    assert {m["prompt"] for m in TRAIN + TEST} <= set(every)
    whole = t(every).input_ids
    for prompt, ids in zip(every, whole, strict=True):
        assert len(ids) == len(prompt.split()) + 2 <= tokenizer.MAX_LENGTH
        assert (ids[0], ids[-1]) == (t.bos_token_id, t.eos_token_id)
    assert t(every, truncation=True).input_ids == whole
    assert t.batch_decode(whole, skip_special_tokens=True) == every


def test_an_unknown_word_is_spelt_and_saving_keeps_the_tokens(tmp_path) -> None:
    t = tokenizer.build()
    text = "two red squares, 3 cats"
    assert t.decode(t(text).input_ids, skip_special_tokens=True).replace(" ,", ",") == text
    assert len(t.tokenize("cat")) == 3
    t.save_pretrained(tmp_path)
    assert type(t).from_pretrained(tmp_path)(text).input_ids == t(text).input_ids
