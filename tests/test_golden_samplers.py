"""Steps, solvers, grids and the mixture oracle against the papers' official code (float64 golden vectors)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_data import cases, load
from torch import Tensor

from diffalign.oracle import GaussianMixture
from diffalign.samplers import denoise, step
from diffalign.schedules import (
    VP,
    RectifiedFlow,
    few_step_sigmas,
    flow_match_sigmas,
    flux2_mu,
    flux_mu,
    plain_sigmas,
    shifted,
)
from diffalign.solvers import dpm2
from diffalign.types import Step

FLOW = RectifiedFlow()
TIGHT = 1e-9
GRID = 2e-6  # the official grids are fp32
# The official functions round log sqrt(2 pi) to fp32; adding this to our exact log-probs leaves 1e-9 to compare at.
ROUNDING = 0.5 * math.log(2 * math.pi) - float(torch.tensor(0.5 * math.log(2 * math.pi), dtype=torch.float32))


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Any, expected: Any, atol: float = TIGHT, rtol: float = 0.0) -> None:
    actual = torch.as_tensor(actual, dtype=torch.float64).detach()
    torch.testing.assert_close(actual, f64(expected), atol=atol, rtol=rtol)


def score(v: Tensor, x: Tensor, s: Any, s_next: Any, kind: str, eta: float, next: Tensor | None) -> Step:
    return step(FLOW, *FLOW.to_x0_eps(v, x, s), x, s, s_next, kind, eta, next)


def std_of(taken: Step) -> Tensor:
    return taken.std.flatten()


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


@pytest.mark.parametrize("case", cases("distill", "cps_transition"))
def test_cps_transition(case: dict[str, Any]) -> None:
    x, v, noise, s, s_next = (f64(case[k]) for k in ("x", "v", "noise", "sigma_from", "sigma_to"))
    taken = score(v, x, s, s_next, "cps", max(case["eta"], 0.0), x)
    close(taken.mean + taken.std * noise, case["out"], 1e-12)


@pytest.mark.parametrize("case", cases("distill", "sde_logprob"))
def test_log_prob_of_stored_transitions(case: dict[str, Any]) -> None:
    kind = {"cps": "cps", "sde": "flow_sde"}[case["sde_type"]]
    rounding = 0.0 if kind == "cps" else ROUNDING
    x, v, noise, prev, sigmas = (f64(case[k]) for k in ("x", "v", "noise", "prev", "sigmas"))
    index = torch.tensor(case["step_index"])
    s, s_next = sigmas[index], sigmas[index + 1]
    old = score(v, x, s, s_next, kind, case["noise_level"], prev)
    close(old.mean, case["mean"])
    close(old.mean + old.std * noise, case["prev"])
    close(old.log_prob + rounding, case["logp"])
    close(std_of(old) / (1 if kind == "cps" else (s - s_next).sqrt()), case["std"])

    v_new = f64(case["v_new"]).requires_grad_()
    new = score(v_new, x, s, s_next, kind, case["noise_level"], prev)
    close(new.mean, case["mean_new"])
    close(new.log_prob + rounding, case["logp_new"])
    (gradient,) = torch.autograd.grad(new.log_prob.sum(), v_new)
    close(gradient, case["dlogp_dvnew"])


@pytest.mark.parametrize("case", cases("distill", "sigma_schedules"))
def test_few_step_sigmas(case: dict[str, Any]) -> None:
    if case["kind"] == "sd3":
        shift = case["shift"]
    else:
        mu = flux_mu(case["tokens"]) if case["kind"] == "flux1" else flux2_mu(case["tokens"], len(case["steps"]))
        close(mu, case["mu"])
        shift = math.exp(mu)
    close(few_step_sigmas(case["steps"], shift), [*case["sigmas"], 0.0], 1e-6)
    close(shifted(f64(case["steps"]) / 1000, shift), case["sigmas"], 1e-6)
