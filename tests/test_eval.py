"""The eval command: equal seeds, nothing made or scored twice, killed at any moment, shared by processes, refusals."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kill_runs
import numpy as np
import pytest
import test_processes
import tiny_models
import torch
from PIL import Image

import diffalign
from diffalign.cli import main
from diffalign.eval import gallery, records
from diffalign.eval.contestant import parse
from diffalign.types import UserError

TESTS = Path(__file__).parent
KILLS = 6
SMALL = ["--images", "2", "--steps", "3", "--batch", "2", "--device", "cpu", "--probes", "2"]
TEXTS = ["a red circle", 'two "green" squares \u2028 </script>', "🟦 a star \u202eنجمة"]


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TESTS))
        patch.setenv("PYTHONPATH", f"{TESTS.parent}{os.pathsep}{TESTS}")
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and a file of prompts."""
    root = tmp_path_factory.mktemp("world")
    for seed in (0, 1):
        tiny_models.sd3_folder(root / f"sd3_{seed}", seed=seed)
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS), "utf-8")
    return root


def command(world: Path, folder: Path, *options: str, models: Sequence[str] = ("base", "other")) -> list[str]:
    specs = [f"{name}={world / ('sd3_0' if name == 'base' else 'sd3_1')}" for name in models]
    rewards = ["reward_functions.redness"]
    return [
        "--models", *specs, "--prompts", str(world / "prompts.jsonl"), "--rewards", *rewards,
        "--out", str(folder), *SMALL, *options,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "whole"
    assert main(["eval", *command(world, folder)]) == 0
    return folder


def facts(folder: Path) -> dict[str, Any]:
    """What must be the same in every evaluation of these models: pictures, seeds, scores."""
    found = gallery.read(folder)
    assert not found.problems
    return {
        name: {
            "made": {key: (m.digest, m.seed, m.nfe) for key, m in entry.made.items()},
            "scores": {r: {k: s.score for k, s in sorted(own.items())} for r, own in entry.scores.items()},
            "probes": {r: {k: s.score for k, s in sorted(own.items())} for r, own in entry.probes.items()},
            "looks": entry.looks,
        }
        for name, entry in found.entries.items()
    }


def test_what_is_in_the_folder(whole: Path) -> None:
    found = gallery.read(whole)
    assert [p["prompt"] for p in found.prompts] == TEXTS and list(found.entries) == ["base", "other", "base-again"]
    for entry in found.entries.values():
        assert list(entry.made) == found.keys == list(entry.scores["redness"]) == list(entry.looks)
        assert all(records.digest_of(entry.image(key).read_bytes()) == m.digest for key, m in entry.made.items())
        assert {probe: len(own) for (_, probe), own in entry.probes.items()} == dict.fromkeys(records.PROBES, 2)
        assert f"diffalign {diffalign.__version__}" in entry.about.versions
    base, other, again = found.entries.values()
    seeds = {key: m.seed for key, m in base.made.items()}
    assert len(set(seeds.values())) == 6 and seeds == {key: m.seed for key, m in other.made.items()}
    assert not set(seeds.values()) & {m.seed for m in again.made.values()}
    assert base.made["0000", 0].digest != base.made["0000", 1].digest != other.made["0000", 1].digest
    assert again.about.again == "base" and other.about.again is None
    pixels = np.asarray(Image.open(base.image(("0001", 1))).convert("RGB"), np.float64) / 255
    assert base.value("redness", ("0001", 1)) == pytest.approx(pixels[..., 0].mean() - pixels[..., 2].mean(), abs=1e-6)
    moved = base.probes["redness", "shuffled"]["0000", 0].score
    assert (
        moved == base.probes["redness", "unprompted"]["0000", 0].score == base.scores["redness"]["0000", 0].score
    )  # this reward reads no prompt
    assert base.probes["redness", "degraded"]["0000", 0].score != moved


def test_a_prompt_has_its_seeds_in_every_set(world: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "fewer.txt").write_text(TEXTS[2] + "\n", "utf-8")
    options = ["--prompts", str(tmp_path / "fewer.txt"), "--no-noise-floor", "--probes", "0"]
    assert main(["eval", *command(world, tmp_path / "e", *options, models=["base"])]) == 0
    (alone,) = gallery.read(tmp_path / "e").entries.values()
    among = gallery.read(whole).baseline
    assert alone.made["0000", 1].digest == among.made["0002", 1].digest


def test_only_what_is_missing_is_made(world: Path, whole: Path, tmp_path: Path) -> None:
    """Another model, then another reward, then a picture that went: the rest keeps its bytes, times and costs."""
    folder = tmp_path / "e"
    assert main(["eval", *command(world, folder, models=["base"])]) == 0

    def times() -> dict[str, int]:
        return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.glob("*/images/*.png")}

    def lines(name: str, file: str) -> list[str]:
        return (folder / name / file).read_text("utf-8").splitlines()

    before, made = times(), lines("base", "made.jsonl")
    assert main(["eval", *command(world, folder)]) == 0
    assert {k: v for k, v in times().items() if k in before} == before and len(times()) == len(before) + 6
    assert main(["eval", *command(world, folder, "--rewards", "reward_functions.topness")]) == 0
    assert lines("base", "made.jsonl") == made
    assert [json.loads(line)["reward"] for line in lines("base", "scores.jsonl")].count("redness") == 6 + 2 * 3
    assert [json.loads(line)["reward"] for line in lines("other", "scores.jsonl")].count("topness") == 6 + 2 * 3
    gone = folder / "other" / "images" / "0001_00.png"
    gone.unlink()
    Image.new("RGB", (32, 32)).save(folder / "other" / "images" / "0002_00.png")  # no longer what was scored
    assert "lacks 1 of its images" in " ".join(gallery.read(folder).problems)
    kept, before_that = times(), "Python 3.9.0, diffalign 0.0.1"
    for name in ("base", "other"):
        about = records.one(records.Contestant, folder / name / records.RUN).model_copy(
            update={"versions": before_that}
        )
        (folder / name / records.RUN).write_text(about.model_dump_json())
    assert main(["eval", *command(world, folder)]) == 0
    made_with = {name: entry.about.versions for name, entry in gallery.read(folder).entries.items()}
    assert (
        made_with["base"] == before_that and made_with["other"] == f"{before_that} and later {made_with['base-again']}"
    )
    anew = {name for name, at in times().items() if kept.get(name) != at}
    assert anew == {"other/images/0001_00.png", "other/images/0002_00.png"}
    assert facts(folder)["other"]["made"] == facts(whole)["other"]["made"]


