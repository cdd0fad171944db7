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

from diffalign.eval import gallery, gallery_charts, gallery_files, gallery_report, gallery_view, pictures, tables
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


def numbers_of(folder: Path) -> tables.Numbers:
    found = gallery.read(folder)
    return tables.numbers(found, gallery_files.inspect(found))


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
    found = numbers_of(tmp_path)
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
    found = numbers_of(tmp_path)
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
    rows = numbers_of(tmp_path)["categories"]["geneval"]
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
    found = numbers_of(tmp_path)["tradeoffs"]
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
    found = numbers_of(tmp_path)
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
    found = numbers_of(tmp_path)["diversity"]["models"]
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
    found = numbers_of(tmp_path)
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
    assert numbers == json.loads(json.dumps(numbers_of(tmp_path), allow_nan=False))


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


def test_a_damaged_file_of_lines_is_refused_in_a_sentence(tmp_path: Path) -> None:
    galleries.write(tmp_path, prompts=2)
    path = tmp_path / "tuned" / "scores.jsonl"
    path.write_text("{half\n" + path.read_text())
    with pytest.raises(UserError, match="line 1 of .* is damaged"):
        gallery_report.write(tmp_path)


@pytest.mark.parametrize("damage", ["half", "a bit", "empty", "no picture"])
def test_a_damaged_picture_has_a_crossed_cell_and_is_told_of(tmp_path: Path, damage: str) -> None:
    galleries.write(tmp_path, prompts=2, images=1)
    gallery_report.write(tmp_path)
    image = tmp_path / "tuned" / "images" / "0001_00.png"
    whole = image.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    image.write_bytes({"half": whole[:middle], "a bit": flipped, "empty": b"", "no picture": b"words"}[damage])
    page = rendered(tmp_path)
    crossed = [e for _, e in page.elements if "gone" in (e.get("class") or "").split()]
    assert crossed and all(e["aria-label"] == "no picture: damaged" for e in crossed)
    assert "tuned: 1 of 2 images cannot be read, such as 0001_00.png" in page.text
    assert len(page.all("img")) and "tuned: 1 of 2" in (tmp_path / "report.md").read_text()
    image.write_bytes(whole)
    assert "cannot be read" not in rendered(tmp_path).text


def test_a_picture_put_in_the_place_of_another_is_shown_and_told_of(tmp_path: Path) -> None:
    galleries.write(tmp_path, prompts=2, images=1)
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(tmp_path / "tuned" / "images" / "0000_00.png")
    page = rendered(tmp_path)
    assert "tuned: 1 of 2 images are not those that were scored, such as 0000_00.png" in page.text
    assert not [e for _, e in page.elements if "gone" in (e.get("class") or "").split()]


TREE = {"step": [0, 0, 4, 4, 8, 8], "parent": [None, None, 0, 1, 2, 2], "reward": [None, None, 0.5, 0.25, 0.75, 1.5]}


def steered(folder: Path, trees: dict[tuple[int, int], dict[str, Any]], **other: Any) -> None:
    """A contestant that follows pickscore, and the lineages of its images (prompt, k)."""
    about = {"kind": "steered", "steering": {"name": "fk", "particles": 2}, "method": "fk", **other}
    gains = {0: 0.0, 1: 3.0, 2: -2.0, 3: 1.0, 4: 2.0}

    def values(model: str, reward: str, p: int, k: int, rng: np.random.Generator) -> float:
        return gains[p] if model == "fk" and reward == "pickscore" else 0.0

    galleries.write(folder, ("base", "fk"), prompts=5, images=1, values=values, about={"fk": about}, texts=HOSTILE)
    lines = [{"id": f"{p:04d}", "k": k, **tree} for (p, k), tree in trees.items()]
    (folder / "fk" / "lineage.jsonl").write_text("".join(map(line, lines)), "utf-8")


def test_trees_of_steering_are_those_of_the_largest_gains_and_losses(tmp_path: Path) -> None:
    """Of pickscore, which steered it: gains on the prompts 1, 4 and 3, a loss on 2; prompt 0 is the first."""
    whole = {**TREE, "leaves": [5]}
    steered(tmp_path, {(p, 0): whole for p in range(5)}, steered_by={"pickscore": {"name": "pickscore"}})
    page = rendered(tmp_path)
    trees = [svg for svg in page.all("svg") if svg.get("class") == "tree"]
    assert len(trees) == 4 and all(svg["role"] == "img" for svg in trees)
    label = str(trees[0]["aria-label"])
    assert label.startswith("2 starts, 6 states at 3 steps; 1 of the 2 starts reaches the last step.")
    assert label.endswith("step 0: no reward, step 4: 0.5, step 8: 1.5.")
    text = " ".join(page.text.split())
    for told in ("0001 , picture 1; rose most", "0004 , picture 1; rose most", "0002 , picture 1; fell most"):
        assert told.replace(" ,", ",") in text
    assert "0000, picture 1; the first of the set" in text and "fk 4 trees of 5, chosen by pickscore" in text
    assert "0003, picture 1; " not in text.partition("How steering chose")[2]
    assert (tmp_path / "index.html").read_text("utf-8").count('<path class="branch kept"') == 4
    assert any(a.get("href") == "#lineages" for a in page.all("a"))


