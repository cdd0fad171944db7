"""The page of an evaluation: closed-form numbers, hostile prompts, folders with gaps, and a disk that is full."""

from __future__ import annotations

import html.parser
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import galleries
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from diffalign.eval import gallery, gallery_report, gallery_view, pictures, tables
from diffalign.eval.records import line
from diffalign.types import UserError

ROOT = Path(__file__).parents[1]
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>",
    "\"quotes\" 'single' & <b>bold</b> {{ 7 * 7 }} {% raw %}",
    "an artist \N{ARTIST PALETTE} <!-- and a comment",
    "\N{RIGHT-TO-LEFT OVERRIDE}\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
)
VOID = {"meta", "img", "input", "br", "link", "hr", "path"}


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self.open = "", "", [""]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while tag in self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("script", "style"):
            self.scripts += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def rendered(folder: Path, mode: pictures.Mode = "folder") -> Page:
    return Page(gallery_report.write(folder, mode).read_text("utf-8"))


def fixed(table: dict[str, list[list[float | None]]]) -> galleries.Values:
    """The same scores for every reward: model -> [P][K]."""
    return lambda model, reward, p, k, rng: table[model][p][k]


SCORES: dict[str, list[list[float | None]]] = {
    "base": [[0.0, 2.0], [1.0, 1.0], [3.0, 5.0], [2.0, None], [None, None]],
    "tuned": [[4.0, 4.0], [0.0, 2.0], [6.0, 8.0], [1.0, 1.0], [9.0, 9.0]],
}


def test_numbers_are_those_of_paper_and_pencil(tmp_path: Path) -> None:
    """Prompt means 1, 1, 4, 2 and none against 4, 1, 7, 1, 9: differences 3, 0, 3 and -1 on four prompts."""
    one = {"pickscore": {"name": "pickscore"}}
    galleries.write(tmp_path, prompts=5, rewards=one, values=fixed(SCORES))
    found = tables.numbers(gallery.read(tmp_path))
    base, tuned = (found["rewards"]["pickscore"]["models"][name] for name in ("base", "tuned"))
    assert (base["mean"], base["n"], base["delta"]) == (2.0, 4, None)
    assert (tuned["mean"], tuned["n"]) == (pytest.approx(22 / 5), 5)
    assert tuned["half"] == pytest.approx((tuned["high"] - tuned["low"]) / 2)
    delta = tuned["delta"]
    assert (delta["mean"], delta["n"]) == (1.25, 4)
    assert (delta["wins"], delta["ties"], delta["losses"], delta["win_rate"]) == (2, 1, 1, 0.625)
    assert delta["p"] == delta["holm"] == stats.binomtest(2, 3).pvalue
    # all 4^4 resamples of (3, 0, 3, -1): the ends of the interval are quantiles of their means
    d = np.array([3.0, 0.0, 3.0, -1.0])
    means = np.sort(d[np.stack(np.meshgrid(*[range(4)] * 4)).reshape(4, -1)].mean(0))
    assert [delta["low"], delta["high"]] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.26)
    assert found["rewards"]["pickscore"]["best"] == ["tuned"] and delta["direction"] == "open"
    assert found["wins"]["pickscore"]["wins"] == [[0, 1], [2, 0]]
    assert found["wins"]["pickscore"]["ties"] == [[0, 1], [1, 0]]
    # two contestants: log-odds of (2 + 1/2 + 0.1) against (1 + 1/2 + 0.1) wins, shared around zero
    theta = {row["name"]: row["theta"] for row in found["wins"]["pickscore"]["strengths"]}
    assert theta["tuned"] == pytest.approx(math.log(2.6 / 1.6) / 2) and theta["base"] == pytest.approx(-theta["tuned"])


