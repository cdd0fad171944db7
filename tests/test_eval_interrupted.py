"""Ctrl-C while an evaluation is made: one sentence at any moment, and the same command goes on with nothing twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models

from diffalign.eval import gallery, records

TESTS = Path(__file__).parent
ROOT = TESTS.parent
ENDS = (130, -signal.SIGINT)  # a shell calls both 130; Python makes the second of one that ends a string it runs
DONE = "what is done stays in {}; the same command goes on\n"


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("world")
    tiny_models.sd3_folder(root / "model")
    (root / "prompts.txt").write_text("a red circle\ntwo squares\na star\na green square\n", "utf-8")
    options = ["--rewards", "reward_functions.redness", "--images", "2", "--batch", "1", "--device", "cpu"]
    given = ["--models", f"base={root / 'model'}", "--prompts", str(root / "prompts.txt"), "--steps", "40"]
    return [sys.executable, "-m", "diffalign", "eval", *given, *options]


SWALLOWED = """
import signal, sys, time
from diffalign.__main__ import run
from diffalign.commands import list

class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def slow(args):
    Dying()
    time.sleep(60)

list.run, sys.argv = slow, ["diffalign", "list"]
run()
"""


def test_ctrl_c_is_not_lost_where_python_ignores_errors() -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)" + SWALLOWED
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--out", str(folder)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # ignored where shells run it behind
    )


def interrupted(command: list[str], folder: Path, now: Callable[[], bool]) -> tuple[int, str]:
    """Exit code and what went to stderr."""
    with start(command, folder) as process:
        while not now() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    return process.returncode, said


def images(folder: Path, least: int) -> Callable[[], bool]:
    return lambda: len(list(folder.glob("*/images/*.png"))) >= least


def test_interrupted_again_and_again(command: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "e"

    def nothing_yet() -> bool:
        time.sleep(0.5)  # Python and its libraries are starting
        return True

    moments = {
        "starting": nothing_yet,
        "begun": (folder / records.SETTINGS).exists,
        "sampling": images(folder, 3),
        "scoring": lambda: any(p.stat().st_size for p in folder.glob("*/scores*.jsonl")),
    }
    for name, now in moments.items():
        code, said = interrupted(command, folder, now)
        assert code in ENDS and said in ("interrupted\n", DONE.format(folder) + "interrupted\n"), (name, said)
    code, said = interrupted(command, folder, (folder / "report.md").exists)  # the last file; Python ends
    assert (code, said) in [(0, ""), *((end, "interrupted\n") for end in ENDS)]
    found = gallery.read(folder)
    assert not found.problems
    for entry in found.entries.values():
        assert list(entry.made) == found.keys == list(entry.scores["redness"])
        for file, size in ((records.MADE, 8), (records.SCORES, 8 + 3 * 4)):
            keys = [(x["id"], x["k"], x.get("probe")) for x in entry.lines(file)]
            assert len(keys) == size and max(Counter(keys).values()) == 1, file
