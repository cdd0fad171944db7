"""Distillation steps, log-probs and grids against the papers' official code (golden vectors, float64)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_data import ROUNDING, cases, close, f64, score, std_of

from diffalign.schedules import few_step_sigmas, flux2_mu, flux_mu, shifted


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
