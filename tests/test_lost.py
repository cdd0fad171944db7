"""Nothing is lost: runs that are killed, that find the disk full, or whose files are damaged, go on as if untouched."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import kill_runs
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from diffalign import checkpoint, evaluation, loading, trainer
from diffalign.interrupt import Interrupt
from diffalign.types import UserError
from diffalign.writing import writing

TESTS = Path(__file__).parent
EPOCHS = 6
KILLS = 20
SETTINGS = """
model: {{path: {model}, device: cpu}}
output: {output}
prompts: {{train: {model}.txt, test: {model}.txt}}
sampling: {{steps: 3, kernel: cps, eta: 0.7, height: 32, width: 32}}
algorithm: {{name: grpo, window: {{size: 1, range: [0, 2]}}}}
advantage: {{name: buffered, buffer_size: 4, min_count: 2}}
curriculum: {{name: variance}}
rewards: [{{name: reward_functions.redness}}]
adapter: {{name: lora, rank: 2, alpha: 4}}
trainer: {{epochs: {epochs}, prompts: 1, images_per_prompt: 3, micro_batch: 3, lr: 1e-3, ema: 0.9}}
evaluation: {{every: 3, prompts: 1, images_per_prompt: 1, steps: 1}}
checkpoint: {{every: 1, keep: 1}}
"""
TIMES = ("seconds", "images_per_second", "memory_gib")  # differ from run to run


@pytest.fixture(scope="module", autouse=True)
def same_modules() -> Any:
    """What the server of the processes imports, which does not inherit sys.path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{TESTS.parent}{os.pathsep}{TESTS}")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sd3"
    folder.with_name("sd3.txt").write_text("a red circle\na blue star\na green square\n")
    return tiny_models.sd3_folder(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, said = kill_runs.run(kill_runs.train, command(folder, model), folder, 0)
    assert code == 0, said
    return folder


def command(folder: Path, model: Path, *overrides: str) -> list[str]:
    path = folder.with_suffix(".yaml")
    path.write_text(SETTINGS.format(model=model, output=folder, epochs=EPOCHS))
    return [str(path), *overrides, "--resume", "auto"]


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in found]


def scores(folder: Path) -> dict[str, Any]:
    return {p.name: json.loads(p.read_text())["samples"] for p in (folder / "eval").iterdir()}


def tensors(folder: Path) -> dict[str, dict[str, bytes]]:
    files = {str(p.relative_to(folder)): load_file(p) for p in folder.rglob("*.safetensors")}
    return {file: {name: t.numpy().tobytes() for name, t in held.items()} for file, held in files.items()}


def assert_same(folder: Path, whole: Path) -> None:
    """Bit for bit, and with nothing left over."""
    assert tensors(folder) == tensors(whole)
    assert lines(folder) == lines(whole)
    assert scores(folder) == scores(whole)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"{EPOCHS:04d}"]
    assert (folder / "report.html").is_file()


def test_a_run_killed_at_twenty_moments_ends_as_if_it_had_not_been(tmp_path: Path, model: Path, whole: Path) -> None:
    kept = {"weights", "ema", "optimizer", "memory", "advantage", "curriculum", "guard"}
    assert kept <= {p.stem for p in (whole / "checkpoints" / f"{EPOCHS:04d}").glob("*.safetensors")}
    assert len(lines(whole)) == EPOCHS + 3
    draw, places = random.Random(0), []
    while len(places) < KILLS:
        folder = tmp_path / f"killed-{len(places)}"
        while True:
            moment = draw.randint(1, 80) if len(places) < KILLS else 0
            code, said = kill_runs.run(kill_runs.train, command(folder, model), folder, moment)
            if code != -signal.SIGKILL:
                break
            places.append(said.splitlines()[-1])
        assert code == 0, said
        assert_same(folder, whole)
    assert places.count("killed in save") >= 5 and places.count("killed elsewhere") >= 3


def test_a_kill_while_replacing_the_only_checkpoint_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    seen = []
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        kill_runs.save_again(folder, 1.0, 0)
        code, said = kill_runs.run(kill_runs.save_again, folder, 2.0, moment)
        (left,) = checkpoint.finished(folder)
        value = load_file(left / "numbers.safetensors")["value"]
        assert value.shape == (100,) and value.unique().tolist() in ([1.0], [2.0])
        seen.append((left.name, float(value[0])))
        kill_runs.save_again(folder, 3.0, 0)
        assert [p.name for p in folder.iterdir()] == ["0001"]
        if code == 0:
            break
        assert code == -signal.SIGKILL, said
    assert {("0001", 1.0), (".0001.old", 1.0), ("0001", 2.0)} == set(seen)


@pytest.mark.parametrize(
    "function, call, what",
    [
        ("diffalign.checkpoint:save", 1, "the checkpoint of epoch 1"),
        ("diffalign.checkpoint:save", 4, "the checkpoint of epoch 4"),
        ("diffalign.tracking:Tracker.log", 4, "the train line of epoch 3"),
        ("diffalign.evaluation:write", 2, "the evaluation of epoch 3"),
        ("diffalign.adapters:export_lora", 1, "the trained weights"),
        ("diffalign.eval.report:write", 1, "the report"),
    ],
)
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    tmp_path: Path, model: Path, whole: Path, function: str, call: int, what: str
) -> None:
    folder = tmp_path / "full"
    code, said = kill_runs.run(kill_runs.train_on_a_full_disk, command(folder, model), function, call)
    assert code == 2
    found = checkpoint.finished(folder / "checkpoints")
    newest = f"the newest complete checkpoint is {found[-1]}" if found else "no checkpoint is complete yet"
    assert said.splitlines()[-1].startswith(f"could not write {what}")
    assert f": File too large; {newest}; raise the limit on file sizes (ulimit -f) and " in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not list((folder / "checkpoints").glob(".*"))  # what was half written takes up no space
    code, said = kill_runs.run(kill_runs.train, command(folder, model), folder, 0)
    assert code == 0, said
    assert_same(folder, whole)


