"""The pages of a steering run: from a real run of the tiny model, and from hostile, unfinished and damaged copies."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_report import HOSTILE, Page

from diffalign import cli
from diffalign.eval import lineage, steering_report
from diffalign.eval.lineage_layout import MOST, MOST_OF_A_STEP, Family, apart, drawn, layout
from diffalign.eval.steering_folder import compared, read, verdict
from diffalign.eval.steering_pictures import CELL, HEADING, MARGIN, ROOM, ROWS
from diffalign.types import UserError

K = 4


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steered") / "run"
    options = f"--model tiny-sd3 --prompts shapes-test --first 2 --steps 6 --particles {K} --lam 5 --resample-at all"
    rewards = f"--reward pickscore:model=tiny-clip --judge jpeg --method fk --out {folder}"
    assert cli.main(["steer", *options.split(), *rewards.split()]) == 0
    return folder


@pytest.fixture
def run(steered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(steered, tmp_path / "run"))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "run.jsonl").read_text().splitlines()]


def rewrite(run: Path, records: list[dict[str, Any]]) -> None:
    (run / "run.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def many(run: Path, n: int, change: Callable[[dict[str, Any], int], None]) -> None:
    """n lines like the first, each changed."""
    records = []
    for index in range(n):
        record = json.loads(json.dumps(lines(run)[0])) | {"index": index}
        change(record, index)
        records.append(record)
    rewrite(run, records)


def shifted(fk: tuple[float, float], spread: float = 0.0) -> Callable[[dict[str, Any], int], None]:
    """The method's (reward, judge) minus those of the other arms, by about `fk`."""

    def change(record: dict[str, Any], index: int) -> None:
        noise = spread * (-1) ** index
        for name, arm in record["arms"].items():
            reward, judge = fk if name == "fk" else (0.0, 0.0)
            arm["rewards"], arm["judges"] = [reward + noise * (name == "fk")], {"jpeg": [judge]}

    return change


def trees(page: Path) -> list[str]:
    return re.findall(r'<svg class="tree".*?</svg>', page.read_text())


def test_page_of_a_real_run(run: Path) -> None:
    path = steering_report.write(run)
    assert path == run / "report.html"
    page, text = Page(path), path.read_text()
    assert page.open == []
    order = [page.text.index(word) for word in ("Arms", "Differences", "Settings", "On the way", "Prompt by prompt")]
    assert order == sorted(order)
    for record in lines(run):
        assert record["prompt"] in page.text
        for arm in record["arms"].values():
            assert steering_report.number(arm["rewards"][0]) in page.text
    pictures = [attrs for tag, attrs in page.elements if tag == "img"]
    assert len(pictures) == 2 * 3 and all(attrs["alt"] for attrs in pictures)
    embedded = str(pictures[-1]["src"]).partition("base64,")[2]
    shown = Image.open(io.BytesIO(base64.b64decode(embedded)))
    with Image.open(run / lines(run)[1]["arms"]["fk"]["images"][0]) as image:
        assert shown.tobytes() == image.convert("RGB").tobytes()  # small pictures enter as they are
    nodes = [len(record["arms"]["fk"]["lineage"]["step"]) for record in lines(run)]
    assert [tree.count("<circle") for tree in trees(path)] == [tree.count("<title>") for tree in trees(path)] == nodes
    assert all("line of the returned image" in tree for tree in trees(path))
    assert "Effective particles" in text and "Starts that still have descendants" in text


def test_page_refers_to_nothing_outside(run: Path) -> None:
    path = steering_report.write(run)
    page = Page(path)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    for _, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on")]
        assert str(attrs.get("src", "data:")).startswith("data:") and "href" not in attrs
    assert "url(" not in path.read_text() and "@import" not in path.read_text()


def test_hostile_words_stay_words(run: Path) -> None:
    records = lines(run)
    records[0]["prompt"] = HOSTILE
    for arm in records[0]["arms"].values():
        arm["warnings"] = [HOSTILE]
        arm["images"] = ["../../" + arm["images"][0]]  # only the run's own images/ are read
    rewrite(run, records)
    settings = json.loads((run / "steer.json").read_text())
    (run / "steer.json").write_text(json.dumps(settings | {"model": HOSTILE, "arguments": {HOSTILE: HOSTILE}}))
    page = Page(steering_report.write(run))
    assert not [tag for tag, attrs in page.elements if tag == "script" or "onerror" in attrs]
    assert page.text.count(HOSTILE) >= 4
    assert not [attrs for tag, attrs in page.elements if tag == "img" and attrs["src"] == "x"]


