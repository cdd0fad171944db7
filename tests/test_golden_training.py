"""Online-RL steps, solver, advantages and losses against the papers' official code (golden vectors, float64)."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import pytest
import torch
from golden_data import FLOW, GRID, ROUNDING, cases, close, f64, load, score, std_of
from torch import Tensor

from diffalign.advantages import Advantage
from diffalign.advantages.buffered import Buffered
from diffalign.advantages.dpo import Dpo
from diffalign.advantages.gdpo import Gdpo
from diffalign.advantages.group import Group
from diffalign.advantages.rwr import Rwr
from diffalign.advantages.sft import Sft
from diffalign.algorithms._policy_gradient import guarded_ratio, mean_kl, policy_loss
from diffalign.curriculums import k_repeat
from diffalign.curriculums.uniform import Uniform
from diffalign.samplers import denoise, step
from diffalign.schedules import VP, flow_match_sigmas, plain_sigmas
from diffalign.solvers import dpm2
from diffalign.types import Step
from diffalign.windows import Window, starts


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


def judged(method: Advantage, rewards: Tensor, group: Tensor, state: dict[str, Tensor] | None = None) -> Tensor:
    return method({"r": rewards}, {"r": 1.0}, group, {} if state is None else state)


def numbered(prompts: list[str]) -> Tensor:
    return torch.tensor([sorted(set(prompts)).index(p) for p in prompts])


@pytest.mark.parametrize("case", cases("training", "advantages"), ids=lambda c: c["id"])
def test_per_prompt_advantages(case: dict[str, Any]) -> None:
    rewards, group = f64(case["rewards"]), numbered(case["prompts"])
    methods: dict[str, Advantage] = {"rwr": Rwr(name="rwr"), "sft": Sft(name="sft")}
    methods |= {"dpo": Dpo(name="dpo", pair_ties=True)}  # as the tracker has it; by default a tie makes no pair
    methods |= {"grpo_False": Group(name="group", std="group"), "grpo_True": Group(name="group", std="global")}
    keys = [key for key in case if "_global_std_" in key]
    assert keys and set(case) - set(keys) <= {"id", "prompts", "rewards", "shapes", "second_rewards", "second_update"}
    for key in keys:
        kind, _, whole = key.partition("_global_std_")
        method = methods[f"grpo_{whole}" if kind == "grpo" else kind]
        columns = rewards.reshape(len(rewards), -1).unbind(1)  # a reward may differ from step to step: [B, T]
        actual = torch.stack([judged(method, column, group) for column in columns], 1).reshape(rewards.shape)
        assert list(actual.shape) == case["shapes"][key]
        close(actual, case[key])
    if "second_rewards" in case:  # the reference must be cleared between epochs, or fails; nothing is carried over here
        assert case["second_update"].startswith("raises")
        second = f64(case["second_rewards"])
        assert group.unique().numel() == 1, "the formula below is for one prompt"
        expected = (second - second.mean()) / (second.std(correction=0) + 1e-4)
        close(judged(methods["grpo_False"], second, group), expected.tolist())


@pytest.mark.parametrize("case", load("training", "advantages")["ddpo"], ids=lambda c: f"buffer-{c['buffer_size']}")
def test_ddpo_advantages(case: dict[str, Any]) -> None:
    method = Buffered(name="buffered", buffer_size=case["buffer_size"], min_count=case["min_count"])
    names = sorted({p for update in case["updates"] for p in update["prompts"]})
    state = method.start()
    for update in case["updates"]:
        group = torch.tensor([names.index(p) for p in update["prompts"]])
        close(judged(method, f64(update["rewards"]), group, state), update["advantages"])


def test_dance_advantages() -> None:
    case = load("training", "advantages")["dance"]
    rewards = f64(case["rewards"])
    group = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])
    actual = judged(Group(name="group", std="group", ddof=1, eps=1e-8), rewards.flatten(), group)
    close(actual.reshape(rewards.shape), case["advantages"])


def test_multi_reward_advantages() -> None:
    case = load("training", "advantages")["multi_reward"]
    rewards = {name: f64(values) for name, values in case["rewards"].items() if name != "shapes"}
    weights, group = case["weights"], torch.tensor(case["group"])
    close(Gdpo(name="gdpo")(rewards, weights, group, {}), case["gdpo"])
    mix = Gdpo(name="gdpo", ddof=1, eps=1e-8, whiten=False)
    close(mix(rewards, weights, group, {}), case["mixgrpo_advantage_aggr"])


@pytest.mark.parametrize("case", load("training", "samplers_and_windows")["k_repeat"], ids=lambda c: f"k-{c['k']}")
def test_k_repeat(case: dict[str, Any]) -> None:
    processes, batch = case["num_replicas"], case["batch_size"]
    for drawn in case["batches"]:
        generator = torch.Generator().manual_seed(case["seed"] + drawn["epoch"])
        chosen = Uniform(name="uniform").draw(case["dataset_len"], processes * batch // case["k"], generator, {})
        order = k_repeat(chosen, case["k"], generator)
        assert order.reshape(processes, batch).tolist() == drawn["per_rank"]


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

    guard = case["guard"]
    root_h = f64(guard["sqrt_dt"])
    std = (g * root_h).expand(len(mean), *[1] * (mean.ndim - 1))
    old_mean = f64(guard["old_prev_sample_mean"])
    close(mean_kl(mean, old_mean, std), guard["ratio_mean_bias"])
    taken = Step(mean=mean, std=std, next=mean, log_prob=log_prob, x0=mean)
    guarded = guarded_ratio(taken, f64(case["old_log_prob"]), old_mean)
    close(guarded, guard["ratio"])
    loss = policy_loss(advantages, guarded, case["clip_range"]).mean() / root_h**2
    close(loss, guard["loss"])
    by_log_prob, by_mean = torch.autograd.grad(loss, (log_prob, mean))
    close(by_log_prob, guard["dloss_dlogprob"])
    close(by_mean, guard["dloss_dmean"])


@pytest.mark.parametrize("case", load("training", "samplers_and_windows")["windows"], ids=str)
def test_windows(case: dict[str, Any]) -> None:
    """Our sliding start, let run past the end of the range as MixGRPO's program does, gives its windows, shrunken and
    empty ones included; `Window.steps` stops at the last start at which the window is whole."""
    a = case["args"]
    size, length, every = a["group_size"], a["max_timesteps"], a["iters_per_group"]
    settings: dict[str, Any] = {"size": size, "range": (0, length), "strategy": a["sample_strategy"], "every": every}
    if a["sample_strategy"] == "decay":
        settings |= {"every": a.get("max_iters_per_group", every)}
        settings |= {"least": a.get("min_iters_per_group", max(1, every // 4))}
    if a["sample_strategy"] == "exp_decay":
        settings |= {"decay_from": a["exp_decay_thre_timestep"], "decay_rate": a["exp_decay_k"]}
    stride = a.get("prog_overlap_step", 1) if a["prog_overlap"] else size
    begin = starts(Window(**settings).stay(length), stride, length, a["roll_back"])
    ours = [list(range(c, min(c + size, length))) for c in islice(begin, len(case["windows"]))]
    assert ours == case["windows"]

    kept = Window(**settings, stride=stride, roll_back=a["roll_back"])
    whole = [kept.steps(0, epoch) for epoch in range(len(case["windows"]))]
    assert all(len(w) == size and w[0] >= 0 and w[-1] < length for w in whole)
    slid = next((i for i, w in enumerate(case["windows"]) if len(w) < size), len(whole))
    assert whole[:slid] == case["windows"][:slid]
