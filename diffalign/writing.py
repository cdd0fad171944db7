"""What goes wrong on the disk, in one sentence: what could not be written, why, and how the run goes on."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffalign.types import UserError

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
}
STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}


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


def put(path: Path, data: str | bytes) -> None:
    """Write a file, whole or not at all. A link stays one, and pipes and devices are written into."""
    data = data.encode("utf-8") if isinstance(data, str) else data
    if str(path) in STREAMS:  # which may be half a file by now: opened again it would be written from its start
        sys.stdout.flush()
        with open(STREAMS[str(path)], "wb", closefd=False) as stream:
            stream.write(data)
        return
    if _special(path):
        path.write_bytes(data)
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def try_out(path: Path) -> None:
    """Raises OSError where `put` could not write; what is there stays as it is, folders on the way are made."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if str(path) not in STREAMS and not _special(path):
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        temporary.touch()
        temporary.unlink()


def _special(path: Path) -> bool:
    """Such as a pipe or a device, whose place no file must take."""
    return path.exists() and not path.is_file()


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
