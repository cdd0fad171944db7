"""Steering many prompts from the command line: images, run.jsonl, contact sheet and report, resumable at any prompt."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from diffalign.eval import steering_report
from diffalign.eval.steering_folder import SETTINGS
from diffalign.images import save_png
from diffalign.rewards import Scorer, score
from diffalign.steer import Steer, Steered
from diffalign.steering import resolve
from diffalign.types import UserError
from diffalign.writing import REMEDIES, put

LINES, IMAGES = "run.jsonl", "images"


@dataclass(frozen=True)
class Job:
    """What to make of every prompt.

    Attributes:
        steps: None for those that a distilled model remembers.
        compare: other ways beside the method: 'base', one plain image, and 'bon', best of N at the method's cost.
        judges: rewards that score what is returned and steer nothing.
        arguments: of the pipeline's call.
    """

    folder: Path
    prompts: Sequence[Mapping[str, Any]]
    steps: int | None
    seed: int
    compare: Sequence[str]
    judges: Mapping[str, Scorer]
    arguments: Mapping[str, Any]
    judged_at_once: int = 8


def finished(
    folder: Path, settings: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]], resume: bool
) -> list[dict[str, Any]]:
    """Lines that are done. `settings` is all that decides the images, as JSON; nothing is written.

    Raises UserError for a folder with other content, or a run of other settings or prompts.
    """
    note = folder / SETTINGS
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return []
    if not resume:
        raise UserError(f"'{folder}' is not empty; name a new folder, or go on in this one with --resume")
    if not note.is_file():
        raise UserError(f"'{folder}' holds no {SETTINGS}, so it is no steering run; name a new folder")
    before = _settings(folder)
    other = [k for k in settings if before.get(k) != settings[k]]
    if other:
        raise UserError(
            f"the run in '{folder}' had {other[0]} {before.get(other[0])!r}, not {settings[other[0]]!r}; "
            "give the same, or name a new folder"
        )
    lines = list(_complete(folder / LINES))
    texts = [str(m["prompt"]) for m in prompts]
    strange = [r for r in lines if r["index"] >= len(texts) or r["prompt"] != texts[r["index"]]]
    if strange:
        raise UserError(f"the run in '{folder}' had other prompts, such as {strange[0]['prompt']!r}; give the same")
    return lines


def begin(job: Job, settings: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> None:
    """Make the folder, or clear away what a killed run left in it."""
    with writing_to(job.folder):
        (job.folder / IMAGES).mkdir(parents=True, exist_ok=True)
        known = _settings(job.folder) if (job.folder / SETTINGS).is_file() else settings
        _note(job.folder, {**known, "prompts": len(job.prompts)})
        put(job.folder / LINES, "".join(_line(r) for r in done))  # a killed run leaves half a line


def _settings(folder: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads((folder / SETTINGS).read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"'{folder / SETTINGS}' is damaged; steer into a new folder") from error
    return known


def run(job: Job, steer: Steer, done: Sequence[dict[str, Any]]) -> None:
    """Steer the prompts that are not done, and write pages of all; also of those that an error or Ctrl-C left."""
    lines, total = list(done), len(job.prompts)
    try:
        with tqdm(total=total, initial=len(lines), disable=not sys.stderr.isatty(), unit="prompt") as bar:
            bar.set_description("finding lam" if dict(steer.method).get("lam") == "auto" else None)
            steer, share = _with_strength(job, steer)
            for index in sorted(set(range(total)) - {line["index"] for line in lines}):
                lines.append(one(job, steer, share, index, bar))
                with writing_to(job.folder), open(job.folder / LINES, "a", encoding="utf-8") as file:
                    file.write(_line(lines[-1]))
                    file.flush()
                    os.fsync(file.fileno())
                bar.update(1)
    except BaseException:
        print(f"{len(lines)} of {total} prompts are done in {job.folder}; --resume goes on", file=sys.stderr)
        if lines:
            with suppress(Exception):  # what stopped the run is what the user must hear of
                steering_report.write(job.folder)
        raise
    print(table(lines))
    said = {said for line in lines for said in line["arms"][steer.method.name]["warnings"]}
    for sentence in [*_settings(job.folder).get("lam_notes", []), *sorted(said)]:
        print(f"note: {sentence}")
    with writing_to(job.folder):
        page = steering_report.write(job.folder)
    print(f"{total} prompt{'s' * (total > 1)} in {job.folder}; see {page}")


def _with_strength(job: Job, steer: Steer) -> tuple[Steer, int]:
    """The steering with lam set, and each prompt's share of the forwards that took; a resumed run knows both."""
    if dict(steer.method).get("lam") != "auto":
        return steer, 0
    known = _settings(job.folder)
    if "lam" not in known:
        method, said, spent = steer.calibrated(job.prompts, job.steps, job.seed, job.arguments)
        known |= {"lam": dict(method)["lam"], "lam_nfe": spent, "lam_notes": said}
        _note(job.folder, known)
    share = math.ceil(known["lam_nfe"] / len(job.prompts))
    return steer.using(steer.method.model_copy(update={"lam": known["lam"]})), share


