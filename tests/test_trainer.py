"""The training loop end to end on small models: invariances, resume, learning, and mistakes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from diffalign import evaluation, loading, pipelines, trainer
from diffalign.ema import EMA
from diffalign.pipelines.sd3 import SD3
from diffalign.rollout import collect
from diffalign.sections import Sampling
from diffalign.types import UserError

SETTINGS = """
model: {{path: {model}, device: cpu}}
output: {output}
prompts: {{train: shapes-train, test: shapes-test}}
sampling: {{steps: 4, kernel: cps, eta: 0.7, height: 32, width: 32}}
algorithm: {{name: grpo, window: {{size: 2, range: [0, 3]}}}}
rewards: [{{name: reward_functions.redness}}]
adapter: {{name: lora, rank: 4, alpha: 8}}
trainer: {{epochs: 2, prompts: 2, images_per_prompt: 3, micro_batch: 6, lr: 1e-3, ema: 0.9}}
evaluation: {{every: 2, prompts: 2, images_per_prompt: 2, steps: 3}}
checkpoint: {{every: 1, keep: 2}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.sd3_folder(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Any:
    def start(name: str, *overrides: str, resume: str | None = None) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(SETTINGS.format(model=model, output=tmp_path / name))
        return trainer.train(loading.load(str(path), overrides), resume)

    start.folder = tmp_path  # type: ignore[attr-defined]
    return start


def weights(folder: Path, epoch: int = 2) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"{epoch:04d}" / "weights.safetensors")


def metrics(folder: Path, phase: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == phase]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)


def test_a_run_writes_what_it_promises(run: Any, model: Path) -> None:
    folder = run("whole")
    train, held_out = metrics(folder, "train"), metrics(folder, "eval")
    assert [line["epoch"] for line in train] == [1, 2]
    assert [line["epoch"] for line in held_out] == [0, 2]
    assert all(line["ratio"] == 1.0 and line["logp_gap"] == 0.0 for line in train)
    assert (folder / "config.yaml").is_file() and (folder / "images" / "eval_0002.png").is_file()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["0001", "0002"]
    samples = json.loads((folder / "eval" / "0000.json").read_text())["samples"]
    assert len(samples) == 4 and len({s["seed"] for s in samples}) == 4
    assert held_out[0]["reward/redness"] == pytest.approx(sum(s["scores"]["redness"] for s in samples) / 4)
    pipe = StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
    pipe.load_lora_weights(folder / "lora")
    assert any("lora" in name for name, _ in pipe.transformer.named_parameters())


def test_micro_batch_changes_nothing(run: Any) -> None:
    assert_same(weights(run("six")), weights(run("one", "trainer.micro_batch=1")), 1e-5)
    assert_same(weights(run("four", "trainer.micro_batch=4")), weights(run("six-again")), 1e-5)
    several = ("trainer.updates_per_rollout=2", "trainer.passes=2", "sampling.guidance=2")
    folder = run("several", *several)
    assert_same(weights(folder), weights(run("several-1", *several, "trainer.micro_batch=1")), 1e-5)
    assert all(0 < abs(line["ratio"] - 1) < 0.1 and line["logp_gap"] < 1e-6 for line in metrics(folder, "train"))


def test_images_of_a_prompt_may_share_their_first_noise(run: Any, model: Path) -> None:
    """With the same start and no noise in the first steps they are equal until the window, and differ after it."""
    pipeline = pipelines.load(model, device="cpu")
    sampling = Sampling(steps=4, kernel="cps", eta=0.7, height=32, width=32, shared_noise=True)
    prompts, seeds = [{"prompt": "a cat"}] * 2, torch.tensor([1, 2])
    rollout = collect(pipeline, prompts, torch.zeros(2), seeds, sampling, [1], start=torch.tensor([7, 7]))
    assert rollout.states is not None
    torch.testing.assert_close(rollout.states[0, 0, 0], rollout.states[1, 0, 0], rtol=0, atol=1e-5)
    assert (rollout.states[0, 0, 1] - rollout.states[1, 0, 1]).abs().max() > 0.1
    shared, own = (run(f"shared {x}", f"sampling.shared_noise={x}", "trainer.epochs=1") for x in ("true", "false"))
    stds = [metrics(folder, "train")[0]["reward/redness_std"] for folder in (shared, own)]
    assert 0 < stds[0] < stds[1]