def test_a_model_is_the_one_it_was(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other weights under an old name are refused, and so is steering by another reward; nothing is mixed."""
    model, folder = tmp_path / "model", tmp_path / "e"
    shutil.copytree(world / "sd3_0", model)
    given = ["--models", f"x={model}", f"fk={model}+fk:particles=2,lam=1", "--prompts", str(world / "prompts.jsonl")]
    given += ["--out", str(folder), *SMALL, "--no-noise-floor", "--first", "1"]
    rewards = ["--rewards", "reward_functions.redness", "reward_functions.topness"]
    assert main(["eval", *given, *rewards]) == 0
    before = facts(folder)
    assert main(["eval", *given, *rewards, "--steer-by", "reward_functions.topness"]) == 2
    assert "'fk' had another steered_by; give it another name" in capsys.readouterr().err
    shutil.rmtree(model)
    shutil.copytree(world / "sd3_1", model)
    assert main(["eval", *given, *rewards]) == 2
    assert "'x' had other weights when its images were made" in capsys.readouterr().err
    assert facts(folder) == before


def test_the_training_reward_is_known_when_it_comes_later(world: Path, tmp_path: Path) -> None:
    folder, model = tmp_path / "e", world / "sd3_0"
    given = ["--prompts", str(world / "prompts.jsonl"), "--out", str(folder), *SMALL, "--first", "1"]
    models = [
        "--models",
        f"base={model}",
        f"fk={model}+best_of_n:particles=2",
        "--steer-by",
        "reward_functions.redness",
    ]
    assert main(["eval", *given, *models, "--rewards", "reward_functions.topness"]) == 0
    later = ["--models", f"base={model}", "--rewards", "reward_functions.redness"]
    assert main(["eval", *given, *later]) == 0
    found = gallery.read(folder)
    assert found.trained(found.entries["fk"]) == ["redness"] and found.trained(found.baseline) == []
    assert "redness (trained)" in (folder / "report.md").read_text("utf-8")


def test_a_contestant_may_be_taken_out_and_another_put_in(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    assert main(["eval", *command(world, folder, "--no-noise-floor", "--first", "1")]) == 0
    shutil.rmtree(folder / "other")
    third = ["--models", f"third={world / 'sd3_1'}", *command(world, folder, "--first", "1")[3:]]
    assert main(["eval", *third]) == 0
    assert list(gallery.read(folder).entries) == ["base", "third"]


def test_two_commands_do_not_share_a_folder(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "e"
    folder.mkdir()
    with open(folder / records.LOCK, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["eval", *command(world, folder)]) == 2
    assert "another evaluation works in" in capsys.readouterr().err
    assert [p.name for p in folder.iterdir()] == [records.LOCK]


@pytest.mark.parametrize("damage", [b'{"id": "0000", \xff}\n', b"not json\n"])
def test_damaged_lines_are_named(whole: Path, tmp_path: Path, damage: bytes) -> None:
    folder = shutil.copytree(whole, tmp_path / "e")
    with open(folder / "other" / "made.jsonl", "ab") as file:
        file.write(damage)
    with pytest.raises(UserError, match=r"line 7 of .*made.jsonl' is damaged"):
        gallery.read(folder)
    (folder / "prompts.jsonl").unlink()
    with pytest.raises(UserError, match="is missing or empty"):
        gallery.read(folder)


def test_half_a_line_does_not_count(world: Path, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "e")
    for name in (records.MADE, records.SCORES, records.LOOKS):
        path = folder / "other" / name
        os.truncate(path, path.stat().st_size - 20)
    assert main(["eval", *command(world, folder)]) == 0
    assert facts(folder) == facts(whole)


@pytest.mark.parametrize("size", [100, 1500, 6000])
def test_a_full_disk_is_one_sentence(world: Path, whole: Path, tmp_path: Path, size: int) -> None:
    """The limit on file sizes stands for the disk: what was asked, an image, or the page is larger than it."""
    folder = tmp_path / "e"
    code, said = kill_runs.run(kill_runs.evaluate_on_a_full_disk, command(world, folder), size)
    assert code == 2 and "could not write" in said and said.count("\n") == 1, said
    assert main(["eval", *command(world, folder)]) == 0
    assert facts(folder) == facts(whole)


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_no_prompts(world: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.txt").write_text(text)
    assert main(["eval", *command(world, tmp_path / "e", "--prompts", str(tmp_path / "none.txt"))]) == 2
    assert "none.txt' holds no prompt" in capsys.readouterr().err and not (tmp_path / "e").exists()


def test_killed_at_any_moment_it_goes_on(world: Path, whole: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    folder, killed = tmp_path / "e", 0
    for _ in range(KILLS):
        code, said = kill_runs.run(kill_runs.evaluate, command(world, folder), folder, rng.randrange(1, 40))
        killed += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), said
    code, said = kill_runs.run(kill_runs.evaluate, command(world, folder), folder, 0)
    assert code == 0, said
    assert killed >= KILLS // 2 and facts(folder) == facts(whole)


def test_two_processes_share_it(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    port = ["--main_process_port", str(test_processes.free_port())]
    done = subprocess.run(
        [*launch, *port, "-m", "diffalign", "eval", *command(world, folder)],
        cwd=TESTS.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as each of the two had: other sums round otherwise
    try:
        assert main(["eval", *command(world, tmp_path / "one")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert facts(folder) == facts(tmp_path / "one")
    assert not list(folder.glob("*/*.[0-9].jsonl"))


def test_steered_starts_from_the_same_noise(world: Path, tmp_path: Path) -> None:
    """One particle of best of N is the plain image; more are at least as good in the reward that steers."""
    folder = tmp_path / "e"
    model = world / "sd3_0"
    specs = [f"base={model}", f"one={model}+best_of_n:particles=1", f"four={model}+best_of_n:particles=4"]
    options = ["--models", *specs, "--prompts", str(world / "prompts.jsonl"), "--rewards", "reward_functions.redness"]
    assert main(["eval", *options, "--out", str(folder), *SMALL, "--batch", "1"]) == 0
    found = gallery.read(folder)
    base, one, four = (found.entries[name] for name in ("base", "one", "four"))
    assert {k: m.digest for k, m in base.made.items()} == {k: m.digest for k, m in one.made.items()}
    gains = [four.value("redness", key) - base.value("redness", key) for key in found.keys]
    assert min(gains) >= 0 and max(gains) > 0
    assert {m.nfe for m in base.made.values()} == {3} and {m.nfe for m in four.made.values()} == {12}
    assert four.about.kind == "steered" and found.trained(four) == ["redness"] and base.about.trained_on == ()
    assert len(four.lines(records.LINEAGE)) == 6


def test_reference_pictures_give_fid_and_kid(world: Path, tmp_path: Path) -> None:
    """The baseline's own pictures are the reference: its distance is 0, and the other model's is not."""
    folder, pictures = tmp_path / "e", tmp_path / "pictures"
    assert main(["eval", *command(world, folder)]) == 0
    shutil.copytree(folder / "base" / "images", pictures)
    options = ["--features", "dino:model=tiny-dino", "--reference", str(pictures)]
    assert main(["eval", *command(world, folder, *options)]) == 0
    told = json.loads((folder / "report.json").read_text("utf-8"))["diversity"]
    assert told["reference"] == 6
    base, other = told["models"]["base"], told["models"]["other"]
    assert abs(base["fid"]) < 1e-3 < other["fid"] and base["kid"] < other["kid"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images", "3"], "has images_per_prompt 2, not 3"),
        (["--seed", "1"], "has seed 0, not 1"),
        (["--height", "16", "--width", "16"], "has height 64, not 16"),
        (["--first", "2"], "has other prompts"),
        (["--steps", "4"], "'base' had steps 3, not 4"),
        (["--baseline", "other"], "has baseline 'base', not 'other'"),
        (["--dtype", "bf16"], "'base' had dtype 'fp32', not 'bf16'"),
    ],
)
def test_another_question_needs_another_folder(
    world: Path, whole: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = facts(whole)
    assert main(["eval", *command(world, whole, *options)]) == 2
    assert said in capsys.readouterr().err and facts(whole) == before


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("tiny-sd3", "write NAME=SOURCE"),
        ("a/b=tiny-sd3", "names a folder too"),
        ("..=tiny-sd3", "names a folder too"),
        ("x=nowhere", "there is no 'nowhere'"),
        ("x-again=tiny-sd3", "uses the name 'x-again' itself"),
        ("img=tiny-sd3", "uses the name 'img' itself"),
        ("x=tiny-sd3@kernel=flow_sde", "kernels: ode, dpm2"),
        ("x=tiny-sd3@dtype=int8", "dtypes are fp32"),
        ("x=tiny-sd3@guidance=0.5", "guidance must be at least 1"),
        ("x=lora@base=tiny-sd3+fk:particles=2", "write +METHOD before the @"),
        ("x=tiny-sd3@steps=0", "does not suit 'steps'"),
        ("x=tiny-sd3@steps=four", "does not suit 'steps'"),
        ("x=tiny-sd3@stps=4", "there is no option 'stps'"),
        ("x=tiny-sd3@weights=live", "'tiny-sd3' is none"),
        ("x=tiny-sd3@base=tiny-sd3", "'tiny-sd3' is no LoRA"),
        ("x=tiny-sd3+fkk:particles=4", "fkk"),
        ("x=tiny-sd3+fk:particles", "'particles' is no option"),
    ],
)
def test_models_that_cannot_be_read(spec: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse([spec])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_names_are_given_once() -> None:
    with pytest.raises(UserError, match="two models are called 'a'"):
        parse(["a=tiny-sd3", "a=tiny-sd3@steps=4"])


def test_runs_and_loras(tmp_path: Path) -> None:
    """Which weights a training run stands for."""
    run = tmp_path / "run"
    run.mkdir()
    settings = {
        "model": {"path": "tiny-sd3", "revision": None}, "algorithm": {"name": "grpo"}, "rewards": [{"name": "geneval"}],
        "trainer": {"ema": 0.9}, "adapter": {"name": "lora"},
    }  # fmt: skip
    (run / "config.yaml").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="is not there yet; let the run finish"):
        parse([f"x={run}"])
    for name in ("lora", "lora_live"):
        (run / name).mkdir()
    (averaged,), (live,) = parse([f"x={run}"]), parse([f"x={run}@weights=live,steps=4"])
    assert (averaged.lora, averaged.weights, averaged.method) == (run / "lora", "moving average", "grpo")
    assert (live.lora, live.weights, live.steps) == (run / "lora_live", "live", 4)
    assert averaged.trained_on == ("geneval",)
    shutil.copytree(run / "lora", tmp_path / "odd+name@x=1")
    (tmp_path / "odd+name@x=1" / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(UserError, match="a LoRA needs its model; add @base=MODEL"):
        parse([f"x={tmp_path / 'odd+name@x=1'}"])
    (lora,) = parse([f"x={tmp_path / 'odd+name@x=1'}@base=tiny-sd3"])
    assert (lora.kind, lora.model, lora.lora) == ("lora", "tiny-sd3", tmp_path / "odd+name@x=1")
