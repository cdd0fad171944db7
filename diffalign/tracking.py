"""Where numbers go: always `metrics.jsonl`, on request accelerate's trackers, and a progress line on the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm


class Tracker:
    """Log of one run. Only the main process writes."""

    def __init__(self, accelerator: Accelerator, folder: Path, epochs: int, first: int) -> None:
        self.accelerator = accelerator
        self.path = folder / "metrics.jsonl"
        self.terminal = accelerator.is_main_process and sys.stderr.isatty()
        self.bar = tqdm(total=epochs, initial=first, desc=folder.name, unit="epoch", disable=not self.terminal)
        if accelerator.is_main_process:
            self._forget_after(first)
        if accelerator.num_processes > 1:
            self.say(f"{accelerator.num_processes} processes")

    def _forget_after(self, first: int) -> None:
        """A resumed run repeats the epochs after its checkpoint; their old lines go."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text("utf-8").splitlines() if _epoch(line) <= first]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), "utf-8")
        os.replace(temporary, self.path)

    def log(self, epoch: int, phase: str, values: Mapping[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": epoch, "phase": phase, **values}) + "\n")
        self.accelerator.log({f"{phase}/{name}": v for name, v in values.items()}, step=epoch)

    def say(self, text: str) -> None:
        """A line for the user, above the progress bar when there is one."""
        if self.accelerator.is_main_process:
            if self.terminal:
                tqdm.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def advance(self, text: str) -> None:
        """One epoch is done: the bar moves, or without a terminal a line is printed."""
        if self.terminal:
            self.bar.set_postfix_str(text)
            self.bar.update()
        else:
            self.say(text)

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()


def _epoch(line: str) -> int:
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that was killed while writing
        return sys.maxsize
    return int(entry["epoch"])
