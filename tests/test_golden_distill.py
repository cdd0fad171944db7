"""Distillation steps, log-probs and grids against the papers' official code (golden vectors, float64)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_data import ROUNDING, cases, close, f64, score, std_of
from torch import Tensor

from diffalign.advantages import Advantage
from diffalign.advantages.gdpo import Gdpo
from diffalign.advantages.group import Group
from diffalign.curriculums import k_repeat
from diffalign.curriculums.uniform import Uniform
from diffalign.ema import EMA
from diffalign.schedules import few_step_sigmas, flux2_mu, flux_mu, shifted

FP32 = (
    1e-5  # grpo_advantages.json was computed in fp32: a reward near 1 is rounded by 6e-8, then divided by a small std
)


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


def alike(rewards: Tensor, group: Tensor) -> Tensor:
    return torch.tensor([len(rewards[group == g].unique()) == 1 for g in group.unique()])


@pytest.mark.parametrize("case", cases("distill", "grpo_advantages"))
def test_grpo_advantages(case: dict[str, Any]) -> None:
    names = sorted(set(case["prompts"]))
    group = torch.tensor([names.index(p) for p in case["prompts"]])
    rewards = {name: f64(values) for name, values in case["rewards"].items()}
    std = "global" if case["global_std"] else "group"
    decoupled: Advantage = Gdpo(name="gdpo", std=std, eps=1e-4)  # type: ignore[arg-type]
    method = decoupled if case["weight_advantages"] else Group(name="group", std=std)  # type: ignore[arg-type]
    advantages = method(rewards, case["weights"], group, {})
    every_step = advantages[:, None].expand(-1, case["num_steps"])  # one advantage for all steps of an image
    close(every_step.mean(), case["adv_mean"], FP32)
    close(every_step.std(correction=1), case["adv_std_unbiased"], FP32)

    # Groups whose images are all alike give exactly 0 here; in the reference rounding may leave 1e-16.
    total = torch.stack([case["weights"][name] * r for name, r in rewards.items()]).sum(0)
    close(alike(total, group).double().mean(), case["zero_std_ratio"])
    flat = torch.stack([alike(r, group) for r in rewards.values()]).all(0)
    assert (advantages[flat[group]] == 0).all()

    # The reference trains on what is not 0, filled up with others to whole batches; one that rounding kept changes nothing.
    kept = torch.tensor(case["kept_index"])
    close(every_step[kept], case["advantages_of_kept"], FP32)
    assert len(kept) % case["num_batches_per_epoch"] == 0 and len(kept.unique()) == len(kept)
    assert set(advantages.nonzero().flatten().tolist()) <= set(kept.tolist())


@pytest.mark.parametrize("case", cases("distill", "k_repeat_sampler"))
def test_k_repeat(case: dict[str, Any]) -> None:
    processes, batch = case["num_replicas"], case["batch_size"]
    generator = torch.Generator().manual_seed(case["seed"] + case["epoch"])
    chosen = Uniform(name="uniform").draw(case["dataset_size"], processes * batch // case["k"], generator, {})
    assert k_repeat(chosen, case["k"], generator).reshape(processes, batch).tolist() == case["per_rank"]


@pytest.mark.parametrize("case", cases("distill", "ema_trace"))
def test_ema_trace(case: dict[str, Any]) -> None:
    weight = f64(case["init"])
    ema = EMA([weight], case["decay"], case["interval"])
    for line in case["trace"]:
        assert ema.updates == line["step"]
        weight.copy_(f64(line["param"]))
        ema.update()
        close(ema.shadow[0], line["ema"])
