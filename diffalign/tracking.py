"""Where numbers go: always `metrics.jsonl`, on request accelerate's trackers, and a progress line on the terminal."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffalign.images import grid, thumbnail, to_pixels
from diffalign.types import UserError
from diffalign.writing import put, sync, writing

PROJECT = "diffalign"
COLUMNS, SIDE = 6, 256  # of the grids that trackers get; the run folder has the images at full size
PACKAGES = {"comet_ml": "comet-ml", "aim": "'aim<4'"}  # where pip calls a tracker by another name


def _trackio(tracker: Any, name: str, picture: np.ndarray, step: int) -> None:
    import trackio

    tracker.log({name: trackio.Image(picture)}, step=step)


# Each wants a picture in its own form; a tracker that is not here gets numbers only, and is said so once.
Picture = Callable[[Any, str, np.ndarray, int], None]
PICTURES: dict[str, Picture] = {
    "tensorboard": lambda t, name, p, step: t.log_images({name: p[None]}, step, dataformats="NHWC"),
    "wandb": lambda t, name, p, step: t.log_images({name: [p]}, step),
    "swanlab": lambda t, name, p, step: t.log_images({name: [p]}, step),
    "aim": lambda t, name, p, step: t.log_images({name: Image.fromarray(p)}, step),
    "clearml": lambda t, name, p, step: t.log_images({name: Image.fromarray(p)}, step),
    "trackio": _trackio,
}


def require(names: Sequence[str]) -> None:
    """accelerate drops a tracker that is not installed without a word; this raises UserError."""
    available = {str(name) for name in get_available_trackers()}
    missing = [PACKAGES.get(name, name) for name in names if name not in available]
    if missing:
        raise UserError(f"log_with: {', '.join(missing)} is not installed; pip install {' '.join(missing)}")


class Tracker:
    """Log of one run. Only the main process writes.

    Args:
        config: the resolved configuration, for accelerate's trackers; those that write files do so in `folder`.
        first: finished epochs; what a killed run logged after them will come again, so it is dropped.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, epochs: int, first: int, config: dict[str, Any]) -> None:
        self.accelerator = accelerator
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.terminal = accelerator.is_main_process and sys.stderr.isatty()
        self.bar = tqdm(total=epochs, initial=max(first, 0), desc=folder.name, unit="epoch", disable=not self.terminal)
        self.warned: set[str] = set()
        if accelerator.is_main_process:
            with writing("metrics.jsonl", folder):
                self._forget_after(first)
            self._start(config, first)
        if accelerator.num_processes > 1:
            self.say(f"{accelerator.num_processes} processes")

    def _forget_after(self, first: int) -> None:
        """A resumed run repeats what came after its checkpoint; old lines go, and those of evaluations cut off."""
        if self.path.exists():
            lines = self.path.read_text("utf-8").splitlines()
            kept = [line for line in lines if self._stays(line, first)]
            put(self.path, "".join(line + "\n" for line in kept))

    def _stays(self, line: str, first: int) -> bool:
        try:
            entry: Any = json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was killed while writing
            return False
        whole = entry["phase"] != "eval" or (self.folder / "eval" / f"{entry['epoch']:04d}.json").exists()
        return bool(entry["epoch"] <= first and whole)

    def _start(self, config: dict[str, Any], first: int) -> None:
        if not self.accelerator.log_with:
            return
        folder, name, run = self.folder, self.folder.resolve().name, self._identity(first)
        settings = {
            "tensorboard": {"purge_step": max(first, 0) + 1},
            "wandb": {"name": name, "id": run, "resume": "allow", "dir": str(folder)},
            "trackio": {"name": f"{name}-{run}", "resume": "allow"},
            "swanlab": {"experiment_name": name, "id": run, "resume": "allow", "logdir": str(folder / "swanlab")},
            "dvclive": {"dir": str(folder / "dvclive"), "resume": first > 0},
        }
        try:
            self.accelerator.init_trackers(PROJECT, config=flat(config), init_kwargs=settings)
        except Exception as error:  # of any library and its server
            asked = ", ".join(str(name) for name in self.accelerator.log_with)
            raise UserError(f"log_with: {asked} did not start: {_said(error)}; mend that, or leave it out") from error
        for tracker in self.accelerator.trackers:
            if tracker.name not in PICTURES:
                self.say(f"{tracker.name} gets numbers only; images are in {self.folder / 'images'}")

    def _identity(self, first: int) -> str:
        """By which a server knows this run again when it goes on; a run that starts over is another one."""
        path = self.folder / "run_id"
        if first <= 0 or not path.exists():
            put(path, uuid.uuid4().hex[:8])
        return path.read_text("utf-8")

    def log(self, epoch: int, phase: str, values: Mapping[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        with writing(f"the {phase} line of epoch {epoch} to {self.path}", self.folder):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"epoch": epoch, "phase": phase, **values}) + "\n")
            sync(self.path)
        self._each(epoch, lambda tracker: tracker.log({f"{phase}/{name}": v for name, v in values.items()}, step=epoch))

    def show(self, epoch: int, name: str, images: Sequence[Tensor]) -> None:
        """Give trackers a grid of images, each [3, H, W] in [0, 1]."""
        if not self.accelerator.trackers or not len(images):
            return
        picture = to_pixels(grid([thumbnail(image, SIDE) for image in images], COLUMNS))
        takers = {t.name for t in self.accelerator.trackers} & PICTURES.keys()
        self._each(epoch, lambda t: PICTURES[t.name](t, name, picture, epoch) if t.name in takers else None)

    def _each(self, epoch: int, do: Callable[[Any], None]) -> None:
        """A tracker that fails is left out from then on: it must not cost the run an epoch, and the file has it all."""
        for tracker in list(self.accelerator.trackers):
            try:
                do(tracker)
            except Exception as error:  # of any library and its server
                self.accelerator.trackers.remove(tracker)
                self.say(f"{tracker.name} failed at epoch {epoch} and gets no more of this run: {_said(error)}")

    def say(self, text: str) -> None:
        """A line for the user, above the progress bar when there is one."""
        if self.accelerator.is_main_process:
            if self.terminal:
                tqdm.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def warn(self, key: str, text: str) -> None:
        """Say something once a run."""
        if key not in self.warned:
            self.warned.add(key)
            self.say(text)

    def advance(self, text: str) -> None:
        """One epoch is done: the bar moves, or without a terminal a line is printed."""
        if self.terminal:
            self.bar.set_postfix_str(text)
            self.bar.update()
        else:
            self.say(text)

    def close(self) -> None:
        self.bar.close()
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:  # of any library and its server
                self.say(f"{tracker.name} did not close well: {_said(error)}")
        self.accelerator.trackers.clear()
        self.accelerator.end_training()


def flat(values: Any, prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as trackers take them: {'trainer.lr': 0.001, 'rewards.0.name': ...}, keys as in overrides."""
    if isinstance(values, dict):
        items = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, list) and any(isinstance(v, dict) for v in values):
        items = [(str(i), value) for i, value in enumerate(values)]
    else:
        return {prefix: values if isinstance(values, (bool, int, float, str)) else json.dumps(values)}
    out: dict[str, bool | int | float | str] = {}
    for key, value in items:
        out |= flat(value, f"{prefix}.{key}" if prefix else key)
    return out


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".") or type(error).__name__
