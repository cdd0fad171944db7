"""The records and files of an evaluation folder: a line of JSON each; see :mod:`diffalign.eval.gallery`.

Lines that a killed run left half-written are passed over, for they are made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffalign.types import UserError

SETTINGS, PROMPTS, RUN, MADE, SCORES = "eval.json", "prompts.jsonl", "run.json", "made.jsonl", "scores.jsonl"
IMAGES, FEATURES, LOOKS, METRICS, LINEAGE = "images", "features", "looks.jsonl", "metrics.jsonl", "lineage.jsonl"
# the image after JPEG and half its size and back; with the text of another prompt; with an empty prompt
PROBES = ("degraded", "shuffled", "unprompted")
LOCK = ".lock"  # held by the command that works in the folder
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
    features: str = ""
    """What embeds the images, such as dino:model=tiny-dino; empty: nothing does."""
    reference: str = ""
    """Folder of pictures that the images should be distributed like, for FID and KID."""
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
    timesteps: tuple[float, ...] | None = None
    """Of a few-step model, before its family's shift."""
    eta: float = 0.0
    """Noise of the kernel cps."""
    steering: dict[str, Any] | None = None
    trained_on: tuple[str, ...] = ()
    """Names of the heads that it was trained on or steered by; see :meth:`Gallery.trained`."""
    steered_by: dict[str, dict[str, Any]] = {}
    """The rewards of its steering: key -> section of settings."""
    dtype: str = "fp32"
    digest: str = ""
    """Of its weights, where they are files on this machine."""
    again: str | None = None
    """It is that contestant with other seeds: the noise floor."""
    seed: int
    method: str = ""
    """Of the training run, such as grpo."""
    command: str = ""
    date: str = ""
    versions: str = ""


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


class Look(Record):
    """The numbers of :mod:`diffalign.eval.looks` for one image."""

    id: str
    k: int
    digest: str
    values: dict[str, float]

    @property
    def key(self) -> Key:
        return self.id, self.k


Kind = TypeVar("Kind", bound=Record)


def features_file(folder: Path, embedder: str) -> Path:
    return folder / f"{FEATURES}.{digest_of(embedder)}.npz"


def reference_file(folder: Path, asked: Asked) -> Path:
    """Embeddings of the reference pictures, by their digests."""
    return folder / f"reference.{digest_of([asked.features, asked.reference])}.npz"


def stored(path: Path) -> dict[str, np.ndarray]:
    """The float32 arrays of an .npz file; none of a missing one."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name].astype(np.float32) for name in arrays.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(f"'{path}' is damaged; remove it, and the evaluation makes it again") from error


def stem(key: Key) -> str:
    return f"{key[0]}_{key[1]:02d}"


def parts(folder: Path, name: str) -> list[Path]:
    """A file of lines, and those that single processes of an evaluation under way have written beside it: made.0.jsonl
    beside made.jsonl, and so on, which count later."""
    first = folder / name
    return [first, *sorted(folder.glob(f"{first.stem}.*{first.suffix}"))]


def asked_before(folder: Path) -> Asked | None:
    """What an evaluation in this folder was asked; None in a new one. UserError for a folder of something else."""
    if not folder.exists() or (folder.is_dir() and not any(p.name != LOCK for p in folder.iterdir())):
        return None
    if not (folder / SETTINGS).is_file():
        raise UserError(f"'{folder}' is not empty and holds no {SETTINGS}; name a new folder")
    return one(Asked, folder / SETTINGS)


def digest_of(value: Any) -> str:
    """16 hexadecimal digits of bytes, or of a value's JSON."""
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
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines[:-1], 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"line {number} of '{path}' is damaged; take it out, and it is made again") from error
        if isinstance(value, dict):
            yield number, value


def line(value: Mapping[str, Any] | BaseModel) -> str:
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else dict(value)
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"
