"""Pages of a steering run."""

from __future__ import annotations

from pathlib import Path


def write(folder: Path) -> Path:
    return folder / "report.html"