def test_resume_is_exact(run: Any) -> None:
    whole = run("whole", "trainer.epochs=4")
    run("parts", "trainer.epochs=2")
    parts = run("parts", "trainer.epochs=4", resume="auto")
    assert_same(weights(whole, 4), weights(parts, 4), 0.0)
    assert_same(
        load_file(whole / "checkpoints" / "0004" / "ema.safetensors"),
        load_file(parts / "checkpoints" / "0004" / "ema.safetensors"),
        0.0,
    )
    assert [line["epoch"] for line in metrics(parts, "train")] == [1, 2, 3, 4]
    assert sorted(p.name for p in (parts / "checkpoints").iterdir()) == ["0003", "0004"]


@pytest.mark.parametrize("moment", ["before the average", "after the average"])
def test_ctrl_c_at_any_moment_loses_no_finished_epoch(run: Any, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Also between the optimizer step and the end of its epoch, where the weights belong to neither epoch."""
    whole = run("whole", "trainer.epochs=3")
    update = EMA.update

    def interrupted(self: EMA) -> None:
        if moment == "after the average":
            update(self)
        if self.updates == 1:
            os.kill(os.getpid(), signal.SIGINT)
        if moment == "before the average":
            update(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EMA, "update", interrupted)
        run("stopped", "trainer.epochs=3", "checkpoint.every=0")
    (saved,) = (run.folder / "stopped" / "checkpoints").iterdir()
    stopped = run("stopped", "trainer.epochs=3", "checkpoint.every=0", resume="auto")
    assert saved.name in ("0001", "0002")
    assert_same(weights(whole, 3), weights(stopped, 3), 0.0)
    assert [line["epoch"] for line in metrics(stopped, "train")] == [1, 2, 3]
    assert [line["epoch"] for line in metrics(stopped, "eval")] == [0, 2, 3]


def interrupting(real: Any, calls: int) -> Any:
    """The function, which sends this process Ctrl-C in one of its calls."""
    count = itertools.count(1)

    def called(*arguments: Any, **named: Any) -> Any:
        if next(count) == calls:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **named)

    return called


def test_ctrl_c_breaks_sampling_off_and_loses_no_finished_epoch(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("whole", "trainer.epochs=2", "evaluation.every=0", "trainer.micro_batch=2")
    settings = ("trainer.epochs=2", "evaluation.every=0", "checkpoint.every=0", "trainer.micro_batch=2")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SD3, "decode", interrupting(SD3.decode, 5))  # three micro-batches an epoch
        run("stopped", *settings)
    assert [p.name for p in (run.folder / "stopped" / "checkpoints").iterdir()] == ["0001"]
    assert_same(weights(whole), weights(run("stopped", *settings, resume="auto")), 0.0)


def test_ctrl_c_in_an_evaluation_does_not_wait_for_another_epoch(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "evaluate", interrupting(evaluation.evaluate, 2))
        run("stopped", "trainer.epochs=3", "evaluation.every=1", "checkpoint.every=0")
    assert [p.name for p in (run.folder / "stopped" / "checkpoints").iterdir()] == ["0001"]
    assert len(metrics(run.folder / "stopped", "train")) == 1


def test_a_run_that_is_stopped_by_the_guard_can_go_on(run: Any) -> None:
    flat = ("rewards=[reward_functions.flat]", "checkpoint.every=0", "evaluation.every=0", "trainer.epochs=4")
    with pytest.raises(UserError, match="every image got the same reward"):
        run("flat", *flat, "guard.flat_epochs=3")
    assert [p.name for p in (run.folder / "flat" / "checkpoints").iterdir()] == ["0002"]
    assert len(metrics(run("flat", *flat, "guard.flat_epochs=0", resume="auto"), "train")) == 4


def test_a_checkpoint_of_another_run_is_refused(run: Any) -> None:
    one, two = run("one", "trainer.epochs=1"), run("two", "trainer.epochs=2")
    with pytest.raises(UserError, match=r"'.*two' holds another run than '.*0001'; choose a new output, or"):
        run("two", "trainer.epochs=3", resume=str(one / "checkpoints" / "0001"))
    assert [p.name for p in sorted((two / "checkpoints").iterdir())] == ["0001", "0002"]
    assert len(metrics(two, "train")) == 2


def test_a_run_without_a_checkpoint_is_evaluated_again(run: Any) -> None:
    run("run", "trainer.epochs=1")
    shutil.rmtree(run.folder / "run" / "checkpoints")
    changed = ("trainer.epochs=1", "evaluation.steps=2")
    again, fresh = run("run", *changed, resume="auto"), run("fresh", *changed)
    assert [e["reward/redness"] for e in metrics(again, "eval")] == [
        e["reward/redness"] for e in metrics(fresh, "eval")
    ]


def test_training_images_are_written_without_evaluations_too(run: Any) -> None:
    folder = run("run", "trainer.epochs=3", "evaluation.every=0", "checkpoint.every=2")
    assert sorted(p.name for p in (folder / "images").iterdir()) == ["train_0002.png", "train_0003.png"]


def test_resume_takes_the_learning_rate_of_the_configuration(run: Any) -> None:
    run("slow", "trainer.epochs=1")
    slow = run("slow", "trainer.epochs=2", "trainer.lr=1e-12", resume="auto")
    assert_same(weights(slow, 1), weights(slow, 2), 1e-9)


def test_an_earlier_checkpoint_replaces_what_came_after_it(run: Any) -> None:
    whole = run("whole", "trainer.epochs=4", "checkpoint.keep=9")
    expected = weights(whole, 3)
    again = run("whole", "trainer.epochs=3", "checkpoint.keep=1", resume=str(whole / "checkpoints" / "0001"))
    assert [p.name for p in (again / "checkpoints").iterdir()] == ["0003"]
    assert_same(weights(again, 3), expected, 0.0)
    assert sorted(p.name for p in (again / "eval").iterdir()) == ["0000.json", "0002.json", "0003.json"]
    assert [line["epoch"] for line in metrics(again, "train")] == [1, 2, 3]


def test_a_missing_evaluation_is_made_up_for(run: Any) -> None:
    folder = run("late")
    (folder / "eval" / "0002.json").unlink()
    run("late", resume="auto")
    assert (folder / "eval" / "0002.json").is_file()


@pytest.mark.parametrize("adapter", ["{name: lora, rank: 8, alpha: 16}", "{name: full}"])
def test_it_learns(run: Any, tmp_path: Path, adapter: str) -> None:
    """The embedded model, free to choose the colour of "a circle", learns to choose red: same seeds, before and after."""
    (tmp_path / "shapes.txt").write_text("a circle\na square\na triangle\na star\n")
    folder = run(
        "learning",
        f"adapter={adapter}",
        "trainer.lr=2e-4" if "full" in adapter else "trainer.lr=3e-3",
        "model={path: tiny-sd3, device: cpu, dtype: bf16}",
        f"prompts={{train: {tmp_path}/shapes.txt, test: {tmp_path}/shapes.txt}}",
        "sampling={steps: 5, kernel: cps, eta: 0.8, height: 64, width: 64}",
        "trainer.epochs=12",
        "trainer.prompts=4",
        "trainer.images_per_prompt=12",
        "trainer.micro_batch=48",
        "trainer.ema=0",
        "evaluation={every: 12, prompts: 4, images_per_prompt: 8, steps: 5}",
        "checkpoint.every=0",
    )
    before, after = (
        torch.tensor([s["scores"]["redness"] for s in json.loads((folder / "eval" / name).read_text())["samples"]])
        for name in ("0000.json", "0012.json")
    )
    risen = after - before
    assert risen.mean() > 4 * risen.std() / len(risen) ** 0.5
    if "full" in adapter:
        assert StableDiffusion3Pipeline.from_pretrained(folder / "model").transformer is not None


def test_mistakes_are_one_sentence(run: Any, tmp_path: Path) -> None:
    folder = run("first")
    with pytest.raises(UserError, match="already holds a run; continue it with --resume auto"):
        run("first")
    with pytest.raises(UserError, match=r"was trained with adapter .*resume with the same"):
        run("first", "adapter={name: full}", "trainer.epochs=3", resume="auto")
    with pytest.raises(UserError, match="was trained with adapter .*'rank': 4"):
        run("first", "adapter.rank=2", "trainer.epochs=3", resume="auto")
    with pytest.raises(UserError, match="is no checkpoint; the last one here is"):
        run("first", resume=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no reward applies to any of the 6 images of epoch 1"):
        run("nan", "rewards=[reward_functions.broken]")
    assert (folder / "checkpoints" / "0002" / "meta.json").is_file()


def test_numbers_that_are_not_finite_stop_the_run(run: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"images of epoch 2 are not finite.*lower trainer\.lr"):
        run("wild", "trainer.lr=1e30", "evaluation.every=0", "trainer.epochs=3")
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "wild", 1).values())
    with pytest.raises(UserError, match="gradients of epoch 1 are not finite"):
        run("loss", "algorithm={name: reward_functions.Exploding}", "evaluation.every=0")


def test_what_could_not_be_scored_is_counted_in_evaluations_and_stops_them(run: Any) -> None:
    some = "evaluation.rewards=[reward_functions.redness, reward_functions.flaky]"
    folder = run("some", some, "trainer.epochs=1", "evaluation.every=1", "evaluation.prompts=5")
    assert [line["invalid/flaky"] for line in metrics(folder, "eval")] == [0.2, 0.2]
    samples = json.loads((folder / "eval" / "0001.json").read_text())["samples"]
    missing = [s for s in samples if s["scores"]["flaky"] is None]
    assert len(missing) == 2 and all(s["errors"] == {"flaky": "asleep"} for s in missing)
    assert sum(bool(s["errors"]) for s in samples) == 2
    none = "evaluation.rewards=[reward_functions.redness, reward_functions.asleep]"
    with pytest.raises(UserError, match="'asleep' could not score 4 of the 4 images of the evaluation, more than 20%"):
        run("none", none)
    with pytest.raises(UserError, match="'asleep' could not score 10 of the 10 images of the evaluation"):
        run("some", none, "trainer.epochs=2", "evaluation.every=1", "evaluation.prompts=5", resume="auto")
    assert (folder / "checkpoints" / "0002" / "meta.json").is_file()


def test_a_new_kind_of_method_needs_no_edit_here(run: Any) -> None:
    """A forward-process method with an old policy and another solver, from the user's own file; resumed exactly."""
    settings = ["algorithm={name: reward_functions.ForwardProcess}", "sampling.kernel=dpm2", "sampling.eta=0"]
    whole = run("whole", *settings, "trainer.epochs=3")
    run("parts", *settings, "trainer.epochs=1")
    parts = run("parts", *settings, "trainer.epochs=3", resume="auto")
    assert_same(weights(whole, 3), weights(parts, 3), 0.0)
    moved = [line["moved"] for line in metrics(whole, "train")]
    assert moved[0] == 0 < moved[1]  # the old policy starts where the trained one does, and lags behind it


def test_ema_follows_its_closed_form() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    ema = EMA([weight], decay=0.3)
    expected = 1.0
    for n, value in enumerate([2.0, -1.0, 4.0]):
        with torch.no_grad():
            weight.fill_(value)
        ema.update()
        d = min((1 + n) / (10 + n), 0.3)
        expected = d * expected + (1 - d) * value
    with ema.applied():
        assert weight.item() == pytest.approx(expected)
    assert weight.item() == 4.0
