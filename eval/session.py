"""An evaluation from the command line to the folder: what is missing is made, scored and embedded, by all processes."""

from __future__ import annotations

import datetime
import errno
import fcntl
import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from diffalign import rewards
from diffalign.eval import gallery, making, records, scores
from diffalign.eval.contestant import AGAIN, Wanted, digest
from diffalign.eval.features import Embedder
from diffalign.eval.records import Asked, Contestant
from diffalign.eval.run_facts import versions
from diffalign.image_lists import Listed
from diffalign.rewards import Reward
from diffalign.sections import Sampling
from diffalign.types import UserError
from diffalign.writing import REMEDIES, put

DISK = {*REMEDIES, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EPERM}
DRAWN = ("steps", "timesteps", "eta", "guidance", "kernel")
SAME = ("digest", "model", "weights", *DRAWN, "dtype", "steering", "steered_by", "seed")


@dataclass(frozen=True)
class Job:
    """What to evaluate, and how.

    Attributes:
        steering: rewards that steered contestants follow.
        sampling: of contestants that name none of their own; height and width of all.
        probed: prompts whose first image is scored degraded, and with another prompt, as well.
        batch: images at once; changes results by rounding alone.
        reference: pictures that FID and KID compare with.
    """

    folder: Path
    asked: Asked
    prompts: list[dict[str, Any]]
    contestants: list[Wanted]
    rewards: list[Reward]
    steering: list[Reward]
    sampling: Sampling
    dtype: str
    probed: int
    batch: int
    command: str
    reference: list[Listed]


def agreed(folder: Path, asked: Asked, prompts: Sequence[Mapping[str, Any]]) -> Asked:
    """What the folder was asked before, with what is new; nothing is written.

    Raises UserError for an evaluation of other prompts, seeds or sizes.
    """
    old = records.asked_before(folder)
    if old is None:
        return asked
    for key in ("images_per_prompt", "seed", "height", "width", "baseline"):
        was, now = getattr(old, key), getattr(asked, key)
        if was != now:
            raise UserError(
                f"the evaluation in '{folder}' has {key} {was!r}, not {now!r}; give the same, or name a new folder"
            )
    listed = [value for _, value in records.whole_lines(folder / records.PROMPTS)]
    if listed and listed != list(prompts):
        raise UserError(f"the evaluation in '{folder}' has other prompts; give the same, or name a new folder")
    return asked.model_copy(
        update={
            "contestants": tuple(dict.fromkeys([*old.contestants, *asked.contestants])),
            "rewards": {**old.rewards, **asked.rewards},
            "features": asked.features or old.features,
            "reference": asked.reference or old.reference,
        }
    )


def run(job: Job, device: str | None) -> bool:
    """True on the first process, which goes on to the page. Raises UserError with what is to be done; whatever was
    made stays, and the same command goes on."""
    cpu = device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu)
    where = device or str(accelerator.device)
    main = bool(accelerator.is_main_process)
    try:
        with told_of_the_disk(job.folder), alone(job.folder, main):
            if main:
                begin(job)
            accelerator.wait_for_everyone()
            for wanted in job.contestants:
                images(job, wanted, accelerator, where)
            for reward in job.rewards:
                judged(job, reward, accelerator, where)
            if main and job.asked.features:
                embedder = Embedder.of(job.asked.features, where)
                for name in begun(job):
                    found = gallery.entry(job.folder / name, job.asked)
                    with progress(f"{name}: features", len(found.made)) as told:
                        scores.embed(job.folder / name, found, embedder, job.batch, told)
                if job.reference:
                    size = (job.asked.height, job.asked.width)
                    path = records.reference_file(job.folder, job.asked)
                    scores.embed_reference(path, job.reference, size, embedder, job.batch)
    except KeyboardInterrupt:
        if main:
            print(f"what is done stays in {job.folder}; the same command goes on", file=sys.stderr)
        raise
    accelerator.wait_for_everyone()
    return main


def begun(job: Job) -> list[str]:
    """The contestants that have a folder: one that was asked for before may have been removed since."""
    return [name for name in job.asked.contestants if (job.folder / name / records.RUN).is_file()]


def begin(job: Job) -> None:
    """The files that say what was asked; lines that a killed process left go into one file.

    Raises UserError, before anything is written, for a contestant that is not what it was.
    """
    abouts = {wanted.name: known(job, described(job, wanted)) for wanted in job.contestants}
    job.folder.mkdir(parents=True, exist_ok=True)
    # first, so that a kill leaves a folder that the same command accepts
    put(job.folder / records.SETTINGS, job.asked.model_dump_json(indent=1) + "\n")
    put(job.folder / records.PROMPTS, "".join(records.line(p) for p in job.prompts))
    for wanted in job.contestants:
        own = job.folder / wanted.name
        (own / records.IMAGES).mkdir(parents=True, exist_ok=True)
        making.copied(wanted, own)
        put(own / records.RUN, abouts[wanted.name].model_dump_json(indent=1) + "\n")
    for name in begun(job):
        tidy(job.folder / name)


def known(job: Job, now: Contestant) -> Contestant:
    """The contestant as it began here before, if it did."""
    path = job.folder / now.name / records.RUN
    if not path.is_file():
        return now
    before = records.one(Contestant, path)
    if other := [key for key in SAME if getattr(before, key) != getattr(now, key)]:
        was = changed(other[0], getattr(before, other[0]), getattr(now, other[0]))
        raise UserError(f"'{now.name}' had {was}; give it another name, or remove '{path.parent}'")
    return now.model_copy(update={key: getattr(before, key) for key in ("date", "command", "versions")})


