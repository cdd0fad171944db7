"""Online-RL steps, solver, advantages and losses against the papers' official code (golden vectors, float64)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_data import FLOW, GRID, ROUNDING, cases, close, f64, load, score, std_of
from torch import Tensor

from diffalign.advantages import group_advantages
from diffalign.algorithms.grpo import mean_kl, policy_loss
from diffalign.samplers import denoise, step
from diffalign.schedules import VP, flow_match_sigmas, plain_sigmas
from diffalign.solvers import dpm2
from diffalign.types import Step


def given(case: dict[str, Any], kind: str, dtype: torch.dtype = torch.float64) -> tuple[Step, Step]:
    """The step scored at the stored next state, and at the one the reference's noise leads to."""
    v, x, s, s_next, noise, prev = (
        f64(case[k]).to(dtype) for k in ("model_output", "sample", "sigma", "sigma_next", "noise", "prev_sample_given")
    )
    stored = score(v, x, s, s_next, kind, case["noise_level"], prev)
    return stored, score(v, x, s, s_next, kind, case["noise_level"], stored.mean + stored.std * noise)


@pytest.mark.parametrize("case", cases("training", "flow_grpo_sde_step"), ids=lambda c: c["id"])
def test_flow_grpo_sde(case: dict[str, Any]) -> None:
    grid = flow_match_sigmas(case["num_steps"], case["shift"])
    index = torch.tensor(case["step_index"])
    close(grid[index], case["sigma"], GRID)
    close(grid[index + 1], case["sigma_next"], GRID)
    close(grid[index] * 1000, case["timestep"], 1000 * GRID)
    close(grid[1], case["sigma_max"], GRID)

    stored, sampled = given(case, "flow_sde")
    close(stored.mean, case["prev_sample_mean"])
    root_h = (f64(case["sigma"]) - f64(case["sigma_next"])).sqrt()
    close(root_h, case["sqrt_neg_dt"])
    close(std_of(stored) / root_h, case["std_dev_t"])
    close(sampled.next, case["prev_sample_from_noise"])
    close(sampled.log_prob + ROUNDING, case["log_prob_from_noise"])
    close(stored.log_prob + ROUNDING, case["log_prob_given"])

    half, _ = given(case, "flow_sde", torch.float32)
    assert half.log_prob.dtype == torch.float32
    close(half.log_prob, case["log_prob_given_float32"], atol=1e-3, rtol=1e-4)
    close(half.mean, case["prev_sample_mean"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", cases("training", "flow_cps_step"), ids=lambda c: c["id"])
def test_flow_cps(case: dict[str, Any]) -> None:
    grid = flow_match_sigmas(case["num_steps"], case["shift"])
    index = torch.tensor(case["step_index"])
    close(grid[index], case["sigma"], GRID)
    close(grid[index + 1], case["sigma_next"], GRID)
    stored, sampled = given(case, "cps")
    close(stored.mean, case["prev_sample_mean"])
    close(std_of(stored), case["std"])
    close(sampled.next, case["prev_sample_from_noise"])
    close(sampled.log_prob, case["log_prob_from_noise"])
    close(stored.log_prob, case["log_prob_given"])


@pytest.mark.parametrize("case", cases("training", "dance_mix_grpo_step"), ids=lambda c: c["id"])
def test_dance_and_mix_grpo(case: dict[str, Any]) -> None:
    grid, i = plain_sigmas(case["num_steps"], case["shift"]), case["step_index"]
    close(grid[i], case["sigma"])
    close(grid[i + 1], case["sigma_next"])
    close(grid[1], case["sigma_max"])
    v, x, prev = (f64(case[k]) for k in ("model_output", "sample", "prev_sample_given"))
    s, s_next = case["sigma"], case["sigma_next"]

    dance = score(v, x, s, s_next, "dance", case["eta"], prev)
    close(dance.x0, case["x0_hat"])
    close(dance.mean, case["dance_mean"])
    close(std_of(dance), [case["dance_std"]] * len(x))
    close(dance.log_prob + ROUNDING, case["dance_log_prob"])
    constants = -math.log(case["dance_std"]) - 0.5 * math.log(2 * math.pi)
    close(dance.log_prob - constants, case["dance_log_prob_no_constants"])

    flow = score(v, x, s, s_next, "flow_sde", case["eta"], prev)
    close(flow.mean, case["flowgrpo_mean"])
    close(std_of(flow), [case["flowgrpo_std"]] * len(x))
    close(flow.log_prob + ROUNDING, case["flowgrpo_log_prob"])

    ode = score(v, x, s, s_next, "ode", 0.0, None)
    close(ode.next, case["ode_next"])
    close(ode.next, case["flowgrpo_deterministic_next"])


@pytest.mark.parametrize("case", cases("training", "ddpo_ddim_step"), ids=lambda c: c["id"])
def test_ddpo_ddim(case: dict[str, Any]) -> None:
    schedule = VP.scaled_linear(prediction=case["prediction_type"])
    after = (torch.tensor(case["timestep"]) - 1000 // case["num_steps"]).clamp(min=0)
    assert after.tolist() == case["prev_timestep_clamped"]
    s, s_next = f64(case["timestep"]) / 1000, after.double() / 1000
    close(schedule.alpha(s) ** 2, case["alpha_bar_t"])
    close(schedule.alpha(s_next) ** 2, case["alpha_bar_prev"])

    out, x, noise, prev = (f64(case[k]) for k in ("model_output", "sample", "noise", "prev_sample_given"))
    x0, eps = schedule.to_x0_eps(out, x, s)
    stored = step(schedule, x0, eps, x, s, s_next, "ddim", case["eta"], prev)
    close(stored.mean, case["prev_sample_mean"])
    close(std_of(stored), case["std"])
    close(stored.log_prob + ROUNDING, case["log_prob_given"])
    sampled = step(schedule, x0, eps, x, s, s_next, "ddim", case["eta"], stored.mean + stored.std * noise)
    close(sampled.next, case["prev_sample_from_noise"])
    close(sampled.log_prob + ROUNDING, case["log_prob_from_noise"])


class Toy:
    """The golden file's velocity field v = tanh(x A^T) + b cos(3 sigma)."""

    schedule = FLOW

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b

    def predict(self, x: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        return FLOW.to_x0_eps(torch.tanh(x @ self.a.T) + self.b * torch.cos(3 * torch.as_tensor(s)), x, s)


@pytest.mark.parametrize("case", cases("training", "nft_solver"), ids=lambda c: f"{c['id']}-{c['solver']}")
def test_nft_solver(case: dict[str, Any]) -> None:
    solver = {"dpm2": dpm2, "dpm1": denoise, "flow": denoise}[case["solver"]]  # dpm1 and Euler are the same step
    x, sigmas = f64(case["x_init"]), f64(case["sigmas"])
    assert len(sigmas) == case["num_steps"] + 1
    states = [x, *(s.next for s in solver(Toy(f64(case["A"]), f64(case["b"])), x, sigmas))]
    close(torch.stack(states), case["trajectory"])
    close(states[-1], case["x_final"])


@pytest.mark.parametrize("case", cases("training", "advantages"), ids=lambda c: c["id"])
def test_group_advantages(case: dict[str, Any]) -> None:
    names = sorted(set(case["prompts"]))
    group = torch.tensor([names.index(p) for p in case["prompts"]])
    rewards = f64(case["rewards"])
    steps = rewards.reshape(len(rewards), -1)  # a reward may differ from step to step: [B, T], one estimate for each
    for std in ("group", "global"):
        key = f"grpo_global_std_{std == 'global'}"
        if key not in case:
            continue
        actual = torch.stack([group_advantages(column, group, std) for column in steps.unbind(1)], 1)
        close(actual.reshape(rewards.shape), case[key])


def test_dance_advantages() -> None:
    case = load("training", "advantages")["dance"]
    rewards = f64(case["rewards"])
    group = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])
    actual = group_advantages(rewards.flatten(), group, "group", ddof=1, eps=1e-8)
    close(actual.reshape(rewards.shape), case["advantages"])


@pytest.mark.parametrize("case", cases("training", "grpo_loss"), ids=lambda c: c["id"])
def test_grpo_loss(case: dict[str, Any]) -> None:
    log_prob, mean = f64(case["log_prob"]).requires_grad_(), f64(case["prev_sample_mean"]).requires_grad_()
    advantages = f64(case["advantages"]).clamp(-case["adv_clip_max"], case["adv_clip_max"])
    ratio = (log_prob - f64(case["old_log_prob"])).exp()
    close(ratio, case["ratio"])
    policy = policy_loss(advantages, ratio, case["clip_range"]).mean()
    close(policy, case["policy_loss"])
    g = f64(case["std_dev_t"])
    g = g.reshape(*g.shape, *[1] * (mean.ndim - g.ndim))
    kl = mean_kl(mean, f64(case["prev_sample_mean_ref"]), g).mean() if case["beta"] else 0 * mean.sum()
    close(kl, case["kl_loss"])
    loss = policy + case["beta"] * kl
    close(loss, case["loss"])
    by_log_prob, by_mean = torch.autograd.grad(loss, (log_prob, mean))
    close(by_log_prob, case["dloss_dlogprob"])
    close(by_mean, case["dloss_dmean"])
    close(((ratio - 1).abs() > case["clip_range"]).double().mean(), case["clip_fraction"])
