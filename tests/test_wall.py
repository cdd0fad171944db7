"""The gallery: its structure without JavaScript, hostile prompts, what its rules choose, and what is drawn over pictures."""

from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import galleries
import numpy as np
import pytest
from PIL import Image

from diffalign.eval import overlays, selections, votes, wall
from diffalign.eval.gallery import Gallery, read
from diffalign.eval.gallery_files import inspect
from diffalign.eval.pictures import Pictures
from diffalign.eval.records import line

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'><b>\u202e\U0001f600"
VOID = {"img", "input", "br", "meta"}


class Parts(html.parser.HTMLParser):
    """Elements with the texts inside them; `open` is what was never closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, kind: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.elements if kind in str(attrs.get("class", "")).split()]


def built(folder: Path, originals: bool = False) -> str:
    found = read(folder)
    pictures = Pictures(folder)
    try:
        return str(wall.build(found, inspect(found), pictures, originals))
    finally:
        pictures.finish()


def data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="wall-data">(.*?)</script>', page, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def values(table: dict[str, list[list[float | None]]]) -> galleries.Values:
    """Of the first reward 'geneval': table[model][prompt][k]; of the others zero."""
    return lambda model, reward, p, k, rng: table[model][p][k] if reward == "geneval" else 0.0


def details(folder: Path, name: str, reward: str, told: dict[str, Any]) -> None:
    """Add details to every score of a reward."""
    path = folder / name / "scores.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    path.write_text("".join(line(v | {"details": told} if v["reward"] == reward else v) for v in lines))


def test_a_row_a_prompt_and_a_column_a_contestant(tmp_path: Path) -> None:
    folder = galleries.write(tmp_path / "e", models=["base", "one", "two"], prompts=5, images=2)
    page = built(folder)
    parts, found = Parts(page), read(folder)
    assert parts.open == []
    rows, cells, shots = parts.of("row"), parts.of("cell"), parts.of("shot")
    assert [row["id"] for row in rows] == [f"p={p:04d}" for p in range(5)]
    assert len(cells) == 15 and len(shots) == 30 and "no picture" not in page
    images = [attrs for tag, attrs in parts.elements if tag == "img" and attrs.get("loading")]
    assert all((folder / str(image["src"])).is_file() for image in images)
    assert all(image["width"] == "32" and image["height"] == "32" for image in images)
    assert images[2]["alt"] == "picture number 0 (one, seed 0)"
    assert {attrs["href"] for tag, attrs in parts.elements if tag == "a"} == {f"#p={p:04d}" for p in range(5)}
    text = "".join(parts.texts)
    for name in found.entries:
        for value in found.per_prompt(name, "geneval"):
            assert wall.number(float(value)) in text
    assert data(page)["means"][0][1][2] == pytest.approx(found.per_prompt("one", "geneval")[2], rel=1e-5)
    assert data(page)["evaluation"] == votes.fingerprint(found)
    again = re.sub(r"<dialog.*?</dialog>", "", built(folder), flags=re.DOTALL)
    assert again == re.sub(r"<dialog.*?</dialog>", "", page, flags=re.DOTALL)


def test_refers_to_nothing_outside_and_runs_nothing_inline(tmp_path: Path) -> None:
    page = built(galleries.write(tmp_path / "e", prompts=3))
    for tag, attrs in Parts(page).elements:
        assert not [name for name in attrs if name.startswith("on")]
        assert str(attrs.get("src", "img/")).startswith("img/") and str(attrs.get("href", "#")).startswith("#")
        assert tag not in ("link", "iframe", "object", "embed", "base")
    everything = page + wall.style() + wall.script()
    assert not re.search(
        r"https?://|url\(|@import|fetch\(|innerHTML|insertAdjacent|document\.write|eval\(|localStorage", everything
    )
    assert "</script" not in wall.script()


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    folder = galleries.write(tmp_path / "e", prompts=3, texts=[HOSTILE, "", "\n x \n"])
    path = folder / "prompts.jsonl"
    lines = [json.loads(text) for text in path.read_text("utf-8").splitlines()]
    lines[0] |= {"tag": HOSTILE, "tags": [HOSTILE, "</script>", 3, None]}
    path.write_text("".join(map(line, lines)), "utf-8")
    details(folder, "tuned", "geneval", {"tokens": ["</script><script>", HOSTILE], "log_probs": [-1.0, -2.0]})
    page = built(folder)
    parts = Parts(page)
    assert [tag for tag, _ in parts.elements].count("script") == 1 and parts.open == []
    assert HOSTILE in "".join(parts.texts)
    assert not [attrs for tag, attrs in parts.elements if tag == "img" and attrs.get("src") == "x"]
    assert json.loads(str(parts.of("row")[0]["data-tags"])) == [HOSTILE, "</script>"]
    assert data(page)["texts"] == [["</script><script>", HOSTILE]]


def test_missing_pictures_have_their_place(tmp_path: Path) -> None:
    folder = galleries.write(tmp_path / "e", prompts=3, images=2)
    (folder / "tuned" / "images" / "0001_00.png").unlink()
    made = folder / "base" / "made.jsonl"
    made.write_text("".join(made.read_text().splitlines(keepends=True)[:-2]))  # prompt 2 is not made yet
    page = built(folder)
    why = [str(cell["aria-label"]) for cell in Parts(page).of("gone")]
    assert {"no picture: missing", "no picture: not made yet"} == set(why) and Parts(page).open == []
    assert len(Parts(page).of("shot")) == 12 - 3
    assert sorted(data(page)["differences"]) == ["1.0.0", "1.0.1", "1.1.1"]


def test_the_best_is_framed_and_nobody_when_level(tmp_path: Path) -> None:
    table = {"base": [[0, 1], [1, 1], [None, None]], "tuned": [[1, 1], [1, 1], [2, None]]}
    folder = galleries.write(tmp_path / "e", prompts=3, images=2, values=values(table))
    won = ["won" in str(cell["class"]).split() for cell in Parts(built(folder)).of("cell")]
    assert won == [False, True, False, False, False, False]  # of the third only one is known


def test_bars_point_to_the_side_of_the_difference() -> None:
    svg = wall.bars([1.0, -0.5, math.nan, 0.0, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0])
    assert re.findall(r'class="(up|down)" d="([^"]*)"', svg) == [
        ("up", "M36 4h35.0v8h-35.0zM36 68h35.0v8h-35.0z"),  # a larger one fills its half and no more
        ("down", "M36 20h-17.5v8h17.5z"),
    ]
    assert 'path class="up"' not in wall.bars([1.0], [0.0])


def evaluation(folder: Path, table: dict[str, list[list[float | None]]], **other: Any) -> Gallery:
    count = len(table["base"])
    galleries.write(
        folder, models=list(table), prompts=count, images=len(table["base"][0]), values=values(table), **other
    )
    return read(folder)


def test_extremes_are_the_largest_pairs_each_prompt_once(tmp_path: Path) -> None:
    base = [[0.0, 0.0] for _ in range(12)]
    one = [[0.1 * p, -0.1 * p] for p in range(12)]
    two = [[0.0, 5.0 if p == 3 else 0.0] for p in range(12)]
    found = evaluation(tmp_path / "e", {"base": base, "one": one, "two": two, "base-again": [[9.0, 9.0]] * 12})
    best, worst = selections.extremes(found, "geneval")
    assert [(p.name, *p.key) for p in best] == [("two", "0003", 1)] + [("one", f"{p:04d}", 0) for p in range(11, 4, -1)]
    assert [(p.name, *p.key) for p in worst] == [("one", f"{p:04d}", 1) for p in range(11, 3, -1)]
    assert [p.value for p in worst] == pytest.approx([-0.1 * p for p in range(11, 3, -1)])
    assert selections.extremes(found, "pickscore") == ([], [])  # nothing rose, nothing fell


def test_scores_that_are_not_known_are_not_chosen(tmp_path: Path) -> None:
    table = {"base": [[0.0], [None], [0.0]], "one": [[None], [1.0], [1.0]]}
    best, worst = selections.extremes(evaluation(tmp_path / "e", table), "geneval")
    assert [p.key for p in best] == [("0002", 0)] and worst == []


def test_a_lone_baseline_shows_its_highest_and_lowest(tmp_path: Path) -> None:
    found = evaluation(tmp_path / "e", {"base": [[float(p), 0.5] for p in range(10)]})
    best, worst = selections.extremes(found, "geneval")
    assert [p.key for p in best] == [(f"{p:04d}", 0) for p in range(9, 1, -1)]
    assert [(p.key, p.value) for p in worst] == [(("0000", 0), 0.0), (("0001", 1), 0.5)]
    assert "disagree" not in built(tmp_path / "e").split("<dialog")[0]


def test_disagreements_are_in_standard_deviations(tmp_path: Path) -> None:
    small, large = [1.0, -1.0, 3.0, 2.0, 0.0], [100.0, 300.0, -200.0, 100.0, 0.0]

    def score(model: str, reward: str, p: int, k: int, rng: np.random.Generator) -> float:
        return (small if reward == "geneval" else large)[p] if model == "one" else 0.0

    galleries.write(tmp_path / "e", models=["base", "one"], prompts=5, images=1, values=score)
    found = read(tmp_path / "e")
    z = np.array([small, large]) / np.std([small, large], axis=1, keepdims=True)
    picks = selections.disagreements(found)
    assert [p.key[0] for p in picks] == ["0002", "0001"]  # the only ones where one rises and another falls
    assert [p.value for p in picks] == pytest.approx([np.ptp(z[:, 2]), np.ptp(z[:, 1])])
    told = data(built(tmp_path / "e"))["disagreement"]
    assert told[0] is None and told[2] == pytest.approx(np.ptp(z[:, 2]), rel=1e-5)


def test_lists_of_the_page_follow_the_rules(tmp_path: Path) -> None:
    folder = galleries.write(tmp_path / "e", models=["base", "one"], prompts=12, images=2)
    page, found = built(folder), read(folder)
    best, worst = selections.extremes(found, "geneval")
    links = re.findall(r'<a href="#p=(\d{4})">\d{4}</a>, picture (\d)', page)
    assert links[: len(best) + len(worst)] == [(p.key[0], str(p.key[1] + 1)) for p in [*best, *worst]]
    odd = selections.disagreements(found)
    assert links[-len(odd) :] == [(p.key[0], str(p.key[1] + 1)) for p in odd] and 0 < len(odd) <= selections.MOST
    assert {selections.RULE, selections.RULE_DISAGREE} <= set(Parts(page).texts)


def test_difference_is_the_mean_over_channels(tmp_path: Path) -> None:
    a = np.zeros((4, 6, 3), np.uint8)
    b = a.copy()
    b[0, 0] = (0, 48, 0)  # a mean of 16, a quarter of the brightest
    b[3, 5] = 255
    pictures = Image.fromarray(a), Image.fromarray(b)
    drawn = np.asarray(overlays.difference(*pictures))
    assert drawn.shape == (4, 6, 3) and drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn, np.asarray(overlays.difference(*reversed(pictures))))
    np.testing.assert_array_equal(drawn[1, 1], overlays.STOPS[0])
    np.testing.assert_array_equal(drawn[3, 5], overlays.STOPS[-1])
    np.testing.assert_allclose(drawn[0, 0], overlays.colours(np.array([[0.25]]))[0, 0], atol=3)
    tall = Image.new("RGB", (200, 400))
    assert overlays.difference(tall, tall).size == (96, 192)
    light = overlays.colours(np.linspace(0, 1, 50)[None])[0] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > 0).all()


def test_heat_of_a_map() -> None:
    drawn = overlays.heat({"map": [[0.0, 0.0], [0.0, 1.0]]})
    assert drawn is not None and drawn.shape == (overlays.MAP_SIDE, overlays.MAP_SIDE, 3)
    np.testing.assert_array_equal(drawn[0, 0], overlays.STOPS[0])
    np.testing.assert_array_equal(drawn[-1, -1], overlays.STOPS[-1])
    for odd in ({}, {"map": None}, {"map": []}, {"map": [[1.0], [1.0, 2.0]]}, {"map": "x"}, {"map": [[math.nan]]}):
        assert overlays.heat(odd) is None


def test_tones_of_an_echo() -> None:
    told = {"tokens": ["a", " red", " cat"], "log_probs": [-9.0, -1.5, -0.01], "gain": [-2, 0.1, 3.0]}
    echo = overlays.echo(told, "log_probs")
    assert echo is not None and (echo.tokens, echo.tones) == (("a", " red", " cat"), "036")
    gain = overlays.echo(told, "gain")
    assert gain is not None and gain.tones == "036"
    for odd in (
        {},
        {"tokens": None, "log_probs": None},
        {"tokens": ["a"], "log_probs": [1.0, 2.0]},
        {"tokens": "a", "log_probs": [1.0]},
    ):
        assert overlays.echo(odd, "log_probs") is None


def test_overlays_reach_the_page(tmp_path: Path) -> None:
    folder = galleries.write(tmp_path / "e", prompts=2, images=1)
    details(folder, "tuned", "geneval", {"tokens": ["a", " b"], "log_probs": [-0.01, -9.0]})
    details(folder, "base", "geneval", {"tokens": ["a", " b"], "log_probs": [-3.0, -9.0]})
    details(folder, "tuned", "pickscore", {"map": [[0.0, 1.0]]})
    told = data(built(folder))
    assert told["texts"] == [["a", " b"]]  # shared
    assert told["echoes"][0]["of"] == {"0.0.0": [0, "20"], "0.1.0": [0, "20"], "1.0.0": [0, "60"], "1.1.0": [0, "60"]}
    assert list(told["maps"]) == ["pickscore"] and sorted(told["maps"]["pickscore"]) == ["1.0.0", "1.1.0"]
    assert sorted(told["differences"]) == ["1.0.0", "1.1.0"]
    drawn = [*told["differences"].values(), *told["maps"]["pickscore"].values()]
    assert all((folder / address).is_file() for address in drawn)


def test_differences_are_limited_and_the_first_images_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wall, "DIFFERENCES", 5)
    folder = galleries.write(tmp_path / "e", models=["base", "one"], prompts=3, images=3)
    assert list(data(built(folder))["differences"]) == ["1.0.0", "1.1.0", "1.2.0", "1.0.1", "1.1.1"]


def test_alt_of_long_prompts_is_cut() -> None:
    told = wall.alt("x" * 500, "base", 7)
    assert len(told) < 200 and told.endswith("\N{HORIZONTAL ELLIPSIS} (base, seed 7)")