def test_lines_that_are_no_trees_are_left_out(tmp_path: Path) -> None:
    odd: dict[tuple[int, int], dict[str, Any]] = {
        (0, 0): {**TREE, "leaves": []},
        (1, 0): {**TREE, "leaves": [6]},
        (2, 0): {**TREE, "parent": [5, None, 0, 1, 2, 2], "leaves": [5]},
        (4, 0): {"leaves": [0]},
    }
    steered(tmp_path, odd)
    page = rendered(tmp_path)
    assert "How steering chose" not in page.text and not [s for s in page.all("svg") if s.get("class") == "tree"]
    own = {**odd, (0, 0): {**TREE, "leaves": [4]}}
    steered(tmp_path, own)
    assert "1 tree of 4" in " ".join(rendered(tmp_path).text.split())


def test_how_the_images_were_made_is_told_as_it_is_recorded(tmp_path: Path) -> None:
    versions = "Python 3.11.7, diffalign 0.1.0, torch 2.13.0, peft 0.21.2"
    about = {
        "base": {"dtype": "bf16", "steps": 12, "guidance": 4.5, "kernel": "dpm2", "versions": versions},
        "fk": {"kind": "steered", "steering": {"name": "fk", "particles": 8}, "method": "fk"},
    }
    galleries.write(tmp_path, ("base", "fk"), prompts=2, images=1, about=about)
    found = numbers_of(tmp_path)
    base, fk = gallery_view.view(gallery.read(tmp_path), found, [])["contestants"]
    assert (base["way"], base["forwards"]) == ("dpm2, 12 steps, guidance 4.5, bf16", "4")
    assert base["software"] == "diffalign 0.1.0, torch 2.13.0"
    assert (fk["how"], fk["options"], fk["software"]) == ("fk", "particles 8", "versions not recorded")
    assert fk["way"] == "sampler chosen by fk, 4 steps, no guidance, precision not recorded"
    later = {**found["contestants"][0], "versions": f"{versions} and later diffalign 0.2.0, torch 2.14.0"}
    assert gallery_view._about(later, 4.0)["software"] == (
        "diffalign 0.1.0, torch 2.13.0 and later diffalign 0.2.0, torch 2.14.0"
    )
    row = {**found["contestants"][0], "guidance": None}  # of a pipeline that takes none from outside
    assert gallery_view._about(row, 4.0)["way"] == "dpm2, 12 steps, the pipeline's own guidance, bf16"


def test_one_of_anything_is_not_many(tmp_path: Path) -> None:
    import re

    galleries.write(tmp_path, prompts=1, images=1)
    text = " ".join(rendered(tmp_path).text.split())
    assert not re.findall(r"\b1 (?:prompts|images|pictures|epochs|trees|votes)\b", text)


def test_rows_of_charts_are_where_their_values_are(tmp_path: Path) -> None:
    """Both kinds of charts share a frame: equal distances of values are equal distances on the page."""
    parts, px, ys = gallery_charts.rows(["a", "<b>", "c"], [-1.0, 2.0], 3, 0.0, 340, "a & b")
    assert ys == sorted(ys) and len(set(np.diff(ys))) == 1
    assert px(1.0) - px(0.0) == pytest.approx(px(2.0) - px(1.0)) and px(-1.0) < px(0.0)
    text = "".join(parts)
    assert "&lt;b&gt;" in text and 'aria-label="a &amp; b"' in text
    assert f'class="reference" x1="{px(0.0):.1f}"' in text


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
    first, again = (made.file(tmp_path / "a.png", "digest", 64) for _ in range(2))
    array, smaller = made.pixels(pixels, 64), made.file(tmp_path / "a.png", "digest", 15)
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

    found = numbers_of(folder)
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

    def draw() -> Image.Image:
        drawn.append(1)
        return Image.new("RGB", (8, 8), (77, 77, 77))

    for _ in range(2):
        made = pictures.Pictures(tmp_path)
        address = made.later("a difference", draw, 64)
        made.finish()
    with Image.open(tmp_path / address) as stored:
        assert (np.asarray(stored.convert("RGB")) == 77).all() and len(drawn) == 1
    single = pictures.Pictures(tmp_path, "single")
    assert single.later("a difference", draw, 64).startswith("data:image/webp;base64,") and len(drawn) == 2
