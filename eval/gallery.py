"""The folder of an evaluation: what was asked, the images of every contestant, and what each reward said of each image.

    EVAL/eval.json            what was asked; see :class:`Asked`
    EVAL/prompts.jsonl        a line a prompt: its metadata with "id", four digits, its place in the set
    EVAL/NAME/run.json        a contestant; see :class:`Contestant`
    EVAL/NAME/images/ID_KK.png
    EVAL/NAME/made.jsonl      a line an image: id, k, seed, digest of the file, and what it cost
    EVAL/NAME/scores.jsonl    a line an image and reward; see :class:`Score`
    EVAL/NAME/looks.jsonl     a line an image: id, k, digest and the numbers of eval/looks.py
    EVAL/NAME/features.npz    embeddings of the images for diversity, "ID_KK" -> [D]
    EVAL/NAME/metrics.jsonl   of the training run that it came from, a copy
    EVAL/NAME/lineage.jsonl   of the steering that made it: a line an image

Reading needs no model and no torch. Lines that a killed run left half-written are passed over, for they are made again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffalign.types import UserError

SETTINGS, PROMPTS, RUN, MADE, SCORES = "eval.json", "prompts.jsonl", "run.json", "made.jsonl", "scores.jsonl"
IMAGES, FEATURES, LOOKS, METRICS, LINEAGE = "images", "features.npz", "looks.jsonl", "metrics.jsonl", "lineage.jsonl"
PROBES = ("degraded", "shuffled")  # the image after JPEG and half its size and back; the text of another prompt
Key = tuple[str, int]  # (prompt id, number of the image among its prompt's)


class Record(BaseModel):
    """A part of these files; what it does not know it leaves alone, so that older pages read newer folders."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Asked(Record):
    """What the evaluation was asked; equal for all contestants."""

    prompts: str
    """Where they came from."""
    images_per_prompt: int = Field(ge=1)
    seed: int
    height: int
    width: int
    baseline: str
    """The contestant that the others are compared with."""
    contestants: tuple[str, ...]
    """In the order of the page."""
    rewards: dict[str, dict[str, Any]]
    """Key -> its section of settings, in the order of the page."""
    notes: tuple[str, ...] = ()
    """What was done to the prompts, such as leaving out repeated ones."""


class Contestant(Record):
    """One model, training run or way to sample."""

    name: str
    spec: str
    """As it was given on the command line."""
    kind: str
    """model, run, lora, steered."""
    model: str
    """The base model's name, folder or hub id."""
    weights: str = "as they are"
    """Such as 'moving average' or 'live' of a training run."""
    steps: int
    guidance: float
    kernel: str
    steering: dict[str, Any] | None = None
    trained_on: tuple[str, ...] = ()
    """Keys of the rewards that it was trained on or steered by."""
    again: str | None = None
    """It is that contestant with other seeds: the noise floor."""
    seed: int
    method: str = ""
    """Of the training run, such as grpo."""
    command: str = ""
    date: str = ""
    versions: dict[str, str] = {}


class Made(Record):
    """One image and its cost."""

    id: str
    k: int
    seed: int
    digest: str
    """sha256 of the file, 16 hexadecimal digits."""
    nfe: int
    """Network forwards, guidance counted twice."""
    seconds: float
    reward_calls: int = 0

    @property
    def key(self) -> Key:
        return self.id, self.k


class Score(Record):
    """What one reward said of one image."""

    id: str
    k: int
    reward: str
    by: str
    """Digest of the reward's settings, 16 hexadecimal digits."""
    digest: str
    """Of the image that was scored."""
    score: float | None
    """null: the reward does not apply, or could not tell."""
    valid: bool = True
    """false: it should apply and could not tell; `details` says why under "error"."""
    probe: str = ""
    """One of `PROBES`; empty: the image as it is with its own prompt."""
    details: dict[str, Any] = {}

    @property
    def key(self) -> Key:
        return self.id, self.k


