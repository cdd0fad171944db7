"""Configuration files: what they mean, and one sentence with its place for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from diffalign import config_help, loading, prompts, source
from diffalign.advantages.group import Group
from diffalign.sections import Full, Lora
from diffalign.types import UserError

RUN = """\
model: {model}
output: runs/test
prompts: {{train: shapes-train, test: shapes-test}}
sampling: {{steps: 10, kernel: cps, eta: 0.7, height: 64, width: 64}}
algorithm: {{name: grpo, clip: 1e-4, kl: {{weight: 0.1}}, window: {{size: 3, range: [0, 5]}}}}
rewards:
  - {{name: jpeg, weight: 0.5}}
trainer:
  epochs: 3
  prompts: 4
  images_per_prompt: 2
  lr: 3e-4
evaluation: {{every: 10}}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/model_index.json").write_text("{}")
    Path("run.yaml").write_text(RUN.format(model="./model"))
    return Path("run.yaml")


def complaint(*overrides: str, name: str = "run.yaml") -> str:
    with pytest.raises(UserError) as caught:
        loading.load(name, overrides)
    return str(caught.value)


def replaced(old: str, new: str) -> str:
    text = Path("run.yaml").read_text()
    assert old in text
    Path("run.yaml").write_text(text.replace(old, new))
    return complaint()