def test_an_image_that_cannot_be_written_costs_no_epoch(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "run", evaluation.write

    def blocked(run: Path, epoch: int, *rest: Any) -> None:
        if epoch:
            (run / "images" / f"eval_{epoch:04d}").write_text("a file in the folder's place")
        write(run, epoch, *rest)

    yaml, *_ = command(folder, model)
    config = loading.load(yaml, ["trainer.epochs=3", "evaluation.every=2", "checkpoint.every=0"])
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write", blocked)
        with pytest.raises(UserError, match="evaluation of epoch 2: File exists; .*0002; make it writable and go on"):
            trainer.train(config)
    (folder / "images" / "eval_0002").unlink()
    trainer.train(config, resume="auto")
    assert [(line["phase"], line["epoch"]) for line in lines(folder)] == [
        ("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("eval", 3),
    ]  # fmt: skip


@pytest.mark.parametrize("number, remedy", [(errno.EDQUOT, "free some space"), (errno.EROFS, "make it writable")])
def test_every_failure_of_the_disk_has_its_remedy(tmp_path: Path, number: int, remedy: str) -> None:
    said = f"could not write it: {os.strerror(number)}; .*; {remedy} and start again"
    with pytest.raises(UserError, match=said), writing("it", tmp_path):
        raise OSError(number, os.strerror(number))


def test_failures_inside_libraries_count_and_bugs_do_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not write it: No such file or directory"), writing("it", tmp_path):
        save_file({"x": torch.zeros(1)}, tmp_path / "nowhere" / "x.safetensors")
    with pytest.raises(RuntimeError, match="a bug"), writing("it", tmp_path):
        raise RuntimeError("a bug")


@pytest.fixture
def run(tmp_path: Path, whole: Path) -> Path:
    """A copy of the whole run that a test may spoil, with a checkpoint before the last one."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    return folder


def resume(folder: Path, model: Path, *overrides: str, start: str = "auto") -> None:
    yaml, *_ = command(folder, model)
    trainer.train(loading.load(yaml, overrides), start)


def test_two_resumes_of_a_finished_run_change_nothing(run: Path, model: Path, whole: Path) -> None:
    for _ in range(2):
        resume(run, model)
        assert_same(run, whole)


def test_resume_auto_without_a_checkpoint_starts_afresh(tmp_path: Path, run: Path, model: Path, whole: Path) -> None:
    resume(tmp_path / "empty", model, "trainer.epochs=1")
    assert [(line["phase"], line["epoch"]) for line in lines(tmp_path / "empty")] == [
        ("eval", 0),
        ("train", 1),
        ("eval", 1),
    ]
    shutil.rmtree(run / "checkpoints")  # only the numbers of a run are left: it is done again
    resume(run, model)
    assert lines(run) == lines(whole)


def test_checkpoints_are_never_taken_for_a_fresh_folder(run: Path, model: Path) -> None:
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="already holds a run"):
        trainer.train(loading.load(command(run, model)[0]))
    assert checkpoint.finished(run / "checkpoints")


@pytest.mark.parametrize(
    "override, key",
    [
        ("model.path=tiny-sd3", "model.path"),
        ("algorithm={name: reward_functions.ForwardProcess}", "algorithm.name"),
        ("advantage=group", "advantage.name"),
        ("curriculum=uniform", "curriculum.name"),
        ("adapter.rank=3", "adapter"),
        ("adapter={name: full}", "adapter"),
        ("seed=1", "seed"),
        ("prompts.train=shapes-test", "prompts"),
        ("evaluation.steps=2", "evaluation.steps"),
        ("sampling.guidance=3", "evaluation.guidance"),
        ("sampling.width=48", "sampling.width"),
    ],
)
def test_resume_with_another_is_refused(run: Path, model: Path, whole: Path, override: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"was trained with {key} .*, this run has .*; resume with the same, or "):
        resume(run, model, override)
    assert_same(run, whole)


def test_resume_with_an_average_that_was_not_kept_is_refused(tmp_path: Path, model: Path) -> None:
    resume(tmp_path / "run", model, "trainer.epochs=1", "trainer.ema=0", "evaluation.every=0")
    with pytest.raises(UserError, match=r"holds no ema, so it was made with other settings, such as trainer\.ema 0; "):
        resume(tmp_path / "run", model, "evaluation.every=0")


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


@pytest.mark.parametrize(
    "file, spoil",
    [
        ("weights.safetensors", shorten),
        ("optimizer.safetensors", shorten),
        ("advantage.safetensors", Path.unlink),
        ("meta.json", shorten),
        ("meta.json", lambda path: path.write_text("[]")),
        ("meta.json", lambda path: path.write_bytes(b"\xff" * 9)),
    ],
)
def test_a_damaged_checkpoint_names_the_one_before(run: Path, model: Path, whole: Path, file: str, spoil: Any) -> None:
    last = run / "checkpoints" / f"{EPOCHS:04d}"
    with pytest.raises(UserError, match=r"cannot be read \(.*\); there is none before it; start afresh"):
        spoil(last / file)
        resume(run, model)
    before = last.with_name("0002")
    shutil.copytree(whole / "checkpoints" / last.name, before)
    with pytest.raises(UserError, match=rf"cannot be read \(.*\); go on from the one before with --resume {before}$"):
        resume(run, model)


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        assert not interrupt.asked
        for number in (signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert interrupt.asked
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
