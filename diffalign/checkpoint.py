"""Resumable state of a run: trained weights, their average, the optimizer, the epoch.

No random-number state is stored: every draw is a function of (seed, epoch, prompt, image).
"""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign import __version__
from diffalign.algorithms import Memory
from diffalign.ema import EMA
from diffalign.types import UserError

# What cannot change on the way without making the run's curve and its comparison with epoch 0 meaningless.
SAME = (
    "model.path",
    "algorithm.name",
    "adapter",
    "seed",
    "prompts",
    "evaluation.prompts",
    "evaluation.images_per_prompt",
    "evaluation.steps",
    "evaluation.guidance",
)
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy")


def save(
    folder: Path,
    epoch: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    memory: Memory,
    config: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/NNNN` after `epoch` epochs, whole or not at all, and drop all but the last `keep`."""
    path = folder / f"{epoch:04d}"
    temporary = folder / f".{epoch:04d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(
        {name: p.detach().cpu().contiguous() for name, p in parameters.items()}, temporary / "weights.safetensors"
    )
    if ema is not None:
        shadow = dict(zip(parameters, ema.shadow, strict=True))
        save_file({name: t.cpu().contiguous() for name, t in shadow.items()}, temporary / "ema.safetensors")
    save_file({name: t.cpu().contiguous() for name, t in memory.state_dict().items()}, temporary / "memory.safetensors")
    torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    meta = {
        "epoch": epoch,
        "ema_updates": ema.updates if ema is not None else 0,
        "config": config,
        "versions": {"diffalign": __version__, **{name: version(name) for name in PACKAGES}},
    }
    (temporary / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    remove(path)
    os.replace(temporary, path)
    for old in finished(folder)[:-keep]:
        remove(old)
    return path


def remove(path: Path) -> None:
    """Delete a checkpoint; it stops counting as one before its files go."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def finished(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.name.isdigit() and (p / "meta.json").is_file()]
    return sorted(found, key=lambda p: int(p.name))


def load(
    path: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    memory: Memory,
    config: dict[str, Any],
) -> int:
    """Restore everything in place and return the number of finished epochs; lr, betas and weight decay stay as given.

    Raises UserError when the checkpoint differs in one of `SAME`.
    """
    meta = json.loads((path / "meta.json").read_text("utf-8"))
    for key in SAME:
        was, now = _value(meta["config"], key), _value(config, key)
        if was != now:
            raise UserError(
                f"checkpoint '{path}' was trained with {key} {was}, this run has {now}; resume with the same, or "
                "choose another output folder"
            )
    weights = load_file(path / "weights.safetensors")
    _copy(parameters, weights, path)
    if ema is not None:
        if not (path / "ema.safetensors").is_file():
            raise UserError(f"checkpoint '{path}' has no moving average; set trainer.ema: 0 or start afresh")
        average = load_file(path / "ema.safetensors")
        for shadow, name in zip(ema.shadow, parameters, strict=True):
            shadow.copy_(average[name])
        ema.updates = meta["ema_updates"]
    memory.load_state_dict(load_file(path / "memory.safetensors"))
    settings = [{key: group[key] for key in ("lr", "betas", "weight_decay")} for group in optimizer.param_groups]
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"))
    for group, chosen in zip(optimizer.param_groups, settings, strict=True):
        group.update(chosen)  # what the configuration says now, not what the checkpoint was made with
    return int(meta["epoch"])


def _value(config: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


@torch.no_grad()
def _copy(parameters: dict[str, nn.Parameter], values: dict[str, Tensor], path: Path) -> None:
    if parameters.keys() != values.keys() or any(p.shape != values[n].shape for n, p in parameters.items()):
        raise UserError(f"checkpoint '{path}' holds other weights than this run trains; is adapter.rank the same?")
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