def test_a_run_is_read_as_written(run: Path) -> None:
    config = loading.load(str(run))
    assert config.model.path == "./model" and config.model.dtype == "fp32"
    assert config.trainer.lr == 3e-4 and config.trainer.betas == (0.9, 0.999)
    assert config.algorithm.model_dump()["window"]["range"] == (0, 5)
    assert [(r.name, r.weight) for r in config.rewards] == [("jpeg", 0.5)]
    assert config.adapter == Lora() and config.advantage == Group(name="group")
    assert config.evaluation.rewards == config.rewards


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3e-4", 3e-4), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("-2", -2), ("0x10", 16), ("1_000", 1000),
        ("no", "no"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("012", "012"), ("true", True), ("null", None),
        ("", None), ("~", None), ("[1, 2e1]", [1, 20.0]), ("{a: 'x'}", {"a": "x"}), ("'3e-4'", "3e-4"),
        (".inf", float("inf")), ("v1.0", "v1.0"), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_scalars(written: str, value: object) -> None:
    assert source.read(f"x: {written}", "f").data["x"] == value
    assert source.override(source.read("x: 0", "f"), [f"x={written}"]).data["x"] == value


def test_saved_configuration_reads_back_equal(run: Path, tmp_path: Path) -> None:
    changes = ["adapter={name: full}", "rewards.0.label=size", "evaluation.rewards=[size, geneval]", "trainer.lr=1e-7"]
    config = loading.load(str(run), changes)
    loading.save(config, tmp_path / "out.yaml")
    assert loading.load(str(tmp_path / "out.yaml")) == config
    assert config.adapter == Full(name="full")


def test_overrides(run: Path) -> None:
    config = loading.load(
        str(run),
        [
            "trainer.epochs=7", "rewards.0.weight=2", "rewards.1=geneval", "rewards.1.weight=3", "model.dtype=bf16",
            "algorithm.window=null", "sampling.negative_prompt=a=b, c", "sampling.guidance=4", "advantage.std=none",
            "adapter=full", "output=runs/other",
        ],
    )  # fmt: skip
    assert config.trainer.epochs == 7
    assert [(r.name, r.weight) for r in config.rewards] == [("jpeg", 2.0), ("geneval", 3.0)]
    assert (config.model.path, config.model.dtype) == ("./model", "bf16")
    assert config.algorithm.model_dump()["window"] is None
    assert config.sampling.negative_prompt == "a=b, c"
    assert config.advantage == Group(name="group", std="none")
    assert (config.adapter.name, config.output) == ("full", "runs/other")
    assert loading.load(str(run)).trainer.epochs == 3, "the file's own values are untouched"


def test_evaluation_names_take_the_training_settings(run: Path) -> None:
    config = loading.load(str(run), ["evaluation.rewards=[geneval, jpeg]"])
    geneval, jpeg = config.evaluation.rewards
    assert jpeg is config.rewards[0] and geneval.name == "geneval"
    assert loading.load(str(run), ["evaluation.rewards=[{name: jpeg}]"]).evaluation.rewards[0].weight == 1.0


def test_evaluation_sampling_is_deterministic(run: Path) -> None:
    sampling = loading.load(str(run), ["evaluation.guidance=3", "evaluation.steps=7"]).evaluation_sampling
    assert (sampling.kernel, sampling.eta, sampling.steps, sampling.guidance) == ("ode", 0.0, 7, 3.0)
    assert (sampling.height, sampling.width) == (64, 64)
    assert loading.load(str(run), ["sampling.guidance=2"]).evaluation_sampling.guidance == 2.0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("clip: 1e-4", "clop: 1e-4", "run.yaml:5: algorithm.clop: unknown key; did you mean 'clip'?"),
        ("weight: 0.1", "wieght: 0.1", "run.yaml:5: algorithm.kl.wieght: unknown key; did you mean 'weight'?"),
        ("lr: 3e-4", "lr: fast", "run.yaml:12: trainer.lr: expected a number, got 'fast'"),
        ("lr: 3e-4", "lr: '3e-4'", "run.yaml:12: trainer.lr: expected a number, got '3e-4'"),
        ("lr: 3e-4", "lr: -1", "run.yaml:12: trainer.lr: must be greater than 0, got -1"),
        ("lr: 3e-4", "lr: .inf", "run.yaml:12: trainer.lr: must be a finite number, got Infinity"),
        ("epochs: 3", "epochs: true", "run.yaml:9: trainer.epochs: expected a whole number, got true"),
        ("  epochs: 3\n", "", "run.yaml:8: trainer.epochs: this key is required"),
        ("  epochs: 3", "  epochs: 3\n  epochs: 4", "run.yaml:10: 'epochs' is given twice; remove one"),
        ("name: grpo", "name: gpro", "run.yaml:5: algorithm: unknown algorithm 'gpro'; did you mean 'grpo'?"),
        ("name: grpo, ", "", "run.yaml:5: algorithm.name: this key is required"),
        ("name: jpeg", "name: jpg", "run.yaml:7: rewards.0: unknown reward 'jpg'; did you mean 'jpeg'?"),
        ("weight: 0.5", "weight: much", "run.yaml:7: rewards.0.weight: expected a number, got 'much'"),
        ("kernel: cps", "kernel: cpss", "run.yaml:4: sampling.kernel: expected 'ode', 'flow_sde', 'cps', 'dance', 'ddim' or 'dpm2', got 'cpss'"),
        ("shapes-test}", "nowhere.txt}", "run.yaml:3: prompts.test: no prompt file 'nowhere.txt'; give a file or one of shapes-train, shapes-test"),
        ("./model", "./modle", "run.yaml:1: model: no folder or embedded model './modle'; "),
        ("output: runs/test\n", "", "run.yaml:1: output: this key is required"),
        ("output:", "\toutput:", "run.yaml:2: not valid YAML: "),
        ("output: runs/test", "output: !!python/name:os.system x", "run.yaml:2: the tag "),
        ("output: runs/test", "output: [runs]", 'run.yaml:2: output: expected text, got ["runs"]'),
    ],
)  # fmt: skip
def test_mistakes_in_a_file(run: Path, old: str, new: str, said: str) -> None:
    found = replaced(old, new)
    assert found.startswith(said) and "\n" not in found


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.lrr=1", "trainer.lrr: unknown key; did you mean 'lr'?"),
        ("trainer.epochs=2.5", "trainer.epochs: expected a whole number, got 2.5"),
        ("trainer=3", "trainer: expected a section with keys, got 3"),
        ("trainer.betas=[0.9]", "trainer.betas.1: one more item is required"),
        ("trainer.betas=[0.9, 0.9, 0.9]", "trainer.betas: expected at most 2 items, got [0.9, 0.9, 0.9]"),
        ("trainer.images_per_prompt=1", "trainer.images_per_prompt: must be at least 2, got 1: an image is compared with others of its prompt"),
        ("trainer.updates_per_rollout=9", "trainer.updates_per_rollout: 9 updates need as many images, got 8 an epoch"),
        ("trainer.prompts=9999", "trainer.prompts: 9999 prompts asked, but 'shapes-train' holds 476; ask for 476 or fewer"),
        ("evaluation.prompts=241", "evaluation.prompts: 241 prompts asked, but 'shapes-test' holds 240; ask for 240 or fewer"),
        ("sampling.kernel=ode", "sampling.kernel: 'grpo' needs a stochastic kernel; take cps or flow_sde"),
        ("sampling.eta=0", "sampling.eta: 0 makes every step deterministic; 'grpo' needs eta above 0"),
        ("sampling.height=60", "sampling.height: must be a multiple of 8, got 60"),
        ("algorithm.window.range=[0, 10]", "algorithm.window.range: ends at 10, but the last of 10 steps is never trained; end at 9"),
        ("adapter.name=lorra", "adapter.name: expected a section with the name 'lora' or 'full', got "),
        ("adapter.targets=[]", "adapter.targets: an empty list adapts nothing; remove it for the family's default"),
        ("model.dtype=fp8", "model.dtype: expected 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        ("prompts.test=null", "prompts.test: needed because evaluation.every is 10"),
        ("rewards=[]", "rewards: name at least one reward"),
        ("rewards=[jpeg, {name: jpeg, weight: 2}]", "rewards: 'jpeg' is listed twice; remove one or give it a label"),
        ("rewards=jpeg", "rewards: expected a list, got 'jpeg'"),
        ("rewards.0=os.path.nothing", "rewards.0: module 'os.path' has no 'nothing'"),
        ("rewards.0=no.such", "rewards.0: cannot import 'no.such': "),
        ("rewards.0=os.sep", "rewards.0: 'os.sep' is no Reward class and no function"),
        ("algorithm=os.path.join", "algorithm: 'os.path.join' is no Algorithm class"),
        ("log_with=[wandbb]", "log_with.0: expected 'tensorboard', "),
        ("sampling.negative_prompt=x", "sampling: negative_prompt has no effect at guidance 1; raise guidance or remove it"),
        ("rewards.3.weight=1", "'rewards' is a list of 1; write rewards.0 for its first item"),
        ("trainer.lr.x=1", "'trainer.lr' is 0.0003, not a section with keys"),
        ("trainer.lr", "expected KEY=VALUE, such as trainer.lr=3e-4"),
        ("trainer..lr=1", "expected KEY=VALUE, such as trainer.lr=3e-4"),
        ("trainer.lr={a: b", "not valid YAML: "),
    ],
)  # fmt: skip
def test_mistakes_in_an_override(run: Path, override: str, said: str) -> None:
    found = complaint(override)
    place = "run.yaml:4" if said.startswith("sampling: ") else f"override {override}"
    assert found.startswith(f"{place}: {said}") and "\n" not in found


