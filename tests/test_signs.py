"""The warning signs on made-up evaluations: each is raised by its own cheat and by no other, none by other seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import galleries
import numpy as np
import pytest

from diffalign.eval import gallery, records
from diffalign.eval._sign import CHANCE, Change, by_prompt, change
from diffalign.eval._sign_pictures import ALIKE, nearest, variety
from diffalign.eval._sign_training import log_rise
from diffalign.eval.gallery import Entry, Gallery
from diffalign.eval.records import Asked, Contestant, Made, Score
from diffalign.eval.signs import EVERY, Sign, signs

KEYS = ("traded", "diversity", "look", "fragile", "prompt_blind", "unasked_text", "exhausted", "duplicates")
LOOKS = {"saturation": 0.4, "contrast": 0.2, "sharpness": 0.02, "clipped": 0.05, "jpeg_bytes": 0.3}
REWARDS = ("geneval", "pickscore", "trained", "ocr")
P, K, D = 48, 4, 16


def entry(folder: Path, name: str, seed: int, cheat: str = "", prompts: int = P, images: int = K) -> Entry:
    """A contestant whose images follow from the prompt and the seed, and that does what `cheat` says."""
    folder = folder / f"{name}_{seed}"
    folder.mkdir(parents=True)
    rng, world = np.random.default_rng([seed, 1]), np.random.default_rng(7)
    keys = [(f"{p:04d}", k) for p in range(prompts) for k in range(images)]
    meaning, ease = world.normal(size=(prompts, D)), world.uniform(0.1, 0.9, prompts)
    made = {key: Made(id=key[0], k=key[1], seed=0, digest=f"{name}{n}", nfe=1, seconds=0) for n, key in enumerate(keys)}
    place = np.repeat(np.arange(prompts), images)
    features = meaning[place] + rng.normal(size=(len(keys), D)) * (0.4 if cheat == "diversity" else 0.8)
    if cheat == "duplicates":  # every fourth prompt shows the images of the one before it
        copies = np.flatnonzero(place % 4 == 1)
        features[copies] = features[copies - images]
    np.savez(records.features_file(folder, ""), **{made[key].digest: f for key, f in zip(keys, features, strict=True)})

    scores: dict[str, dict[Any, Score]] = {reward: {} for reward in REWARDS}
    probes: dict[tuple[str, str], dict[Any, Score]] = {(r, p): {} for r in REWARDS for p in records.PROBES}

    def note(key: Any, reward: str, value: float | None, probe: str = "", **details: Any) -> None:
        kept = probes[reward, probe] if probe else scores[reward]
        kept[key] = Score(
            id=key[0], k=key[1], reward=reward, by="", digest="", score=value, probe=probe, details=details
        )

    better = 1.0 if cheat == "traded" else 0.0
    for p, key in zip(place, keys, strict=True):
        right = float(rng.random() < ease[p])
        quality, gain = 10 * ease[p] + rng.normal() - 0.8 * better, rng.normal() + better
        loss = abs(rng.normal(0.2, 0.2)) * (10 if cheat == "fragile" else 1)
        margin = rng.normal(3, 1) * (0.4 if cheat == "prompt_blind" else 1)
        reads = rng.random() < (0.5 if cheat == "unasked_text" else 0.02)
        holds, elsewhere = rng.random() < 0.9, rng.random() < 0.1
        note(key, "geneval", right)
        note(key, "pickscore", quality)
        note(key, "trained", gain)
        note(key, "ocr", None)
        if key[1] == 0:
            note(key, "geneval", right * holds, "degraded")
            note(key, "geneval", float(elsewhere), "shuffled")
            note(key, "pickscore", quality - loss, "degraded")
            note(key, "pickscore", quality - margin, "shuffled")
            note(key, "ocr", 0.0, "shuffled", text="SALE" if reads else " ")
    spread = {look: usual / 4 for look, usual in LOOKS.items()}
    moved = {"saturation": 0.25} if cheat == "look" else {}
    looks = {
        key: {n: usual + moved.get(n, 0.0) + spread[n] * (ease[p] + rng.normal()) for n, usual in LOOKS.items()}
        for p, key in zip(place, keys, strict=True)
    }
    flat = 0.2 + 0.7 * np.linspace(0, 1, 40) * (cheat == "exhausted") + 0.05 * rng.random(40)
    lines = [{"phase": "train", "zero_advantage_groups": f, "reward/other": -f, "reward/other_std": 1.0} for f in flat]
    log(folder, lines)
    about = Contestant(
        name=name, spec=name, kind="run", model="tiny", steps=1, guidance=1.0, kernel="ode", seed=seed,
        trained_on=("trained",),
    )  # fmt: skip
    return Entry(folder, about, made, scores, probes, looks)


def log(folder: Path, lines: Sequence[dict[str, Any]]) -> None:
    (folder / records.METRICS).write_text("".join(records.line(line) for line in lines))


def put(folder: Path, *entries: Entry, images: int = K) -> Gallery:
    """The first is the baseline."""
    names = tuple(e.about.name for e in entries)
    asked = Asked(
        prompts="made up", images_per_prompt=images, seed=0, height=8, width=8, baseline=names[0], contestants=names,
        rewards={r: {"name": r} for r in REWARDS},
    )  # fmt: skip
    prompts = [{"id": i, "prompt": f"prompt {i}"} for i in sorted({key[0] for key in entries[0].made})]
    return Gallery(folder, asked, prompts, dict(zip(names, entries, strict=True)))


def judged(folder: Path, cheat: str, seed: int = 1, **sizes: int) -> dict[str, Sign]:
    evaluated = put(folder, entry(folder, "base", 0, **sizes), entry(folder, "own", seed, cheat, **sizes))
    return {sign.key: sign for sign in signs(evaluated)}


@pytest.mark.parametrize("cheat", KEYS)
def test_a_cheat_raises_its_own_sign_and_no_other(tmp_path: Path, cheat: str) -> None:
    found = judged(tmp_path, cheat)
    assert tuple(found) == KEYS
    assert {key: s.level for key, s in found.items() if key != cheat} == dict.fromkeys(set(KEYS) - {cheat}, "green")
    sign = found[cheat]
    assert sign.level in ("amber", "red") and sign.contestant == "own"
    assert any(character.isdigit() for character in sign.sentence) and sign.sentence.endswith(".")
    raised = [row for row in sign.evidence["rows"] if row["level"] == sign.level]
    assert raised and all(abs(row["size"]) > abs(row["limit"]) for row in raised)


def test_other_seeds_raise_nothing(tmp_path: Path) -> None:
    """Forty evaluations of the base against itself: 320 signs, of which chance raises one in three such tests."""
    base = entry(tmp_path, "base", 0)
    raised = []
    for seed in range(1, 41):
        raised += [s for s in signs(put(tmp_path, base, entry(tmp_path, "own", seed))) if s.level != "green"]
    assert len(raised) <= 1, [(s.key, s.sentence) for s in raised]


@pytest.mark.parametrize("images", [1, 2])
def test_few_images_raise_nothing_by_chance(tmp_path: Path, images: int) -> None:
    base = entry(tmp_path, "base", 0, prompts=8, images=images)
    for seed in range(1, 16):
        own = entry(tmp_path, "own", seed, prompts=8, images=images)
        found = signs(put(tmp_path, base, own, images=images))
        assert {s.level for s in found} <= {"green", "unknown"}, [s for s in found if s.level in ("amber", "red")]


def test_all_that_a_sign_says_is_json_and_the_same_each_time(tmp_path: Path) -> None:
    own, again = judged(tmp_path / "a", "look"), judged(tmp_path / "b", "look")
    told = [json.dumps({k: s.evidence for k, s in found.items()}, allow_nan=False) for found in (own, again)]
    assert told[0] == told[1]
    assert [s.sentence for s in own.values()] == [s.sentence for s in again.values()]


def test_evidence_names_the_prompts(tmp_path: Path) -> None:
    pairs = judged(tmp_path, "duplicates")["duplicates"].evidence["pairs"]
    assert len(pairs) == 8
    for (one, k), (other, same), cosine in pairs:
        assert int(other) == int(one) + 1 and k == same and cosine > ALIKE


def test_without_data_a_sign_is_unknown_and_says_why(tmp_path: Path) -> None:
    """Scores of one reward alone, two prompts, no features, no probes, no training."""
    folder = galleries.write(tmp_path / "e", models=("base", "base-again", "own"), prompts=2)
    for path in folder.glob("*/features*"):
        path.unlink()
    found = signs(gallery.read(folder))
    assert [(s.contestant, s.key) for s in found] == [("own", key) for key in KEYS]  # neither baseline nor noise floor
    assert {s.level for s in found} == {"unknown"}
    assert all(s.sentence.endswith(".") and s.evidence == {"rows": []} for s in found)
    assert len({s.sentence for s in found}) >= 6


def test_a_folder_on_the_disk_is_judged(tmp_path: Path) -> None:
    about = {"own": {"trained_on": ["geneval"]}}

    def values(model: str, reward: str, prompt: int, k: int, rng: np.random.Generator) -> float:
        return float(rng.normal() + 2 * (model == "own") * (1 if reward == "geneval" else -1))

    folder = galleries.write(tmp_path / "e", models=("base", "own"), prompts=24, values=values, about=about)
    found = {s.key: s for s in signs(gallery.read(folder))}
    assert found["traded"].level == "red" and "pickscore" in found["traded"].sentence
    assert found["diversity"].level == found["look"].level == "green"


def test_a_reward_that_was_not_evaluated_is_followed_in_the_log(tmp_path: Path) -> None:
    base, own = entry(tmp_path, "base", 0), entry(tmp_path, "own", 1, "traded")
    elsewhere = own.about.model_copy(update={"trained_on": ()})
    own = Entry(own.folder, elsewhere, own.made, own.scores, own.probes, own.looks)
    levels = {}
    for way, slope in {"up": 1.0, "level": 0.0}.items():
        log(
            own.folder,
            [{"phase": "train", "reward/other": slope * n + n % 2, "reward/other_std": 1.0} for n in range(20)],
        )
        levels[way] = EVERY[0](put(tmp_path, base, own), own).level
    log(own.folder, [{"phase": "train", "reward/other": float(n), "reward/other_std": 1.0} for n in range(9)])
    levels["short"] = EVERY[0](put(tmp_path, base, own), own).level
    assert levels == {"up": "red", "level": "green", "short": "unknown"}


def test_the_log_compares_its_first_and_last_tenth(tmp_path: Path) -> None:
    own = entry(tmp_path, "own", 1)
    log(own.folder, [{"phase": "eval", "r": 9.0}, *({"phase": "train", "r": float(n)} for n in range(100))])
    found = log_rise(own, "r")
    assert found is not None and (found.base, found.own) == (4.5, 94.5)
    noise = np.random.default_rng(0).normal(size=100_000)
    log(own.folder, [{"phase": "train", "r": value} for value in noise])
    found = log_rise(own, "r")
    assert found is not None and found.error == pytest.approx(math.sqrt(2 / 10_000), rel=0.02)


def test_a_reward_that_rises_at_once_and_gives_some_back_has_risen(tmp_path: Path) -> None:
    own = entry(tmp_path, "own", 1)
    steep = [-1.53, -1.40, -1.18, -1.09, -0.94, *[-0.82] * 10, -0.93, -0.95, -1.03, -1.07, -1.10]
    log(own.folder, [{"phase": "train", "r": value} for value in steep])
    found = log_rise(own, "r")
    assert found is not None and found.mean > 3 * found.error


@pytest.mark.parametrize(("top", "level"), [(0.7, "green"), (0.9, "amber"), (1.0, "red")])
def test_a_reward_at_its_ceiling(tmp_path: Path, top: float, level: str) -> None:
    base, own = entry(tmp_path, "base", 0), entry(tmp_path, "own", 1)
    for n, (key, score) in enumerate(own.scores["trained"].items()):
        if n % 10 < round(10 * top):
            own.scores["trained"][key] = score.model_copy(update={"score": 50.0})
    assert EVERY[6](put(tmp_path, base, own), own).level == level


def test_a_number_that_hardly_varies_does_not_drift_beyond_measure(tmp_path: Path) -> None:
    base, own = entry(tmp_path, "base", 0), entry(tmp_path, "own", 0)
    for e, clipped, border in ((base, 0.0, 0.0), (own, 0.0005, 0.3)):
        for look in e.looks.values():
            look |= {"clipped": clipped, "border": border}
    sign = EVERY[2](put(tmp_path, base, own), own)
    rows = {row["measure"]: row for row in sign.evidence["rows"]}
    assert rows["clipped"]["level"] == "green"  # nobody sees it
    assert rows["border"]["level"] == "red" and rows["border"]["size"] == 99.0


def test_a_small_world_has_doubles_of_its_own(tmp_path: Path) -> None:
    """Where the baseline's images are nearly equal for many prompts, only what is nearer than they are counts."""
    found = {}
    for cheat in ("", "duplicates"):
        folder = tmp_path / cheat
        entries = [entry(folder, "base", 0), entry(folder, "own", 1, cheat)]
        for e in entries:
            near = {e.made[key].digest: 12 + f for key, f in e.features.items()}
            np.savez(records.features_file(e.folder, ""), **near)
            del e.__dict__["features"]
        found[cheat] = EVERY[7](put(folder, *entries), entries[1])
    assert found[""].level == "green" and found["duplicates"].level != "green"
    assert found[""].evidence["cosine"] > ALIKE


