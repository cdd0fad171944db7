"""The report in a real headless Chromium, from a file and under its own policy: driven by keys and clicks alone.

Needs a Chromium or Chrome on the path (Debian's package is called chromium), or its address in CHROMIUM.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import galleries
import numpy as np
import pytest

from diffalign.eval import gallery_report, serving, votes
from diffalign.eval.gallery import read
from diffalign.eval.records import line

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'><b>"
RIGHT_TO_LEFT = "\u202e\u05e9\u05dc\u05d5\u05dd \U0001f600 <!-- {{ 7 * 7 }} ${1}"
MODELS, SIZE = ("base", "one", "two"), 24
REWARDS = {"geneval": {"name": "geneval"}, "pickscore": {"name": "pickscore"}}
GAINS = {"one": (0.0, 3.0, 1.0, -2.0, 2.0, -1.0), "two": (5.0, 0.0, 4.0, 1.0, 3.0, 2.0)}

pytestmark = pytest.mark.skipif(
    chromium.binary() is None, reason="no chromium on the path; Debian: apt install chromium"
)


def value(model: str, reward: str, p: int, k: int, rng: np.random.Generator) -> float:
    sign = 1.0 if reward == "geneval" else -1.0
    return 10.0 * p + (sign * GAINS[model][p] if model in GAINS else 0.0)


def picture(model: str, p: int, k: int, rng: np.random.Generator) -> np.ndarray:
    pixels = np.full((SIZE, SIZE, 3), 40 * p, np.uint8)
    pixels[: SIZE // 2, : SIZE // 2, MODELS.index(model)] = 255 - 40 * k
    return pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "a folder #1 & more"
    texts = [HOSTILE, RIGHT_TO_LEFT, "a cat", "a dog", "two cats", "x" * 400]
    galleries.write(folder, MODELS, 6, 2, REWARDS, value, picture, texts=texts, size=SIZE)
    prompts = [json.loads(text) for text in (folder / "prompts.jsonl").read_text("utf-8").splitlines()]
    prompts[0]["tags"] = [HOSTILE]
    (folder / "prompts.jsonl").write_text("".join(map(line, prompts)), "utf-8")
    scores = [json.loads(text) for text in (folder / "one" / "scores.jsonl").read_text("utf-8").splitlines()]
    for score in scores:
        if score["reward"] == "geneval":
            score["details"] = {"tokens": [HOSTILE, " b"], "log_probs": [-9.0, -0.01], "map": [[0.0, 1.0], [0.5, 0.2]]}
    (folder / "one" / "scores.jsonl").write_text("".join(map(line, scores)), "utf-8")
    gallery_report.write(folder)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    with chromium.Browser(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def page(browser: chromium.Browser, folder: Path) -> Iterator[chromium.Browser]:
    """A fresh load; whatever a test does, nothing may be complained about."""
    browser.problems.clear()
    browser.open("about:blank")
    browser.open((folder / "index.html").as_uri())
    yield browser
    assert browser.problems == []


def order(page: chromium.Browser) -> list[int]:
    """Numbers of the prompts that are shown, from top to bottom."""
    return list(
        page.run(
            '[...document.querySelectorAll(".row")].filter((r) => r.checkVisibility()).map((r) => Number(r.dataset.p))'
        )
    )


def text(page: chromium.Browser, selector: str) -> str:
    return str(page.run(f"document.querySelector({json.dumps(selector)}).textContent"))


def zoomed(page: chromium.Browser) -> tuple[float, str]:
    """Displayed over own pixels, and how they are drawn."""
    page.until(
        "document.getElementById('above').naturalWidth > 0 && document.getElementById('plane').style.width !== ''"
    )
    found = page.run("[document.getElementById('above').getBoundingClientRect().width / document.getElementById('above').naturalWidth,"
                     "getComputedStyle(document.getElementById('above')).imageRendering]")  # fmt: skip
    return float(found[0]), str(found[1])


def test_opens_quietly_and_hostile_words_do_nothing(page: chromium.Browser) -> None:
    assert text(page, '[data-p="0"] .prompt') == HOSTILE and text(page, '[data-p="1"] .prompt') == RIGHT_TO_LEFT
    assert page.run('document.querySelectorAll("img[src=x], [onerror], b b").length') == 0
    assert page.run('document.querySelectorAll("script:not([type])").length') == 1
    page.run("scrollTo(0, document.body.scrollHeight)")
    page.run('document.querySelectorAll("details").forEach((d) => { d.open = true; })')
    for p in range(6):
        page.run(f"document.querySelector('[data-p=\"{p}\"]').scrollIntoView()")
    page.until('[...document.querySelectorAll(".shot img")].every((i) => i.complete && i.naturalWidth > 0)')
    assert page.run("document.querySelector('#told') !== null && document.querySelector('#controls').hidden === false")


def test_outside_is_out_of_reach(browser: chromium.Browser, folder: Path) -> None:
    browser.open((folder / "index.html").as_uri())
    refused = 'fetch("report.json").then(() => "read", () => "refused")'
    assert browser.run(refused) == "refused"
    assert browser.run('new Promise((done) => { const i = new Image(); i.onload = () => done("read"); i.onerror = () => done("refused");'
                       ' i.src = "http://127.0.0.1:9/x.png"; })') == "refused"  # fmt: skip
    assert any("Content Security Policy" in problem for problem in browser.problems)


def test_search_filter_and_sort(page: chromium.Browser) -> None:
    assert order(page) == [0, 1, 2, 3, 4, 5]
    page.key("/", *"cat")
    assert order(page) == [2, 4] and text(page, "#count") == "2 of 6 prompts"
    page.key("Tab")
    page.run(
        "document.getElementById('find').value = ''; document.getElementById('find').dispatchEvent(new Event('input'))"
    )
    page.choose("#tag", "counting")
    assert order(page) == [1, 4]
    page.choose("#tag", HOSTILE)
    assert order(page) == [0]
    page.choose("#tag", "")
    page.choose("#sort", "gain")  # of the first rival in the first reward
    assert order(page) == [1, 4, 2, 0, 5, 3]
    page.choose("#of", "2")
    assert order(page) == [0, 2, 4, 5, 3, 1]
    page.choose("#by", "1")
    assert order(page) == [1, 3, 5, 4, 2, 0]
    assert text(page, "#judged") == "pickscore"
    page.choose("#sort", "loss")
    assert order(page) == [0, 2, 4, 5, 3, 1]
    page.choose("#sort", "worst")
    assert order(page) == [0, 1, 2, 3, 4, 5]
    page.choose("#sort", "disagreement")
    assert order(page)[:2] == [0, 2]
    page.choose("#sort", "random")
    assert sorted(order(page)) == [0, 1, 2, 3, 4, 5]
    page.choose("#sort", "set")
    assert order(page) == [0, 1, 2, 3, 4, 5]


def test_frame_follows_the_reward(page: chromium.Browser) -> None:
    won = "document.querySelectorAll(\"[data-p='0'] .cell.won .who\")"
    assert page.run(f"[...{won}].map((e) => e.textContent)") == ["two"]
    page.choose("#by", "1")
    assert page.run(f"[...{won}].map((e) => e.textContent)") == ["base", "one"]


def test_first_or_all_pictures(page: chromium.Browser) -> None:
    visible = '[...document.querySelectorAll(".shot")].filter((s) => s.checkVisibility()).length'
    assert page.run(visible) == 6 * 3 * 2
    page.choose("#shown", "first")
    assert page.run(visible) == 6 * 3


def test_links_lead_to_rows_even_filtered_ones(page: chromium.Browser) -> None:
    page.key("/", *"dog")
    assert order(page) == [3]
    page.run('location.hash = "#p=0005"')
    page.until('Math.abs(document.getElementById("p=0005").getBoundingClientRect().top) < innerHeight')
    assert order(page) == [0, 1, 2, 3, 4, 5]


def test_lightbox_by_keys(page: chromium.Browser) -> None:
    page.click('[data-p="0"] [data-m="0"] .shot')
    assert page.run("document.getElementById('lightbox').open") and text(page, "#light-title") == "base, picture 1"
    scale, drawn = zoomed(page)
    assert scale > 4 and drawn == "pixelated"
    page.key("ArrowRight")
    assert text(page, "#light-title").startswith("one,") and text(page, "#light-prompt") == HOSTILE
    assert page.run("document.getElementById('above').src").endswith("/one/images/0000_00.png")  # the file itself
    page.key("]")
    assert text(page, "#light-title") == "one, picture 2"
    page.key("[", "ArrowDown", "ArrowDown")
    assert text(page, "#light-prompt") == "a cat"
    page.key("ArrowUp", "ArrowLeft", "ArrowLeft")
    assert text(page, "#light-prompt") == RIGHT_TO_LEFT and text(page, "#light-title").startswith("two,")
    page.key("f")
    assert text(page, "#light-title").startswith("base (reference)")
    assert page.run("[above.checkVisibility(), below.checkVisibility()]") == [False, True]
    page.key("f", "w")
    assert page.run("[above.checkVisibility(), below.checkVisibility(), getComputedStyle(above).clipPath]") == [
        True, True, "inset(0px 0px 0px 50%)",
    ]  # fmt: skip
    page.run("slider.focus()")
    page.key("ArrowRight")
    assert page.run("getComputedStyle(above).clipPath") == "inset(0px 0px 0px 51%)"
    assert text(page, "#light-title").count("two") == 1  # the slider has the arrows, not the wall
    page.key("w", "9")
    assert zoomed(page)[0] == pytest.approx(1)
    page.key("+")
    assert zoomed(page) == (pytest.approx(1.5), "pixelated")
    page.key("-", "-")
    assert zoomed(page) == (pytest.approx(1 / 1.5), "auto")
    page.key("0")
    assert zoomed(page)[0] == pytest.approx(scale, rel=0.3)
    page.key("Escape")
    assert not page.run("document.getElementById('lightbox').open")
    # where one has got to; a dialog's close event comes a little later than the key
    page.until("document.activeElement.closest('.row')?.dataset.p == '1'")


def test_lightbox_overlays(page: chromium.Browser) -> None:
    page.click('[data-p="2"] [data-m="1"] .shot')
    page.key("d")
    page.until("layer.naturalWidth > 0")
    assert text(page, "#light-title") == "Difference of one and base, brightest from 64 of 255, picture 1"
    assert page.run("layer.src").endswith(".webp")
    page.key("ArrowRight", "x", "ArrowLeft")  # two becomes the reference: the browser subtracts
    assert text(page, "#light-title").startswith("Difference of one and two") and "by the browser" in text(
        page, "#light-title"
    )
    assert page.run("[layer.checkVisibility(), getComputedStyle(above).mixBlendMode]") == [False, "difference"]
    page.key("m")
    assert text(page, "#light-title") == "one, picture 1, with the map of geneval"
    page.key("e")
    assert page.run("[...echo.children].map((e) => [e.textContent, e.className])") == [
        [HOSTILE, "tone0"],
        [" b", "tone6"],
    ]
    page.key("ArrowRight")
    assert "no map of geneval" in text(page, "#light-title") and "not known" in text(page, "#legend")


def test_wheel_zooms_at_the_pointer(page: chromium.Browser) -> None:
    page.click('[data-p="2"] [data-m="1"] .shot')
    before, _ = zoomed(page)
    x, y, across = page.run(
        "(() => { const r = above.getBoundingClientRect(); return [r.left + r.width / 4, r.top + r.height / 4, r.width]; })()"
    )
    page.send("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=-400)
    page.until(f"above.getBoundingClientRect().width > {across} * 2")
    after, _ = zoomed(page)
    assert after == pytest.approx(before * np.e, rel=0.01)
    left, width = page.run("(() => { const r = above.getBoundingClientRect(); return [r.left, r.width]; })()")
    assert (x - left) / width == pytest.approx(0.25, abs=0.01)


def test_thumbnails_by_keys(page: chromium.Browser) -> None:
    page.run("document.querySelector('[data-p=\"1\"] .shot').focus()")
    here = "(() => { const s = document.activeElement; return [s.closest('.row').dataset.p, s.closest('.cell').dataset.m, s.dataset.k]; })()"
    page.key("ArrowRight", "ArrowRight")
    assert page.run(here) == ["1", "1", "0"]
    page.key("ArrowDown")
    assert page.run(here) == ["2", "1", "0"]
    page.key("ArrowUp", "ArrowUp", "ArrowLeft")
    assert page.run(here) == ["0", "0", "1"]
    page.key("Enter")
    assert text(page, "#light-title") == "base, picture 2"
    page.key("Escape")


def test_blind_votes_are_exported(page: chromium.Browser, folder: Path, tmp_path: Path) -> None:
    page.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.choose("#sides", "all")
    page.click("#blind")
    assert set(page.run('[...document.querySelectorAll(".who")].map((e) => e.textContent)')) == {"A", "B", "C"}
    assert not page.run('document.getElementById("of").checkVisibility()')
    alts = page.run('[...document.querySelectorAll(".shot img")].map((i) => i.alt)')
    assert not any("(base" in alt or "(one" in alt or "(two" in alt for alt in alts)
    assert (
        page.run(
            '[...document.querySelectorAll("#chosen, .means, .shot span")].filter((e) => e.checkVisibility()).length'
        )
        == 0
    )
    assert page.run(
        '[...document.querySelector("[data-p=\'3\']").querySelectorAll(".who")].map((e) => e.textContent)'
    ) == ["A", "B", "C"]
    places = "[...document.querySelectorAll('.row')].map((r) => [...r.querySelectorAll('.cell')].map((c) => Number(c.dataset.m)))"
    before: list[list[int]] = page.run(places)
    assert all(sorted(row) == [0, 1, 2] for row in before)

    page.click('[data-p="0"] .cell:nth-of-type(3) .vote')  # the second picture column; the first div is the prompt
    page.run("document.querySelector('[data-p=\"1\"] .shot').focus()")
    page.key("3")
    page.run("document.querySelector('[data-p=\"2\"] .shot').focus()")
    page.key("1", "0")  # a change of mind
    page.run("document.querySelector('[data-p=\"3\"] .shot').focus()")
    page.key("1", "1")  # and a vote taken back
    page.click('[data-p="4"] .shot')
    assert text(page, "#light-title") == "A, picture 1" and text(page, "#light-scores") == ""
    page.key("Escape", "r")
    assert text(page, "#told").startswith("Votes: ")
    page.run("document.querySelector('[data-p=\"5\"] .shot').focus()")
    page.key("1")  # names are known now: not counted
    page.click("#export")
    cast = exported(tmp_path)
    votes.check(cast, read(folder))
    named = [[MODELS[m] for m in row] for row in before]
    assert [(v.id, list(v.shown), v.best) for v in cast] == [
        ("0000", named[0], named[0][1]), ("0001", named[1], named[1][2]), ("0002", named[2], None),
    ]  # fmt: skip
    page.key("b")
    assert page.run(places) == [[0, 1, 2]] * 6
    assert page.run('document.querySelector(".shot img").alt').endswith("(base, seed 0)")


def exported(folder: Path) -> list[votes.Vote]:
    """The votes that were saved into a folder, once the browser has done so."""
    for _ in range(500):
        if (folder / "votes.json").is_file() and (folder / "votes.json").read_text().endswith("}\n"):
            break
        time.sleep(0.02)
    return votes.read([folder / "votes.json"])


def mixed(seed: int, row: int, place: int) -> float:
    """The page's generator, written anew."""
    h = (seed ^ (row + 1) * 0x9E3779B1 ^ (place + 1) * 0x85EBCA77) % 2**32
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return (h ^ h >> 16) / 2**32


