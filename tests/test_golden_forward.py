"""Forward-process losses against the papers' official code (golden vectors, float64)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_data import FLOW, cases, close, f64, load
from torch import Tensor, nn

from diffalign.algorithms._forward import Noised, squared
from diffalign.algorithms._shadow import Decay, Shadow
from diffalign.algorithms._weighted_matching import awm_loss, drift
from diffalign.algorithms.awm import AWM
from diffalign.algorithms.nft import NFT, implicit, matching, nft_loss, probability
from diffalign.ema import EMA
from diffalign.schedules import noised


def clean(v: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return FLOW.to_x0_eps(v, x, t)[0]


@pytest.mark.parametrize("case", cases("training", "diffusion_nft_loss"), ids=lambda c: c["id"])
def test_nft_loss(case: dict[str, Any]) -> None:
    t, x0, eps = f64(case["t"]), f64(case["x0"]), f64(case["noise"])
    v, old, reference = f64(case["v_theta"]).requires_grad_(), f64(case["v_old"]), f64(case["v_ref"])
    x = noised(FLOW, x0, eps, t)
    close(x, case["x_t"])
    clip, beta, mode, advantages = case["adv_clip_max"], case["beta"], case["adv_mode"], f64(case["advantages"])
    close(probability(advantages, mode, clip), case["r"])
    sides = implicit(clean(v, x, t), clean(old, x, t), beta)
    for side, weight in zip(sides, (case["w_plus"], case["w_minus"]), strict=True):
        close((side - x0).abs().flatten(1).mean(1).clamp(min=1e-5), weight)
        close(squared(side, x0) / matching(side, x0), weight)
    positive, negative = (matching(side, x0) for side in sides)
    close(positive, case["positive_loss"])
    close(negative, case["negative_loss"])
    per_sample = nft_loss(positive, negative, beta, mode, clip, advantages)
    close(per_sample / clip, case["per_sample_policy_loss"])
    close(per_sample.mean(), case["policy_loss"])
    kl = squared(v, reference).mean()
    close(kl, case["kl_div_loss"])
    loss = per_sample.mean() + case["kl_beta"] * kl
    close(loss, case["loss"])
    close(torch.autograd.grad(loss, v)[0], case["dloss_dv_theta"])


def test_nft_old_policy_decay() -> None:
    """The three published schedules are one formula; the second is the default."""
    golden = load("training", "diffusion_nft_loss")["old_policy_decay"]
    published = {"type0": Decay(rate=0), "type1": NFT(name="nft").old, "type2": Decay(rate=0.0075, start=75, cap=0.999)}
    for kind, decay in published.items():
        close([decay(step) for step in golden["step"]], golden[kind])


def test_nft_old_policy_follows() -> None:
    golden = load("training", "diffusion_nft_loss")["old_policy_decay"]
    for step, eta in zip(golden["step"], golden["type1"], strict=True):
        weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        shadow = Shadow({"w": weight}, NFT(name="nft").old, "epoch", acts=True)
        weight.data.fill_(3.0)
        shadow.after_step()
        shadow.steps = step
        shadow.after_epoch()
        close(shadow.old["w"], [eta * 1.0 + (1 - eta) * 3.0] * 3)


def test_ema_decay() -> None:
    golden = load("training", "diffusion_nft_loss")["ema_decay"]
    for key, decay in (("decay_0_9", 0.9), ("decay_0_9999", 0.9999)):
        for step, expected in zip(golden["step"], golden[key], strict=True):
            weight = torch.zeros(1, dtype=torch.float64)
            average = EMA([weight], decay)
            weight.fill_(1.0)
            average.updates = step
            average.update()
            close(1 - average.shadow[0], [expected])


NAMES = {"Uniform": "uniform", "t": "t", "t**2": "t2", "huber": "huber", "ghuber": "ghuber"}


@pytest.mark.parametrize("case", cases("training", "awm_loss"), ids=lambda c: c["id"])
def test_awm_loss(case: dict[str, Any]) -> None:
    weighting = NAMES[case["weighting"]]
    method = AWM(name="awm", weighting=weighting, **({"power": case["ghuber_power"]} if weighting == "ghuber" else {}))
    t, x0, eps = f64(case["t"]), f64(case["x0"]), f64(case["noise"])
    v, old, reference = f64(case["v_theta"]).requires_grad_(), f64(case["v_old"]), f64(case["v_ref"])
    at = Noised(noised(FLOW, x0, eps, t), t, x0, eps)
    log_prob = method.log_prob(*FLOW.to_x0_eps(v, at.x, t), at)
    close(log_prob, case["log_prob"])
    close(method.log_prob(*FLOW.to_x0_eps(old, at.x, t), at), case["old_log_prob"])
    ratio = (log_prob - f64(case["old_log_prob"])).exp()
    close(ratio, case["ratio"])
    advantages = f64(case["advantages"])
    policy = awm_loss(ratio, method.clip, method.advantage_clip, advantages).mean()
    close(policy, case["policy_loss"])
    close(torch.autograd.grad(policy, v, retain_graph=True)[0], case["dpolicy_dv"])
    on_policy = awm_loss((log_prob - log_prob.detach()).exp(), method.clip, method.advantage_clip, advantages).mean()
    close(torch.autograd.grad(on_policy, v)[0], case["on_policy_dpolicy_dv"])
    close(drift(v, reference, t, "velocity").mean(), case["kl_uniform"])
    close(drift(v, reference, t, "elbo").mean(), case["kl_elbo"])