def test_variety_and_doubles_against_all_pairs(tmp_path: Path) -> None:
    own = entry(tmp_path, "own", 3, prompts=6, images=3)
    evaluated, keys = put(tmp_path, own, images=3), list(own.made)
    x = np.stack([own.features[key] for key in keys]).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosine, prompt = x @ x.T, np.array([int(key[0]) for key in keys])
    apart = prompt[:, None] != prompt[None]
    best, place = nearest(keys, own.features)
    np.testing.assert_allclose(best, np.where(apart, cosine, -9).max(1), atol=1e-6)
    np.testing.assert_array_equal(place, np.where(apart, cosine, -9).argmax(1))
    found = variety(evaluated, keys, own.features)["distance between prompts"]
    for p in range(6):
        assert found[p] == pytest.approx(1 - cosine[prompt == p][:, prompt != p].mean(), abs=1e-6)


def test_chance_and_missing_values() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4000, 20))
    sure = [c.sure() for x, y in zip(a, b, strict=True) if (c := change(x, y))]
    assert len(sure) == 4000 and sum(sure) <= 3 * CHANCE * 4000
    assert Change(8, 1, 0, 1.0, 0.0).sure() and not Change(7, 1, 0, 1.0, 0.0).sure()
    assert not Change(8, 0, 0, 0.0, 0.0).sure()
    x, y = np.arange(10.0), np.ones(10)
    x[0] = y[1] = np.nan
    found = change(x, y)
    assert found is not None and (found.n, found.own, found.mean) == (8, 5.5, 4.5)
    x[2] = np.nan
    assert change(x, y) is None


def test_means_by_prompt_leave_out_what_is_unknown(tmp_path: Path) -> None:
    evaluated = put(tmp_path, entry(tmp_path, "own", 0, prompts=3))
    values = {("0000", 0): 1.0, ("0000", 1): 3.0, ("0001", 0): math.nan, ("0009", 0): 5.0}
    np.testing.assert_array_equal(by_prompt(evaluated, values), [2.0, np.nan, np.nan])
