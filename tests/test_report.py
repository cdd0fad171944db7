"""The report page, from run folders in the documented format; some are hostile, some unfinished."""

from __future__ import annotations

import html.parser
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from diffalign.eval import charts, report
from diffalign.eval.comparison import compare, direction, mean_score
from diffalign.eval.run_folder import read
from diffalign.eval.statistics import paired
from diffalign.shapes.prompts import test_prompts as shapes_test_prompts
from diffalign.shapes.world import render
from diffalign.types import UserError

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'><b>"
CONFIG: dict[str, Any] = {
    "model": {"path": "tiny-sd3"},
    "seed": 0,
    "algorithm": {"name": "grpo", "clip": 1e-4},
    "rewards": [{"name": "geneval", "mode": "dense", "weight": 1.0}, {"name": "jpeg", "weight": 0.1}],
    "trainer": {"epochs": 30, "prompts": 16, "images_per_prompt": 8},
    "evaluation": {
        "every": 10, "prompts": 60, "images_per_prompt": 2, "steps": 20,
        "rewards": [{"name": "geneval", "mode": "strict", "weight": 1.0}, {"name": "jpeg", "weight": 1.0}],
    },
    "note": HOSTILE,
}  # fmt: skip


def make_run(
    folder: Path,
    *,
    epochs: int = 30,
    evaluated: tuple[int, ...] = (0, 10, 20, 30),
    gain: float = 0.3,
    hostile: bool = False,
) -> Path:
    """A run folder as the trainer writes it: half of the prompts right at first, `gain` more of them at the end."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    prompts = [(m["prompt"], m["tag"], m) for m in shapes_test_prompts()[:60]]
    if hostile:
        prompts[1] = (HOSTILE, HOSTILE, prompts[1][2])
    luck = [rng.random() for _ in range(2 * len(prompts))]
    (folder / "eval").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    lines = []
    for epoch in range(1, epochs + 1):
        x = epoch / 30
        lines.append({
            "epoch": epoch, "phase": "train", "reward/geneval": 0.55 + 0.35 * x + rng.gauss(0, 0.03),
            "reward/geneval_std": 0.4 - 0.15 * x, "reward/jpeg": -1.2 - 0.1 * x + rng.gauss(0, 0.01),
            "loss": rng.gauss(0, 1e-5), "ratio": 1 + rng.gauss(0, 2e-6), "clip_fraction": 0.3 * x, "kl": 0.002 * x**2,
            "logp_gap": 1e-6 * rng.random(), "grad_norm": 0.1 + 0.02 * rng.random(), "seconds": 9.5,
            "seconds/rollout": 3.5, "zero_advantage_groups": 0.1,
            "images_per_second": 13.4,
        })  # fmt: skip
    for epoch in evaluated:
        write_evaluation(folder, epoch, prompts, luck, 0.5 + gain * epoch / max(evaluated[-1], 1), noise)
        lines.append({"epoch": epoch, "phase": "eval", "reward/geneval": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_evaluation(
    folder: Path, epoch: int, prompts: list[Any], luck: list[float], rate: float, noise: np.random.Generator
) -> None:
    from diffalign.shapes.prompts import scene

    singles = folder / "images" / f"eval_{epoch:04d}"
    singles.mkdir(parents=True)
    samples, pictures = [], []
    for i, (prompt, tag, meta) in enumerate(p for p in prompts for _ in range(2)):
        right = luck[i] < rate
        objects = scene(random.Random(i), meta["include"])
        picture = render(objects if right else objects[1:])
        pictures.append(np.clip(picture + noise.normal(0, 2, picture.shape), 0, 255).astype(np.uint8))
        scores = {"geneval": float(right), "jpeg": -1.2 - luck[i] / 5}
        samples.append({"prompt": prompt, "tag": tag, "seed": 1000 + i, "scores": scores})
        if i % 2 == 0 and i < 48:  # the first image of each of the first 24 prompts
            Image.fromarray(pictures[-1]).save(singles / f"{i // 2:03d}.png")
    Image.fromarray(np.vstack([np.hstack(pictures[r : r + 8]) for r in range(0, 24, 8)])).save(
        folder / "images" / f"eval_{epoch:04d}.png"
    )
    content = {"epoch": epoch, "steps": 20, "seconds": 21.5, "samples": samples}
    (folder / "eval" / f"{epoch:04d}.json").write_text(json.dumps(content))


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    VOID = {"meta", "img", "br", "circle", "line", "path"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", list[str]()
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "shapes demo", hostile=True)


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(report.write(run))


def test_the_page_is_self_contained_and_well_formed(page: Page) -> None:
    assert page.open == []
    assert not any(page.all(tag) for tag in ("script", "link", "iframe", "object"))
    for _, attrs in page.elements:
        assert not any(name.startswith("on") for name in attrs)
        assert all((attrs.get(name) or "data:").startswith("data:") for name in ("src", "href"))
    assert "default-src 'none'" in str(page.all("meta"))


def test_hostile_text_stays_text(page: Page) -> None:
    assert page.text.count(HOSTILE) >= 3  # the prompt, its category, the configuration
    assert HOSTILE in str([image["alt"] for image in page.all("img")]).replace("\\'", "'")


def test_pairs_show_the_first_samples_of_both_evaluations(page: Page, run: Path) -> None:
    images = page.all("img")
    assert len(images) == 2 * 24
    for prompt in 0, 1, 23:
        sample = read(run).evaluations[0].samples[2 * prompt]
        for k, (epoch, name) in enumerate([(0, "base"), (30, "epoch 30")]):
            image = images[2 * prompt + k]
            assert image["alt"] == f"{sample.prompt} ({name}, seed {sample.seed})"
            assert image["src"] == report.uri(run / "images" / f"eval_{epoch:04d}" / f"{prompt:03d}.png")
    marks = [a["title"] for a in page.all("span") if "title" in a and str(a["title"]).startswith("geneval")]
    base, final = read(run).evaluations[0], read(run).evaluations[-1]
    pairs = zip(base.samples[:48:2], final.samples[:48:2], strict=True)
    shown = [sample.score("geneval") for pair in pairs for sample in pair]
    assert marks == [f"geneval = {value:.3f}" for value in shown]


def test_summary_and_page_tell_the_same_numbers(page: Page, run: Path) -> None:
    numbers = report.summary(run)
    base, final = (json.loads((run / "eval" / f"{e:04d}.json").read_text())["samples"] for e in (0, 30))
    before, after = ([s["scores"]["geneval"] for s in samples] for samples in (base, final))
    assert numbers["metric"] == "geneval" and numbers["prompts"] == 60
    assert numbers["base"] == pytest.approx(np.mean(before)) and numbers["final"] == pytest.approx(np.mean(after))
    assert numbers["delta"] == pytest.approx(np.mean(after) - np.mean(before))
    assert 0 < numbers["low"] < numbers["delta"] < numbers["high"]
    assert numbers["images"] == 30 * 16 * 8 and numbers["seconds"] == pytest.approx(30 * 9.5)
    assert numbers["wins"] + numbers["ties"] + numbers["losses"] == 60 and numbers["losses"] == 0
    assert numbers["verdict"].startswith("Better")
    for key in ("base", "final", "delta", "low", "high"):
        assert f"{numbers[key]:.3f}" in page.text
    assert numbers["verdict"] in page.text


def test_categories_are_compared_within_themselves(page: Page, run: Path) -> None:
    read_back = read(run)
    base, final = read_back.evaluations[0], read_back.evaluations[-1]
    for tag in {s.tag for s in base.samples}:
        result = compare(base, final, "geneval", tag)
        assert result is not None and result.n == len({s.prompt for s in base.samples if s.tag == tag})
        assert result.mean == pytest.approx(mean_score(final, "geneval", tag) - mean_score(base, "geneval", tag))
        assert report.signed(result.mean) in page.text
    labels = [label for label in ("counting", "position", "color_attr") if label in page.text]
    assert len(labels) == 3


def test_different_settings_of_one_reward_are_told_apart(page: Page) -> None:
    assert "Held-out geneval (mode strict), base to epoch 30" in page.text
    assert "training images (mode dense)" in page.text
    assert "trained on (mode dense)" in page.text


def test_time_is_told_and_not_charted(page: Page) -> None:
    assert "of it rollout" in page.text and "1 min 45 s" in page.text  # 30 epochs of 3.5 s
    assert not any("seconds" in str(a.get("aria-label")) for a in page.all("svg"))


def test_curves_exist_for_rewards_and_health(page: Page) -> None:
    labels = [a["aria-label"] for a in page.all("svg") if "aria-label" in a]
    assert labels[:2] == ["geneval by epoch", "jpeg by epoch"]
    logged = [name for key, name in report.HEALTH.items() if key != "trained_images"]
    for name in [*logged, "Spread of geneval (std)"]:
        assert f"{name} by epoch" in labels


def test_writing_again_gives_the_same_bytes_and_leaves_no_temporary_file(run: Path) -> None:
    first = report.write(run).read_bytes()
    assert report.write(run).read_bytes() == first
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize(("gain", "start"), [(-0.3, "Worse"), (0.0, "Undecided"), (0.02, "Undecided")])
def test_the_verdict_follows_the_interval(tmp_path: Path, gain: float, start: str) -> None:
    run = make_run(tmp_path / "run", evaluated=(0, 30), gain=gain)
    assert report.summary(run)["verdict"].startswith(start)
    assert start in Page(report.write(run)).text


def test_few_changed_prompts_convince_nobody() -> None:
    few = paired([1.0] * 4 + [0.0] * 56, [0.0] * 60)
    assert few.low > 0 and direction(few) == "open"
    assert direction(paired([1.0] * 8 + [0.0] * 52, [0.0] * 60)) == "up"
    assert direction(paired([0.0] * 60, [1.0] * 8 + [0.0] * 52)) == "down"


def test_base_only_no_evaluation_and_no_training(tmp_path: Path) -> None:
    base_only = make_run(tmp_path / "base", epochs=3, evaluated=(0,))
    text = Page(report.write(base_only)).text
    assert "Only one held-out evaluation so far (base)" in text and "3 of 30 epochs, unfinished" in text
    assert report.summary(base_only)["final"] is None
    none = make_run(tmp_path / "none", epochs=3, evaluated=())
    assert "no held-out evaluation yet" in Page(report.write(none)).text
    assert report.summary(none)["metric"] is None
    untrained = make_run(tmp_path / "untrained", epochs=0, evaluated=(0,))
    (untrained / "metrics.jsonl").unlink()
    (untrained / "config.yaml").unlink()
    assert len(Page(report.write(untrained)).all("img")) == 24


def test_grids_stand_in_for_single_images(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluated=(0, 30))
    for path in run.glob("images/*/*.png"):
        path.unlink()
    alts = [image["alt"] for image in Page(report.write(run)).all("img")]
    assert alts == ["grid of samples, base", "grid of samples, epoch 30"]


def test_scores_that_do_not_apply_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluated=(0, 30))
    path = run / "eval" / "0030.json"
    content = json.loads(path.read_text())
    for sample in content["samples"][:2]:
        sample["scores"]["geneval"] = math.nan
    content["samples"][2]["scores"]["geneval"] = None
    path.write_text(json.dumps(content))
    assert report.summary(run)["prompts"] == 59
    report.write(run)


def test_a_resumed_and_a_cut_off_log_are_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", epochs=3)
    log = run / "metrics.jsonl"
    again = {"epoch": 3, "phase": "train", "seconds": 100.0, "reward/geneval": 0.7}
    log.write_text(log.read_text() + json.dumps(again) + "\n" + '{"epoch": 4, "pha')
    assert read(run).column("seconds") == [9.5, 9.5, 100.0]
    log.write_text('{"epoch": 4, "pha\n' + log.read_text())
    with pytest.raises(UserError, match=r"metrics.jsonl:1 is not a metrics line"):
        report.write(run)


def test_unreadable_folders_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        report.write(tmp_path)
    run = make_run(tmp_path / "run", epochs=1, evaluated=(0,))
    (run / "images" / "eval_0000" / "000.png").write_text("no picture")
    with pytest.raises(UserError, match="000.png is not a readable picture"):
        report.write(run)
    (run / "eval" / "0000.json").write_text('{"epoch": 0}')
    with pytest.raises(UserError, match="0000.json is not an evaluation file"):
        report.write(run)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.5123, 0.8), (-3e-6, 4e-6), (0.999999, 1.000002), (-250.0, 7000.0), (1e-9, 2e-9)]
)
def test_ticks_are_few_even_and_enclose(low: float, high: float) -> None:
    values = charts.ticks(low, high, 4)
    assert values[0] <= low + 1e-12 * abs(low) and values[-1] >= high - 1e-12 * abs(high) and 2 <= len(values) <= 7
    assert np.ptp(np.diff(values)) == pytest.approx(0, abs=(high - low) * 1e-6)
    labels = charts.tick_labels(values)
    assert len(set(labels)) == len(labels)


def test_charts_survive_gaps_flat_lines_and_nothing() -> None:
    assert charts.chart([charts.Series([0, 1], [math.nan, math.nan], "train")], label="none") == ""
    assert charts.chart([], label="none") == ""
    gap = charts.chart([charts.Series([0, 1, 2, 3], [1.0, math.nan, 2.0, 3.0], "train")], label="<gap>")
    assert gap.count("M") == 2 and "&lt;gap&gt;" in gap and "nan" not in gap
    for flat in ([1.0, 1.0], [0.0, 0.0], [-5e-7]):
        drawing = charts.chart([charts.Series(range(len(flat)), flat, "train")], label="flat")
        assert "nan" not in drawing and "inf" not in drawing and 'class="line train"' in drawing


def test_running_mean_keeps_lines_straight() -> None:
    line = [0.5 * i - 3 for i in range(30)]
    assert charts.running_mean(line, 7) == pytest.approx(line)
    assert charts.running_mean([1.0, math.nan, 3.0], 3)[1] == 2.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.500"),
        (0.0, "0.000"),
        (21.347, "21.35"),
        (-0.0047, "\u22124.7\u00d710\u207b\u00b3"),
        (12345.6, "12,346"),
        (None, "\u2013"),
        (math.nan, "\u2013"),
        (-0.25, "\u22120.250"),
    ],
)
def test_numbers_are_written_for_readers(value: float | None, text: str) -> None:
    assert report.number(value) == text
