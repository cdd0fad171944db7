"""MARBLE's balance of reward gradients against golden vectors (exact float64 solutions, and the reference's SLSQP)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_data import FLOW, cases, close, f64, load
from torch import Tensor

from diffalign.advantages.group import Group
from diffalign.algorithms.nft import implicit, matching, nft_loss
from diffalign.multireward._min_norm import balance
from diffalign.multireward.marble import NEVER, Marble, due, smoothed
from diffalign.schedules import noised

SHARES = 1e-5  # absolute, of alphas
GRADIENTS = 1e-5  # relative, of combined gradients
SLSQP = 2e-3  # how far the reference's shares may be from the exact ones


def with_nan(values: Any) -> Any:
    """Nested lists, null replaced by NaN."""
    if isinstance(values, list):
        return [with_nan(value) for value in values]
    return math.nan if values is None else values


def near(actual: Tensor, expected: list[float], unit: float) -> None:
    """Equal to 1e-5 of the expected vector's length; one that should cancel out may keep 1e-6 of the unit."""
    target = f64(expected)
    assert float((actual - target).norm()) <= GRADIENTS * float(target.norm()) + 1e-6 * unit


@pytest.mark.parametrize("case", cases("training", "marble_mgda"), ids=lambda c: c["id"])
def test_balance(case: dict[str, Any]) -> None:
    args, raw = case["args"], f64(with_nan(case["gradients"]))
    weights, floor = args["weights"], args["alpha_floor"]
    assert (~raw.isfinite().all(1)).nonzero().flatten().tolist() == case["nonfinite_rows"]
    found = balance(raw @ raw.T, args["normalize"], None if weights is None else f64(weights), floor)

    valid = found.valid
    assert valid.tolist() == case["valid"]
    assert found.fallback == case["fallback"]
    close(found.norms, case["raw_norms"], rtol=1e-9)
    close(found.scale, case["rescale_factor"], rtol=1e-9)
    assert not found.alphas[~valid].any() and not found.coefficients[~valid].any()
    if valid.any():
        assert float(found.alphas.sum()) == pytest.approx(1, abs=1e-9)
        assert float(found.alphas[valid].min()) >= min(floor, 1 / int(valid.sum())) - 1e-9
    if case["alphas_unique"]:
        close(found.alphas, case["alphas"], SHARES)
    near(found.coefficients[valid] @ raw[valid], case["combined_grad"], found.scale)
    if case["fallback"] != "none":
        assert not {"gram", "direction", "inner", "alphas_slsqp", "direction_norm"} & set(case)
        return

    solved = raw[valid]
    if args["normalize"]:
        solved = solved / solved.norm(dim=1, keepdim=True)
    if weights is not None:
        solved = solved * f64(weights)[valid, None]
    close(found.gram, case["gram"], rtol=1e-9)
    direction = found.alphas[valid] @ solved
    near(direction, case["direction"], 1.0)
    length = case["direction_norm"]
    assert found.direction_norm == pytest.approx(length, rel=GRADIENTS, abs=1e-6)
    reach = solved.norm(dim=1)  # an error of d counts this much in each inner product
    assert bool(((found.inner - f64(case["inner"])).abs() <= (GRADIENTS * length + 1e-6) * reach).all())
    if floor == 0:
        assert bool((found.inner >= length**2 - (GRADIENTS * length + 1e-6) * reach).all())

    reference = f64(case["alphas_slsqp"])
    assert float(direction.square().sum()) / 2 <= float((reference[valid] @ solved).square().sum()) / 2 + 1e-9
    if args["normalize"] and case["alphas_unique"]:
        close(reference, found.alphas.tolist(), SLSQP)


@pytest.mark.parametrize("case", load("training", "marble_mgda")["nan_advantages"], ids=lambda c: f"{c['global_std']}")
def test_rewards_that_do_not_apply(case: dict[str, Any]) -> None:
    rewards = f64(with_nan(case["rewards"]))
    names = sorted(set(case["prompts"]))
    group = torch.tensor([names.index(prompt) for prompt in case["prompts"]])
    method = Group(name="group", std="global" if case["global_std"] else "group")
    actual, expected = method({"r": rewards}, {"r": 1.0}, group, {}), f64(with_nan(case["advantages"]))
    assert actual.isnan().equal(expected.isnan())
    close(actual.nan_to_num(), expected.nan_to_num().tolist())


def test_alphas_are_averaged_over_the_solves() -> None:
    golden = load("training", "marble_mgda")["alpha_ema"]
    average: Tensor | None = None
    for solved, expected in zip(golden["solved"], golden["smoothed"], strict=True):
        average = f64(solved) if average is None else smoothed(average, f64(solved), golden["rho"])
        close(average, expected)


@pytest.mark.parametrize("case", load("training", "marble_mgda")["refresh"], ids=lambda c: f"warmup-{c['warmup']}")
def test_refresh_schedule(case: dict[str, Any]) -> None:
    """The published program asks at every micro-step; `Marble.lead` asks once a step, which gives the same steps."""
    solves, solved = [], NEVER
    for step in range(case["steps"]):
        for micro in range(case["micro_per_step"]):
            if due(step, solved, case["every"], case["warmup"]):
                solves.append([step, micro])
                solved = step
    assert solves == case["full_solves"]
    method = Marble(name="marble", every=case["every"], warmup=case["warmup"])
    state, ours, one = method.start(2, 0), [], torch.ones(2, dtype=torch.float64)
    for step in range(case["steps"]):
        if method.lead(state) != 0:
            ours.append(step)
            method.coefficients(torch.eye(2, dtype=torch.float64), one, state)
        method.mixture(one, one, state)
    assert ours == sorted({step for step, _ in solves})


@pytest.mark.parametrize("case", load("training", "marble_mgda")["amortised"], ids=lambda c: c["id"])
def test_one_backward_serves_all_rewards(case: dict[str, Any]) -> None:
    """L(sum_k alpha_k A_k) = sum_k alpha_k L(A_k), unless an advantage is cut."""
    t, x0 = f64(case["t"]), f64(case["x0"])
    x = noised(FLOW, x0, f64(case["noise"]), t)
    v = f64(case["v_theta"]).requires_grad_()
    now, old = (FLOW.to_x0_eps(velocity, x, t)[0] for velocity in (v, f64(case["v_old"])))
    sides = [matching(side, x0) for side in implicit(now, old, case["beta"])]
    alphas, advantages = f64(case["alphas"]), f64(case["advantages"])

    def loss_and_gradient(a: Tensor) -> tuple[Tensor, Tensor]:
        value = nft_loss(*sides, case["beta"], "all", case["adv_clip_max"], a).mean()
        return value, torch.autograd.grad(value, v, retain_graph=True)[0]

    alone = [loss_and_gradient(a) for a in advantages]
    close(torch.stack([value for value, _ in alone]), case["per_reward_loss"])
    close(torch.stack([gradient for _, gradient in alone]), case["per_reward_grads"])
    # the alphas are stored with six digits, so that their mixtures agree to fewer than the rest
    close(alphas @ advantages, case["combined_advantage"])
    value, gradient = loss_and_gradient(f64(case["combined_advantage"]))
    close(value, case["amortised_loss"])
    close(gradient, case["amortised_grad"])
    weighted = sum(alpha * own for alpha, (_, own) in zip(alphas, alone, strict=True))
    close(weighted, case["weighted_sum_of_grads"])
    close((gradient - weighted).abs().max(), case["max_abs_difference"])
    if bool((advantages.abs() <= case["adv_clip_max"]).all()):
        close(gradient, weighted.tolist())
