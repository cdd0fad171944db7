"""Particle filters against the papers' official code and a spec's own numbers (golden vectors, float64)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_data import cases, close, f64, load
from torch import Tensor

from diffalign.schedules import RectifiedFlow, Schedule, plain_sigmas
from diffalign.steering import _resampling as schemes
from diffalign.steering import _smc
from diffalign.steering._fkd_official import Population, Rules, resampled
from diffalign.steering._problem import Problem
from diffalign.steering._tempering import exponential, linear


@pytest.mark.parametrize("case", cases("steering", "fkd_official"))
def test_fkd_official(case: dict[str, Any]) -> None:
    assert case["variant"] in ("text_to_image", "discrete_diffusion")
    rules = Rules(
        case["potential"],
        case["lambda_"],
        range(case["t_start"], case["t_end"] + 1, case["resample_frequency"]),
        case["T"] - 1,
        case["adaptive"],
        discrete=case["variant"] == "discrete_diffusion",
    )
    k, generator = case["K"], torch.Generator().manual_seed(case["torch_manual_seed"])
    ones = torch.ones(k, dtype=torch.float64)
    population = Population(case["reward_min_value"] * ones, ones)
    assert [taken["i"] for taken in case["steps"]] == list(range(case["T"]))
    for taken in case["steps"]:
        index, weights = torch.arange(k), None
        assert rules.weighs(taken["i"]) == taken["called_reward"]
        if taken["called_reward"]:
            population, index, weights = resampled(rules, population, f64(taken["rewards"]), taken["i"], generator)
        assert (weights is None) == (taken["weights"] is None)
        if weights is not None:
            close(weights, taken["weights"], rtol=1e-9)
        if taken["indices"] is not None:
            assert index.tolist() == taken["indices"]
        close(f64(taken["latents_in"])[index], taken["latents_out"], 0)
        close(population.rewards, taken["population_rs_after"])
        close(population.product, taken["product_of_potentials_after"], rtol=1e-9)


SCHEMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "systematic": schemes.systematic,
    "stratified": schemes.stratified,
    "multinomial_sorted_u": schemes.multinomial,
    "residual": schemes.residual,
    "ssp": schemes.ssp,
}


@pytest.mark.parametrize("case", cases("steering", "das_resampling"))
def test_das_resampling(case: dict[str, Any]) -> None:
    w = f64(case["W"])
    assert len(w) == case["K"]
    close(schemes.effective(w.log()), case["ess"])
    children = {name: scheme(w, f64(case[name]["u"]).reshape(-1)) for name, scheme in SCHEMES.items()}
    sure = torch.arange(len(w)).repeat_interleave((len(w) * w).floor().long())
    assert len(sure) == case["residual"]["n_deterministic"]
    assert children["residual"][: len(sure)].tolist() == sure.tolist()
    # The official search stops at the number of points instead of that of particles: of m points none picks particle m
    # or a later one. Only residual has fewer points than particles; ours picks any.
    rest = children["residual"][len(sure) :]
    children["residual"] = torch.cat([sure, rest.clamp(max=len(rest) - 1)])
    assert {name: index.tolist() for name, index in children.items()} == {
        name: case[name]["indices"] for name in SCHEMES
    }


@pytest.mark.parametrize("case", load("steering", "das_resampling")["log_weight_cases"])
def test_das_log_weights(case: dict[str, Any]) -> None:
    log_w = f64(case["log_w"])
    close(schemes.normalised(log_w), case["log_normalized"])
    close(schemes.effective(log_w), case["ess"])


@pytest.mark.parametrize("case", cases("steering", "das_tempering"))
def test_das_ess_at_each_strength(case: dict[str, Any]) -> None:
    names = ("log_w", "log_prob_diffusion", "log_twist", "log_prob_proposal", "log_twist_prev")
    log_w, p, twist, q, before = (f64(case[name]) for name in names)
    assert log_w.shape[1] == case["P"]
    for scale, ess in case["ess_at_scale"].items():
        close(schemes.effective(log_w + p - q + float(scale) * twist - before), ess)


@pytest.mark.parametrize("case", load("steering", "das_tempering")["schedules"])
def test_das_schedules(case: dict[str, Any]) -> None:
    gamma, steps, start = case["gamma"], case["T"], case["tempering_start"]
    close(exponential(gamma, steps, start), case["exp"])
    close(linear(gamma, steps, start), case["poly1"])
    close(exponential(gamma, steps + 1, start)[1:], case["exp_next"])  # guidance to step i + 1 takes its strength


class Numbered:
    """A model whose states matter to nobody."""

    schedule: Schedule = RectifiedFlow()
    cost = 1

    def __init__(self, steps: int) -> None:
        self.sigmas = plain_sigmas(steps)

    def start(self, generators: Any) -> Tensor:
        return torch.zeros(len(generators), 1, dtype=torch.float64)

    def predict(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        return x, x

    def decode(self, x0: Tensor) -> Tensor:
        return x0


@pytest.mark.parametrize("case", load("steering", "spec_fk_dts")["fk"])
def test_filter(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter itself, given the rewards of each slot and the point of each resampling. State 0 is not weighed, so
    weighing j of the file is that of state j + 1, and the last is that of x_T."""
    k, steps, scheme = case["K"], case["steps"], SCHEMES[case["scheme"]]
    end = len(steps)
    twists: list[Tensor] = []  # one more at each weighing
    log_ws: dict[int, Tensor] = {}
    ancestors: dict[int, Tensor] = {}
    after: dict[int, Any] = {}
    twist = _smc._twist

    def children(j: int, log_w: Tensor) -> Tensor:
        return scheme(schemes.normalised(log_w).exp(), f64(steps[j]["u"]).reshape(-1))

    def recorded_twist(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        found = twist(*args)
        twists.append(found[0])
        return found

    def resample(name: str, log_w: Tensor, generator: torch.Generator) -> Tensor:
        j = len(twists) - 1
        log_ws[j], ancestors[j] = log_w, children(j, log_w)
        return ancestors[j]

    monkeypatch.setattr(_smc, "_twist", recorded_twist)
    monkeypatch.setattr(_smc, "resample", resample)
    problem = Problem(
        Numbered(end),
        lambda images, sigma: f64(steps[len(twists)]["rewards"]),
        micro_batch=k,
        watch=lambda taken: after.update({taken.step - 1: taken.row}),
    )
    strengths, at = [case["lambda_"]] * (end + 1), range(1, end)
    plan = _smc.Plan(k, strengths, at, case["potential"], case["scheme"], case["ess_threshold"])
    outcome = _smc.smc(problem, plan)

    assert outcome.log_z is not None
    before = ([0.0] + [taken["logZ_so_far"] for taken in steps])[-2]
    # the file resamples at the end too, where the filter returns the weights
    log_ws[end - 1] = outcome.log_weights + (outcome.log_z - before) + f64(k).log()
    ancestors[end - 1] = children(end - 1, log_ws[end - 1])
    close(outcome.log_z, steps[-1]["logZ_so_far"])
    for j, taken in enumerate(steps):
        close(outcome.history[j]["ess"], taken["ess"])
        assert taken["resampled"] == (j in ancestors)
        if j < end - 1:
            assert outcome.history[j]["resampled"] == taken["resampled"]
        close(log_ws[j] if j in log_ws else after[j]["log_weights"], taken["log_w"])
        index = ancestors.get(j, torch.arange(k))
        assert index.tolist() == taken.get("indices", list(range(k)))
        close(twists[j][index], taken["twist_after"])
