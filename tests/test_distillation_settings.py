"""What few-step generators go together with, and what is refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from diffalign import loading, trainer
from diffalign.types import Stopped, UserError

SETTINGS = """
model: {{path: {model}, device: cpu, max_sequence_length: 0}}
output: {output}
prompts: {{train: shapes-train, test: shapes-test}}
sampling: {{timesteps: [1000, 750, 500, 250], kernel: cps, eta: 0.9, height: 32, width: 32}}
algorithm: {{name: rtdmd, guidance: 2.0, matching: 0.1, backpropagated: {{weight: 0}}, fake: {{lr: 1e-2}}}}
rewards: [jpeg, {{name: jpeg, label: coarse, quality: 20}}]
adapter: {{name: lora, rank: 2, alpha: 4}}
trainer: {{epochs: 2, prompts: 2, images_per_prompt: 3, micro_batch: 3, lr: 1e-2, ema: 0.9}}
checkpoint: {{every: 1}}
"""
ACDMD = ["algorithm={name: acdmd, ratio: 1, guidance: 2.0}", "rewards=[]", "trainer.images_per_prompt=1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.sd3_folder(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture
def settings(tmp_path: Path, model: Path) -> Any:
    path = tmp_path / "run.yaml"
    path.write_text(SETTINGS.format(model=model, output=tmp_path / "run"))
    return lambda *overrides: loading.load(str(path), overrides)


def weights(folder: Path, part: str, epoch: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"{epoch:04d}" / f"{part}.safetensors")


@pytest.mark.parametrize("method", ["{name: marble}", "{name: marble, every: 1, losses: null}", "{name: pcgrad}"])
def test_several_rewards_share_the_policy_gradient(settings: Any, method: str) -> None:
    """The last step's terms, which no advantage scales, are the penalty of the shared gradient."""
    folder = trainer.train(settings(f"multireward={method}", "trainer.epochs=1"))
    plain = trainer.train(settings("trainer.epochs=1", f"output={folder}_plain"))
    one, other = weights(folder, "weights", 1), weights(plain, "weights", 1)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    fakes = weights(folder, "memory", 1), weights(plain, "memory", 1)
    assert all(torch.equal(fakes[0][name], fakes[1][name]) for name in fakes[0])  # it learns before


def test_a_run_that_stops_after_the_fake_scores_step_keeps_the_checkpoint_before_it(settings: Any) -> None:
    flat = "rewards=[{name: jpeg, shape: {name: clamp, high: -1e6}}]"
    whole = settings("trainer.epochs=1", flat)
    folder = trainer.train(whole)
    before = weights(folder, "memory", 1)
    with pytest.raises(Stopped):
        trainer.train(settings("trainer.epochs=3", "guard.flat_epochs=2", flat), "auto")
    after = weights(folder, "memory", 1)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["algorithm={name: rtdmd, matching: 0, backpropagated: {weight: 0}, warmup: 1}"],
            "which matching 0 does without",
        ),
        (["algorithm={name: rtdmd}"], "name differentiable rewards"),
        (["algorithm.fake.betas=[2, 0.9]"], "algorithm.fake.betas"),
        (["algorithm.fake.lr=.inf"], "algorithm.fake.lr"),
        (["algorithm.fake.consistency={weight: 0, moves: 2}"], "have no effect with weight 0"),
        (["sampling.steps=3"], "steps 3 contradicts the 4 timesteps"),
        (["evaluation.steps=7"], "evaluation.steps: has no effect with sampling.timesteps"),
        ([*ACDMD, "advantage.name=rank"], "advantage: has no effect with 'acdmd'"),
        ([*ACDMD, "evaluation.every=1"], "evaluation.rewards: name what to measure"),
        ([*ACDMD, "rewards=[jpeg]"], "rewards: 'acdmd' trains on none"),
    ],
)
def test_what_has_no_effect_is_refused(settings: Any, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        settings(*overrides)


@pytest.mark.parametrize("override", ["sampling.timesteps=[1000, 800, 600, 400]", "sampling.eta=0.5"])
def test_a_run_goes_on_with_the_steps_it_began_with(settings: Any, override: str) -> None:
    trainer.train(settings("trainer.epochs=1"))
    with pytest.raises(UserError, match="was trained with sampling.timesteps .*; resume with the same"):
        trainer.train(settings(override), "auto")


def test_a_saved_configuration_is_one(settings: Any) -> None:
    folder = trainer.train(settings("trainer.epochs=1"))
    saved = loading.load(str(folder / "config.yaml"), ["trainer.epochs=2"])
    assert saved == settings()
    trainer.train(saved, "auto")
    assert weights(folder, "weights", 2)


def test_single_images_are_no_flat_groups(settings: Any) -> None:
    """Methods that compare nothing are not stopped for having nothing to compare."""
    few = ["rewards=[smooth_rewards.Greenness]", "trainer.images_per_prompt=1", "guard.flat_epochs=1"]
    method = "algorithm={name: draft, steps: 1, renoised: 1, rewards: {Greenness: 1}}"
    sampling = ["sampling={steps: 3, kernel: ode, height: 32, width: 32}"]
    trainer.train(settings(method, *few, *sampling))
