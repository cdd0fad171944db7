"""From the scores of an epoch's images to their advantages."""

from __future__ import annotations

import torch
from accelerate.utils import gather_object
from torch import Tensor

from diffalign.advantages._statistics import bounds, rows
from diffalign.rewards import shaped
from diffalign.run import Run
from diffalign.types import RewardOutput, Rollout, Stopped
from diffalign.validity import invalid


def advantages(run: Run, rollout: Rollout, outputs: dict[str, RewardOutput]) -> dict[str, float]:
    """Set the advantages from the rewards of all processes; returns what to log of them."""
    rollout.rewards = {name: outputs[name].scores for name in run.scorers}
    logged = invalid(outputs, f"epoch {run.epoch + 1}")
    method = run.config.advantage
    by_name = {name: s.reward for name, s in run.scorers.items()}
    mine = {"group": rollout.group.cpu(), **{name: r.cpu() for name, r in rollout.rewards.items()}}
    mine[""] = rollout.x0.float().flatten(1).square().mean(1).sqrt().cpu()
    parts: list[dict[str, Tensor]] = gather_object([mine])
    every = {name: torch.cat([part[name] for part in parts]) for name in mine}
    group, x0_norm = every.pop("group"), every.pop("")
    if all(bool(r.isnan().all()) for r in every.values()):
        raise Stopped(
            f"no reward applies to any of the {len(group)} images of epoch {run.epoch + 1}; check that the prompt set "
            "carries the metadata they need"
        )
    shaped_rewards = {name: shaped(by_name[name], r) for name, r in every.items()}
    weights = {name: reward.weight for name, reward in by_name.items()}
    own: dict[str, Tensor] = {}
    if run.balancer is None:
        values = method(shaped_rewards, weights, group, run.states["advantage"])
    else:
        own = separate(run, run.balancer.groups, shaped_rewards, weights, group)
        values = mean(list(own.values()))
    run.config.curriculum.learn(group, values, method.overall(shaped_rewards, weights, group), run.states["curriculum"])
    values = values.nan_to_num(0.0).clamp(-method.clip, method.clip)
    first = sum(len(part["group"]) for part in parts[: run.accelerator.process_index])
    rollout.advantages = values[first : first + len(rollout)].float().to(rollout.x0.device)
    rollout.separate = {
        name: a[first : first + len(rollout)].clamp(-method.clip, method.clip).float().to(rollout.x0.device)
        for name, a in own.items()
    }
    alike = torch.stack([same_in_group(a, group) for a in [values, *own.values()]]).all(0)
    logged |= {"zero_advantage_groups": float(alike.double().mean()), "x0_norm": float(x0_norm.mean())}
    spread = {}
    for name, r in every.items():
        valid = r[~r.isnan()].double()
        if len(valid):
            spread[name] = float(valid.std(correction=0))
            logged |= {f"reward/{name}": float(valid.mean()), f"reward/{name}_std": spread[name]}
        if len(valid) < len(r):
            logged[f"applies/{name}"] = len(valid) / len(r)
    run.watch.rewards(run.epoch + 1, spread, run.config.algorithm.compares and bool(alike.all()))
    return logged


def same_in_group(advantages: Tensor, group: Tensor) -> Tensor:
    """[G] bool: the advantages that a group has are all equal; sft gives those of equal rewards 1, and group 0."""
    row = rows(group)
    low, high = bounds(advantages, row)
    differs = advantages.new_zeros(int(row.max()) + 1).scatter_reduce_(0, row, (high > low).double(), "amax")
    return differs == 0


def separate(
    run: Run, groups: dict[str, list[str]], rewards: dict[str, Tensor], weights: dict[str, float], group: Tensor
) -> dict[str, Tensor]:
    """The advantages of each reward on its own, [B] float64, NaN where it does not apply.

    Rewards of one of `groups` are averaged, by weight, over those that apply; `group` [B] are prompt ids.
    """
    alone = {
        name: run.config.advantage({name: r}, {name: 1.0}, group, run.states[f"advantage_{i}"])
        for i, (name, r) in enumerate(rewards.items())
    }
    return {
        name: mean([alone[member] for member in members], [weights[member] for member in members])
        for name, members in groups.items()
    }


def mean(values: list[Tensor], weights: list[float] | None = None) -> Tensor:
    """Weighted mean over those that are not NaN, [B]; NaN where all are."""
    stacked = torch.stack(values)
    weight = torch.ones(len(values)) if weights is None else torch.tensor(weights)
    share = weight.to(stacked)[:, None] * ~stacked.isnan()
    return (share * stacked.nan_to_num(0.0)).sum(0) / share.sum(0)
