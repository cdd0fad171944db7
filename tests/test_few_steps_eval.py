"""Few-step generators among the contestants of an evaluation, and a training run that makes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml

from diffalign import adapters, pipelines
from diffalign.cli import main
from diffalign.eval import contestant, gallery
from diffalign.few_steps import FewSteps
from diffalign.sections import Sampling
from diffalign.types import UserError

FOUR = (1000.0, 750.0, 500.0, 250.0)
TRAINING = """
model: {{path: {model}, device: cpu, max_sequence_length: 0}}
output: {output}
prompts: {{train: shapes-train}}
sampling: {{timesteps: [1000, 500], kernel: cps, eta: 0.3, height: 64, width: 64}}
algorithm: {{name: acdmd, ratio: 1}}
adapter: {adapter}
trainer: {{epochs: 2, prompts: 2, images_per_prompt: 2, micro_batch: 4, lr: 1e-4}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    base = tiny_models.sd3_folder(root / "sd3")
    (base / "diffalign.json").write_text('{"max_sequence_length": 0}')
    few = {"timesteps": FOUR, "kernel": "cps", "eta": 0.9, "height": 64, "width": 64}
    adapters.export_full(pipelines.load(base, device="cpu"), root / "few", sampling=Sampling.model_validate(few))
    (root / "prompts.txt").write_text("a red circle\ntwo squares\n", "utf-8")
    for name, adapter in (("full", "full"), ("lora", "{name: lora, rank: 2, alpha: 2}")):
        path = root / f"{name}.yaml"
        path.write_text(TRAINING.format(model=base, output=root / name, adapter=adapter))
        assert main(["train", str(path)]) == 0
    return root


def test_contestants_have_their_own_steps(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    models = [
        f"base={world / 'sd3'}",
        f"few={world / 'few'}",
        f"quiet={world / 'few'}@eta=0",
        f"told={world / 'sd3'}@timesteps=1000/750/500/250,eta=0.9,guidance=1",
        f"plain={world / 'few'}@steps=3",
        f"searched={world / 'few'}+best_of_n:particles=2",
    ]
    command = ["eval", "--models", *models, "--prompts", str(world / "prompts.txt"), "--out", str(tmp_path / "e")]
    command += ["--rewards", "reward_functions.redness", "--images", "1", "--steps", "5", "--guidance", "2"]
    command += ["--device", "cpu", "--probes", "1", "--no-noise-floor"]
    assert main(command) == 0
    assert main(command) == 0  # it goes on with what is there, and finds the contestants unchanged
    found = gallery.read(tmp_path / "e")
    nfe = {name: {m.nfe for m in entry.made.values()} for name, entry in found.entries.items()}
    assert nfe == {"base": {10}, "few": {4}, "quiet": {4}, "told": {4}, "plain": {6}, "searched": {8}}
    about = {name: entry.about for name, entry in found.entries.items()}
    few, quiet, told, plain = (about[name] for name in ("few", "quiet", "told", "plain"))
    assert (few.timesteps, few.eta, few.kernel, few.guidance) == (FOUR, 0.9, "cps", 1.0)
    assert (quiet.timesteps, quiet.eta, quiet.kernel) == (FOUR, 0.0, "ode")
    assert (plain.timesteps, plain.steps, plain.guidance) == (None, 3, 2.0)
    for key in found.keys:
        digest = {name: entry.made[key].digest for name, entry in found.entries.items()}
        assert digest["few"] == digest["told"] != digest["quiet"]
        assert found.entries["searched"].value("redness", key) >= found.entries["few"].value("redness", key) - 1e-3
    page = (tmp_path / "e" / "index.html").read_text("utf-8")
    assert "cps, eta 0.9, 4 steps (1000/750/500/250), no guidance" in page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("timesteps=750/500", "timesteps: must fall from 1000"),
        ("timesteps=1000+500", "is no list of numbers, such as 1000/500"),
        ("timesteps=1000/500,steps=2", "steps are those of the plain grid, so they contradict timesteps"),
        ("eta=1.5", "eta 1.5 does not suit kernel 'cps'; use 0 to 1"),
        ("eta=0.5,kernel=dpm2", "noise is that of the kernel cps; leave kernel or eta out"),
        ("kernel=cps", "eta=0.9 alone gives noise, that of cps; kernels: ode, dpm2"),
    ],
)
def test_mistakes(options: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        contestant.parse([f"x=tiny-sd3@{options}"])
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_training_run_exports_its_few_steps(world: Path, name: str) -> None:
    wanted: Any
    (wanted,) = contestant.parse([f"x={world / name}"])
    assert (wanted.timesteps, wanted.eta, wanted.guidance) == ((1000.0, 500.0), 0.3, 1.0)
    folder = world / name / {"full": "model", "lora": "lora"}[name]
    known = pipelines.few_steps(world / "sd3", folder)
    assert known == FewSteps((1000.0, 500.0), 0.3)
    call = {"full": "num_inference_steps=2, height=64, width=64", "lora": "sigmas=[1, 0.5], height=64, width=64"}[name]
    said = (folder / "README.md").read_text("utf-8")
    assert call in said and "eta = 0.3" in said
    if name == "full":
        pipe = pipelines.load(folder, device="cpu")
        wanted_sigmas = torch.tensor([1.0, 0.75, 0.0])
        torch.testing.assert_close(pipe.sigmas((1000.0, 500.0), 64, 64), wanted_sigmas, rtol=0, atol=1e-6)
        assert yaml.safe_load((folder / "scheduler" / "scheduler_config.json").read_text())["shift_terminal"] == 0.75
