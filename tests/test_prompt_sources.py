"""Training on prompts of several sources: what they are called, how a configuration lists them, and a run with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny_models
import torch
import yaml
from safetensors.torch import load_file

from diffalign import config_help, loading, prompts, trainer
from diffalign.types import UserError

RUN = """\
model: {{path: {model}, device: cpu}}
output: run
prompts: {{train: [one.txt, more/two.jsonl], test: one.txt}}
curriculum: {{name: stratified}}
sampling: {{steps: 2, kernel: cps, eta: 0.7, height: 32, width: 32}}
algorithm: {{name: grpo, window: {{size: 1, range: [0, 1]}}}}
rewards:
  - {{name: reward_functions.redness}}
  - {{name: jpeg, only: {{source: two}}}}
adapter: {{name: lora, rank: 2, alpha: 4}}
trainer: {{epochs: 2, prompts: 3, images_per_prompt: 2, micro_batch: 2, lr: 1e-3}}
evaluation: {{every: 2, prompts: 1, images_per_prompt: 1, steps: 1}}
checkpoint: {{every: 1, keep: 2}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.sd3_folder(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture
def run(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("more").mkdir()
    Path("one.txt").write_text("a cat\na dog\na bird\na fish\n")
    Path("more/two.jsonl").write_text('{"prompt": "a cat", "tag": "x"}\n{"prompt": "a cow", "source": "farm"}\n')
    Path("more/one.jsonl").write_text('{"prompt": "a horse"}\n')
    Path("run.yaml").write_text(RUN.format(model=model))


def complaint(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        loading.load("run.yaml", overrides)
    return str(caught.value)


@pytest.mark.usefixtures("run")
def test_prompts_are_told_their_source_and_none_is_lost() -> None:
    assert prompts.load(["more/two.jsonl", "one.txt"]) == [
        {"prompt": "a cat", "tag": "x", "source": "two"},
        {"prompt": "a cow", "source": "farm"},
        *({"prompt": text, "source": "one"} for text in ("a cat", "a dog", "a bird", "a fish")),
    ]
    texts = ("a cat", "a dog", "a bird", "a fish")
    assert prompts.load(("one.txt",)) == [{"prompt": text, "source": "one"} for text in texts]
    assert prompts.load("one.txt") == [{"prompt": text} for text in texts]
    turns = prompts.first(["more/two.jsonl", "one.txt"], 5)
    assert [entry["prompt"] for entry in turns] == ["a cat", "a cat", "a cow", "a dog", "a bird"]
    assert prompts.first("one.txt", 2) == prompts.load("one.txt")[:2]
    both = prompts.load(["shapes-train", "one.txt"])
    assert len(both) == 480 and both[0]["source"] == "shapes-train" and both[0]["tag"] == "single_object"
    assert "source" not in prompts.load("shapes-train")[0], "the embedded set itself stays as it is"


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("[one.txt, more/one.jsonl]", "prompts.train: the prompt sources 'one.txt' and 'more/one.jsonl' are both called 'one'; rename one, or list it once"),
        ("[one.txt, one.txt]", "prompts.train: the prompt sources 'one.txt' and 'one.txt' are both called 'one'; "),
        ("[]", "prompts.train: the list of prompt sources is empty; name a file, or one of shapes-train, shapes-test"),
        ("[one.txt, tow.jsonl]", "prompts.train: no prompt file 'tow.jsonl'; give a file or one of "),
        ("[one.txt, 3]", "prompts.train.1: expected text, got 3"),
        ("3", "prompts.train: expected text, got 3"),
        ("{one: one.txt}", 'prompts.train: expected text, got {"one": "one.txt"}'),
    ],
)  # fmt: skip
def test_mistakes_in_a_list_of_sources(override: str, said: str) -> None:
    found = complaint(f"prompts.train={override}")
    assert found.startswith(f"override prompts.train={override}: {said}") and "\n" not in found


@pytest.mark.usefixtures("run")
def test_a_list_is_as_long_as_its_sources_together() -> None:
    assert complaint("trainer.prompts=7") == (
        "override trainer.prompts=7: trainer.prompts: 7 prompts asked, but one.txt + more/two.jsonl hold 6; ask for 6 "
        "or fewer"
    )


@pytest.mark.usefixtures("run")
def test_a_string_stays_a_string_and_a_list_a_list() -> None:
    check = jsonschema.Draft202012Validator(json.loads(json.dumps(config_help.schema())))
    overrides = {
        ("one.txt", "more/two.jsonl"): [],
        ("one.txt", "shapes-test"): ["prompts.train=[one.txt,shapes-test]", "rewards=[jpeg]"],
        ("one.txt", "shapes-train"): ["prompts.train.1=shapes-train", "rewards=[jpeg]"],
        "one.txt": ["prompts.train=one.txt", "curriculum=uniform", "rewards=[jpeg]"],
    }
    for expected, given in overrides.items():
        config = loading.load("run.yaml", given)
        assert config.prompts.train == expected
        loading.save(config, Path("resolved.yaml"))
        saved = yaml.safe_load(Path("resolved.yaml").read_text())
        assert saved["prompts"]["train"] == (expected if isinstance(expected, str) else list(expected))
        assert loading.load("resolved.yaml") == config
        check.validate(saved)
        check.validate(loading.read("run.yaml", given).data)
        assert not check.is_valid({**saved, "prompts": {"train": ["one.txt", 3]}})
    said = config_help.explain("prompts.train", {})
    assert said.startswith("prompts.train: Prompts to train on: ") and "list of several" in said


@pytest.mark.usefixtures("run")
def test_a_run_draws_by_source_scores_by_source_and_resumes() -> None:
    """Three prompts an epoch from `one`, `two` and `farm`: one each. The second reward is for `two` alone."""
    folder = trainer.train(loading.load("run.yaml", ["output=whole"]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["phase"] == "train"]
    assert len(train) == 2 and all(line["applies/jpeg"] == pytest.approx(1 / 3) for line in train)
    assert all("applies/redness" not in line and line["reward/jpeg"] == line["reward/jpeg"] for line in train)
    held_out = [line for line in lines if line["phase"] == "eval"]
    assert held_out and all("reward/redness" in line and "reward/jpeg" not in line for line in held_out)
    trainer.train(loading.load("run.yaml", ["output=parts", "trainer.epochs=1"]))
    for other in ("[more/two.jsonl, one.txt]", "one.txt"):
        changed = ["output=parts", f"prompts.train={other}", "curriculum.by=prompt", "rewards=[jpeg]"]
        with pytest.raises(UserError, match="was trained with prompts .*, this run has .*; resume with the same"):
            trainer.train(loading.load("run.yaml", changed), "auto")
    with pytest.raises(UserError, match="remembers strata by another key than 'prompt'"):
        trainer.train(loading.load("run.yaml", ["output=parts", "curriculum.by=prompt"]), "auto")
    parts = trainer.train(loading.load("run.yaml", ["output=parts"]), "auto")
    for name in ("weights", "curriculum"):
        a, b = (load_file(f / "checkpoints" / "0002" / f"{name}.safetensors") for f in (folder, parts))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert a["stratum/source"].tolist() == [1, 1, 1, 1, 2, 0]


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("curriculum.by=tag", "curriculum.by: every prompt needs a tag, and 'a cat' has none; add it to their metadata, or take another key"),
        ("curriculum.shares={one: 1, tow: 1, farm: 1, two: 1}", "curriculum.shares.tow: no prompt has the source 'tow'; did you mean 'two'?"),
        ("curriculum.shares={one: 1, two: 1}", "curriculum.shares: the source 'farm' is left out; give it a weight, 0 for none of its prompts"),
        ("curriculum.shares={one: 0, two: 1, farm: 1}", "trainer.prompts: 3 prompts asked for an epoch, but the strata with a share hold 2; ask for 2 or fewer, or raise curriculum.shares"),
    ],
)  # fmt: skip
def test_a_curriculum_that_does_not_suit_the_prompts_is_found_with_the_configuration(override: str, said: str) -> None:
    place = "run.yaml:11" if said.startswith("trainer.prompts") else f"override {override}"
    assert complaint(override) == f"{place}: {said}"


@pytest.mark.usefixtures("run")
def test_strata_need_sources_and_other_mistakes_stand_beside_theirs() -> None:
    lines = complaint("prompts.train=one.txt", "trainer.prompts=5").splitlines()
    assert lines == [
        "override trainer.prompts=5: trainer.prompts: 5 prompts asked, but 'one.txt' holds 4; ask for 4 or fewer",
        "run.yaml:9: rewards.1.only: scores no training prompt: `only` asks for their 'source', and none has one; known: "
        "prompt",
        "run.yaml:4: curriculum.by: every prompt needs a source, and 'a cat' has none; list several files in "
        "prompts.train, or take a key of their metadata",
    ]


@pytest.mark.usefixtures("run")
def test_a_run_refuses_what_no_prompt_suits_before_it_loads_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def untouched(*args: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("diffalign.pipelines.load", untouched)
    said = "scores no training prompt: none has the source 'tow'; did you mean 'two'?"
    assert complaint("rewards.1.only.source=tow") == f"run.yaml:9: rewards.1.only: {said}"
    config = loading.load("run.yaml")
    reward = config.rewards[1].model_copy(update={"only": {"source": "tow"}})
    with pytest.raises(UserError, match=f"reward 'jpeg' {said[:-1]}"):
        trainer.train(config.model_copy(update={"rewards": (config.rewards[0], reward)}))
    curriculum = config.curriculum.model_copy(update={"by": "tag"})
    with pytest.raises(UserError, match=r"curriculum\.by: every prompt needs a tag, and 'a cat' has none; add it to"):
        trainer.train(config.model_copy(update={"curriculum": curriculum}))
    assert not Path("run").exists()