def test_window_must_leave_a_step_to_train(run: Path) -> None:
    said = complaint("sampling.steps=1", "algorithm.window=null")
    assert said == "override sampling.steps=1: sampling.steps: 1 leaves 'grpo' no step to train; add steps"


def test_every_mistake_has_its_own_line(run: Path) -> None:
    lines = complaint("trainer.lr=x", "seed=-1", "rewards.0.weight=y").splitlines()
    assert sorted(lines) == [
        "override rewards.0.weight=y: rewards.0.weight: expected a number, got 'y'",
        "override seed=-1: seed: must be greater than or equal to 0, got -1",
        "override trainer.lr=x: trainer.lr: expected a number, got 'x'",
    ]


@pytest.mark.parametrize("text", ["", "- a", "just text", "a: &x [*x]", "? [a]\n: 1"])
def test_files_that_are_no_mapping_of_plain_values(run: Path, text: str) -> None:
    run.write_text(text)
    assert complaint().startswith("run.yaml:1: ")


def test_a_file_wins_over_a_preset(run: Path) -> None:
    assert complaint(name="shape_demo") == "no file or preset 'shape_demo'; did you mean 'shapes_demo'?"
    assert loading.read("shapes_demo").data["output"] == "runs/shapes_demo"
    Path("shapes_demo").write_text(run.read_text())
    assert loading.load("shapes_demo").output == "runs/test"


