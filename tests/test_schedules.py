from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.schedules import (
    VP,
    RectifiedFlow,
    Schedule,
    few_step_sigmas,
    flow_match_sigmas,
    flux_mu,
    noised,
    plain_sigmas,
    vp_sigmas,
)
from diffalign.types import UserError

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def model_output(schedule: Schedule, x0: torch.Tensor, eps: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """What a perfect model with this schedule would say, written down independently of to_x0_eps."""
    if isinstance(schedule, RectifiedFlow):
        return eps - x0
    assert isinstance(schedule, VP)
    alpha, sigma = (f(s).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
    return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[schedule.prediction_type]


@pytest.mark.parametrize("schedule", [RectifiedFlow(), *(VP.scaled_linear(prediction=p) for p in PREDICTIONS)])
def test_a_perfect_model_gives_back_data_and_noise(schedule: Schedule) -> None:
    x0, eps = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64).unbind(0)
    s = torch.tensor([0.031, 0.5, 0.981], dtype=torch.float64)
    found = schedule.to_x0_eps(model_output(schedule, x0, eps, s), noised(schedule, x0, eps, s), s)
    torch.testing.assert_close(found, (x0, eps), atol=1e-12, rtol=0)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VP.scaled_linear()])
def test_precision_follows_x(schedule: Schedule) -> None:
    for given, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        x = torch.randn(2, 3).to(given)
        assert [t.dtype for t in schedule.to_x0_eps(x, x, 0.5)] == [kept, kept]
        assert noised(schedule, x, x, 0.5).dtype == kept


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VP.scaled_linear()])
def test_scalars_and_batches_agree_and_floats_keep_their_digits(schedule: Schedule) -> None:
    s = torch.tensor([0.123, 0.7], dtype=torch.float64)
    for f in (schedule.alpha, schedule.sigma):
        assert torch.equal(f(s), torch.stack([f(0.123), f(0.7)]))


def test_vp_is_the_diffusers_table_from_clean_to_noise() -> None:
    reference = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double()
    schedule = VP.scaled_linear()
    s = torch.arange(1000) / 1000  # fp32 on purpose: rounding must still hit every timestep
    torch.testing.assert_close(schedule.alpha(s), reference.sqrt().float(), atol=0, rtol=1e-7)
    torch.testing.assert_close(schedule.sigma(s), (1 - reference).sqrt().float(), atol=0, rtol=1e-7)
    assert (float(schedule.alpha(-0.001)), float(schedule.sigma(-0.001))) == (1, 0)
    assert float(schedule.alpha(1.0)) == float(schedule.alpha(0.999))


def test_unknown_prediction_type_names_the_choices() -> None:
    with pytest.raises(UserError, match="v_prediction"):
        VP(torch.ones(10), "velocity")


@pytest.mark.parametrize("steps", [1, 4, 10, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_grid_is_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(flow_match_sigmas(steps, shift).float(), scheduler.sigmas, atol=1e-6, rtol=0)


def test_the_two_flow_grids_differ_at_the_end() -> None:
    assert flow_match_sigmas(10, 3.0)[-2] < 0.01 < 0.2 < plain_sigmas(10, 3.0)[-2]


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_flux_dynamic_shift_is_the_plain_grid_with_exp_mu(tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 7, 7).tolist(), mu=flux_mu(tokens))
    torch.testing.assert_close(plain_sigmas(7, math.exp(flux_mu(tokens))).float(), scheduler.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [4, 20, 50])
def test_vp_grid_is_diffusers(steps: int) -> None:
    scheduler = DDIMScheduler(steps_offset=1)
    scheduler.set_timesteps(steps)
    assert (vp_sigmas(steps) * 1000).round().long().tolist() == [*scheduler.timesteps.tolist(), 0]


@pytest.mark.parametrize(
    "grid", [plain_sigmas(8, 3.0), flow_match_sigmas(8, 3.0), few_step_sigmas([1000, 750, 500, 250], 3.0), vp_sigmas(8)]
)
def test_grids_fall_to_zero(grid: torch.Tensor) -> None:
    assert grid.dtype == torch.float64 and grid[-1] == 0 and (grid.diff() < 0).all() and grid[0] <= 1
