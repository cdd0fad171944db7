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

from diffalign.ema import EMA
from diffalign.types import UserError

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy")


def save(
    folder: Path,
    epoch: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
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
    torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    meta = {
        "epoch": epoch,
        "ema_updates": ema.updates if ema is not None else 0,
        "config": config,
        "versions": {name: version(name) for name in PACKAGES},
    }
    (temporary / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)
    for old in finished(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def finished(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.isdigit() and (p / "meta.json").is_file())


def load(
    path: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    config: dict[str, Any],
) -> int:
    """Restore everything in place and return the number of finished epochs.

    Raises UserError when the checkpoint is of another model, algorithm or adapter.
    """
    meta = json.loads((path / "meta.json").read_text("utf-8"))
    for key, field in (("model", "path"), ("algorithm", "name"), ("adapter", "name")):
        was, now = meta["config"][key][field], config[key][field]
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
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"))
    return int(meta["epoch"])


@torch.no_grad()
def _copy(parameters: dict[str, nn.Parameter], values: dict[str, Tensor], path: Path) -> None:
    if parameters.keys() != values.keys() or any(p.shape != values[n].shape for n, p in parameters.items()):
        raise UserError(f"checkpoint '{path}' holds other weights than this run trains; is adapter.rank the same?")
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
