"""Calls in threads that can be told to stop, and for which neither Ctrl-C nor the end of the program waits long.

Those of `concurrent.futures` are joined when Python ends, for as long as a server keeps them waiting.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

GRACE = 1.0  # seconds for what is under way at a stop: a thread in the midst of native code may crash Python's end
STOP: ContextVar[threading.Event | None] = ContextVar("STOP", default=None)  # what tells this thread to stop


def stopped(seconds: float = 0.0) -> bool:
    """Wait so long, or until this thread is to stop; whether it is."""
    return (STOP.get() or threading.Event()).wait(seconds)


def finish(threads: Iterable[threading.Thread]) -> None:
    """Wait for their ends, GRACE seconds in all."""
    until = time.monotonic() + GRACE
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0.0))


def settle(future: Future[T], call: Callable[..., T], *args: Any) -> None:
    """The future becomes what the call returns or raises, or cancelled where this thread is to stop."""
    if stopped():
        future.cancel()
        return
    try:
        future.set_result(call(*args))
    except BaseException as error:
        future.set_exception(error)


class Pool:
    """At most `size` calls at once. A `map` that is interrupted, or whose thread is to stop, begins no more of them."""

    def __init__(self, size: int) -> None:
        self.size, self.room = size, threading.BoundedSemaphore(size)

    def map(self, call: Callable[..., T], *each: Iterable[Any]) -> list[T]:
        """call(...) of the first of each, of the second of each, and so on; raises what a call raises."""
        mine = threading.Event()
        stop = STOP.get() or mine
        calls: list[tuple[Future[T], Any]] = [(Future(), args) for args in zip(*each, strict=True)]
        left = deque(calls)

        def work() -> None:
            STOP.set(stop)
            while True:
                try:
                    future, args = left.popleft()
                except IndexError:
                    return
                with self.room:
                    settle(future, call, *args)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.size, len(calls)))]
        for thread in threads:
            thread.start()
        try:
            return [future.result() for future, _ in calls]
        except BaseException:
            mine.set()
            left.clear()
            finish(threads)
            raise
