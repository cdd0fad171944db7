"""docs/rewards.md: every head has its section, every configuration in it is valid, and its own head scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffalign import reward_entries, rewards
from diffalign.advantages import Advantage
from diffalign.listing import available
from diffalign.methods import lookup

PAGE = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def entries() -> list[tuple[str, Any]]:
    """(rewards or advantage, value) of every configuration; each line at the margin begins one."""
    texts = [t for kind, block in BLOCKS if kind == "yaml" for t in re.split(r"^(?=\w)", block, flags=re.MULTILINE)]
    return [pair for text in texts for pair in (yaml.safe_load(text) or {}).items()]


def test_every_head_has_its_section_and_its_line_of_the_table() -> None:
    named = set(re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)) | {"remote"}
    assert named == set(available("diffalign.rewards"))
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == named


def test_every_configuration_is_valid() -> None:
    found = entries()
    assert len(found) > 30
    for key, value in found:
        if key == "rewards":
            for entry in value:
                rewards.resolve(entry)
        else:
            assert key == "advantage"
            lookup("diffalign.advantages", value["name"], Advantage).model_validate(value)


def test_every_reward_on_a_command_line_is_valid() -> None:
    lines = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
    asked = [one for line in lines for one in re.findall(r"--reward ('[^']*'|\S+)", line)]
    assert len(asked) > 5
    for text in asked:
        reward_entries.parse([text.strip("'")])


def test_which_heads_give_gradients_is_told_right() -> None:
    for name, told in re.findall(r"^\| `(\w+)` \|[^|]*\| (yes|no|local only) \|", PAGE, re.MULTILINE):
        needs = {"dino": {"references": "x"}, "dino_adversarial": {"references": "x"}, "remote": {"url": "http://a"}}
        needs |= {"pickscore_adversarial": {"references": "x"}, "openclip": {"model": "hf-hub:a/b"}}
        reward = rewards.resolve({"name": name, **needs.get(name, {})})
        assert reward.differentiable == (told != "no"), name


def test_its_own_head_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for kind, block in BLOCKS if kind == "python" and "class Sharpness" in block]
    (tmp_path / "page_sharp.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (scorer,) = rewards.build([{"name": "page_sharp.Sharpness", "power": 2}]).values()
    images = torch.rand(2, 3, 4, 4)
    expected = (images[..., 1:] - images[..., :-1]).square().flatten(1).mean(1)
    torch.testing.assert_close(scorer(images, ["a", "b"], [{}, {}]).scores, expected)
