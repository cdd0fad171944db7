"""What stands in for a pipeline's scheduler: it makes the grid of noise levels as ever, but only records the steps.

A flow model keeps its own scheduler class, so that dynamic shifting and the like stay the model's. A diffusion model
(SD1.5, SDXL, PixArt) gets a DDIMScheduler of the same config whatever it came with, because the states of Euler, PNDM
or DPM-Solver are not x = alpha x0 + sigma eps at the timesteps that their network is told.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import wraps
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffalign.schedules import VP, RectifiedFlow
from diffalign.types import UserError

FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")  # timesteps and sigmas are one list each
REPLACED_FLOW = ("FlowMatchHeunDiscreteScheduler",)  # its grid holds every level twice


class Recorded(NamedTuple):
    """What a pipeline gave its scheduler: the guided output of the network, and what it was computed from."""

    output: Tensor
    timestep: float
    sample: Tensor


@dataclass
class Tape:
    """One call of the pipeline: which iterations of its loop may run, and what they gave the scheduler."""

    only: int | None = None  # the iteration that runs; None: none of them
    window: bool = False  # expose that timestep alone, for a pipeline that cannot be told to skip an iteration
    reached: int = 0  # iterations that asked whether to run
    timesteps: Tensor = field(default_factory=lambda: torch.empty(0))  # [T]
    sigmas: Tensor = field(default_factory=lambda: torch.empty(0))  # [T+1], of a flow model
    taken: list[Recorded] = field(default_factory=list)

    def skips(self) -> bool:
        """Asked once in every iteration."""
        self.reached += 1
        return self.reached - 1 != self.only


def standing_in(scheduler: Any) -> tuple[Any, RectifiedFlow | VP]:
    """(a scheduler whose states are x = alpha x0 + sigma eps, the schedule of alpha and sigma), from a pipeline's own.

    clip_sample and thresholding, which are for models of pixels, are not applied. Raises UserError for a scheduler of
    another kind, such as EDM or consistency models have.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name in REPLACED_FLOW:
        return FlowMatchEulerDiscreteScheduler.from_config(config), RectifiedFlow()
    flow = name in FLOW or (config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas"))
    if flow and not config.get("invert_sigmas"):
        return copy.deepcopy(scheduler), RectifiedFlow()
    if flow or "beta_schedule" not in config:
        raise UserError(
            f"a model with a {name} cannot be steered; use one with a flow-matching Euler scheduler, or one that "
            "DDIM can sample"
        )
    ddim = DDIMScheduler.from_config(config)
    return ddim, VP(ddim.alphas_cumprod, config.get("prediction_type", "epsilon"))


def recording(scheduler: Any) -> Any:
    """A copy of `scheduler` with its own grid and signatures, whose step changes nothing and writes to its `tape`."""
    base: Any = type(scheduler)

    class Recording(base):
        tape: Tape
        timesteps: Tensor
        sigmas: Tensor

        # The signatures are looked at: by retrieve_timesteps, and for what else `step` takes, such as eta.
        @wraps(base.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            tape, flow = self.tape, not isinstance(self, DDIMScheduler)
            tape.timesteps = self.timesteps
            if flow:
                tape.sigmas = self.sigmas
            if tape.window:
                first = tape.only or 0
                self.timesteps = self.timesteps[first : first + (tape.only is not None)]
                if flow:  # set_begin_index(0) must find the sigma of the first timestep
                    self.sigmas = self.sigmas[first:]

        @wraps(base.step)
        def step(
            self,
            model_output: Tensor,
            timestep: Any,
            sample: Tensor,
            *args: Any,
            return_dict: bool = True,
            **kwargs: Any,
        ) -> Any:
            self.tape.taken.append(Recorded(model_output, float(timestep), sample))
            if not return_dict:
                return (sample, sample)
            return SimpleNamespace(prev_sample=sample, pred_original_sample=sample)

    Recording.__name__ = base.__name__
    stand_in = copy.deepcopy(scheduler)
    stand_in.__class__ = Recording
    return stand_in


def levels(tape: Tape, scheduler: Any) -> Tensor:
    """[T+1] fp32 on the CPU: s from noise to data of the grid on the tape. Raises UserError for one that rises.

    Of a DDIM it is timestep / N, and the end is timestep 0, or clean data (s < 0) when it says set_alpha_to_one. Each
    step goes to the next timestep of the list, as DDIM does where N is a multiple of T.
    """
    if isinstance(scheduler, DDIMScheduler):
        end = -1.0 if scheduler.config.set_alpha_to_one else 0.0
        timesteps = tape.timesteps.double().cpu()
        sigmas = torch.cat([timesteps, timesteps.new_tensor([end])]) / len(scheduler.alphas_cumprod)
    else:
        sigmas = tape.sigmas.cpu()
    if len(sigmas) < 2 or len(sigmas) != len(tape.timesteps) + 1 or bool((sigmas.diff() > 0).any()):
        raise UserError(
            f"the {type(scheduler).__name__} gives {len(tape.timesteps)} timesteps for noise levels that do not fall "
            "from noise to data; give at least one step, and no timesteps or sigmas of your own that rise"
        )
    return sigmas.float()