@dataclass(frozen=True)
class Entry:
    """A contestant with all that is known of its images."""

    folder: Path
    about: Contestant
    made: dict[Key, Made]
    scores: dict[str, dict[Key, Score]]  # by reward; only those of the images and settings that are there
    probes: dict[tuple[str, str], dict[Key, Score]]  # by (reward, probe); of the first images alone
    looks: dict[Key, dict[str, float]]  # of eval/looks.py

    def image(self, key: Key) -> Path:
        return self.folder / IMAGES / f"{stem(key)}.png"

    @cached_property
    def features(self) -> dict[Key, np.ndarray]:
        """Embeddings [D] float32; empty when none were computed."""
        path = self.folder / FEATURES
        if not path.is_file():
            return {}
        with np.load(path, allow_pickle=False) as stored:
            return {unstem(name): stored[name].astype(np.float32) for name in stored.files}

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

    @property
    def rewards(self) -> list[str]:
        return list(self.asked.rewards)

    def per_prompt(self, name: str, reward: str) -> np.ndarray:
        """[P] float64: the mean over a prompt's images that the reward scored; NaN where it scored none."""
        entry, count = self.entries[name], self.asked.images_per_prompt
        values = np.array([[entry.value(reward, (p["id"], k)) for k in range(count)] for p in self.prompts])
        known = ~np.isnan(values)
        total = np.where(known, values, 0.0).sum(1)
        return np.divide(total, known.sum(1), out=np.full(len(values), np.nan), where=known.any(1))


def stem(key: Key) -> str:
    return f"{key[0]}_{key[1]:02d}"


def unstem(name: str) -> Key:
    number, _, k = name.rpartition("_")
    return number, int(k)


Kind = TypeVar("Kind", bound=Record)


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
            problems.append(f"{name}: {len(gone)} images are missing on the disk, such as {stem(gone[0])}.png.")
    if asked.baseline not in entries:
        raise UserError(f"'{path}' has no images of the baseline '{asked.baseline}' yet; run the evaluation on")
    return Gallery(path, asked, prompts, entries, problems)


def entry(folder: Path, asked: Asked) -> Entry:
    """A contestant's folder; of equal lines the last counts, and scores of other images or settings do not."""
    made = {m.key: m for m in many(Made, folder / MADE)}
    current = {reward: digest_of(settings) for reward, settings in asked.rewards.items()}
    scores: dict[str, dict[Key, Score]] = {reward: {} for reward in current}
    probes: dict[tuple[str, str], dict[Key, Score]] = {(reward, probe): {} for reward in current for probe in PROBES}
    for path in sorted(folder.glob("scores*.jsonl")):  # one of each process while an evaluation runs
        for score in many(Score, path):
            image = made.get(score.key)
            if image is not None and score.digest == image.digest and current.get(score.reward) == score.by:
                kept = probes[score.reward, score.probe] if score.probe else scores[score.reward]
                kept[score.key] = score
    looks = {}
    for number, found in whole_lines(folder / LOOKS):
        try:
            key = (found.pop("id"), found.pop("k"))
            if key in made and found.pop("digest") == made[key].digest:
                looks[key] = {name: float(value) for name, value in found.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"line {number} of '{folder / LOOKS}' is damaged; take it out, and it is made again"
            ) from error
    return Entry(folder, one(Contestant, folder / RUN), made, scores, probes, looks)


def digest_of(value: Any) -> str:
    """16 hexadecimal digits of bytes, or of a value's JSON."""
    from hashlib import sha256

    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
    return sha256(data).hexdigest()[:16]


def one(kind: type[Kind], path: Path) -> Kind:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"'{path}' is damaged; evaluate into a new folder ({str(error).splitlines()[0]})") from error


def many(kind: type[Kind], path: Path) -> Iterator[Kind]:
    for number, line in whole_lines(path):
        try:
            yield kind.model_validate(line)
        except ValidationError as error:
            raise UserError(f"line {number} of '{path}' is damaged; take it out, and it is made again") from error


def whole_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of a JSONL file's lines; of a missing file none, and not what follows its last newline."""
    lines = path.read_text("utf-8").split("\n") if path.is_file() else []
    for number, line in enumerate(lines[:-1], 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} of '{path}' is damaged; take it out, and it is made again") from error
        if isinstance(value, dict):
            yield number, value


def line(value: Mapping[str, Any] | BaseModel) -> str:
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else dict(value)
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def ordered(names: Sequence[str], first: str) -> list[str]:
    """`first`, then the others as they come."""
    return [first, *(name for name in names if name != first)]
