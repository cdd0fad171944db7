"""The steer command: what it writes, that it goes on where it stopped, and what it says of mistakes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.cli import main

ROOT = Path(__file__).parent.parent
REWARD = "steer_rewards.redness"
BASE = ["steer", "--model", "tiny-sd3", "--steps", "5", "--reward", REWARD, "--device", "cpu"]
PROMPTS = ["a red circle", "two\u2028green\x85squares", "<b>../../etc & a star</b>"]  # some end a line for Python


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def steer(folder: Path, *options: str, prompts: list[str] = PROMPTS) -> int:
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    return main([*BASE, "--out", str(folder), *asked, *options])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run.jsonl").read_text("utf-8").split("\n")[:-1]]


def timeless(folder: Path) -> list[dict[str, Any]]:
    """What must be the same in every run."""
    found = lines(folder)
    for line in found:
        for arm in line["arms"].values():
            del arm["seconds"]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        folder = tmp_path_factory.mktemp("steer") / "whole"
        assert steer(folder, "--particles", "3", "--judge", "geneval,jpeg") == 0
    return folder


def test_what_is_written(whole: Path) -> None:
    found = lines(whole)
    assert [line["prompt"] for line in found] == PROMPTS and [line["index"] for line in found] == [0, 1, 2]
    for line in found:
        assert list(line["arms"]) == ["fk", "base", "bon"]
        for name, arm in line["arms"].items():
            (file,) = arm["images"]
            assert file == f"images/{line['index']:04d}_{name}_00.png"
            assert Image.open(whole / file).size == (64, 64)
            assert set(arm["judges"]) == {"geneval", "jpeg"}
        fk, base, bon = (line["arms"][name] for name in ("fk", "base", "bon"))
        # 3 particles and 5 steps, and a third of the pilot: 8 samples of each prompt; best of N gets the same
        assert (fk["nfe"], base["nfe"], bon["nfe"]) == (15 + 40, 5, 15 + 40)
        assert bon["rewards"][0] >= base["rewards"][0]
        assert fk["history"][-1]["step"] == 5 and fk["lineage"]["parent"][:3] == [None] * 3
    assert found[0]["arms"]["base"]["judges"]["geneval"][0] in (0.0, 1.0)
    assert found[2]["arms"]["base"]["judges"]["geneval"] == [None]  # no prompt of the world: does not apply
    settings = json.loads((whole / "steer.json").read_text())
    assert settings["lam_nfe"] == 3 * 40
    assert settings["lam"] == found[0]["arms"]["fk"]["method"]["lam"] > 0
    assert {p.name for p in whole.iterdir()} == {"steer.json", "run.jsonl", "images", "report.html", "contact.png"}


def test_a_run_that_was_cut_off_goes_on(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed in the middle of the second prompt's line; the rest is made as if nothing had happened."""
    import shutil

    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    text = (whole / "run.jsonl").read_text()
    first = text.index("\n") + 1
    (cut / "run.jsonl").write_text(text[: first + 100])
    (cut / "images" / "0001_fk_00.png").unlink()
    options = ["--particles", "3", "--judge", "geneval,jpeg"]
    assert steer(cut, *options) == 2
    assert "is not empty; name a new folder, or go on in this one with --resume" in capsys.readouterr().err
    assert steer(cut, "--resume", *options) == 0
    assert timeless(cut) == timeless(whole)
    for file in (whole / "images").iterdir():
        assert (cut / "images" / file.name).read_bytes() == file.read_bytes()
    for damaged in (text.replace("{", "[", 1), text.replace("index", "inex", 1)):
        (cut / "run.jsonl").write_text(damaged)
        capsys.readouterr()
        assert steer(cut, "--resume", *options) == 2
        assert "line 1 of" in (said := capsys.readouterr().err) and "is damaged; take it out, and --resume" in said
        assert (cut / "run.jsonl").read_text() == damaged
    (cut / "run.jsonl").write_text(text)
    assert steer(cut, "--resume", "--particles", "4", "--judge", "geneval,jpeg") == 2
    assert "the run in" in (said := capsys.readouterr().err) and "had method" in said
    assert steer(cut, "--resume", *options, prompts=["a blue star", *PROMPTS[1:]]) == 2
    assert "had other prompts, such as 'a red circle'; give the same" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import steer_rewards

    monkeypatch.setattr(steer_rewards, "scored", 0)
    monkeypatch.setattr(steer_rewards, "interrupt_after", 6)
    folder = tmp_path / "out"
    options = ["--method", "best_of_n", "--particles", "4", "--compare", "none"]
    assert steer(folder, *options) == 130
    assert "1 of 3 prompts are done in" in capsys.readouterr().err
    assert len(lines(folder)) == 1 and (folder / "report.html").is_file()
    monkeypatch.setattr(steer_rewards, "interrupt_after", None)
    assert steer(folder, "--resume", *options) == 0
    assert [line["index"] for line in lines(folder)] == [0, 1, 2]


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    """The limit on file sizes stands for the disk: images are larger than it."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "diffalign", *BASE, "--out", str(tmp_path / "out"), "--prompt", "a star"]
    command += ["--reward", "jpeg", "--method", "best_of_n", "--compare", "none"]
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 3; exec "$@"', "bash", *command],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )
    assert limited.returncode == 2, limited.stderr
    assert "could not write into" in limited.stderr and "raise the limit on file sizes" in limited.stderr
    assert "Traceback" not in limited.stderr


def test_a_dry_run_tells_the_cost_and_writes_nothing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert steer(tmp_path / "none", "--particles", "3", "--dry-run") == 0
    said = capsys.readouterr().out
    fk = lines(whole)[0]["arms"]["fk"]
    assert f"network forwards  {fk['nfe'] - 40} (3 plain images)" in said and "for lam  40 forwards" in said
    assert f"images scored     {fk['reward_calls']}" in said
    assert "GiB of weights" in said
    assert not (tmp_path / "none").exists()


def test_the_methods_and_their_options_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["steer", "--list-methods"]) == 0
    said = capsys.readouterr().out
    for name in ("best_of_n: ", "fk: ", "das: ", "svdd: ", "dts: ", "dts_star: ", "noise_search: ", "prune: "):
        assert f"\n{name}" in f"\n{said}"
    assert "  particles = 8: K, images" in said


def test_a_mistake_in_the_model_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steer(tmp_path / "out", "--model", "tiny-sd4", prompts=["a star"]) == 2
    assert not (tmp_path / "out").exists()


def test_a_damaged_note_of_settings(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "steer.json").write_text("{")
    assert steer(folder, "--resume") == 2
    assert "steer.json' is damaged; steer into a new folder" in capsys.readouterr().err


def test_without_a_folder_the_next_free_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("steer", "steer-2"):
        assert main([*BASE, "--prompt", "a star", "--method", "best_of_n:particles=1", "--compare", "none"]) == 0
        assert (tmp_path / "runs" / name / "report.html").is_file()


def test_a_window_is_the_methods_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images beside it are made by the ODE, which has none."""
    options = ["--particles", "2", "--lam", "5", "--window", "1,3", "--resample-at", "2"]
    assert steer(tmp_path / "out", *options, prompts=["a star"]) == 0
    assert [row["step"] for row in lines(tmp_path / "out")[0]["arms"]["fk"]["history"]] == [2, 5]
    assert main([*BASE, "--prompt", "a star", "--resume"]) == 2
    assert "--resume needs --out" in capsys.readouterr().err


