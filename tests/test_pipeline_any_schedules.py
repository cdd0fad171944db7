"""Which schedule and grid a pipeline of any family is sampled on."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_pipelines
import torch
from any_pipelines import NUMPY, STEPS, agrees, generators, native
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
)

from diffalign.pipelines.any import AnyPipeline


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
def test_where_ddim_ends(to_one: bool, offset: int) -> None:
    pipe, arguments = tiny_pipelines.sd15(set_alpha_to_one=to_one, steps_offset=offset)
    agrees(pipe, arguments, native(pipe, arguments, steps=7), steps=7)  # 7 does not divide 1000
    oracle = AnyPipeline(pipe).oracle(None, 5, arguments)
    assert oracle.sigmas.shape == (6,) and oracle.sigmas[0] == torch.tensor((800 + offset) / 1000)
    end = oracle.schedule.sigma(oracle.sigmas[-1])
    assert end == 0 if to_one else end > 0


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions(prediction: str) -> None:
    zero_snr = prediction == "v_prediction"
    pipe, arguments = tiny_pipelines.sd15(
        prediction_type=prediction, timestep_spacing="trailing", rescale_betas_zero_snr=zero_snr
    )
    agrees(pipe, {**arguments, "guidance_rescale": 0.7}, native(pipe, {**arguments, "guidance_rescale": 0.7}))


@NUMPY
@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, PNDMScheduler, DPMSolverMultistepScheduler])
def test_diffusion_models_are_sampled_as_by_ddim(scheduler: Any) -> None:
    pipe, arguments = tiny_pipelines.sd15()
    config = pipe.scheduler.config
    expected = native(pipe, arguments)
    pipe.scheduler = scheduler.from_config(config)
    agrees(pipe, arguments, expected)
    assert type(pipe.scheduler) is scheduler


@NUMPY
def test_flow_models_keep_their_grid() -> None:
    pipe, arguments = tiny_pipelines.sd3()
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 1}
    pipe.scheduler = DPMSolverMultistepScheduler(**flow)  # as Sana has it; its first order is the ODE step
    expected = native(pipe, arguments)
    agrees(pipe, arguments, expected)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    oracle = AnyPipeline(pipe).oracle(None, STEPS, arguments)
    assert torch.equal(oracle.sigmas, AnyPipeline(tiny_pipelines.sd3()[0]).oracle(None, STEPS, arguments).sigmas)
    assert oracle.predict(oracle.start(generators(0)), 3)[0].isfinite().all()
    pipe, arguments = tiny_pipelines.flux()
    sizes = [AnyPipeline(pipe).oracle(None, STEPS, {**arguments, "height": h}).sigmas for h in (32, 96)]
    assert (sizes[0] - sizes[1]).abs().max() > 1e-3  # the shift follows the size