def test_presets_are_valid(run: Path) -> None:
    for name in loading.presets():
        assert loading.load(name, ["model=./model"]).output == f"runs/{name}"


@pytest.mark.parametrize(
    ("name", "text", "held"),
    [
        ("p.txt", "a cat\n\n  a dog  \n", [{"prompt": "a cat"}, {"prompt": "a dog"}]),
        ("p.jsonl", '{"prompt": "a cat", "tag": "x"}\n', [{"prompt": "a cat", "tag": "x"}]),
    ],
)
def test_prompt_files(tmp_path: Path, name: str, text: str, held: list[dict[str, str]]) -> None:
    (tmp_path / name).write_text(text)
    assert prompts.load(str(tmp_path / name)) == held


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", " \n\n", "'p.txt' holds no prompt"),
        ("p.jsonl", "", "'p.jsonl' holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"', "p.jsonl:2: not valid JSON: "),
        ("p.jsonl", '\n{"text": "a"}', 'p.jsonl:2: expected an object with a text under "prompt"'),
        ("p.jsonl", '{"prompt": " "}', 'p.jsonl:1: expected an object with a text under "prompt"'),
        ("p.txt", "caf\xe9", "'p.txt' is not UTF-8 text"),
    ],
)
def test_prompt_file_mistakes(run: Path, name: str, text: str, said: str) -> None:
    Path(name).write_bytes(text.encode("latin-1"))
    assert complaint(f"prompts.train={name}").startswith(f"override prompts.train={name}: prompts.train: {said}")


USER_CODE = '''\
from typing import ClassVar
from diffalign.algorithms import Algorithm
from diffalign.rewards import Reward

def brightness(images, prompts, metadata):
    """Mean pixel."""
    return images.mean((1, 2, 3))

class Redness(Reward):
    """Mean red."""
    power: float = 1.0

class Mine(Algorithm):
    """A method of the user's own."""
    strength: float = 1.0
    """How much."""

    def losses(self, policy, batch):
        yield from ()
'''


