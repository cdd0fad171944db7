"""The parts of a diffusers pipeline without their weights, and whether files of weights are whole."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import ModelMixin, SchedulerMixin
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from diffalign.types import UserError


def parts(source: str, revision: str | None, index: Mapping[str, Any]) -> dict[str, Any]:
    """Every part that model_index.json names: networks and schedulers from their configurations, of all else None."""
    named = {name: part for name, part in index.items() if isinstance(part, (list, tuple)) and len(part) == 2}
    return {name: _part(source, name, revision, *part) for name, part in named.items()}


def _part(source: str, name: str, revision: str | None, library: str | None, class_name: str | None) -> Any:
    if library not in ("diffusers", "transformers") or class_name is None:
        return None
    kind = getattr(importlib.import_module(library), class_name)
    if not isinstance(kind, type):
        return None
    own: Any = kind  # which the checks below do not narrow
    with init_empty_weights():
        if issubclass(kind, ModelMixin):
            config = own.load_config(source, subfolder=name, revision=revision)
            return own.from_config(config).eval()
        if issubclass(kind, PreTrainedModel):
            return own(own.config_class.from_pretrained(source, subfolder=name, revision=revision)).eval()
    if issubclass(kind, SchedulerMixin):
        return own.from_pretrained(source, subfolder=name, revision=revision)
    return None


def check_weights(folder: Path, made: Mapping[str, Any]) -> None:
    """Raises UserError for networks among these parts whose files of weights are missing or, as their heads tell, cut
    off."""
    for name, part in made.items():
        if isinstance(part, nn.Module):
            _check_weights(folder / name)


def _check_weights(folder: Path) -> None:
    files = {*folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        files |= {folder / file for file in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    if not files:
        raise UserError(f"'{folder}' has no weights: no *.safetensors; save or download the model again")
    for file in sorted(files):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the weights '{file}': {error}; save or download the model again") from error