def changed(key: str, was: Any, now: Any) -> str:
    if key == "digest":
        return "other weights when its images were made"
    return f"another {key}" if isinstance(was, dict) or isinstance(now, dict) else f"{key} {was!r}, not {now!r}"


def tidy(folder: Path) -> None:
    making.joined(folder, records.LINEAGE, records.LOOKS, records.MADE, records.SCORES)


def described(job: Job, wanted: Wanted) -> Contestant:
    steering = job.steering if wanted.steering is not None else []
    return Contestant(
        name=wanted.name,
        spec=wanted.spec,
        kind=wanted.kind,
        model=wanted.model,
        weights=wanted.weights,
        steps=wanted.steps or job.sampling.steps,
        timesteps=wanted.timesteps,
        eta=wanted.eta or 0.0,
        guidance=1.0 if wanted.guidance is None else wanted.guidance,
        kernel=wanted.kernel or job.sampling.kernel,
        steering=None if wanted.steering is None else wanted.steering.model_dump(mode="json"),
        steered_by={r.key: r.model_dump(mode="json") for r in steering},
        trained_on=tuple(dict.fromkeys([*wanted.trained_on, *(r.name for r in steering)])),
        again=job.asked.baseline if wanted.again else None,
        seed=job.asked.seed + wanted.again,
        method=wanted.method or ("" if wanted.steering is None else wanted.steering.name),
        dtype=wanted.dtype or job.dtype,
        digest=digest(wanted),
        command=job.command,
        date=datetime.date.today().isoformat(),
        versions=versions(),
    )


def images(job: Job, wanted: Wanted, accelerator: Accelerator, device: str) -> None:
    """Make what the contestant lacks."""
    own = job.folder / wanted.name
    about = records.one(Contestant, own / records.RUN)
    missing = making.missing(own, job.asked, job.prompts)
    total = len(job.prompts) * job.asked.images_per_prompt
    if missing and accelerator.is_main_process:
        noted = about.model_copy(update={"versions": made_with(about.versions, len(missing) == total)})
        put(own / records.RUN, noted.model_dump_json(indent=1) + "\n")
    # steered images are made one by one, so none is made again because of another
    size = 1 if wanted.steering is not None else job.batch
    every = making.batches(job.asked, job.prompts, size, missing)
    mine = every[accelerator.process_index :: accelerator.num_processes]
    if mine:
        pipeline = making.load(wanted, device, job.dtype)
        sampling = job.sampling.model_copy(update={k: getattr(about, k) for k in DRAWN})
        draw = making.sampler(wanted, pipeline, sampling, job.steering, job.prompts, about.seed, total, job.batch)
        prompts = {p["id"]: p for p in job.prompts}
        with progress(f"{wanted.name}: images", sum(len(missing.intersection(batch)) for batch in mine)) as told:
            making.make(own, mine, missing, prompts, about.seed, accelerator.process_index, draw, told)
        del pipeline, draw
        gc.collect()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        tidy(own)
    accelerator.wait_for_everyone()


def made_with(before: str, anew: bool) -> str:
    """What images are made with: versions that all of them share, or those of the first and of the later ones."""
    now = versions()
    return now if anew or not before else before if now in before else f"{before} and later {now}"


def judged(job: Job, reward: Reward, accelerator: Accelerator, device: str) -> None:
    """Score what the reward has not seen of any contestant, also of those of earlier commands."""
    found = {name: gallery.entry(job.folder / name, job.asked) for name in begun(job)}
    rank, processes = accelerator.process_index, accelerator.num_processes
    tasks = {
        name: scores.tasks(entry, reward, job.prompts, job.probed)[rank::processes] for name, entry in found.items()
    }
    if any(tasks.values()):
        scorer = rewards.build([reward], device)[reward.key]
        for name, wanted in tasks.items():
            with progress(f"{name}: {reward.key}", len(wanted)) as told:
                scores.score(
                    job.folder / name, found[name], wanted, scorer, job.asked, job.prompts, job.batch, rank, told
                )
        del scorer
        gc.collect()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for name in found:
            tidy(job.folder / name)
    accelerator.wait_for_everyone()


@contextmanager
def alone(folder: Path, main: bool) -> Iterator[None]:
    """Inside, no other command can work in the folder; the lock goes with the process."""
    if not main:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / records.LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another evaluation works in '{folder}'; wait for it, or name another folder") from None
        yield


@contextmanager
def told_of_the_disk(folder: Path) -> Iterator[None]:
    """Inside, a failure of the disk becomes a UserError."""
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        if number not in DISK:  # a reward's, say
            raise
        remedy = REMEDIES.get(number, "make it writable")
        raise UserError(
            f"could not write into '{folder}': {os.strerror(number)}; {remedy}, and the same command goes on"
        ) from error


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], Any]]:
    """A bar on a terminal, of the first process."""
    quiet = not total or not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"
    with tqdm(total=total, disable=quiet, desc=what, unit="image") as bar:
        yield bar.update


def floor(baseline: Wanted) -> Wanted:
    """The baseline with other seeds: how much of a difference chance alone makes."""
    return replace(baseline, name=baseline.name + AGAIN, again=True)