def test_run_under_way(run: Path) -> None:
    whole = (run / "run.jsonl").read_text().splitlines(keepends=True)
    (run / "run.jsonl").write_text(whole[0] + whole[1][: len(whole[1]) // 2])
    assert "A single prompt allows no conclusion" in Page(steering_report.write(run)).text
    (run / "run.jsonl").write_text(whole[0][:40] + "\n" + whole[1])
    with pytest.raises(UserError, match=r"run\.jsonl:1 "):
        steering_report.write(run)
    (run / "run.jsonl").unlink()
    assert "No prompt is done yet" in Page(steering_report.write(run)).text
    assert not list(run.glob("*.tmp"))


def test_only_steering_runs_are_read(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"has no steer\.json"):
        steering_report.write(tmp_path / "other")
    (run / "steer.json").write_text("[1")
    with pytest.raises(UserError, match="does not hold the settings"):
        steering_report.write(run)


@pytest.mark.parametrize("damage", [{"leaves": [10_000]}, {"rewards": []}, {"judges": {"jpeg": []}}, {"nfe": "<b>"}])
def test_damaged_lines_are_named(run: Path, damage: dict[str, Any]) -> None:
    records = lines(run)
    records[0]["arms"]["fk"] |= damage
    rewrite(run, records)
    with pytest.raises(UserError, match=r"run\.jsonl:1 is no line"):
        read(run)


@pytest.mark.parametrize("change, kind, said", [
    (shifted((1.0, 1.0), 0.1), "up", "fk beats best-of-N at equal cost on pickscore by"),
    (shifted((-1.0, 0.0)), "down", "fk loses to best-of-N"),
    (shifted((0.0, 0.0), 0.1), "open", "cannot be told apart"),
    (shifted((1.0, -1.0), 0.1), "down", "Over-optimised: against best-of-N the steering reward rises while jpeg falls"),
])  # fmt: skip
def test_verdict_is_honest(run: Path, change: Callable[[dict[str, Any], int], None], kind: str, said: str) -> None:
    def same_cost(record: dict[str, Any], index: int) -> None:
        change(record, index)
        for arm in record["arms"].values():
            arm["nfe"], arm["seconds"] = 24, {"model": 1.0, "total": 1.0}

    many(run, 10, same_cost)
    found = read(run)
    got, sentences = verdict(found, compared(found), "{:+.2f}".format)
    assert got == kind and said in " ".join(sentences)
    assert ("Over-optimised" in " ".join(sentences)) == (kind == "down" and "Over" in said)


def test_few_prompts_that_agree_only_lean(run: Path) -> None:
    many(run, 4, shifted((1.0, 0.0)))
    found = read(run)
    kind, sentences = verdict(found, compared(found), "{:+.2f}".format)
    assert kind == "open" and "leans above" in sentences[0]


def test_a_method_alone_and_missing_rewards(run: Path) -> None:
    records = lines(run)
    for record in records:
        record["arms"] = {"fk": record["arms"]["fk"] | {"rewards": [None], "judges": {"jpeg": [None]}}}
    rewrite(run, records)
    settings = json.loads((run / "steer.json").read_text())
    (run / "steer.json").write_text(json.dumps(settings | {"compare": []}))
    page = Page(steering_report.write(run))
    assert "fk ran alone" in page.text and "Differences" not in page.text
    with Image.open(run / "contact.png") as sheet:
        assert sheet.size[0] == MARGIN + CELL + ROOM


def test_contact_sheet_and_long_runs(run: Path) -> None:
    steering_report.write(run)
    with Image.open(run / "contact.png") as sheet:
        assert sheet.size == (MARGIN + 3 * (CELL + ROOM), HEADING + 2 * (CELL + ROOM))
        with Image.open(run / lines(run)[1]["arms"]["base"]["images"][0]) as image:
            middle = image.convert("RGB").resize((CELL, CELL)).getpixel((CELL // 2, CELL // 2))
        got = sheet.getpixel((MARGIN + CELL // 2, HEADING + CELL + ROOM + CELL // 2))
        assert isinstance(got, tuple) and isinstance(middle, tuple)
        assert max(abs(a - b) for a, b in zip(got, middle, strict=True)) < 30
    many(run, ROWS + 3, lambda record, index: None)
    page = Page(steering_report.write(run))
    with Image.open(run / "contact.png") as sheet:
        assert sheet.size[1] == HEADING + ROWS * (CELL + ROOM)
    assert len(trees(run / "report.html")) == steering_report.SHOWN
    assert f"{ROWS + 3 - steering_report.SHOWN} more prompts" in page.text


def test_warnings_that_differ_in_the_step_are_one(run: Path) -> None:
    def warned(record: dict[str, Any], index: int) -> None:
        record["arms"]["fk"]["warnings"] = [f"too few at step {index + 2}: lower lam"] if index < 3 else []

    many(run, 5, warned)
    text = Page(steering_report.write(run)).text
    assert "3 of 5 prompts" in text and "too few at steps 2 to 4: lower lam" in text


def particles(k: int, steps: list[int], seed: int = 0) -> Family:
    """As fk: all weighed and resampled at each step."""
    draw = random.Random(seed)
    step, parent = [0] * k, list[int | None]([None] * k)
    here = list(range(k))
    for s in steps:
        chosen = sorted(draw.choices(here, [draw.random() ** 4 for _ in here], k=k))
        here = list(range(len(step), len(step) + k))
        step, parent = step + [s] * k, [*parent, *chosen]
    return Family(step=step, parent=parent, reward=[None if s == 0 else draw.gauss(s, 1) for s in step])


def comb(m: int, steps: int) -> Family:
    """As svdd: m draws a step from the one that was chosen."""
    step, parent, at = [0], list[int | None]([None]), 0
    for s in range(1, steps + 1):
        parent, step = parent + [at] * m, step + [s] * m
        at = len(step) - 1 - (7 * s) % m
    return Family(step=step, parent=parent, reward=[float(n) for n in range(len(step))])


def funnel() -> Family:
    """As prune: 16, 6, 2 and 1 seeds."""
    step, parent = [0] * 16, list[int | None]([None] * 16)
    before = list(range(16))
    for s, n in ((2, 16), (6, 6), (11, 2), (20, 1)):
        step, parent = step + [s] * n, [*parent, *before[-n:]]
        before = list(range(len(step) - n, len(step)))
    return Family(step=step, parent=parent, reward=[None] * 16 + [float(n) for n in range(25)])


def rounds() -> Family:
    """As noise search: a pivot that stays for several rounds has children in each of them."""
    parents = [None, *[0] * 4, *[2] * 4, *[2] * 4, *[2] * 4, *[15] * 4]
    step = [0, *(1 + n // 4 for n in range(20))]
    return Family(step=step, parent=parents, reward=[float(-n) for n in range(21)])


def bush(seed: int, visits: int) -> Family:
    """As dts: every visit adds a child somewhere and all that follows it to the end."""
    draw, levels = random.Random(seed), [2, 6, 9, 12, 16, 20]
    step, parent, reward = list[int](), list[int | None](), list[float | None]()
    for _ in range(visits):
        inner = [n for n, s in enumerate(step) if s < 20]
        at: int | None = draw.choice(inner) if inner and draw.random() < 0.8 else None
        for s in levels[0 if at is None else levels.index(step[at]) + 1 :]:
            step.append(s)
            parent.append(at)
            reward.append(draw.random() if s == 20 else None)
            at = len(step) - 1
    return Family(step=step, parent=parent, reward=reward)


FAMILIES = {
    "fk8": particles(8, [4, 7, 10, 13, 16, 20]),
    "fk64": particles(64, list(range(1, 21))),
    "close steps": particles(16, [1, 2, 3, 50], 1),
    "svdd": comb(20, 20),
    "prune": funnel(),
    "noise_search": rounds(),
    "dts": bush(0, 60),
    "dts, large": bush(1, 400),
    "one state": Family(step=[0], parent=[None], reward=[None]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_layout_of_trees(name: str) -> None:
    family = FAMILIES[name]
    leaf = len(family.step) - 1
    chosen = drawn(family, leaf)
    at = layout(family, leaf, chosen)
    assert set(family.path(leaf)) <= set(chosen) and len(chosen) <= max(MOST + len(at.columns), len(at.columns))
    if len(family.step) <= 400:
        assert len(chosen) == len(family.step)
    columns: dict[int, list[float]] = {}
    for n in chosen:
        x, y = at.dots[n]
        assert 0 < x < lineage.WIDTH and 0 < y < at.height
        assert x == at.columns[family.step[n]]
        parent = family.parent[n]
        if parent is not None:
            assert at.dots[parent][0] < x - 2 * at.radius
        columns.setdefault(family.step[n], []).append(y)
    for ys in columns.values():
        assert len(ys) <= MOST_OF_A_STEP
        assert all(b - a > at.gap - 1e-6 > 2 * at.radius for a, b in pairwise(sorted(ys)))
    kept = {n for n in chosen if at.standing[n] == "kept"}
    assert kept == set(family.path(leaf))
    lines = at.lines  # of one step to the next: none crosses another
    for _, a, b in lines:
        for _, c, d in (other for other in lines if other[1][0] == a[0]):
            assert (a[1] - c[1]) * (b[1] - d[1]) > -1e-6
    assert all(a[0] < b[0] for _, a, b in lines)


def test_every_node_is_joined_to_its_parent_by_lines() -> None:
    family = rounds()
    at = layout(family, 20, range(21))
    came = {b: a for _, a, b in at.lines}
    for n, parent in enumerate(family.parent):
        place = at.dots[n]
        while parent is not None and place != at.dots[parent]:
            place = came[place]
        assert (parent is None) == (place not in came) or parent is not None


def test_line_of_the_returned_image_is_straight_where_it_alone_goes_on() -> None:
    for family in (comb(20, 20), comb(5, 9), funnel()):
        leaf = next(n for n in reversed(range(len(family.step))) if family.step[n] == max(family.step))
        at = layout(family, leaf, drawn(family, leaf))
        heights = [at.dots[n][1] for n in family.path(leaf)]
        assert max(heights) - min(heights) < at.gap


def test_apart_is_the_least_move() -> None:
    assert apart([0, 10, 20], [1, 1, 1], 5) == [0, 10, 20]
    assert apart([0, 0, 0], [1, 1, 1], 2) == [-2, 0, 2]
    assert apart([0, 0], [3, 1], 4) == [-1, 3]  # the heavier moves less


def test_tree_tells_what_it_shows() -> None:
    whole = lineage.picture(particles(8, [4, 7]), 23)
    assert "8 starts, 24 states at 3 steps" in whole.text and "Drawn" not in whole.text
    assert whole.svg.count("<circle") == 24 and "step 7: " in whole.svg and 'role="img"' in whole.svg
    cut = lineage.picture(FAMILIES["fk64"], 64 * 21 - 1)
    assert cut.svg.count("<circle") < 64 * 21 and f"Drawn: {cut.svg.count('<circle')} of the states" in cut.text
    assert cut.svg.count("unknown") > 1  # some of the starts that died at once are still seen
    assert "at 6 rounds" in lineage.picture(rounds(), 20, "round").text


def test_tones_hold_equally_many_dots() -> None:
    family = Family(step=list(range(70)), parent=[None, *range(69)], reward=[2.0**k for k in range(70)])
    svg = lineage.picture(family, 69).svg
    assert [len(re.findall(f'"tone{k} ', svg)) for k in range(lineage.TONES)] == [10] * lineage.TONES
    alike = lineage.picture(Family(step=[0, 1], parent=[None, 0], reward=[3.0, 3.0]), 1).svg
    assert len(set(re.findall(r'"(tone\d) ', alike))) == 1


@pytest.mark.parametrize("broken", [
    {"step": [0, 0], "parent": [None, 0], "reward": [None, None]},  # a parent of the same step
    {"step": [0, 1], "parent": [1, None], "reward": [None, None]},  # a parent that comes later
    {"step": [0], "parent": [None, 0], "reward": [None]},
])  # fmt: skip
def test_families_are_trees(broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Family(**broken)
