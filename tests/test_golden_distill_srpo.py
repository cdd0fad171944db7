"""SRPO's Direct-Align and its relative reward against golden vectors (float64)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_data import FLOW, cases, close, f64

from diffalign.algorithms._reward_gradient import descended
from diffalign.algorithms.srpo import recovered, relative
from diffalign.schedules import noised

TIGHT = 1e-10
HINGE = 0.7  # of the official program, stated in the file's "meaning"


@pytest.mark.parametrize("case", cases("distill", "srpo_direct_align"))
def test_direct_align(case: dict[str, Any]) -> None:
    x0, noise, v, s, t = (f64(case[key]) for key in ("x0", "noise", "v", "sigma_from", "sigma_to"))
    x = noised(FLOW, x0, noise, s)
    close(x, case["x_from"], TIGHT)
    v = v.requires_grad_()
    predicted = FLOW.to_x0_eps(v, x, s)
    close(noised(FLOW, *predicted, t), case["x_to"], TIGHT)
    found = recovered(FLOW, *predicted, noise, t)
    close(found, case["recovered"], TIGHT)
    (slope,) = torch.autograd.grad(found.sum(), v)
    close(slope, case["d_sum_dv"], TIGHT)
    exact = recovered(FLOW, *FLOW.to_x0_eps(noise - x0, x, s), noise, t)
    assert float((exact - x0).abs().max()) <= max(TIGHT, case["identity_max_err"])


@pytest.mark.parametrize("case", cases("distill", "srpo_direct_align"))
def test_relative_reward(case: dict[str, Any]) -> None:
    positive, negative, image = (f64(case[key]) for key in ("text_pos", "text_neg", "img"))
    reward = relative((positive * image).sum(-1), (negative * image).sum(-1), case["k"])
    close(reward, case["srp_reward"], TIGHT)
    close(descended(reward, HINGE).mean(), case["hinge"], TIGHT)
