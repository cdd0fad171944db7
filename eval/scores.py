"""Scoring the images of an evaluation: what no reward has said of them yet, by this process's share."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign import image_lists, validity
from diffalign.eval import records
from diffalign.eval.gallery import Entry
from diffalign.eval.making import append, part_of
from diffalign.eval.records import PROBES, Asked, Key, Score
from diffalign.image_lists import Listed
from diffalign.rewards import Reward, Scorer
from diffalign.scoring import plain
from diffalign.types import RewardOutput, UserError
from diffalign.writing import put

QUALITY = 75  # of the JPEG that the probe "degraded" goes through
Task = tuple[Key, str]  # an image and the probe that is made of it, "" for none


def tasks(found: Entry, reward: Reward, prompts: Sequence[Mapping[str, Any]], probed: int) -> list[Task]:
    """What is to be scored: every image, and of the first image of the first `probed` prompts the probes as well."""
    scored = found.scores[reward.key]
    missing: list[Task] = [(key, "") for key in found.made if key not in scored]
    for probe in probes(reward):
        known = found.probes[reward.key, probe]
        first = [(p["id"], 0) for p in prompts[:probed]]
        missing += [(key, probe) for key in first if key in found.made and key not in known]
    return sorted(missing, key=lambda task: (task[1], task[0]))


def probes(reward: Reward) -> tuple[str, ...]:
    """Another prompt, or none, tells nothing of a reward that reads none."""
    return PROBES if reward.needs_prompt else PROBES[:1]


@torch.no_grad()
def score(
    folder: Path,
    found: Entry,
    wanted: Sequence[Task],
    scorer: Scorer,
    asked: Asked,
    prompts: Sequence[Mapping[str, Any]],
    batch: int,
    rank: int,
    told: Callable[[int], None],
) -> None:
    """Score and note them batch by batch, so nothing is scored twice."""
    reward = scorer.reward.key
    by = records.digest_of(asked.rewards[reward])
    place = {p["id"]: number for number, p in enumerate(prompts)}
    for part in parts(wanted, batch):
        pixels = torch.stack([read(found.image(key), probe) for key, probe in part])
        metadata = [asked_about(prompts, place[key[0]], probe) for key, probe in part]
        output = said(scorer, pixels, metadata, part[0][1])
        reasons = validity.reasons(output)
        lines = []
        for row, (key, probe) in enumerate(part):
            value = float(output.scores[row])
            details = {name: kept for name, values in output.extra.items() if (kept := plain(values[row])) is not None}
            if reasons[row]:
                details["error"] = reasons[row]
            lines.append(
                Score(
                    id=key[0],
                    k=key[1],
                    reward=reward,
                    by=by,
                    digest=found.made[key].digest,
                    score=None if math.isnan(value) else value,
                    valid=reasons[row] is None,
                    probe=probe,
                    details={k: v for k, v in details.items() if isinstance(v, str)} if probe else details,  # no maps
                )
            )
        append(part_of(folder / records.SCORES, rank), lines)
        told(len(part))


def parts(wanted: Sequence[Task], batch: int) -> Iterator[Sequence[Task]]:
    """Batches of one probe each."""
    for _, same in groupby(wanted, key=lambda task: task[1]):
        tasks = list(same)
        yield from (tasks[start : start + batch] for start in range(0, len(tasks), batch))


def said(scorer: Scorer, pixels: Tensor, metadata: Sequence[Mapping[str, Any]], probe: str) -> RewardOutput:
    """What the reward says of the images. One that cannot bear an empty prompt has nothing to say of that probe."""
    try:
        return scorer(pixels, [str(m["prompt"]) for m in metadata], metadata)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a function that somebody wrote for prompts with words
        if probe != "unprompted":
            raise
        why = f"{type(error).__name__}: {error}"
        nothing = torch.full((len(pixels),), math.nan)
        return RewardOutput(nothing, {"error": [why] * len(pixels)}, nothing > 0)


def asked_about(prompts: Sequence[Mapping[str, Any]], number: int, probe: str) -> dict[str, Any]:
    """The prompt that an image of that prompt is scored with: its own, the one half the set further on, or none."""
    if probe == "unprompted":
        return {"prompt": ""}
    return dict(prompts[(number + len(prompts) // 2) % len(prompts) if probe == "shuffled" else number])


def read(path: Path, probe: str) -> Tensor:
    """[3, H, W] fp32 in [0, 1]; for "degraded" after a JPEG and half its size and back."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    if probe == "degraded":
        small = picture.resize((max(1, picture.width // 2), max(1, picture.height // 2)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.resize(picture.size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=QUALITY)
        picture = Image.open(buffer).convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def embed(
    folder: Path, found: Entry, embedder: Callable[[Tensor], Tensor], batch: int, told: Callable[[int], None]
) -> None:
    """Embed the images that have no features yet; the file is written whole."""
    path = records.features_file(folder, found.embedder)
    images = {made.digest: found.image(key) for key, made in found.made.items()}
    _embed(path, {digest: partial(read, image, "") for digest, image in images.items()}, embedder, batch, told)


def embed_reference(
    path: Path, images: Sequence[Listed], size: tuple[int, int], embedder: Callable[[Tensor], Tensor], batch: int
) -> None:
    """The same of pictures of any size, which are scaled to the (height, width) of the evaluation."""
    wanted = {records.digest_of(image.path.read_bytes()): partial(_scaled, image, size) for image in images}
    _embed(path, wanted, embedder, batch, lambda done: None)


def _embed(
    path: Path,
    wanted: Mapping[str, Callable[[], Tensor]],
    embedder: Callable[[Tensor], Tensor],
    batch: int,
    told: Callable[[int], None],
) -> None:
    known = records.stored(path)
    digests = [digest for digest in wanted if digest not in known]
    for start in range(0, len(digests), batch):
        part = digests[start : start + batch]
        vectors = embedder(torch.stack([wanted[digest]() for digest in part]))
        known |= dict(zip(part, vectors.detach().float().cpu().numpy(), strict=True))
        told(len(part))
    if digests:
        buffer = io.BytesIO()
        half: dict[str, Any] = {digest: vector.astype(np.float16) for digest, vector in known.items()}
        np.savez(buffer, **half)
        put(path, buffer.getvalue())


def _scaled(image: Listed, size: tuple[int, int]) -> Tensor:
    pixels = image_lists.read(image)
    if image.size == size:
        return pixels
    return torch.nn.functional.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
