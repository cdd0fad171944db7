"""Training with DiffusionNFT, AWM and RAFT end to end on small models: learning, invariances, resume, old policies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from diffusers import SD3Transformer2DModel
from forward_process import perturb
from safetensors.torch import load_file
from test_processes import ROOT, free_port
from torch import Tensor

from diffalign import cli, loading, summary, trainer
from diffalign.clock import Clock
from diffalign.interrupt import Interrupt
from diffalign.overlap import Early
from diffalign.run import prepare

SETTINGS = """
model: {{path: {model}, device: cpu}}
output: {output}
prompts: {{train: {model}.txt, test: {model}.txt}}
sampling: {{steps: 3, kernel: dpm2, height: 32, width: 32}}
algorithm: {algorithm}
rewards: [{{name: reward_functions.redness}}]
adapter: {{name: lora, rank: 4, alpha: 8}}
trainer: {{epochs: 2, prompts: 2, images_per_prompt: 3, micro_batch: 6, lr: 3e-4, ema: 0.9}}
"""
LEVELS = "timesteps: {choice: stratified, count: 2}"
METHODS = {
    "nft": "{name: nft, beta: 0.5, kl: 0.1, old: {rate: 0.2}}",
    "awm": f"{{name: awm, {LEVELS}, advantage_clip: 0.2, kl: {{weight: 0.1}}, slow: {{rate: 0.2}}}}",
    "raft": f"{{name: raft, {LEVELS}, kl: 0.1}}",
}
ESTIMATOR = {"nft": "group", "awm": "group", "raft": "sft"}
SHARED = (  # the first step is split whole, the third at one of two noise levels, the others are mixed
    "rewards=[reward_functions.redness, reward_functions.topness, {name: reward_functions.sometimes, weight: 2}]",
    "multireward={name: marble, every: 2}",
)
SEVERAL = ("trainer.updates_per_rollout=2", "trainer.passes=2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sd3"
    folder.with_suffix(".txt").write_text("a circle\na square\na triangle\na star\n")
    return tiny_models.sd3_folder(folder)


@pytest.fixture
def start(tmp_path: Path, model: Path) -> Any:
    def run(method: str, name: str, *overrides: str, resume: str | None = None) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(SETTINGS.format(model=model, output=tmp_path / name, algorithm=METHODS[method]))
        return trainer.train(loading.load(str(path), (f"advantage={ESTIMATOR[method]}", *overrides)), resume)

    return run


def weights(folder: Path, epoch: int = 2, name: str = "weights") -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"{epoch:04d}" / f"{name}.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == "train"]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("method", "chosen"),
    [("nft", ()), ("nft", ("adapter=full", "trainer.lr=1e-5")), ("awm", ()), ("raft", ())],
    ids=["nft", "nft full", "awm", "raft"],
)
def test_the_micro_batch_changes_nothing(start: Any, method: str, chosen: tuple[str, ...]) -> None:
    six, two = (start(method, f"{n}", *SEVERAL, *chosen, f"trainer.micro_batch={n}") for n in (6, 2))
    assert_same(weights(six), weights(two), 1e-5)
    first, last = metrics(six)
    assert first["kl"] > 0 and last["grad_norm"] > 0
    if method == "awm":
        assert 0 < abs(last["ratio"] - 1) < 0.5 and last["anchor"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact(start: Any, method: str) -> None:
    """With old policy and slow copy half-way between start and now."""
    adapter = ("adapter=full", "trainer.lr=1e-4") if method == "nft" else ()
    settings = ("trainer.updates_per_rollout=2", "checkpoint.every=1", *adapter)
    whole = start(method, "whole", *settings, "trainer.epochs=3")
    start(method, "parts", *settings, "trainer.epochs=1")
    parts = start(method, "parts", *settings, "trainer.epochs=3", resume="auto")
    for name in ("weights", "memory", "ema"):
        if (whole / "checkpoints" / "0003" / f"{name}.safetensors").exists():
            assert_same(weights(whole, 3, name), weights(parts, 3, name), 0.0)
    if method != "raft":
        live, copy = weights(whole, 3), weights(whole, 3, "memory")
        assert copy.pop("steps") == 6
        assert copy.keys() == live.keys() and any(not torch.equal(copy[name], live[name]) for name in live)
    ends = [
        [line[key] for key in ("epoch", "loss", "reward/redness")] for run in (whole, parts) for line in metrics(run)
    ]
    assert ends[:3] == ends[3:]


@pytest.mark.parametrize("shared", [(), SHARED], ids=["one reward", "marble"])
def test_two_processes_equal_one(start: Any, tmp_path: Path, shared: tuple[str, ...]) -> None:
    """Three images in two updates: shares are uneven, and of the second a process has nothing to train."""
    several = [
        "trainer.prompts=1",
        "trainer.micro_batch=2",
        "trainer.updates_per_rollout=2",
        "trainer.lr=1e-4",
        *shared,
    ]
    one, two = start("nft", "two", *several, f"output={tmp_path / 'one'}"), tmp_path / "two"
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(ROOT / "configs/accelerate/cpu.yaml"), "--main_process_port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    command = [*launch, "-m", "diffalign", "train", "two.yaml", *several]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("weights", "memory"):
        assert_same(weights(one, name=name), weights(two, name=name), 1e-5)
    assert any(t.abs().max() > 0 for n, t in weights(one).items() if "lora_B" in n)
    assert [line["trained_images"] for line in metrics(one)] == [line["trained_images"] for line in metrics(two)]


def test_images_come_from_the_old_policy(start: Any, tmp_path: Path) -> None:
    """However far the trained weights have gone; they are as they were afterwards."""
    start("nft", "run", "trainer.epochs=1", "algorithm.old={rate: 1, cap: 0.9}")
    config = loading.load(str(tmp_path / "run.yaml"), ["algorithm.old={rate: 1, cap: 0.9}", "trainer.epochs=2"])

    def sampled(scale: float) -> Tensor:
        run = prepare(config, "auto")
        perturb(run.parameters, scale)
        before = {name: p.detach().clone() for name, p in run.parameters.items()}
        with Early(run.scorers) as early, Interrupt() as interrupt:
            rollout, *_ = trainer.sample(run, Clock(run.pipeline.device), early, interrupt) or ()
        assert all(torch.equal(p, before[name]) for name, p in run.parameters.items())
        run.tracker.close()
        return rollout.x0

    assert torch.equal(sampled(0.0), sampled(0.5))


@pytest.mark.parametrize("kernel", ["ode", "cps"])
def test_any_sampler_will_do(start: Any, kernel: str) -> None:
    """Images of a stochastic one are trained like the others."""
    (line, _) = metrics(start("nft", kernel, f"sampling.kernel={kernel}", "sampling.eta=0.5"))
    assert line["grad_norm"] > 0 and line["trained_images"] == 6 and line["old_gap"] == 0


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("nft", ("trainer.passes=2",)),
        ("nft", ("trainer.updates_per_rollout=3", "algorithm.old.rate=0", "algorithm.kl=0")),
        ("awm", ("trainer.updates_per_rollout=2", "trainer.passes=2")),
    ],
    ids=["nft", "nft on policy", "awm"],
)
def test_forward_passes_are_those_that_check_tells(
    start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, settings: tuple[str, ...]
) -> None:
    """Of a second epoch; in the first the copies are still equal to what is trained."""
    forward, images = SD3Transformer2DModel.forward, []

    def counted(self: Any, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        images.append(len(hidden_states))
        return forward(self, hidden_states, *args, **named)

    start(method, "run", *settings, "trainer.epochs=1")
    monkeypatch.setattr(SD3Transformer2DModel, "forward", counted)
    start(method, "run", *settings, "trainer.epochs=2", resume="auto")
    told = summary.forwards(loading.load(str(tmp_path / "run.yaml"), settings))
    assert sum(images) == sum(int(n) for n in re.findall(r"\d+", told)), told


def test_raft_runs_the_kept_images_alone(start: Any) -> None:
    for line in metrics(start("raft", "raft")):
        assert line["trained_images"] == 2  # the best of each prompt


def test_flat_groups_are_not_run(start: Any) -> None:
    flat = ("rewards=[reward_functions.flat]", "algorithm.kl=0", "algorithm.old.rate=0", "trainer.weight_decay=0")
    lines = metrics(start("nft", "flat", *flat))
    assert [line["trained_images"] for line in lines] == [0, 0] and lines[-1]["grad_norm"] == 0
    lines = metrics(start("nft", "pulled", *flat, "trainer.updates_per_rollout=2"))
    assert lines[-1]["grad_norm"] == 0  # nothing has moved, so there is nothing to go back to


def test_guidance_is_refused_before_anything_is_loaded(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    for method, settings in METHODS.items():
        path.write_text(SETTINGS.format(model=model, output=tmp_path / "run", algorithm=settings))
        assert cli.main(["train", str(path), f"advantage={ESTIMATOR[method]}", "sampling.guidance=3"]) == 2
        said = capsys.readouterr().err
        assert "sampling.guidance" in said and f"'{method}' trains the conditional prediction itself" in said
        assert "set sampling.guidance to 1" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_nft_learns(start: Any) -> None:
    """The embedded model, free to choose the colour of "a circle", learns to choose red: same seeds, before and after."""
    folder = start(
        "nft",
        "learning",
        "algorithm={name: nft, kl: 0, old: {rate: 0.02}, timesteps: {count: 2}}",
        "model={path: tiny-sd3, device: cpu, dtype: bf16}",
        "sampling={steps: 4, kernel: dpm2, height: 64, width: 64}",
        "adapter={name: lora, rank: 8, alpha: 16}",
        "trainer={epochs: 5, prompts: 4, images_per_prompt: 6, micro_batch: 24, lr: 5e-3}",
        "evaluation={every: 5, prompts: 4, images_per_prompt: 4, steps: 4}",
    )
    before, after = (
        torch.tensor([s["scores"]["redness"] for s in json.loads((folder / "eval" / name).read_text())["samples"]])
        for name in ("0000.json", "0005.json")
    )
    risen = after - before
    assert risen.mean() > 4 * risen.std() / len(risen) ** 0.5
