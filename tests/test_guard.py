"""Runs that cannot learn stop with the cause and the remedy."""

from __future__ import annotations

import math

import pytest

from diffalign.guard import Watch
from diffalign.sections import Guard
from diffalign.types import UserError


def test_rewards_without_spread_stop_the_run() -> None:
    watch = Watch(Guard(flat_epochs=3))
    for epoch, alike in enumerate([True, True, False, True, True], 1):
        watch.rewards(epoch, {"a": 0.0}, alike)
    with pytest.raises(UserError, match="in 3 epochs up to 6: every image got the same reward; check the reward"):
        watch.rewards(6, {"a": 0.0}, True)
    with pytest.raises(UserError, match=r"images of each prompt all scored alike; raise trainer\.images_per_prompt"):
        watch.rewards(7, {"a": 0.3}, True)
    never = Watch(Guard(flat_epochs=0))
    for epoch in range(100):
        never.rewards(epoch, {"a": 0.0}, True)


def test_a_gradient_that_stays_huge_stops_the_run_and_a_spike_does_not() -> None:
    watch = Watch(Guard(grad_norm=100))
    for epoch in range(20):
        watch.gradient(epoch, 1.0 + epoch % 3)
    for norm in (1e4, 1e4, 2.0, 1e4, 1e4):
        watch.gradient(20, norm)
    with pytest.raises(UserError, match="rose to 1e\\+04 in epoch 21, over 100 times its usual 2"):
        watch.gradient(21, 1e4)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run_at_once(norm: float) -> None:
    with pytest.raises(UserError, match="gradients of epoch 4 are not finite"):
        Watch(Guard()).gradient(4, norm)


def test_gradients_of_zero_are_no_explosion() -> None:
    watch = Watch(Guard(grad_norm=100))
    for epoch in range(60):
        watch.gradient(epoch, 0.0)
    watch.gradient(60, 1.0)
