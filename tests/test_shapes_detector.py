from __future__ import annotations

import io
import math
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage
from shape_outlines import Points, ngon, outline

from diffalign.shapes import prompts
from diffalign.shapes.detector import Detection, detect
from diffalign.shapes.world import BACKGROUND, COLORS, SHAPES, SIZE, Object, render

RGB = tuple[int, int, int]


def scenes(n: int, seed: int) -> list[tuple[prompts.Metadata, list[Object], np.ndarray]]:
    rng, catalogue = random.Random(seed), prompts.catalogue()
    drawn = [prompts.sample(rng, catalogue) for _ in range(n)]
    return [(meta, objects, render(objects)) for meta, objects in drawn]


def draw(*polygons: tuple[Points, RGB]) -> np.ndarray:
    image = Image.new("RGB", (SIZE * 4, SIZE * 4), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for points, color in polygons:
        pen.polygon([(4 * x, 4 * y) for x, y in points], fill=color)
    return np.asarray(image.reduce(4))


def one(rng: random.Random, shape: str | None = None) -> Object:
    r = rng.uniform(8, 20)
    x, y = rng.uniform(r + 1, SIZE - r - 1), rng.uniform(r + 1, SIZE - r - 1)
    return Object(shape or rng.choice(SHAPES), rng.choice(list(COLORS)), x, y, r)


def box(o: Object) -> tuple[float, ...]:
    points = np.array(outline(o.shape, o.x, o.y, o.r))
    return (*points.min(0), *points.max(0))


def read(found: list[Detection], objects: list[Object], tolerance: float) -> bool:
    """Are these exactly the objects, each with a box within `tolerance` px?"""
    if Counter((d.shape, d.color) for d in found) != Counter((o.shape, o.color) for o in objects):
        return False
    return all(
        any(
            (d.shape, d.color) == (o.shape, o.color) and np.abs(np.subtract(d.box, box(o))).max() < tolerance
            for d in found
        )
        for o in objects
    )


def as_bytes(image: np.ndarray) -> np.ndarray:
    return image.round().clip(0, 255).astype(np.uint8)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return as_bytes(ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0)))


def jpeg(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return np.asarray(Image.open(file))


def mix(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    w = weight.clip(0, 1)[..., None]
    return as_bytes(a * (1 - w) + b * w)


def across(o: Object, angle: float) -> np.ndarray:
    """[64, 64] signed distance from the line through the centre of the object."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    return (x - o.x) * math.cos(angle) + (y - o.y) * math.sin(angle)


def satisfied(meta: prompts.Metadata, found: list[Detection]) -> bool:
    """GenEval's rule, and nothing but what the prompt asks for."""

    def matching(clause: prompts.Metadata) -> list[Detection]:
        return [d for d in found if d.shape == clause["class"] and d.color == clause.get("color", d.color) != ""]

    def centre(d: Detection) -> tuple[float, float]:
        return (d.box[0] + d.box[2]) / 2, (d.box[1] + d.box[3]) / 2

    if len(found) != sum(c["count"] for c in meta["include"]):
        return False
    for clause in meta["include"]:
        if len(matching(clause)) != clause["count"]:
            return False
        if "position" in clause:
            relation, index = clause["position"]
            (x, y), (a, b) = centre(matching(clause)[0]), centre(matching(meta["include"][index])[0])
            if not {"left of": x < a, "right of": x > a, "above": y < b, "below": y > b}[relation]:
                return False
    return all(len(matching(clause)) < clause["count"] for clause in meta["exclude"])


def test_scenes_satisfy_their_own_metadata() -> None:
    rng = random.Random(4)
    for meta in prompts.test_prompts() + prompts.train_prompts()[:120]:
        objects = prompts.scene(rng, meta["include"])
        shown = [Detection(o.shape, o.color, (o.x, o.y, o.x, o.y), 1.0) for o in objects]
        assert satisfied(meta, shown), meta
        assert satisfied(meta, detect(render(objects))), meta


def test_clean_scenes_are_read_without_a_mistake_and_best_first() -> None:
    for meta, objects, image in scenes(500, 1):
        found = detect(image)
        assert read(found, objects, 1.5), (meta["prompt"], found)
        assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)
        assert all(0.9 < d.score <= 1 for d in found)
    assert detect(render([])) == []


DEGRADE: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "jpeg": lambda image, rng: jpeg(image),
    "blur": lambda image, rng: blurred(image, 0.5),
    "noise": lambda image, rng: as_bytes(image + rng.normal(0, 4, image.shape)),
    "shift": lambda image, rng: as_bytes(
        ndimage.shift(image.astype(float), (*rng.uniform(-0.5, 0.5, 2), 0), order=1, mode="nearest")
    ),
}


