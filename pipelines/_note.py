"""What a folder exported by this library remembers beyond the diffusers format: the file SIDECAR in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.few_steps import FewSteps
from diffalign.types import UserError
from diffalign.writing import put

SIDECAR = "diffalign.json"


@dataclass(frozen=True)
class Note:
    """
    Attributes:
        max_sequence_length: T5 tokens of the prompt; None for what the family has by default.
        few_steps: of a distilled model.
        scheduler: the family's own configuration, where the saved one was set up for the few steps.
    """

    max_sequence_length: int | None = None
    few_steps: FewSteps | None = None
    scheduler: dict[str, Any] | None = None


def read(folder: Path) -> Note:
    """An empty note for a folder without one. Raises UserError for a file that is damaged."""
    path = folder / SIDECAR
    if not path.is_file():
        return Note()
    try:
        found = json.loads(path.read_text("utf-8"))
        few, tokens = found.get("few_steps"), found.get("max_sequence_length")
        return Note(
            None if tokens is None else int(tokens),
            None if few is None else FewSteps(tuple(float(t) for t in few["timesteps"]), float(few["eta"])),
            found.get("scheduler"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' is damaged; export the model again") from error


def fetch(name: str, revision: str | None = None) -> Note:
    """That of a hub id, from the hub or its cache; an empty one where there is none, and for what cannot be reached,
    since whatever loads the model itself says why."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return read(Path(hf_hub_download(name, SIDECAR, revision=revision)).parent)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
        return Note()


def write(folder: Path, note: Note) -> None:
    """Nothing for a note that says nothing."""
    few = note.few_steps
    known = {
        "max_sequence_length": note.max_sequence_length,
        "few_steps": None if few is None else {"timesteps": few.timesteps, "eta": few.eta},
        "scheduler": note.scheduler,
    }
    if said := {key: value for key, value in known.items() if value is not None}:
        put(folder / SIDECAR, f"{json.dumps(said)}\n")