def _note(folder: Path, settings: Mapping[str, Any]) -> None:
    with writing_to(folder):
        put(folder / SETTINGS, json.dumps(dict(settings), ensure_ascii=False, indent=1) + "\n")


def one(job: Job, steer: Steer, share: int, index: int, bar: Any) -> dict[str, Any]:
    """Every arm of one prompt: its images on the disk, its numbers as a line of run.jsonl. `share` forwards set lam."""
    metadata = job.prompts[index]
    prompt = str(metadata["prompt"])
    few, plain = steer.few_steps(job.steps), steer.plain(job.steps)
    count = job.steps if few is None else len(few.timesteps)

    def make(name: str, chosen: Steer) -> Steered:
        told: dict[str, str] = {}

        def tell(_: Steer, step: int, sigma: float, seen: dict[str, Any]) -> None:
            known = {"ESS": "ess", "roots": "roots", "best": "best"}
            told.update({label: f"{seen[key]:.3g}" for label, key in known.items() if seen.get(key) is not None})
            bar.set_description(f"{name} {step + 1}/{count}", refresh=False)
            bar.set_postfix(told, refresh=False)
            bar.update(0)

        return chosen(prompt, job.steps, job.seed, metadata, index, tell, **job.arguments)

    steered = make(steer.method.name, steer)
    cost = steered.nfe + share
    found = {steer.method.name: replace(steered, nfe=cost)}
    if "base" in job.compare:
        found["base"] = make("base", steer.using(resolve({"name": "best_of_n", "particles": 1}), plain))
    if "bon" in job.compare:
        found["bon"] = make(
            "bon", steer.using(resolve({"name": "best_of_n", "budget_nfe": cost, "select": "best"}), plain)
        )
    arms = {name: _arm(job, index, name, steered, metadata) for name, steered in found.items()}
    return {"index": index, "prompt": prompt, "arms": arms}


def _arm(job: Job, index: int, name: str, steered: Steered, metadata: Mapping[str, Any]) -> dict[str, Any]:
    files = [f"{index:04d}_{name}_{k:02d}.png" for k in range(len(steered.pixels))]
    with writing_to(job.folder):
        for file, image in zip(files, steered.pixels, strict=True):
            save_png(image, job.folder / IMAGES / file)
    n = len(files)
    outputs = score(job.judges, steered.pixels, [steered.prompt] * n, [metadata] * n, job.judged_at_once)
    lineage = steered.lineage
    return {
        "images": [f"{IMAGES}/{file}" for file in files],
        "rewards": _numbers(steered.rewards),
        "weights": _numbers(steered.weights),
        "judges": {judge: _numbers(output.scores) for judge, output in outputs.items()},
        "method": steered.method.model_dump(mode="json"),
        "seed": steered.seed,
        "nfe": steered.nfe,
        "reward_calls": steered.reward_calls,
        "seconds": {phase: round(s, 4) for phase, s in steered.seconds.items()},
        "log_z": steered.log_z,
        "ancestors": steered.ancestors,
        "leaves": steered.leaves,
        "lineage": {"step": lineage.step, "parent": lineage.parent, "reward": [_number(r) for r in lineage.reward]},
        "history": [{k: _number(v) if isinstance(v, float) else v for k, v in row.items()} for row in steered.history],
        "warnings": steered.warnings,
    }


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Inside, a failure of the disk becomes a UserError."""
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        remedy = REMEDIES.get(number, "make it writable")
        raise UserError(f"could not write into '{folder}': {os.strerror(number)}; {remedy} and use --resume") from error


def _number(value: float | None) -> float | None:
    """JSON has no infinities."""
    return None if value is None or not math.isfinite(value) else value


def _numbers(values: Tensor) -> list[float | None]:
    return [_number(v) for v in values.double().tolist()]


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _complete(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that a killed run may have left in the middle of its last one."""
    lines = path.read_text("utf-8").split("\n") if path.is_file() else []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last end of a line is not whole
        try:
            record = json.loads(line)
            record["index"], record["prompt"], record["arms"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(
                f"line {number} of '{path}' is damaged; take it out, and --resume makes that prompt anew"
            ) from None
        yield record


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Means over prompts, one row an arm: reward of the best image, what the judges say of it, and the cost."""
    arms = list(lines[0]["arms"])
    judges = list(lines[0]["arms"][arms[0]]["judges"])
    rows = [["", "reward", *judges, "forwards", "seconds"]]
    for arm in arms:
        here = [line["arms"][arm] for line in lines]
        means = [_mean([a["rewards"][0] for a in here]), *(_mean([a["judges"][j][0] for a in here]) for j in judges)]
        rows.append([arm, *means, _mean([a["nfe"] for a in here], 0), _mean([a["seconds"]["total"] for a in here], 2)])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.rjust(w) if k else c.ljust(w) for k, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows
    )


def _mean(values: Sequence[float | None], digits: int = 4) -> str:
    known = [v for v in values if v is not None]
    return f"{sum(known) / len(known):.{digits}f}" if known else "-"