@pytest.mark.parametrize("kind", [*DEGRADE, "all"])
def test_mildly_degraded_scenes_are_still_read(kind: str) -> None:
    rng = np.random.default_rng(2)
    good = 0
    for _, objects, image in scenes(150, 2):
        for one_kind in reversed(DEGRADE) if kind == "all" else [kind]:
            image = DEGRADE[one_kind](image, rng)
        good += read(detect(image), objects, 2.0 if kind in ("shift", "all") else 1.5)
    assert good >= 0.98 * 150


def stretched(rng: random.Random) -> tuple[Object, np.ndarray]:
    o = one(rng)
    k = rng.choice((1.05, 1 / 1.05)) ** 0.5
    points = [(o.x + 0.97 * k * (x - o.x), o.y + 0.97 / k * (y - o.y)) for x, y in outline(o.shape, o.x, o.y, o.r)]
    return o, draw((points, COLORS[o.color]))


def worn(rng: random.Random) -> tuple[Object, np.ndarray]:
    """Corners rounded with a tenth of the radius: a morphological opening at four times the resolution."""
    o, k = one(rng), 4
    image = Image.new("L", (SIZE * k, SIZE * k))
    ImageDraw.Draw(image).polygon([(k * x, k * y) for x, y in outline(o.shape, o.x, o.y, o.r)], fill=1)
    eroded = ndimage.distance_transform_edt(np.asarray(image)) > 0.1 * o.r * k
    opened = ndimage.distance_transform_edt(~eroded) <= 0.1 * o.r * k
    coverage = opened.reshape(SIZE, k, SIZE, k).mean((1, 3))
    return o, mix(np.full((SIZE, SIZE, 3), BACKGROUND), np.full((SIZE, SIZE, 3), COLORS[o.color]), coverage)


def tinted(rng: random.Random) -> tuple[Object, np.ndarray]:
    o = one(rng)
    r, g, b = (min(max(c + rng.choice((-15, 15)), 0), 255) for c in COLORS[o.color])
    return o, draw((outline(o.shape, o.x, o.y, o.r), (r, g, b)))


@pytest.mark.parametrize("imperfect", [stretched, worn, tinted])
def test_shapes_as_a_good_generator_draws_them_are_accepted(
    imperfect: Callable[[random.Random], tuple[Object, np.ndarray]],
) -> None:
    rng = random.Random(5)
    for o, image in (imperfect(rng) for _ in range(60)):
        assert [(d.shape, d.color) for d in detect(image)] == [(o.shape, o.color)], o


def far_too_blurred(rng: random.Random) -> np.ndarray:
    return blurred(render([one(rng)]), rng.uniform(3, 5))


def merged(rng: random.Random) -> np.ndarray:
    """Two objects of any colours that overlap, neither swallowing the other."""
    while True:
        a, b = one(rng), one(rng)
        n, m, both = (
            (np.abs(render(objects) - np.array(BACKGROUND)).sum(-1) > 100).sum() for objects in ([a], [b], [a, b])
        )
        if both < n + m - 8 and both > n + 0.3 * m and both > m + 0.3 * n:
            return render([a, b])


def half_drawn(rng: random.Random) -> np.ndarray:
    """Half of the object is missing, on any side; a triangle loses a corner, since one cut along a side stays one."""
    o = one(rng)
    toward = rng.choice((30, 150, 270)) + rng.uniform(-45, 45) if o.shape == "triangle" else rng.uniform(0, 360)
    return mix(render([o]), render([]), across(o, math.radians(toward)) + 0.5)


def other_color(rng: random.Random, o: Object) -> np.ndarray:
    color = rng.choice([c for c in COLORS if c != o.color])
    return render([Object(o.shape, color, o.x, o.y, o.r)])