def test_blind_votes_on_two_of_a_row(page: chromium.Browser, folder: Path, tmp_path: Path) -> None:
    """Who is shown and on which side follows from the exported seed; all else of a row is hidden."""
    page.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.click("#blind")
    seen = "[...document.querySelectorAll('.row')].map((r) => [...r.querySelectorAll('.cell')].filter((c) => c.checkVisibility()).map((c) => Number(c.dataset.m)))"
    sides: list[list[int]] = page.run(seen)
    assert all(len(set(row)) == 2 for row in sides)
    page.run("document.querySelector('[data-p=\"0\"] .shot').focus()")
    page.key("3", "2")  # there is no third
    for p in (1, 2, 3, 4):
        page.run(f"document.querySelector('[data-p=\"{p}\"] .cell:not([hidden]) .shot').focus()")
        page.key("1" if p != 3 else "0")
    page.key("Enter")  # where the focus is
    assert text(page, "#light-title") == "A, picture 1"
    page.key("ArrowRight")
    assert text(page, "#light-title") == "B, picture 1"
    page.key("ArrowUp")  # to whoever is on that side there
    assert text(page, "#light-title") == "B, picture 1" and text(page, "#light-prompt") == "a dog"
    page.key("ArrowRight")
    assert text(page, "#light-title") == "A, picture 1"  # of two
    page.key("Escape")
    page.click("#export")
    cast = exported(tmp_path)
    votes.check(cast, read(folder))
    assert [v.best for v in cast] == [
        MODELS[sides[p][side]] if side is not None else None for p, side in enumerate((1, 0, 0, None, 0))
    ]
    for p, vote in enumerate(cast):
        assert vote.seed is not None and vote.shown == tuple(MODELS[m] for m in sides[p])
        places = [0, 1, 2]
        for i in (2, 1):
            j = int(mixed(vote.seed, p, i) * (i + 1))
            places[i], places[j] = places[j], places[i]
        assert places[:2] == sides[p]
    page.choose("#sides", "all")
    assert all(sorted(row) == [0, 1, 2] for row in page.run(seen))
    page.key("b")
    assert page.run(seen) == [[0, 1, 2]] * 6