def test_holm_covers_all_rewards_and_contestants_but_not_the_noise_floor(tmp_path: Path) -> None:
    """Ten of ten prompts won: p = 2 / 2^10, of two rewards and two contestants, so four times that."""
    step = {"base": 0.0, "up": 1.0, "down": -1.0, "base-again": 1.0}

    def values(model: str, reward: str, p: int, k: int, rng: np.random.Generator) -> float:
        return step[model] + 0.1 * p

    galleries.write(tmp_path, tuple(step), prompts=10, images=1, values=values)
    found = tables.numbers(gallery.read(tmp_path))
    for reward in found["rewards"].values():
        ways = {name: (m["delta"] or {}).get("direction") for name, m in reward["models"].items()}
        assert ways == {"base": None, "up": "up", "down": "down", "base-again": "up"}
        assert reward["models"]["up"]["delta"]["holm"] == pytest.approx(4 * 2 / 2**10)
        assert reward["models"]["up"]["delta"]["holds"]
        assert reward["models"]["base-again"]["delta"]["holm"] is None
        assert not reward["models"]["base-again"]["delta"]["holds"] and reward["best"] == ["up"]
    assert found["noise"] == ["base-again"]
    line_of_up = gallery_view.verdict(found, "up")
    assert line_of_up["text"] == "is better than base on geneval (+1.000) and pickscore (+1.000)."


def test_categories_and_their_unweighted_mean(tmp_path: Path) -> None:
    """Prompts of the tags colors, counting and position in turn; five prompts make groups of 2, 2 and 1."""
    galleries.write(tmp_path, prompts=5, values=fixed({"base": [[1.0] * 2] * 5, "tuned": [[p, p] for p in range(5)]}))
    rows = tables.numbers(gallery.read(tmp_path))["categories"]["geneval"]
    assert [(row["tag"], row["prompts"]) for row in rows] == [
        ("colors", 2), ("counting", 2), ("position", 1), (None, 5),
    ]  # fmt: skip
    assert [row["models"]["tuned"]["mean"] for row in rows] == [1.5, 2.5, 2.0, 2.0]
    assert rows[0]["models"]["tuned"]["delta"]["mean"] == 0.5


def test_trade_offs_know_who_is_beaten_and_how_sure_that_is(tmp_path: Path) -> None:
    """good is better than base on both rewards, odd on one alone; the covariance is the plug-in one of the means."""
    shift = {"base": (0, 0), "good": (1, 1), "odd": (-1, 2)}

    def values(model: str, reward: str, p: int, k: int, rng: np.random.Generator) -> float:
        return shift[model][reward == "pickscore"] + (p if reward == "geneval" else p * p)

    galleries.write(tmp_path, tuple(shift), prompts=4, images=1, values=values)
    found = tables.numbers(gallery.read(tmp_path))["tradeoffs"]
    pair = next(p for p in found["pairs"] if (p["x"], p["y"]) == ("geneval", "pickscore"))
    points = {p["name"]: p for p in pair["points"]}
    assert {name: p["front"] for name, p in points.items()} == {"base": False, "good": True, "odd": True}
    assert points["good"]["at"] == [2.5, 4.5]
    x = np.arange(4.0)
    assert np.allclose(points["base"]["covariance"], np.cov([x, x**2], ddof=0) / 4)


def test_checkpoints_of_a_run_are_joined_in_the_order_of_training(tmp_path: Path) -> None:
    specs = {"base": "tiny-sd3", "end": "runs/a", "b": "runs/a/checkpoints/0020", "a": "runs/a/checkpoints/0010"}
    about = {name: {"kind": "run", "spec": f"{name}={spec}"} for name, spec in specs.items() if name != "base"}
    galleries.write(tmp_path, (*specs, "other"), prompts=2, images=1, about=about)
    found = tables.numbers(gallery.read(tmp_path))
    assert found["tradeoffs"]["lines"] == [["a", "b", "end"]]
    assert '<path class="training"' in gallery_report.write(tmp_path).read_text("utf-8")


def features(folder: Path, model: str, vectors: Callable[[int, int], list[float]], prompts: int, images: int) -> None:
    """Give a contestant these embeddings."""
    entry = gallery.read(folder).entries[model]
    every = {(f"{p:04d}", k): vectors(p, k) for p in range(prompts) for k in range(images)}
    path = next((folder / model).glob("features*.npz"))
    np.savez(path, **{entry.made[key].digest: np.array(v, np.float32) for key, v in every.items()})


