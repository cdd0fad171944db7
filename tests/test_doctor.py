"""`diffalign doctor rewards`: which checkpoints are here, and do heads score as they did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffalign import reward_entries
from diffalign.cli import main
from diffalign.commands.doctor import apart, fixed_scores, picture


def test_says_what_is_here(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(["doctor", "rewards"]) == 0
    said = capsys.readouterr().out
    official = "pickscore: yuvalkirstain/PickScore_v1: not here; `hf download yuvalkirstain/PickScore_v1` fetches it"
    assert official in said.splitlines()
    assert "hpsv2: xswu/HPSv2: not here; `hf download xswu/HPSv2 HPS_v2.1_compressed.pt` fetches it" in said
    assert (
        "image_reward: google-bert/bert-base-uncased: not here; `hf download" in said and "--include '*.json'" in said
    )
    assert "vlm_echo: tiny-vlm: in " in said
    assert "geneval" not in said
    assert main(["doctor", "rewards", "--reward", "aesthetic:head=nowhere"]) == 0
    assert "aesthetic: nowhere: not here\n" in capsys.readouterr().out
    assert main(["doctor", "rewards", "--reward", "pickscore:model=tiny-clip,jpeg"]) == 0
    here, other = capsys.readouterr().out.splitlines()
    assert here.startswith("pickscore: tiny-clip: in ") and Path(here.partition(": in ")[2], "config.json").is_file()
    assert other == "jpeg: loads no checkpoint"
    assert main(["doctor", "rewards", "--reward", "artifact_head"]) == 0
    head, backbone = capsys.readouterr().out.splitlines()
    assert head.startswith("artifact_head: tiny-artifact: in ") and backbone.startswith("artifact_head: tiny-dino: in ")
    assert main(["doctor", "rewards", "--reward", "image_reward:model=tiny-image-reward"]) == 0
    weights, tokenizer = capsys.readouterr().out.splitlines()
    assert weights == tokenizer and weights.startswith("image_reward: tiny-image-reward: in ")


def test_compares_with_the_first_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    reference = tmp_path / "more" / "scores.json"
    asked = ["doctor", "rewards", "--compare-official", "--reference", str(reference), "--device", "cpu"]
    asked += ["--reward", "pickscore:model=tiny-clip"]
    assert main(asked) == 0
    assert "pickscore: recorded " in capsys.readouterr().out
    recorded = json.loads(reference.read_text())
    (entry,) = recorded.values()
    assert len(entry["scores"]) == 6 and set(entry["versions"]) == {"torch", "transformers"}
    assert main(asked) == 0
    assert "pickscore: as recorded, " in capsys.readouterr().out

    entry["scores"][2] += 0.5
    reference.write_text(json.dumps(recorded))
    assert main(asked) == 2
    captured = capsys.readouterr()
    assert "differs from" in captured.out
    assert captured.err.startswith("pickscore score otherwise than recorded in ")

    assert main([*asked[:-1], "pickscore"]) == 2
    captured = capsys.readouterr()
    assert "pickscore: left out: 'yuvalkirstain/PickScore_v1' is not in the hub cache" in captured.out
    assert captured.err.startswith("no head could be scored")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a": 1}', '{"a": {"scores": [1.0]}}', '{"a": {"scores": "abcdef"}}', "\xff"]
)
def test_a_reference_that_cannot_be_read_is_one_sentence(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scores.json").write_text(text, "latin-1")
    asked = ["doctor", "rewards", "--reward", "artifact_head", "--compare-official", "--device", "cpu", "--reference"]
    assert main([*asked, str(tmp_path / "scores.json")]) == 2
    assert capsys.readouterr().err.endswith(
        "' holds no scores of these pictures; remove it, or give another --reference\n"
    )
    for place in (tmp_path, tmp_path / "scores.json" / "x.json"):
        assert main([*asked, str(place)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"could not write '{place}'") and said.count("\n") == 1
    assert (tmp_path / "scores.json").read_text("latin-1") == text


def test_the_pictures_tell_artifact_heads_apart() -> None:
    (head,) = reward_entries.parse(["artifact_head"])
    scores = fixed_scores(head, "cpu")
    assert any(0.01 < s < 0.99 for s in scores), "a score at its bound would stay there whatever changed"


def test_tolerance_and_pictures() -> None:
    assert apart([1.0, 20.0], [1.0005, 20.015]) == 0
    assert apart([1.0, 20.0], [1.0005, 20.03]) == pytest.approx(0.03)
    assert apart([0.001], [0.0015]) == 0
    assert apart([0.1], [0.102]) == pytest.approx(0.002)
    for pair in ([1.0, float("nan")], [float("nan"), 1.0]):
        assert apart(pair, [1.0, 1.0]) != 0
    assert apart([float("nan"), 1.0], [float("nan"), 1.0]) == 0
    x = picture(30, 40)
    assert x.shape == (1, 3, 30, 40) and x.min() >= 0 and x.max() <= 1
    assert torch.equal((x * 255).round() / 255, x)
