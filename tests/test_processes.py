"""Two processes give the weights that one gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from diffalign import loading, trainer
from diffalign.types import UserError

ROOT = Path(__file__).parent.parent
SETTINGS = """
model: {{path: {model}{device}}}
output: {output}
prompts: {{train: shapes-train, test: shapes-test}}
sampling: {{steps: 4, kernel: cps, eta: 0.7, height: 32, width: 32}}
advantage: buffered
curriculum: variance
algorithm: {{name: grpo, window: {{size: 2, range: [0, 3]}}, kl: {{weight: 0.1}}}}
rewards: [jpeg]
adapter: {{name: lora, rank: 4, alpha: 8}}
trainer: {{epochs: 2, prompts: 1, images_per_prompt: 3, micro_batch: 2, lr: 1e-3, ema: 0.9,
  updates_per_rollout: 2, passes: 2}}
evaluation: {{every: 2, prompts: 3, images_per_prompt: 1, steps: 2}}
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Three images of one prompt over two processes: the shares are uneven and a group spans both."""
    model = tiny_models.sd3_folder(tmp_path / "sd3")
    cpu = ", device: cpu" if torch.accelerator.is_available() else ""  # as a user writes it on a machine without one
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(SETTINGS.format(model=model, output=tmp_path / name, device=cpu))
    trainer.train(loading.load(str(tmp_path / "one.yaml")))
    settings = str(ROOT / "configs/accelerate/cpu.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", settings]
    launch += ["--main_process_port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launch, "-m", "diffalign", "train", "two.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    one, two = (load_file(tmp_path / n / "checkpoints" / "0002" / "weights.safetensors") for n in ("one", "two"))
    assert any(t.abs().max() > 0 for n, t in one.items() if "lora_B" in n)  # B starts at zero: something was learnt
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
    assert (tmp_path / "two" / "report.html").is_file()


def test_processes_that_are_not_joined_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train alone and write into the other's folder."""
    model = tiny_models.sd3_folder(tmp_path / "sd3")
    (tmp_path / "run.yaml").write_text(SETTINGS.format(model=model, output=tmp_path / "run", device=", device: cpu"))
    Accelerator(cpu=True)  # this process is alone from here on, as one that accelerate did not join
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started"):
        trainer.train(loading.load(str(tmp_path / "run.yaml")))
    assert not (tmp_path / "run").exists()
