"""Going on with several rewards that share one gradient: what must be as the checkpoint has it, and what may change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models

from diffalign import checkpoint, loading, trainer
from diffalign.config import Config
from diffalign.types import UserError

SETTINGS = """
model: {{path: {model}, device: cpu}}
output: {output}
prompts: {{train: shapes-train}}
sampling: {{steps: 3, kernel: dpm2, height: 32, width: 32}}
algorithm: {{name: nft, timesteps: {{choice: grid, count: 1}}}}
multireward: {{name: marble, groups: {{style: [redness, size]}}}}
rewards: [reward_functions.redness, {{name: jpeg, label: size}}, reward_functions.sometimes]
adapter: {{name: lora, rank: 2, alpha: 4}}
trainer: {{epochs: 1, prompts: 2, images_per_prompt: 2, micro_batch: 4, lr: 1e-3}}
evaluation: {{every: 0}}
checkpoint: {{every: 1, keep: 9}}
"""
SAID = "was trained with {}, this run has {}; resume with the same, or choose another output folder"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of one epoch, and its configuration beside it."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_models.sd3_folder(folder / "sd3")
    (folder / "run.yaml").write_text(SETTINGS.format(model=model, output=folder / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        trainer.train(loading.load(str(folder / "run.yaml")))
        yield folder


def config(saved: Path, *overrides: str) -> Config:
    return loading.load(str(saved / "run.yaml"), ["trainer.epochs=2", *overrides])


def refusal(path: Path, changed: Config) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.check(path, changed.model_dump(mode="json"))
    return str(caught.value)


def rewritten(saved: Path, to: Path, of: Config) -> Path:
    """The checkpoint as a run of another configuration would have described it."""
    copied = Path(shutil.copytree(saved / "run" / "checkpoints" / "0001", to / "0001"))
    meta = json.loads((copied / "meta.json").read_text())
    meta["config"] = of.model_dump(mode="json")
    (copied / "meta.json").write_text(json.dumps(meta))
    return copied


@pytest.mark.parametrize(
    ("overrides", "key", "was", "now"),
    [
        (["rewards=[reward_functions.redness, {name: jpeg, label: size}]", "multireward.groups={}"], "rewards", "redness, size, sometimes", "redness, size"),
        (["rewards.3=jpeg"], "rewards", "redness, size, sometimes", "redness, size, sometimes, jpeg"),
        (["rewards=[reward_functions.sometimes, reward_functions.redness, {name: jpeg, label: size}]"], "rewards", "redness, size, sometimes", "sometimes, redness, size"),
        (["rewards.1.label=bytes", "multireward.groups={style: [redness, bytes]}"], "rewards", "redness, size, sometimes", "redness, bytes, sometimes"),
        (["multireward={name: marble}"], "multireward.groups", '{"style": ["redness", "size"]}', "{}"),
        (["multireward.groups={style: [redness, sometimes]}"], "multireward.groups", '{"style": ["redness", "size"]}', '{"style": ["redness", "sometimes"]}'),
        (["multireward=null"], "multireward", "marble", "null"),
        (["multireward=pcgrad"], "multireward", "marble", "pcgrad"),
    ],
    ids=["fewer", "more", "reordered", "renamed", "no groups", "other groups", "none", "pcgrad"],
)  # fmt: skip
def test_a_run_that_shares_otherwise_is_refused_before_anything_is_loaded(
    saved: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], key: str, was: str, now: str
) -> None:
    def untouched(*args: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("diffalign.pipelines.load", untouched)
    with pytest.raises(UserError) as caught:
        trainer.train(config(saved, *overrides), resume="auto")
    assert str(caught.value).endswith(SAID.format(f"{key} {was}", now))


def test_the_order_of_groups_is_theirs(saved: Path, tmp_path: Path) -> None:
    """Shares are kept by position."""
    one = config(saved, "multireward.groups={a: [redness], b: [size, sometimes]}")
    other = config(saved, "multireward.groups={b: [size, sometimes], a: [redness]}")
    path = rewritten(saved, tmp_path, one)
    assert checkpoint.check(path, one.model_dump(mode="json")) == 1
    assert "was trained with multireward.groups" in refusal(path, other)


def test_from_no_sharing_and_from_pcgrad_to_marble(saved: Path, tmp_path: Path) -> None:
    for name, was in (("none", "null"), ("pcgrad", "pcgrad")):
        path = rewritten(saved, tmp_path / name, config(saved, f"multireward={was}"))
        assert refusal(path, config(saved)).endswith(SAID.format(f"multireward {was}", "marble"))


def test_checkpoints_older_than_the_key(saved: Path, tmp_path: Path) -> None:
    """They had no sharing; without it rewards may change on the way as ever."""
    path = rewritten(saved, tmp_path, config(saved, "multireward=null"))
    meta = json.loads((path / "meta.json").read_text())
    del meta["config"]["multireward"]
    (path / "meta.json").write_text(json.dumps(meta))
    fewer = config(saved, "multireward=null", "rewards=[jpeg]")
    assert checkpoint.check(path, fewer.model_dump(mode="json")) == 1
    assert refusal(path, config(saved)).endswith(SAID.format("multireward null", "marble"))


def test_weights_and_the_methods_other_settings_may_change(saved: Path, tmp_path: Path) -> None:
    weighed = "rewards.2={name: reward_functions.sometimes, weight: 2}"
    changed = config(saved, weighed, "multireward.every=3", f"output={tmp_path / 'on'}")
    folder = trainer.train(changed, resume=str(saved / "run" / "checkpoints" / "0001"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if line["phase"] == "train"]
    assert last["epoch"] == 2 and last["alpha/style"] + last["alpha/sometimes"] == pytest.approx(1)
