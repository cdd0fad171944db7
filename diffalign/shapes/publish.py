"""Finished models join the embedded ones: a folder in one step, and its lines of the log."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def add_log(stage: str, log: Path, weights: Path) -> None:
    """The lines of `stage` in `log` replace those in the log that ships."""
    path = weights / LOG
    old = path.read_text("utf-8").splitlines() if path.exists() else []
    lines = [line for line in old if json.loads(line)["stage"] != stage]
    lines += [line for line in log.read_text("utf-8").splitlines() if json.loads(line)["stage"] == stage]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", "utf-8")
    os.replace(temporary, path)
