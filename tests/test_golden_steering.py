"""Steering steps and the mixture oracle against the papers' official code (golden vectors, float64)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_data import FLOW, GRID, cases, close, f64, load, std_of

from diffalign.oracle import GaussianMixture
from diffalign.samplers import step
from diffalign.schedules import VP, flow_match_sigmas


@pytest.mark.parametrize("case", cases("steering", "flow_grpo_sde_step"))
def test_steering_flow_grpo_sde(case: dict[str, Any]) -> None:
    grid = flow_match_sigmas(case["T"], case["shift"])
    close(grid[case["step"]], case["sigma"], GRID)
    close(grid[case["step"] + 1], case["sigma_next"], GRID)
    close(grid[1], case["sigma_1"], GRID)
    x, s = f64(case["x"]), case["sigma"]
    x0, eps = FLOW.to_x0_eps(f64(case["v"]), x, s)
    close(x0, case["x0"], 1e-5)
    close(eps, case["eps"], 1e-5)
    taken = step(FLOW, x0, eps, x, s, case["sigma_next"], "flow_sde", case["eta"], torch.full_like(x, 0.1))
    close(taken.mean, case["mean"], 1e-5, 1e-5)
    close(std_of(taken), [case["std_sqrt_dt"]] * len(x), rtol=1e-5)
    close(taken.log_prob, case["logprob_mean_at_0p1"], 1e-4, 1e-4)


@pytest.mark.parametrize("case", cases("steering", "das_ddim_step"))
def test_das_ddim(case: dict[str, Any]) -> None:
    schedule = VP.scaled_linear()
    hop = 1000 // case["T"]
    assert case["timestep"] == 1 + hop * (case["T"] - 1 - case["step"])
    assert case["prev_timestep"] == max(case["timestep"] - hop, 0)
    s, s_next = case["timestep"] / 1000, case["prev_timestep"] / 1000
    close(schedule.alpha(s) ** 2, case["alpha_bar"])
    close(schedule.alpha(s_next) ** 2, case["alpha_bar_prev"])
    x = f64(case["x"])
    x0, eps = schedule.to_x0_eps(f64(case["eps"]), x, s)
    close(x0, case["x0"])
    taken = step(schedule, x0, eps, x, s, s_next, "ddim", case["eta"], x)
    close(taken.mean, case["mean"])
    close(std_of(taken), [case["std"]] * len(x))


@pytest.mark.parametrize("case", load("steering", "gmm_oracle")["mixtures"])
def test_mixture_oracle(case: dict[str, Any]) -> None:
    mixture, a, x = GaussianMixture(f64(case["w"]), f64(case["mu"]), f64(case["sd"])), f64(case["a"]), f64(case["x"])
    target = mixture.tilted(a)
    close(target.weights, case["target_w"])
    close(target.means, case["target_mu"])
    close(target.stds, case["sd"])
    close(mixture.log_z(a), case["logZ"])
    for at in case["at"]:
        close(mixture.predict(x, at["sigma"])[0], at["x0hat"])
        close(mixture.soft_value(x, at["sigma"], a), at["soft_value"])


@pytest.mark.parametrize("case", load("steering", "gmm_oracle")["transitions"])
def test_ddim_is_the_flow_posterior(case: dict[str, Any]) -> None:
    s, s_next = case["sigma"], case["sigma_next"]
    unit_x0, unit_x = f64([[1.0], [0.0]]), f64([[0.0], [1.0]])
    eps = (unit_x - (1 - s) * unit_x0) / s
    posterior = step(FLOW, unit_x0, eps, unit_x, s, s_next, "ddim", 1.0, unit_x)
    close(posterior.mean.flatten(), [case["posterior_coef_x0"], case["posterior_coef_x"]])
    close(std_of(posterior), [case["posterior_std"]] * 2, 1e-8)
    ddim = step(FLOW, unit_x0, unit_x, unit_x, s, s_next, "ddim", case["eta"], unit_x)
    close(ddim.mean.flatten(), [case["ddim_coef_x0"], case["ddim_coef_eps"]], 1e-8)
    close(std_of(ddim), [case["ddim_std"]] * 2, 1e-8)
