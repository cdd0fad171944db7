"""What goes wrong on the disk, in one sentence: what could not be written, why, and how the run goes on."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffalign.types import UserError

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
}


@contextmanager
def writing(what: str, run: Path, rescue: Callable[[], None] | None = None) -> Iterator[None]:
    """Inside, a failure of the disk becomes a UserError; every other error stays as it is.

    Args:
        what: the sentence says "could not write {what}".
        run: the run folder, whose newest complete checkpoint is named.
        rescue: called first, to save what was finished and is not on the disk yet; may fail for the same reason.
    """
    try:
        yield
    except Exception as error:
        number = failed_call(error)
        if number is None:
            raise
        if rescue is not None:
            with suppress(UserError):
                rescue()
        raise UserError(f"could not write {what}: {os.strerror(number)}; {_way_on(run, number)}") from error


def failed_call(error: BaseException) -> int | None:
    """errno of the system call behind an error. Libraries written in Rust tell it in their text alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def _way_on(run: Path, number: int) -> str:
    from diffalign.checkpoint import finished  # imports torch

    remedy = REMEDIES.get(number, "make it writable")
    found = finished(run / "checkpoints")
    if not found:
        return f"no checkpoint is complete yet; {remedy} and start again with --resume auto"
    return f"the newest complete checkpoint is {found[-1]}; {remedy} and go on with --resume auto"


def put(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    sync(temporary)
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A folder for what is not whole yet, gone afterwards; what a killed process left in it goes first."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path)