def half_and_half(rng: random.Random) -> np.ndarray:
    o = one(rng)
    return mix(render([o]), other_color(rng, o), across(o, rng.uniform(0, 7)) + 0.5)


def gradient(rng: random.Random) -> np.ndarray:
    o = one(rng)
    return mix(render([o]), other_color(rng, o), across(o, rng.uniform(0, 7)) / (2 * o.r) + 0.5)


def pale(rng: random.Random) -> np.ndarray:
    return mix(render([one(rng)]), render([]), np.full((SIZE, SIZE), 0.4))


def polygon(rng: random.Random, points: Callable[[float, float, float], Points]) -> np.ndarray:
    o = one(rng)
    return draw((points(o.x, o.y, o.r), COLORS[o.color]))


def pentagon(rng: random.Random) -> np.ndarray:
    return polygon(rng, lambda x, y, r: ngon(x, y, r, 5, rng.uniform(0, 7)))


def ellipse(rng: random.Random) -> np.ndarray:
    turn = rng.uniform(0, 7)

    def points(x: float, y: float, r: float) -> Points:
        flat = [(u, v / 1.5) for u, v in ngon(0, 0, r, 90, 0)]
        c, s = math.cos(turn), math.sin(turn)
        return [(x + u * c - v * s, y + u * s + v * c) for u, v in flat]

    return polygon(rng, points)


def diamond(rng: random.Random) -> np.ndarray:
    return polygon(rng, lambda x, y, r: ngon(x, y, r, 4, 0))


def triangle_upside_down(rng: random.Random) -> np.ndarray:
    return polygon(rng, lambda x, y, r: ngon(x, y, r, 3, math.pi / 2))


def blob(rng: random.Random) -> np.ndarray:
    """A smooth outline whose radius varies by 20 % up and down, two to four times around."""
    waves, phase = rng.choice((2, 3, 4)), rng.uniform(0, 7)

    def points(x: float, y: float, r: float) -> Points:
        turns = np.linspace(0, 2 * math.pi, 90, endpoint=False)
        radii = 0.83 * r * (1 + 0.2 * np.cos(waves * turns + phase))
        return list(zip((x + radii * np.cos(turns)).tolist(), (y + radii * np.sin(turns)).tolist(), strict=True))

    return polygon(rng, points)


def ring(rng: random.Random) -> np.ndarray:
    o = one(rng, "circle")
    hole = outline("circle", o.x, o.y, o.r * rng.uniform(0.25, 0.7))
    return draw((outline("circle", o.x, o.y, o.r), COLORS[o.color]), (hole, BACKGROUND))


RUBBISH = [far_too_blurred, merged, half_drawn, half_and_half, gradient, pale, pentagon, ellipse, diamond]
RUBBISH += [triangle_upside_down, blob, ring]


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_rubbish_is_reported_but_not_as_a_clean_object(rubbish: Callable[[random.Random], np.ndarray]) -> None:
    rng = random.Random(6)
    found = [detect(rubbish(rng)) for _ in range(100)]
    assert sum(any(d.shape and d.color for d in ds) for ds in found) <= 1
    assert sum(len(ds) > 0 for ds in found) >= 99  # a picture of rubbish must not look empty


def test_a_two_coloured_circle_keeps_its_shape_and_loses_its_colour() -> None:
    a, b = Object("circle", "red", 32, 32, 16), Object("circle", "blue", 32, 32, 16)
    (found,) = detect(mix(render([a]), render([b]), across(a, 0) + 0.5))
    assert (found.shape, found.color) == ("circle", "")


def test_specks_are_ignored() -> None:
    image = render([Object("square", "green", 32, 32, 12)]).copy()
    image[3:6, 3:6] = COLORS["red"]
    assert [(d.shape, d.color) for d in detect(image)] == [("square", "green")]
    image[3:9, 3:9] = COLORS["red"]  # 36 px are no speck
    assert len(detect(image)) == 2


def test_objects_at_the_border_are_read() -> None:
    objects = [Object("star", "purple", 11, 11, 10), Object("circle", "yellow", 54, 54, 10)]
    assert read(detect(render(objects)), objects, 1.5)
