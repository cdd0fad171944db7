"""Checkpoints: everything a run carries from epoch to epoch, one safetensors file a part.

No random-number state is stored: every draw is a function of (seed, epoch, prompt, image).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from diffalign import __version__
from diffalign.states import State
from diffalign.types import UserError
from diffalign.writing import sync

# What cannot change on the way without making the run's curve and its comparison with epoch 0 meaningless.
SAME = (
    "model.path",
    "model.revision",
    "model.max_sequence_length",
    "algorithm.name",
    "advantage.name",
    "curriculum.name",
    "adapter",
    "seed",
    "prompts",
    "evaluation.prompts",
    "evaluation.images_per_prompt",
    "evaluation.steps",
    "evaluation.guidance",
    "sampling.height",
    "sampling.width",
    "sampling.negative_prompt",
)
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy")


def save(folder: Path, epoch: int, states: Mapping[str, State], config: dict[str, Any], keep: int) -> Path:
    """Write `folder/NNNN` after `epoch` epochs, whole or not at all, and drop all but the last `keep`.

    Everything is on the disk before the folder gets its name, so not even a power cut leaves half a checkpoint.
    """
    tidy(folder)
    path, temporary, displaced = (folder / name.format(epoch) for name in ("{:04d}", ".{:04d}.tmp", ".{:04d}.old"))
    temporary.mkdir(parents=True)
    try:
        for name, state in states.items():
            tensors = {key: t.detach().cpu().contiguous() for key, t in state.collect().items()}
            save_file(tensors, temporary / f"{name}.safetensors")
        versions = {"diffalign": __version__, **{name: version(name) for name in PACKAGES}}
        meta = {"epoch": epoch, "states": list(states), "config": config, "versions": versions}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
        for written in temporary.iterdir():
            sync(written)
        sync(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk what is left of it would stand in the way
        raise
    if path.exists():
        os.replace(path, displaced)
    os.replace(temporary, path)
    sync(folder)
    tidy(folder)
    for old in finished(folder)[:-keep]:
        remove(old)
    return path


def finished(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. One that a killed `save` had moved aside for its successor counts too."""
    found = {epoch_of(p): p for p in folder.glob(".[0-9]*.old")}
    found |= {epoch_of(p): p for p in folder.glob("[0-9]*") if p.name.isdigit()}
    return [found[epoch] for epoch in sorted(found) if (found[epoch] / "meta.json").is_file()]


def epoch_of(path: Path) -> int:
    return int(path.name.removeprefix(".").removesuffix(".old"))


def remove(path: Path) -> None:
    """Delete a checkpoint; it stops counting as one before its files go."""
    doomed = path.with_name(f".{epoch_of(path):04d}.gone")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def tidy(folder: Path) -> None:
    """Clear what a killed `save` or `remove` left."""
    for path in [*folder.glob(".[0-9]*.tmp"), *folder.glob(".[0-9]*.gone")]:
        shutil.rmtree(path)
    for path in folder.glob(".[0-9]*.old"):
        successor = path.with_name(f"{epoch_of(path):04d}")
        if successor.exists():
            remove(path)
        else:
            os.replace(path, successor)


def check(path: Path, config: dict[str, Any]) -> int:
    """Whether this run can go on from a checkpoint, without reading its tensors; returns its finished epochs.

    Raises UserError when the checkpoint differs in one of `SAME` or in `multireward`, or is damaged.
    """
    try:
        meta = json.loads((path / "meta.json").read_text("utf-8"))
        epoch, was = int(meta["epoch"]), _kept(meta["config"])
        for name in meta["states"]:
            with safe_open(path / f"{name}.safetensors", "pt"):  # compares the file's length with its header
                pass
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    now = _kept(config)
    for key in was:  # with another `multireward`, the first to differ, `now` may have other keys after it
        if was[key] != now[key]:
            raise UserError(
                f"checkpoint '{path}' was trained with {key} {was[key]}, this run has {now[key]}; resume with the "
                "same, or choose another output folder"
            )
    return epoch


def load(path: Path, states: Mapping[str, State]) -> None:
    """Restore everything in place. Raises UserError for a checkpoint that is damaged or does not fit."""
    for name, state in states.items():
        file = path / f"{name}.safetensors"
        if not file.is_file():
            raise UserError(
                f"checkpoint '{path}' holds no {name}, so it was made with other settings, such as trainer.ema 0; "
                "resume with the same, or choose another output folder"
            )
        try:
            saved = load_file(file)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error
        try:
            state.restore(saved)
        except (KeyError, ValueError) as error:
            raise UserError(f"the {name} of checkpoint '{path}' do not fit: {error}") from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
    older = [
        p for p in finished(path.parent) if p.name.isdigit() and path.name.isdigit() and int(p.name) < int(path.name)
    ]
    advice = (
        f"go on from the one before with --resume {older[-1]}" if older else "there is none before it; start afresh"
    )
    return UserError(f"checkpoint '{path}' cannot be read ({type(error).__name__}: {reason}); {advice}")


def _kept(config: dict[str, Any]) -> dict[str, Any]:
    """What must be the same, by key. With `multireward` that is what its tensors are about: the rewards in order."""
    kept = {key: _value(config, key) for key in SAME} | _optional(config)
    method = config.get("multireward")  # checkpoints older than the key have none
    if method is None:
        return {**kept, "multireward": "null"}
    rewards = [reward["label"] or reward["name"].rpartition(".")[2] for reward in config["rewards"]]
    groups = json.dumps(method.get("groups", {}))  # as text, in which their order counts too
    return {**kept, "multireward": method["name"], "rewards": ", ".join(rewards), "multireward.groups": groups}


def _optional(config: dict[str, Any]) -> dict[str, Any]:
    """What newer versions have; a checkpoint from before counts as one without."""
    sampling, algorithm = config["sampling"], config["algorithm"]
    few = sampling.get("timesteps")
    way = "null" if few is None else f"{list(few)} with {sampling['kernel']}, eta {sampling['eta']:g}"
    fake = algorithm.get("fake") or {}
    return {
        "sampling.timesteps": way,
        "algorithm.teacher": algorithm.get("teacher"),
        "algorithm.fake.base": fake.get("base", "generator"),
    }


def _value(config: dict[str, Any], key: str) -> Any:
    if key == "evaluation.guidance" and config["evaluation"]["guidance"] is None:
        return config["sampling"]["guidance"]
    for part in key.split("."):
        config = config[part]
    if key == "adapter":  # what is not given is left out, so that a checkpoint older than an option goes on
        return {name: value for name, value in config.items() if value is not None}
    return config