@pytest.fixture
def user_code(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my_methods.py").write_text(USER_CODE)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)


@pytest.mark.usefixtures("user_code")
def test_rewards_of_the_user() -> None:
    own = ["rewards=[{name: my_methods.brightness, weight: 2}, {name: my_methods.Redness, power: 3}]"]
    brightness, redness = loading.load("run.yaml", own).rewards
    assert (brightness.weight, redness.model_dump()["power"]) == (2.0, 3.0)
    import torch

    scores = brightness.setup("cpu")(torch.full((2, 3, 4, 4), 0.25), ["a", "b"], [{}, {}])
    assert torch.equal(torch.as_tensor(scores), torch.tensor([0.25, 0.25]))
    found = complaint("rewards=[{name: my_methods.brightness, power: 2}]")
    assert "rewards.0.power: unknown key; known: name, weight" in found


@pytest.mark.usefixtures("user_code")
def test_an_algorithm_of_the_user() -> None:
    config = loading.load("run.yaml", ["algorithm={name: my_methods.Mine, strength: 2}", "sampling.kernel=ode"])
    assert config.algorithm.model_dump() == {"name": "my_methods.Mine", "strength": 2.0}
    found = complaint("algorithm={name: my_methods.Mine, strenght: 2}")
    assert found.endswith("algorithm.strenght: unknown key; did you mean 'strength'?")
    assert config_help.explain("algorithm.strength", {"algorithm": "my_methods.Mine"}).endswith("How much.")


def test_every_key_is_explained() -> None:
    def keys(node: object, prefix: str = "") -> list[str]:
        if isinstance(node, dict):
            return [k for name, v in node.items() for k in [prefix + name, *keys(v, f"{prefix}{name}.")]]
        return [k for i, v in enumerate(node) for k in keys(v, f"{prefix}{i}.")] if isinstance(node, list) else []

    data = loading.read("shapes_demo").data
    assert len(keys(data)) > 30
    for key in keys(data):
        said = config_help.explain(key, data).splitlines()[0].partition(": ")[2]
        assert len(said) > 3, key
    assert config_help.explain("trainer.lr", {}) == "trainer.lr = 0.0003: Learning rate of AdamW."
    assert "  clip: " in config_help.explain("algorithm", data)
    with pytest.raises(UserError, match=r"trainer\.lrr: unknown key; did you mean 'lr'\?"):
        config_help.explain("trainer.lrr", {})


def test_schema_accepts_what_the_models_accept(run: Path) -> None:
    schema = json.loads(json.dumps(config_help.schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    good = loading.read("run.yaml").data
    check.validate(good)
    check.validate({**good, "algorithm": "grpo", "rewards": ["jpeg", {"name": "my.own", "x": 1}], "adapter": "full"})
    check.validate(yaml.safe_load(yaml.safe_dump(loading.load("run.yaml").model_dump(mode="json"))))
    for wrong in (
        {**good, "sead": 1},
        {**good, "algorithm": {"name": "grpo", "clop": 1}},
        {**good, "rewards": [{"name": "jpeg", "weight": "much"}]},
        {**good, "trainer": {**good["trainer"], "epochs": "3"}},
    ):
        assert not check.is_valid(wrong), wrong


def test_schema_accepts_every_preset_and_knows_every_method() -> None:
    check = jsonschema.Draft202012Validator(json.loads(json.dumps(config_help.schema())))
    presets = {name: loading.read(name).data for name in loading.presets()}
    assert "multireward" in presets["shapes_marble"]
    for name, data in presets.items():
        errors = [f"{name}: {error.json_path}: {error.message}" for error in check.iter_errors(data)]
        assert not errors, errors
    marble = presets["shapes_marble"]
    for good in ("marble", None, {"name": "pcgrad"}, {"name": "my.own", "x": 1}):
        check.validate({**marble, "multireward": good})
    for wrong in ({"name": "marble", "evry": 1}, {"name": "pcgrad", "every": 1}, {"name": "marble", "every": "1"}):
        assert not check.is_valid({**marble, "multireward": wrong}), wrong


def test_mistakes_in_multireward_name_its_own_keys(run: Path) -> None:
    two = ["algorithm=nft", "sampling={kernel: dpm2}", "rewards=[jpeg, geneval]"]
    said = complaint(*two, "multireward={name: marble, unit: 1}")
    assert "multireward.unit: unknown key; known: name, alphas, every, " in said
    assert complaint(*two, "multireward={name: marble, evry: 1}").endswith("unknown key; did you mean 'every'?")
    assert complaint(*two, "multireward={name: pcgrad, unit: 1}").endswith("multireward.unit: unknown key; known: name")
    explained = config_help.explain("multireward.every", {})
    assert explained.startswith("multireward.every = 10: ")
    assert explained == config_help.explain("multireward.every", {"multireward": "marble"})
    assert "\n  [Marble] warmup: " in config_help.explain("multireward", {})


def test_an_override_reaches_inside_a_method_that_was_named_alone(run: Path) -> None:
    two = ["algorithm=nft", "sampling={kernel: dpm2}", "rewards=[jpeg, geneval]"]
    given = [*two, "multireward=marble", "multireward.every=5", "curriculum=stratified", "curriculum.by=tag"]
    config = loading.load(str(run), given)
    assert config.multireward is not None
    assert (config.multireward.name, config.multireward.model_dump()["every"]) == ("marble", 5)
    assert (config.curriculum.name, config.curriculum.model_dump()["by"]) == ("stratified", "tag")


def test_a_configuration_is_frozen(run: Path) -> None:
    config = loading.load(str(run))
    for section, key in ((config, "seed"), (config.trainer, "epochs"), (config.rewards[0], "weight")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 5)


def test_reading_a_configuration_imports_no_torch(run: Path) -> None:
    code = (
        "import sys; from diffalign import catalogue, config_help, loading; loading.load('run.yaml');"
        "config_help.schema(); catalogue.everything();"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules); print(sorted(heavy - {'numpy'}))"
    )
    root = Path(config_help.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_env(root), check=True)
    assert done.stdout == "[]\n"


def _env(root: Path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(root)}
