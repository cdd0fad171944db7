"""Shaping: what a reward may earn is bounded, what is reported is not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diffalign import config_help, loading, rewards
from diffalign.advantages.group import Group
from diffalign.rewards import resolve, shaped
from diffalign.types import UserError

SIGMOID = {"name": "sigmoid", "center": 22.0, "scale": 0.5}


def reward(shape: dict[str, Any] | None = None) -> rewards.Reward:
    return resolve({"name": "jpeg", "shape": shape} if shape else "jpeg")


def test_shapes_follow_their_formulas() -> None:
    scores = torch.linspace(18, 26, 9, dtype=torch.float64)
    expected = [1 / (1 + math.exp(-(r - 22) / 0.5)) for r in scores.tolist()]
    torch.testing.assert_close(shaped(reward(SIGMOID), scores).tolist(), expected, rtol=0, atol=1e-15)
    for low, high in ((20.0, 25.0), (None, 21.5), (24, None)):
        bent = shaped(reward({"name": "clamp", "low": low, "high": high}), scores)
        lower, upper = -math.inf if low is None else low, math.inf if high is None else high
        assert bent.tolist() == [min(max(r, lower), upper) for r in scores.tolist()]
    assert shaped(reward(), scores).tolist() == scores.tolist()


@pytest.mark.parametrize("shape", [None, SIGMOID, {"name": "clamp", "low": 0.0, "high": 1.0}])
def test_missing_scores_stay_missing(shape: dict[str, Any] | None) -> None:
    bent = shaped(reward(shape), torch.tensor([0.25, math.nan, 30.0]))
    assert bent.dtype == torch.float64
    assert bent.isnan().tolist() == [False, True, False]


def test_shapes_keep_the_order_and_pass_gradients() -> None:
    scores = torch.tensor([3.0, 19.0, 21.9, 22.0, 23.0, 25.0, 39.0], dtype=torch.float64, requires_grad=True)
    bent = shaped(reward(SIGMOID), scores)
    assert (bent.diff() > 0).all() and bent.min() > 0 and bent.max() <= 1
    (slope,) = torch.autograd.grad(bent.sum(), scores)
    assert slope.argmax() == 3 and slope[3].item() == pytest.approx(1 / (4 * 0.5))


def test_a_hacked_reward_gains_nothing_beyond_its_bound() -> None:
    """Two images reach the bound; pushing one of them to 100 changes no advantage, and unshaped it decides them all."""
    group, method = torch.zeros(4, dtype=torch.long), Group(name="group")

    def advantages(head: rewards.Reward, best: float) -> list[float]:
        scores = torch.tensor([0.1, 0.4, 1.0, best])
        return method({"a": shaped(head, scores)}, {"a": 1.0}, group, {}).tolist()

    capped = reward({"name": "clamp", "high": 1.0})
    assert advantages(capped, 100.0) == advantages(capped, 1.0)
    assert advantages(reward(), 100.0) != advantages(reward(), 1.0)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ("{high: 1}", "rewards.0.shape.name: this key is required"),
        ("{name: clamp}", "rewards.0.shape: a clamp needs low, high or both"),
        ("{name: clamp, low: 1, high: 1}", "rewards.0.shape: low 1 must be less than high 1"),
        ("{name: clamp, lower: 1}", "rewards.0.shape.lower: unknown key; did you mean 'low'?"),
        ("{name: sigmoid, center: 1}", "rewards.0.shape.scale: this key is required"),
        ("{name: sigmoid, center: 1, scale: 0}", "rewards.0.shape.scale: must be greater than 0, got 0"),
        ("{name: sigmoid, center: 1, scale: '2'}", "rewards.0.shape.scale: expected a number, got '2'"),
        ("{name: sigmoid, center: .inf, scale: 1}", "rewards.0.shape.center: must be a finite number, got Infinity"),
        ("{name: tanh}", "rewards.0.shape.name: expected a section with the name 'clamp' or 'sigmoid'"),
        ("3", "rewards.0.shape: expected a section with keys, got 3"),
    ],
)
def test_mistakes_are_one_sentence(shape: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        loading.load("shapes_demo", [f"rewards.0.shape={shape}"])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_shaped_reward_is_configured_and_saved() -> None:
    config = loading.load("shapes_demo", ["rewards.0.shape={name: sigmoid, center: 0.5, scale: 0.1}"])
    shape = config.rewards[0].shape
    assert shape is not None and shape(torch.tensor(0.5)) == 0.5
    assert config.model_dump(mode="json")["rewards"][0]["shape"] == {"name": "sigmoid", "center": 0.5, "scale": 0.1}
    assert config.rewards[1].shape is None
    assert {"Clamp", "Sigmoid"} <= config_help.schema()["$defs"].keys()
    assert "Distance from the center" in config_help.explain("rewards.0.shape", config.model_dump(mode="json"))
