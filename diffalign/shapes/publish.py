"""Finished models join the embedded ones: a folder in one step, and its lines of the log."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffalign.writing import put

LOG = "pretrain_log.jsonl"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` when the block ends without an error."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def add_log(stage: str, log: Path | None, weights: Path, held_out: Mapping[str, Any] | None = None) -> None:
    """The lines of `stage` in `log`, and what was measured in the end, replace those in the log that ships."""
    new = log.read_text("utf-8").splitlines() if log is not None else []
    path = weights / LOG
    old = path.read_text("utf-8").splitlines() if path.exists() else []
    lines = [line for line in old if json.loads(line)["stage"] != stage]
    lines += [line for line in new if json.loads(line)["stage"] == stage]
    if held_out is not None:
        lines.append(json.dumps({"stage": stage, "held_out": held_out}))
    put(path, "\n".join(lines) + "\n")