def test_variety_of_known_features(tmp_path: Path) -> None:
    """Orthogonal images of a prompt: Vendi 2, distance 1. Equal ones: Vendi 1, distance 0, which is 50 % and 100 % less.

    The baseline's prompts share one of two directions, so that a pair of images of two prompts has cosine 1/2 on average.
    """
    galleries.write(tmp_path, prompts=3, images=2)
    features(tmp_path, "base", lambda p, k: [1.0, 0.0] if k else [0.0, 1.0], 3, 2)
    features(tmp_path, "tuned", lambda p, k: [1.0, 1.0], 3, 2)
    found = tables.numbers(gallery.read(tmp_path))["diversity"]["models"]
    assert found["base"]["vendi"]["per_prompt"] == pytest.approx([2.0] * 3) and found["base"]["distance"]["mean"] == 1.0
    assert found["tuned"]["vendi"]["mean"] == pytest.approx(1.0)
    assert found["tuned"]["vendi"]["change"]["mean"] == pytest.approx(-0.5)
    assert found["tuned"]["distance"]["change"]["mean"] == pytest.approx(-1.0)
    assert (found["base"]["alike"], found["tuned"]["alike"]) == (pytest.approx(0.5), pytest.approx(1.0))


def test_looks_drift_in_deviations_of_the_baseline_and_cost_is_per_image(tmp_path: Path) -> None:
    galleries.write(tmp_path, prompts=2, images=2)
    for model, values in (("base", [1.0, 3.0, 1.0, 3.0]), ("tuned", [4.0, 6.0, 4.0, 6.0])):
        path = tmp_path / model / "looks.jsonl"
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        path.write_text("".join(line({**old, "values": {"contrast": v}}) for old, v in zip(lines, values, strict=True)))
        path = tmp_path / model / "made.jsonl"
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        spent = {"nfe": 4, "seconds": 0.5} if model == "base" else {"nfe": 12, "seconds": 2.0, "reward_calls": 8}
        path.write_text("".join(line({**old, **spent}) for old in lines))
    found = tables.numbers(gallery.read(tmp_path))
    deviation = np.std([1.0, 3.0, 1.0, 3.0], ddof=1)
    drift = found["looks"]["contrast"]["models"]["tuned"]["drift"]
    assert drift["mean"] == drift["low"] == drift["high"] == pytest.approx(3 / deviation)
    assert found["cost"]["tuned"] == {
        "images": 4, "nfe": 12.0, "seconds": 2.0, "reward_calls": 8.0, "total_seconds": 8.0, "times": 3.0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four contestants, hostile prompts, a training run's metrics and a server's hostile complaint."""
    path = tmp_path_factory.mktemp("evaluations") / "an <i>evaluation"
    about = {
        "grpo": {"kind": "run", "method": "grpo", "trained_on": ["pickscore"], "spec": "grpo=runs/<script>"},
        "fk": {"kind": "steered", "steering": {"name": "fk", "particles": 8}, "trained_on": ["geneval"]},
    }
    rewards = {"geneval": {"name": "geneval"}, "pickscore": {"name": "pickscore", "model": "tiny-clip"}}
    rewards["mine"] = {"name": "somebody.evil.Reward", "note": HOSTILE[0]}
    galleries.write(
        path, ("base", "grpo", "fk", "base-again"), prompts=9, images=2, rewards=rewards, about=about, texts=HOSTILE
    )
    lines: list[dict[str, Any]] = [{"epoch": 0, "phase": "eval", "reward/geneval": 0.4}]
    for epoch in range(1, 7):
        logged = {"reward/pickscore": epoch, "reward/pickscore_std": 1, "kl": 0.1, "zero_advantage_groups": 0.2}
        lines.append({"epoch": epoch, "phase": "train", **logged, "invalid/pickscore": 0.01})
    lines.append({"epoch": 6, "phase": "eval", "reward/geneval": 0.6})
    (path / "grpo" / "metrics.jsonl").write_text("".join(map(line, lines)))
    scored = [json.loads(text) for text in (path / "fk" / "scores.jsonl").read_text().splitlines()]
    scored[0] |= {"score": None, "valid": False, "details": {"error": HOSTILE[0]}}
    (path / "fk" / "scores.jsonl").write_text("".join(map(line, scored)))
    return path


@pytest.mark.parametrize("mode", ["folder", "single"])
def test_the_page_holds_or_brings_all_that_it_needs(folder: Path, mode: pictures.Mode) -> None:
    page = rendered(folder, mode)
    assert not page.all("link") and not page.all("iframe") and all("src" not in s for s in page.all("script"))
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert not (attributes.get(name) or "").startswith(("http", "//")) and name + "set" not in attributes
    sources = [image["src"] or "" for image in page.all("img") if "src" in image]
    assert len(sources) >= 9 * 4 * 2
    for source in sources:
        if mode == "folder":
            assert source.startswith("img/")
            with Image.open(folder / source) as picture:
                assert picture.format == "WEBP"
        else:
            assert source.startswith("data:image/webp;base64,")
    assert all(image.get("alt") for image in page.all("img") if "src" in image)
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    allowed = "data: 'self' file:" if mode == "folder" else "data:"
    rest = "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert policy == f"default-src 'none'; img-src {allowed}; {rest}"


def test_links_within_the_page_lead_somewhere(folder: Path) -> None:
    page = rendered(folder)
    places = {attributes["id"] for _, attributes in page.elements if attributes.get("id")}
    wanted = {(a["href"] or "")[1:] for a in page.all("a")}
    assert wanted and wanted <= places
    assert len(places) == sum("id" in attributes for _, attributes in page.elements), "an id is given twice"


def test_words_of_others_stay_text(folder: Path) -> None:
    page = rendered(folder)
    text = (folder / "index.html").read_text("utf-8")
    for prompt in HOSTILE:
        assert prompt in page.text
    assert "an <i>evaluation" in page.text and "grpo=runs/<script>" in page.text
    assert all("onerror" not in attributes for _, attributes in page.elements)
    assert not any("src" in i and i["src"] == "x" for i in page.all("img")) and not page.all("i")
    assert "alert(1)</script>" not in text and "somebody.evil.Reward" in page.text
    told = (folder / "report.md").read_text("utf-8")
    assert "<script>" not in told and "&lt;/script&gt;" in told


def test_the_blocks_are_there_in_order(folder: Path) -> None:
    page = rendered(folder)
    ids = [attributes["id"] for tag, attributes in page.elements if tag == "section" and "id" in attributes]
    order = ["signs", "rewards", "wins", "tradeoffs", "curves", "variety", "wall", "appendix"]
    assert [i for i in ids if i in order] == order
    assert (
        "fk: pickscore could not score" not in page.text and "fk: geneval could not score 1 of 18 images" in page.text
    )
    assert "base-again is base again with other seeds" in " ".join(page.text.split())
    for title in (
        "KL to the reference",
        "Prompts whose images all score alike",
        "pickscore: images it could not score",
    ):
        assert title in page.text
    labels = [svg.get("aria-label") for svg in page.all("svg")]
    assert {"geneval by epoch", "pickscore by epoch", "Strengths by mine", "pickscore against geneval"} <= set(labels)
    assert "score = exp(logit_scale) cos(image, prompt)" in page.text, "the definition of PickScore"
    assert "Apache-2.0, embedded in diffalign" in page.text


def test_rendering_again_gives_the_same_bytes_and_no_stale_pictures(tmp_path: Path) -> None:
    galleries.write(tmp_path, prompts=3)

    def files() -> dict[str, bytes]:
        gallery_report.write(tmp_path)
        written = [tmp_path / "index.html", tmp_path / "report.json", tmp_path / "report.md"]
        return {str(p): p.read_bytes() for p in [*written, *(tmp_path / "img").iterdir()]}

    first = files()
    (tmp_path / "img" / "older.webp").write_bytes(b"of another page")
    assert files() == first
    for image in (tmp_path / "img").iterdir():
        image.unlink()
    assert files() == first
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers == json.loads(json.dumps(tables.numbers(gallery.read(tmp_path)), allow_nan=False))


def test_a_full_disk_leaves_the_old_report_intact(tmp_path: Path) -> None:
    """The limit on file sizes stands for the disk: the page is larger than it, its pictures are not."""
    galleries.write(tmp_path, prompts=3, size=8)
    gallery_report.write(tmp_path)
    names = ("index.html", "report.json", "report.md")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    pictured = {path.name for path in (tmp_path / "img").iterdir()}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(prompts.read_text().replace("picture number", "another picture"))
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import resource\n"
        "from diffalign.eval import gallery_report\n"
        "from diffalign.types import UserError\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before['report.json']) + 4000}, resource.RLIM_INFINITY))\n"
        "try:\n"
        f"    gallery_report.write({str(tmp_path)!r})\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    assert len(before["index.html"]) > len(before["report.json"]) + 4000
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "could not write the report" in done.stdout and "raise the limit on file sizes" in done.stdout
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    assert pictured <= {path.name for path in (tmp_path / "img").iterdir()}
    assert not list(tmp_path.rglob("*.tmp"))


def test_gaps_are_told_in_sentences(tmp_path: Path) -> None:
    """A missing image, scores that a killed run left half-written, and a contestant that has not begun."""
    galleries.write(tmp_path, prompts=4)
    (tmp_path / "tuned" / "images" / "0002_01.png").unlink()
    path = tmp_path / "tuned" / "scores.jsonl"
    path.write_text(path.read_text()[:-20])
    asked = json.loads((tmp_path / "eval.json").read_text())
    (tmp_path / "eval.json").write_text(json.dumps({**asked, "contestants": ["base", "tuned", "late"]}))
    page = rendered(tmp_path)
    for sentence in (
        "late was asked for and has not begun.",
        "of its images on the disk, such as 0002_01.png.",
        "tuned: scores.jsonl ends in half a line, which does not count; run the evaluation on.",
        "tuned: 1 of 8 images have no score of pickscore yet.",
    ):
        assert sentence in page.text
    assert sentence in (tmp_path / "report.md").read_text()


def test_other_seeds_and_sizes_are_flagged(tmp_path: Path) -> None:
    """Of a contestant, not of the noise floor, whose seeds differ by design."""
    galleries.write(tmp_path, ("base", "tuned", "base-again"), prompts=2)
    for model in ("tuned", "base-again"):
        path = tmp_path / model / "made.jsonl"
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        path.write_text("".join(line({**old, "seed": old["seed"] + 7 * (i < 3)}) for i, old in enumerate(lines)))
    small = tmp_path / "tuned" / "images" / "0000_00.png"
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(small)
    text = rendered(tmp_path).text
    assert "tuned: 3 of 4 images start from other seeds than those of base" in text
    told = json.loads((tmp_path / "report.json").read_text())["problems"]
    assert told and all(problem.startswith("tuned: ") for problem in told)
    assert "tuned: 1 of 24 by 16 pixels instead of 32 by 32" in text


def test_damaged_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    galleries.write(tmp_path, prompts=2)
    image = tmp_path / "tuned" / "images" / "0001_00.png"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"0001_00\.png is not a readable picture; delete it and run"):
        gallery_report.write(tmp_path)
    image.write_bytes(whole)
    path = tmp_path / "tuned" / "scores.jsonl"
    path.write_text("{half\n" + path.read_text())
    with pytest.raises(UserError, match="line 1 of .* is damaged"):
        gallery_report.write(tmp_path)


def test_one_contestant_one_image_and_no_reward_make_a_page(tmp_path: Path) -> None:
    galleries.write(tmp_path, ("base",), prompts=1, images=1, rewards={})
    for name in ("looks.jsonl", *[p.name for p in (tmp_path / "base").glob("features*")]):
        (tmp_path / "base" / name).unlink()
    page = rendered(tmp_path)
    assert "The images were not embedded" in page.text and page.all("img")
    galleries.write(tmp_path / "two", prompts=1, images=1)
    assert "cannot be told from base" in rendered(tmp_path / "two").text


def test_votes_of_people_become_a_judge(tmp_path: Path) -> None:
    """Three of four votes for tuned: log-odds of 3.1 to 1.1 wins."""
    from diffalign.eval.votes import fingerprint

    galleries.write(tmp_path, prompts=4, images=1)
    cast = [{"id": f"{p:04d}", "shown": ["base", "tuned"], "best": "base" if p == 0 else "tuned"} for p in range(4)]
    ballot = {"format": "diffalign votes", "version": 1, "sitting": "s", "votes": cast}
    (tmp_path / "v.json").write_text(json.dumps({**ballot, "evaluation": fingerprint(gallery.read(tmp_path))}))
    text = gallery_report.write(tmp_path, votes=[tmp_path / "v.json"]).read_text("utf-8")
    assert "votes of people, blind" in text
    found = json.loads((tmp_path / "report.json").read_text())["people"]
    assert found["wins"] == [[0, 1], [3, 0]]
    assert found["strengths"][1]["theta"] == pytest.approx(math.log(3.1 / 1.1) / 2)


def test_a_large_single_page_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    galleries.write(tmp_path, prompts=1, images=1)
    gallery_report.write(tmp_path, "single")
    assert capsys.readouterr().err == "" and not (tmp_path / "img").exists()
    monkeypatch.setattr(gallery_report, "LARGE", 1000)
    gallery_report.write(tmp_path, "single")
    assert "use --mode folder" in capsys.readouterr().err


def test_pictures_hold_pixels_alone_and_are_made_once(tmp_path: Path) -> None:
    """What else is in a file, such as a comment, stays outside; small pictures are exact."""
    from PIL.PngImagePlugin import PngInfo

    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    note = PngInfo()
    note.add_text("secret", "a <script> of somebody")
    Image.fromarray(pixels).save(tmp_path / "a.png", pnginfo=note)
    made = pictures.Pictures(tmp_path)
    first, again, array = (made.uri(s, 64) for s in (tmp_path / "a.png", tmp_path / "a.png", pixels))
    smaller = made.uri(tmp_path / "a.png", 15)
    made.finish()
    assert first == again and b"secret" not in (tmp_path / first).read_bytes()
    for address in (first, array):
        with Image.open(tmp_path / address) as stored:
            assert (np.asarray(stored.convert("RGB")) == pixels).all()
    with Image.open(tmp_path / smaller) as stored:
        assert stored.size == (15, 10)


def test_the_sorted_csv_is_complete(folder: Path) -> None:
    import csv
    import io

    found = tables.numbers(gallery.read(folder))
    from diffalign.eval.gallery_tables import comma_separated

    rows = list(csv.DictReader(io.StringIO(comma_separated(found))))
    assert [(row["contestant"], row["reward"]) for row in rows] == [
        (name, reward) for name in ("base", "grpo", "fk", "base-again") for reward in ("geneval", "pickscore", "mine")
    ]
    for row in rows:
        own = found["rewards"][row["reward"]]["models"][row["contestant"]]
        assert float(row["mean"]) == own["mean"] and int(row["prompts"]) == own["n"]
        assert (row["delta"] == "") == (row["contestant"] == "base")
        if own["delta"]:
            assert float(row["delta low"]) == own["delta"]["low"] and int(row["wins"]) == own["delta"]["wins"]


def test_pictures_that_an_earlier_page_had_are_not_drawn_again(tmp_path: Path) -> None:
    drawn: list[int] = []

    def draw() -> np.ndarray:
        drawn.append(1)
        return np.full((8, 8, 3), 77, np.uint8)

    for _ in range(2):
        made = pictures.Pictures(tmp_path)
        address = made.later("a difference", draw, 64)
        made.finish()
    with Image.open(tmp_path / address) as stored:
        assert (np.asarray(stored.convert("RGB")) == 77).all() and len(drawn) == 1
    single = pictures.Pictures(tmp_path, "single")
    assert single.later("a difference", draw, 64).startswith("data:image/webp;base64,") and len(drawn) == 2
