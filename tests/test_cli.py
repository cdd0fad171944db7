"""The command line as its user meets it: every call is a process of its own."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import diffalign
from diffalign import catalogue, cli

ROOT = Path(diffalign.__file__).parent.parent
LEFT_OUT = "import sys; from diffalign.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules, code)"


def run(*args: str, cwd: Path, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(("-m", "diffalign") if code is None else ("-c", code)), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.fixture
def model(tmp_path: Path) -> str:
    """An argument that names a model folder, empty but for what the checks look at."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    return "model=./model"


def test_help_and_version(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("train", "check", "generate", "report", "list", "schema"))
    done = run("--version", cwd=tmp_path)
    assert done.stdout == f"diffalign {diffalign.__version__}\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("train", "shapes_demo", "trainer.lrr=1"), "override trainer.lrr=1: trainer.lrr: unknown key; did you mean 'lr'?"),
        (("train", "nowhere"), "no file or preset 'nowhere'; known: "),
        (("train", "shapes_demo", "--output", "a: b", "output.x=1"), "override output.x=1: 'output' is 'runs/shapes_demo'"),
        (("train", "shapes_demo", "--output", "out", "seed=x"), "override seed=x: seed: expected a whole number, got 'x'"),
        (("check",), "give a configuration to check, or --explain KEY"),
        (("check", "--explain", "trainer.lrr"), "trainer.lrr: unknown key; did you mean 'lr'?"),
        (("generate", "--model", "tiny-sd3", "--prompt", " ", "--output", "x"), "a prompt is empty; "),
        (("generate", "--model", "tiny-sd3", "--prompts", "no.txt", "--output", "x"), "no prompt file 'no.txt'; "),
        (("generate", "--model", "m", "--prompt", "a", "--output", "x", "--steps", "0"), "generate: steps: must be greater than 0, got 0"),
        (("generate", "--model", "m", "--prompt", "a", "--output", "x", "--images", "0"), "generate: images must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_exit_code_2_and_no_torch(tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    done = run(*args, cwd=tmp_path, code=LEFT_OUT)
    assert done.stdout == "False 2\n"
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "nothing is written before the checks have passed"


@pytest.mark.parametrize("args", [(), ("frobnicate",), ("train",), ("train", "shapes_demo", "--fast"), ("list", "x=1")])
def test_usage_errors_exit_2(tmp_path: Path, args: tuple[str, ...]) -> None:
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 2 and "usage: diffalign" in done.stderr and "Traceback" not in done.stderr


def test_check_says_what_a_run_will_do(tmp_path: Path, model: str) -> None:
    sizes = ["trainer.epochs=5", "trainer.prompts=3", "trainer.images_per_prompt=4", "algorithm.window=null"]
    done = run("check", "shapes_demo", model, *sizes, cwd=tmp_path, code=LEFT_OUT)
    assert done.stderr == ""
    for fact in (
        "3 prompts x 4 images = 12 images",
        "5 epochs, 5 updates, 60 images",
        "9 of them cps",
        "runs/shapes_demo",
    ):
        assert fact in done.stdout
    assert done.stdout.endswith("False 0\n")


def test_check_of_a_method_without_a_trajectory(tmp_path: Path) -> None:
    method = "algorithm={name: nft, kl: 0, old: {rate: 0}, timesteps: {count: 5}}"
    done = run("check", "shapes_nft", method, cwd=tmp_path, code=LEFT_OUT)
    assert done.stderr == "" and done.stdout.endswith("False 0\n")
    for fact in (
        "10 steps of dpm2, guidance 1\n",
        "at 5 noise levels",
        "1280 to sample + 640 to train\n",
        "old policy",
    ):
        assert fact in done.stdout


def test_overrides_may_stand_after_options() -> None:
    args = cli._parse(["train", "shapes_demo", "a=1", "--output", "out", "b=2"])
    assert (args.config, args.overrides, args.output) == ("shapes_demo", ["a=1", "b=2"], "out")


def test_explain(tmp_path: Path) -> None:
    done = run("check", "--explain", "trainer.lr", cwd=tmp_path, code=LEFT_OUT)
    assert done.stdout == "trainer.lr = 0.0003: Learning rate of AdamW.\nFalse 0\n"


def test_list_names_every_method_with_its_first_line(tmp_path: Path) -> None:
    done = run("list", cwd=tmp_path, code=LEFT_OUT)
    assert done.stdout.endswith("False 0\n")
    folders = {kind: f"diffalign/{kind}" for kind in ("algorithms", "advantages", "curriculums", "multireward")}
    for kind, folder in {**folders, "rewards": "rewards", "pipelines": "pipelines"}.items():
        files = [f for f in sorted((ROOT / folder).glob("*.py")) if not f.name.startswith("_")]
        assert list(catalogue.everything()[kind]) == [f.stem for f in files] and files
        for file in files:
            summary = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n")[0]
            assert summary and f"  {file.stem} " in done.stdout and summary in done.stdout
    for folder in (ROOT / "diffalign/shapes/weights").glob("*/"):
        assert f"  {folder.name}\n" in done.stdout
    assert set(catalogue.everything()["presets"]) == {f.stem for f in (ROOT / "configs").glob("*.yaml")}


def test_kernels_are_those_of_the_samplers() -> None:
    from diffalign.samplers import KERNELS
    from diffalign.solvers import SOLVERS

    assert set(catalogue.everything()["kernels"]) == {*KERNELS, *SOLVERS}


def test_schema_is_json(tmp_path: Path) -> None:
    done = run("schema", cwd=tmp_path)
    assert json.loads(done.stdout)["properties"].keys() >= {"model", "algorithm", "rewards", "trainer"}


def test_output_that_nobody_reads_to_the_end(tmp_path: Path) -> None:
    command = f"{sys.executable} -m diffalign schema | head -1"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "{\n" and done.stderr == ""


def test_ctrl_c_is_one_line_and_exit_code_130(tmp_path: Path, model: str) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(60)\ndef reward(*args): pass\n"
    )
    command = [sys.executable, "-m", "diffalign", "check", "shapes_demo", model, "rewards=[slow.reward]"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None and process.stderr.read() == "interrupted\n"
    assert process.returncode == 130


def test_main_runs_in_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--explain", "seed"]) == 0
    assert capsys.readouterr().out == "seed = 0: Every random number of the run follows from it.\n"
    assert cli.main(["check", "nowhere"]) == 2
    assert "no file or preset 'nowhere'" in capsys.readouterr().err
