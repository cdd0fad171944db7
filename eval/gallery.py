"""The folder of an evaluation: what was asked, the images of every contestant, and what each reward said of each image.

    EVAL/eval.json            what was asked; see :class:`Asked`
    EVAL/prompts.jsonl        a line a prompt: its metadata with "id", four digits, its place in the set
    EVAL/reference.BY.npz     embeddings of the pictures that FID and KID compare with
    EVAL/NAME/run.json        a contestant; see :class:`Contestant`
    EVAL/NAME/images/ID_KK.png
    EVAL/NAME/made.jsonl      a line an image: id, k, seed, digest of the file, and what it cost
    EVAL/NAME/scores.jsonl    a line an image and reward; see :class:`Score`
    EVAL/NAME/looks.jsonl     a line an image: how bright, sharp ... it is; see :class:`Look`
    EVAL/NAME/features.BY.npz embeddings of the images for diversity, digest of the image -> [D]; BY: of the embedder
    EVAL/NAME/metrics.jsonl   of the training run that it came from, a copy
    EVAL/NAME/lineage.jsonl   of the steering that made it: a line an image

Reading needs no model and no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.eval.records import (
    IMAGES,
    LOOKS,
    MADE,
    PROBES,
    PROMPTS,
    RUN,
    SCORES,
    SETTINGS,
    Asked,
    Contestant,
    Key,
    Look,
    Made,
    Score,
    digest_of,
    features_file,
    many,
    one,
    parts,
    reference_file,
    stem,
    stored,
    whole_lines,
)
from diffalign.types import UserError


@dataclass(frozen=True)
class Entry:
    """A contestant with all that is known of its images."""

    folder: Path
    about: Contestant
    made: dict[Key, Made]
    scores: dict[str, dict[Key, Score]]  # by reward; only those of the images and settings that are there
    probes: dict[tuple[str, str], dict[Key, Score]]  # by (reward, probe); of the first images alone
    looks: dict[Key, dict[str, float]]  # of eval/looks.py
    embedder: str = ""  # of the features; see Asked

    def image(self, key: Key) -> Path:
        return self.folder / IMAGES / f"{stem(key)}.png"

    @cached_property
    def features(self) -> dict[Key, np.ndarray]:
        """Embeddings [D] float32; empty when none were computed."""
        known = stored(features_file(self.folder, self.embedder))
        return {key: known[made.digest] for key, made in self.made.items() if made.digest in known}

    def value(self, reward: str, key: Key) -> float:
        """NaN: does not apply, not valid, or not scored."""
        score = self.scores.get(reward, {}).get(key)
        return math.nan if score is None or score.score is None or not score.valid else score.score

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Of `metrics.jsonl` or `lineage.jsonl`; none when there is no such file."""
        return [line for _, line in whole_lines(self.folder / name)]


@dataclass(frozen=True)
class Gallery:
    """An evaluation folder as it was found."""

    folder: Path
    asked: Asked
    prompts: list[dict[str, Any]]  # each with "id" and "prompt"
    entries: dict[str, Entry]  # by name, in the order of the page
    problems: list[str] = field(default_factory=list)  # what is missing or odd, in sentences for the page

    @property
    def baseline(self) -> Entry:
        return self.entries[self.asked.baseline]

    @property
    def keys(self) -> list[Key]:
        return [(p["id"], k) for p in self.prompts for k in range(self.asked.images_per_prompt)]

    @cached_property
    def reference(self) -> np.ndarray | None:
        """[n, D] embeddings of the pictures that the images are to be distributed like."""
        known = stored(reference_file(self.folder, self.asked)) if self.asked.reference else {}
        return np.stack(list(known.values())) if known else None

    def trained(self, entry: Entry) -> list[str]:
        """Keys of the evaluated rewards that a contestant was trained on or steered by, under any settings."""
        known = set(entry.about.trained_on)
        heads = {key: str(section.get("name", key)) for key, section in self.asked.rewards.items()}
        return [key for key, head in heads.items() if known & {key, head, head.rpartition(".")[2]}]

    @property
    def rewards(self) -> list[str]:
        return list(self.asked.rewards)

    def per_prompt(self, name: str, reward: str) -> np.ndarray:
        """[P] float64: the mean over a prompt's images that the reward scored; NaN where it scored none."""
        entry, count = self.entries[name], self.asked.images_per_prompt
        values = np.array([[entry.value(reward, (p["id"], k)) for k in range(count)] for p in self.prompts])
        known = ~np.isnan(values)
        total = np.where(known, values, 0.0).sum(1)
        means: np.ndarray = np.divide(total, known.sum(1), out=np.full(len(values), np.nan), where=known.any(1))
        return means


def read(folder: Path | str) -> Gallery:
    """The evaluation in `folder`. Raises UserError when it is none, or one of its files is damaged."""
    path = Path(folder)
    if not (path / SETTINGS).is_file():
        raise UserError(f"'{path}' holds no {SETTINGS}, so it is no evaluation; make one with `diffalign eval`")
    asked = one(Asked, path / SETTINGS)
    prompts = [line for _, line in whole_lines(path / PROMPTS)]
    if strange := [
        n for n, p in enumerate(prompts) if p.get("id") != f"{n:04d}" or not isinstance(p.get("prompt"), str)
    ]:
        raise UserError(f"line {strange[0] + 1} of '{path / PROMPTS}' is damaged; evaluate into a new folder")
    if not prompts:
        raise UserError(f"'{path / PROMPTS}' is missing or empty; evaluate into a new folder")
    problems: list[str] = []
    entries = {}
    for name in asked.contestants:
        if not (path / name / RUN).is_file():
            problems.append(f"{name} was asked for and has not begun.")
            continue
        entries[name] = entry(path / name, asked)
    wanted = len(prompts) * asked.images_per_prompt
    for name, found in entries.items():
        if len(found.made) < wanted:
            problems.append(f"{name} has {len(found.made)} of {wanted} images.")
        if gone := [key for key in found.made if not found.image(key).is_file()]:
            problems.append(f"{name} lacks {len(gone)} of its images on the disk, such as {stem(gone[0])}.png.")
    if asked.baseline not in entries:
        raise UserError(f"'{path}' has no images of the baseline '{asked.baseline}' yet; run the evaluation on")
    return Gallery(path, asked, prompts, entries, problems)


def entry(folder: Path, asked: Asked) -> Entry:
    """A contestant's folder; of equal lines the last counts, and scores of other images or settings do not."""
    made = {m.key: m for path in parts(folder, MADE) for m in many(Made, path)}
    current = {reward: digest_of(settings) for reward, settings in asked.rewards.items()}
    scores: dict[str, dict[Key, Score]] = {reward: {} for reward in current}
    probes: dict[tuple[str, str], dict[Key, Score]] = {(reward, probe): {} for reward in current for probe in PROBES}
    for path in parts(folder, SCORES):
        for score in many(Score, path):
            image = made.get(score.key)
            if image is not None and score.digest == image.digest and current.get(score.reward) == score.by:
                kept = probes[score.reward, score.probe] if score.probe else scores[score.reward]
                kept[score.key] = score
    looks = {}
    for path in parts(folder, LOOKS):
        for look in many(Look, path):
            if look.key in made and look.digest == made[look.key].digest:
                looks[look.key] = look.values
    return Entry(folder, one(Contestant, folder / RUN), made, scores, probes, looks, asked.features)