def test_light_and_dark(page: chromium.Browser) -> None:
    def colours() -> Any:
        return page.run(
            '[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector(".row .what")).backgroundColor]'
        )

    light = colours()
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    dark = colours()
    page.send("Emulation.setEmulatedMedia", features=[])
    assert light[0] == light[1] != dark[0] == dark[1]


def test_readable_without_javascript(browser: chromium.Browser, folder: Path) -> None:
    browser.problems.clear()
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open((folder / "index.html").as_uri() + "?plain")
        document = browser.send("DOM.getDocument", depth=-1)["root"]
        browser.send("DOM.querySelector", nodeId=document["nodeId"], selector="noscript p")
        box = browser.send("DOM.querySelector", nodeId=document["nodeId"], selector='[data-p="2"] [data-m="1"] .means')
        size = browser.send("DOM.getBoxModel", nodeId=box["nodeId"])["model"]
        assert size["width"] > 50 and size["height"] > 20
        controls = browser.send("DOM.querySelector", nodeId=document["nodeId"], selector="#controls")
        assert "hidden" in browser.send("DOM.getAttributes", nodeId=controls["nodeId"])["attributes"]
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.problems == []


def test_no_sideways_scrolling_of_the_page(page: chromium.Browser) -> None:
    for width in (1400, 800, 400):
        page.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        room = page.run("document.documentElement.clientWidth")
        ends = "[...document.querySelectorAll('#wall, #wall > *, #chosen, #chosen *')].map((e) => e.getBoundingClientRect().right)"
        assert max(page.run(ends)) <= room, width
    page.send("Emulation.clearDeviceMetricsOverride")


def test_served_page(browser: chromium.Browser, folder: Path) -> None:
    browser.problems.clear()
    with serving.server(folder) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        try:
            browser.open(f"http://localhost:{running.server_address[1]}/")
            browser.click('[data-p="0"] [data-m="1"] .shot')
            browser.key("d")
            browser.until("layer.naturalWidth > 0 && above.naturalWidth > 0")
            assert browser.run("above.src").endswith("/one/images/0000_00.png")
        finally:
            running.shutdown()
            thread.join(10)
    assert browser.problems == []


def test_a_single_file_works_alone(browser: chromium.Browser, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    alone = tmp_path / "alone.html"
    gallery_report.write(copy, mode="single").rename(alone)
    shutil.rmtree(copy)
    browser.problems.clear()
    browser.open(alone.as_uri())
    browser.click('[data-p="0"] [data-m="1"] .shot')
    browser.key("d")
    browser.until("layer.naturalWidth > 0 && above.naturalWidth > 0")
    assert browser.problems == []