def test_a_pilot_without_spread_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--reward", "steer_rewards.constant", "--particles", "2", "--compare", "none"]
    base = [word for word in BASE if word not in ("--reward", REWARD)]
    assert main([*base, "--prompt", "a star", "--out", str(tmp_path / "out"), *options]) == 0
    assert "note: all 8 plain samples of the pilot score alike, so lam is 10" in capsys.readouterr().out


def test_a_fine_tuned_model_is_steered(tmp_path: Path) -> None:
    """A run folder stands for the LoRA in it, whose images differ from the base model's."""
    from diffalign import adapters, pipelines

    pipe = pipelines.load("tiny-sd3", device="cpu")
    adapters.add_lora(pipe, rank=2, alpha=2.0)
    with torch.no_grad():
        for name, weight in pipe.network.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    adapters.export_lora(pipe, tmp_path / "run" / "lora")
    options = ["--method", "best_of_n", "--particles", "1", "--compare", "none"]
    for name, more in (("plain", []), ("tuned", ["--lora", str(tmp_path / "run")])):
        assert steer(tmp_path / name, *options, *more, prompts=["a star"]) == 0
    pictures = [(tmp_path / name / "images" / "0000_best_of_n_00.png").read_bytes() for name in ("plain", "tuned")]
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "fx"], "unknown steering 'fx'"),
        (["--method", "fk:lamb=2"], "steering 'fk', lamb: there is no such option; did you mean 'lam'?"),
        (["--method", "fk:lam"], "'lam' is no option; write OPTION=VALUE after the colon"),
        (["--particles", "1"], "one particle leaves 'fk' nothing to choose from; take --particles 2 or more"),
        (["--lam", "much"], "--lam 'much' is no number; give one, or auto"),
        (["--resample-at", "2,x"], "--resample-at '2,x' is no list of whole numbers"),
        (["--resample-at", "1,2,3,4,5,6"], "6 resampling points for 5 steps"),
        (["--kernel", "ode"], "steering 'fk' needs noise"),
        (["--kernel", "flow_sd:1"], "unknown kernel 'flow_sd'; did you mean 'flow_sde'?"),
        (["--window", "4"], "--window '4' is no span of steps"),
        (["--compare", "best"], "--compare knows base, bon and none, not 'best'"),
        (["--budget-nfe", "7"], "budget_nfe 7 is less than one round of 'fk', 40 network forwards"),
        (["--reward", "nothing"], "unknown reward 'nothing'"),
        (["--method", "das", "--reward", "jpeg"], "'jpeg' has none"),
        (["--first", "0"], "--first must be at least 1"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--model", "tiny-sd4"], "model folder 'tiny-sd4' does not exist"),
        (["--lora", "nowhere"], "LoRA folder 'nowhere' does not exist"),
        (["--guidance", "0.5"], "guidance must be at least 1"),
        (["--method", "fk:particles=[1"], "'[1' is no YAML value"),
        (["--window", "3,9"], "window 3,9 is no span of steps 0 to 4"),
        (["--seed", "-1"], "--seed must be 0 or more, got -1"),
        (["--dry-run", "--reward", "nope"], "unknown reward 'nope'"),
        (["--dry-run", "--compare", "foo"], "--compare knows base, bon and none"),
        (["--micro-batch", "0"], "--micro-batch must be at least 1"),
    ],
)
def test_mistakes(options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steer(tmp_path / "out", *options, prompts=["a star"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "run.jsonl").is_file() or not lines(tmp_path / "out")


def test_an_empty_prompt_and_none_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steer(tmp_path / "out", prompts=[" "]) == 2
    assert "a prompt is empty" in capsys.readouterr().err
    assert steer(tmp_path / "out", prompts=[]) == 2
    assert "give a --prompt, or --prompts FILE" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n")
    assert steer(tmp_path / "out", "--prompts", str(tmp_path / "empty.txt"), prompts=[]) == 2
    assert "holds no prompt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
