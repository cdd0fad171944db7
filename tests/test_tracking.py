"""accelerate's trackers get the numbers, the settings and the images of a run, once; none of them can stop it."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny_models
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from diffalign import cli, loading, sections, trainer
from diffalign.images import thumbnail
from diffalign.tracking import PICTURES, flat
from diffalign.types import UserError

SETTINGS = """
model: {{path: {model}, device: cpu}}
output: {output}
prompts: {{train: {model}.txt, test: {model}.txt}}
sampling: {{steps: 3, kernel: cps, eta: 0.7, height: 32, width: 32}}
algorithm: {{name: grpo, window: {{size: 1, range: [0, 2]}}}}
rewards: [{{name: reward_functions.redness, weight: 2.0}}]
adapter: {{name: lora, rank: 2, alpha: 4}}
trainer: {{epochs: 2, prompts: 1, images_per_prompt: 2, lr: 1e-3}}
evaluation: {{every: 2, prompts: 3, images_per_prompt: 1, steps: 1}}
checkpoint: {{every: 1, keep: 2}}
log_with: [tensorboard]
"""
Start = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sd3"
    folder.with_name("sd3.txt").write_text("a red circle\na blue star\na green square\n")
    return tiny_models.sd3_folder(folder)


@pytest.fixture
def settings(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(SETTINGS.format(model=model, output=tmp_path / "run"))
    return path


def steps_and_values(events: EventAccumulator, tag: str) -> tuple[list[int], list[float]]:
    found = events.Scalars(tag)
    return [e.step for e in found], [e.value for e in found]


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_has_numbers_settings_and_images_once(settings: Path, tmp_path: Path) -> None:
    folder = trainer.train(loading.load(str(settings), []))
    shutil.rmtree(folder / "checkpoints" / "0002")  # as if killed after epoch 2 was logged and before it was saved
    trainer.train(loading.load(str(settings), ["trainer.epochs=3"]), resume="auto")

    events = read(folder / "diffalign")
    for phase, expected in (("train", [1, 2, 3]), ("eval", [0, 2, 3])):
        lines = [line for line in metrics(folder) if line["phase"] == phase]
        assert [line["epoch"] for line in lines] == expected
        for name in lines[0].keys() - {"phase", "epoch"}:
            steps, values = steps_and_values(events, f"{phase}/{name}")
            assert steps == expected, name
            assert values == pytest.approx([line[name] for line in lines], rel=1e-6), name

    pictures = events.Images("eval/images")
    assert [p.step for p in pictures] == [0, 2, 3]
    shown = Image.open(io.BytesIO(pictures[0].encoded_image_string))
    assert shown.tobytes()[:3] == Image.open(folder / "images" / "eval_0000" / "000.png").tobytes()[:3]
    assert shown.size == (6 * 32 + 5 * 2, 32)

    told = []
    for path in sorted((folder / "diffalign").glob("*/events*")):
        content = read(path).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        told.append(plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams)
    first, second = told
    assert (first["trainer.epochs"].number_value, second["trainer.epochs"].number_value) == (2, 3)
    assert first["trainer.lr"].number_value == 1e-3 and first["rewards.0.weight"].number_value == 2
    assert first["algorithm.name"].string_value == "grpo" and first["sampling.shared_noise"].bool_value is False


def test_a_tracker_that_fails_is_dropped_and_the_run_is_not(
    settings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = TensorBoardTracker.log

    def lost(self: Any, values: Any, step: Any = None, **rest: Any) -> None:
        if step == 1:
            raise ConnectionError("the server is gone\nsecond line")
        log(self, values, step, **rest)

    monkeypatch.setattr(TensorBoardTracker, "log", lost)
    folder = trainer.train(loading.load(str(settings), []))
    assert [line["epoch"] for line in metrics(folder)] == [0, 1, 2, 2]
    said = "tensorboard failed at epoch 1 and gets no more of this run: the server is gone\n"
    assert capsys.readouterr().err.count(said) == 1
    assert "train/reward/redness" not in read(folder / "diffalign").Tags()["scalars"]


def test_a_tracker_that_cannot_start_is_one_sentence(settings: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diffalign").write_text("a file where its folder should be")
    with pytest.raises(
        UserError, match="log_with: tensorboard did not start: .*File exists.*; mend that, or leave it "
    ):
        trainer.train(loading.load(str(settings), []))


def test_a_tracker_that_is_not_installed_is_one_sentence(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = next(n for n in get_args(sections.Tracker) if importlib.util.find_spec(n) is None)
    assert cli.main(["train", str(settings), f"log_with=[{missing}]"]) == 2
    assert f"pip install {missing.replace('_', '-')}" in capsys.readouterr().err
    (tmp_path / missing).mkdir()  # such as wandb leaves where it runs: a folder that looks like a package
    monkeypatch.syspath_prepend(tmp_path)
    config = loading.load(str(settings), [f"log_with=[{missing}]"])
    with pytest.raises(UserError, match=rf"log_with: {missing.replace('_', '.')} is not installed; pip install "):
        trainer.train(config)
    assert not (tmp_path / "run").exists()


def test_settings_become_flat_scalars_with_the_keys_of_overrides() -> None:
    values = {"a": {"b": 1, "c": None}, "list": [1, 2], "rewards": [{"name": "x", "weight": 0.5}], "on": True, "e": []}
    assert flat(values) == {
        "a.b": 1, "a.c": "null", "list": "[1, 2]", "rewards.0.name": "x", "rewards.0.weight": 0.5, "on": True,
        "e": "[]",
    }  # fmt: skip


def test_every_tracker_that_takes_images_gets_them() -> None:
    able = {name for name, kind in LOGGER_TYPE_TO_CLASS.items() if hasattr(kind, "log_images")}
    assert able | {"trackio"} == set(PICTURES)


def test_thumbnails_keep_the_shape_and_never_grow() -> None:
    wide = torch.linspace(0, 1, 64).expand(3, 16, 64)
    assert thumbnail(wide, 64) is wide
    small = thumbnail(wide, 16)
    assert small.shape == (3, 4, 16)
    torch.testing.assert_close(small[0, 0], wide[0, 0].reshape(16, 4).mean(1), rtol=0, atol=0.02)
