"""`python -m diffalign`, and the installed command."""

from __future__ import annotations

import signal
import sys
import threading

from diffalign.cli import main


def run() -> None:
    sys.unraisablehook = _once_more
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said, and what torch still tidies up is not to be broken off
    sys.exit(code)


def _once_more(ignored: sys.UnraisableHookArgs) -> None:
    """Ctrl-C that comes in the middle of a weak reference's callback or a `__del__` is lost: press it again."""
    if ignored.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(ignored)


if __name__ == "__main__":
    run()
