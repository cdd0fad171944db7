"""Processes that die at a chosen moment, or find the disk full, for test_lost.py.

A moment is each time something is about to be written, renamed or deleted in a folder, each wait for the disk, each
half-written tensor file, and each optimizer step.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import reward_functions  # noqa: F401 (this and the next two: what the processes find loaded)
import tiny_models  # noqa: F401
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from diffalign import checkpoint, cli, states, trainer  # noqa: F401

WRITES = {"os.rename": 0, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0}  # audit event -> the argument with the path


def run(target: Callable[..., None], *arguments: Any) -> tuple[int, str]:
    """Exit code, negative for a signal, and what went to stderr. Forked from a process that has run no tensor code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_start, args=(writer, target, *arguments))
    process.start()
    writer.close()
    with os.fdopen(os.dup(reader.fileno()), encoding="utf-8", errors="replace") as text:
        said = text.read()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, said


def _start(writer: Connection, target: Callable[..., None], *arguments: Any) -> None:
    os.dup2(writer.fileno(), 2)
    target(*arguments)


def train(command: list[str], folder: Path, kill_at: int) -> None:
    """`diffalign train`, killed at that moment; 0 lets it live."""
    if kill_at:
        die_at(kill_at, folder)
    sys.exit(cli.main(["train", *command]))


def train_on_a_full_disk(command: list[str], function: str, call: int) -> None:
    """`diffalign train` where from the given call of 'module:function' on no file can be longer than 64 bytes."""
    module, _, name = function.partition(":")
    holder: Any = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    original, calls = getattr(holder, name), [0]

    def full(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))  # Python ignores SIGXFSZ
        return original(*args, **kwargs)

    setattr(holder, name, full)
    sys.exit(cli.main(["train", *command]))


def evaluate(command: list[str], folder: Path, kill_at: int) -> None:
    """`diffalign eval`, killed at that moment; 0 lets it live."""
    if kill_at:
        die_at(kill_at, folder)
    sys.exit(cli.main(["eval", *command]))


def evaluate_on_a_full_disk(command: list[str], size: int) -> None:
    """`diffalign eval` where no file can be longer than that many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    sys.exit(cli.main(["eval", *command]))


def save_again(folder: Path, value: float, kill_at: int) -> None:
    """Write checkpoint 1 of one number, in place of the one that is there."""
    if kill_at:
        die_at(kill_at, folder)
    state = states.of_tensors({"value": torch.full((100,), value)})
    checkpoint.save(folder, 1, {"numbers": state}, {}, keep=1)


def die_at(number: int, folder: Path) -> None:
    left = [number]

    def moment(last_words: Callable[[], None] = lambda: None) -> None:
        left[0] -= 1
        if left[0] == 0:
            last_words()
            place = "in save" if any(f.name == "save" for f in traceback.extract_stack()) else "elsewhere"
            os.write(2, f"killed {place}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        writing = event in WRITES or (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        # a path without a slash: shutil.rmtree names files by their folder's descriptor
        if writing and (str(args[0]).startswith(str(folder)) or "/" not in str(args[0])):
            moment()

    fsync, save_file = os.fsync, checkpoint.save_file

    def half_written(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, path)
        moment(lambda: os.truncate(path, path.stat().st_size // 2))

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        moment()

    os.fsync, checkpoint.save_file = synced, half_written
    register_optimizer_step_post_hook(lambda *_: moment())
    sys.addaudithook(audit)
