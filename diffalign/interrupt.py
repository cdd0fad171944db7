"""Ctrl-C without loss: the first one is noted and acted on before the next update, the second ends the program at once.

SIGTERM is noted too, however often it comes: a scheduler sends it to every process of a job, and a launcher passes its
own on. Who cannot wait has SIGKILL.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Context manager; inside, `asked` becomes True when the user or the cluster's scheduler wants the run to stop."""

    def __init__(self) -> None:
        self.asked = False
        self.before: list[Any] = []

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self.before = [signal.signal(s, self._note) for s in SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for s, handler in zip(SIGNALS, self.before, strict=False):
            signal.signal(s, signal.SIG_DFL if handler is None else handler)  # None: not set from Python

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            again = "; once more to stop now without saving it" if number == signal.SIGINT else ""
            print(f"stopping{again}", file=sys.stderr, flush=True)
        self.asked = True
