"""Every other text-to-image pipeline of diffusers, for steering: its own call is run with the scheduler interposed.

`pipe.__call__` is a black box. Inside one call its scheduler makes the grid as ever but only records, and
prepare_latents gives our state x, so that a call with a single iteration yields the guided output of the network at
(x, i): guidance of any kind, LoRA, IP-adapters and offloading are the pipeline's own. A call without iterations gives
the prior sample, or decodes. The transition is always ours. With the ODE kernel the result is that of `pipe()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffalign.few_steps import FewSteps
from diffalign.pipelines import _any_arguments as arguments_of
from diffalign.pipelines import looks_like_hub_id
from diffalign.pipelines._any_oracle import AnyOracle, reason
from diffalign.pipelines._any_scheduler import Tape, recording, standing_in
from diffalign.types import UserError

SERVES = ("*",)


def unused(max_sequence_length: int | None) -> tuple[str, ...]:
    """Parts of the pipeline that need not be loaded."""
    return ()


def wrap(
    pipe: Any,
    dtype: torch.dtype,
    device: torch.device,
    max_sequence_length: int | None,
    source: tuple[str, str | None] | None = None,
    offload: bool = False,
) -> AnyPipeline:
    return AnyPipeline(pipe, dtype, device, max_sequence_length, source, offload)


class AnyPipeline:
    """A diffusers text-to-image pipeline, frozen. Between calls `pipe` is exactly what it was.

    A flow model keeps its scheduler; a diffusion model is sampled on the timesteps that DDIMScheduler.from_config makes
    of whatever it came with (Euler, PNDM, DPM-Solver ...). Not for several threads.

    Args:
        pipe: the pipeline. Raises UserError when it is not text-to-image, or has a scheduler of an unknown kind.
        dtype: of the frozen network; the VAE is then fp32. None: both stay as they are.
        device: where all parts are put. None: they stay where they are, hooks of accelerate included.
        max_sequence_length: tokens of a prompt, for a pipeline that takes this argument; None: its default.
        source: (path, revision) the pipeline was loaded from.
        offload: text encoders wait in main memory, and are on the device to encode alone; needs a device.
    """

    def __init__(
        self,
        pipe: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        max_sequence_length: int | None = None,
        source: tuple[str, str | None] | None = None,
        offload: bool = False,
    ) -> None:
        self.network = arguments_of.network(pipe)
        if max_sequence_length is not None and "max_sequence_length" not in arguments_of.parameters(type(pipe)):
            raise UserError(f"a {type(pipe).__name__} has no max_sequence_length; leave it out")
        scheduler, self.schedule = standing_in(pipe.scheduler)
        self.scheduler: Any = recording(scheduler)
        self.pipe = pipe
        self.max_sequence_length = max_sequence_length
        self.source = source
        self.few_steps: FewSteps | None = None  # none of our distilled models is of another family
        self.offload = offload and device is not None
        for part in self._modules().values():
            part.requires_grad_(False).eval()
        if dtype is not None:
            self._cast(self.network, dtype)
            self._cast(pipe.vae, torch.float32)
        placed = None if device is None else torch.device(device)
        if placed is not None:
            for name, part in self._modules().items():
                part.to("cpu" if self.offload and name.startswith("text_encoder") else placed)
        self.device: torch.device = placed or pipe._execution_device
        self.skips = arguments_of.skips(type(pipe))
        self._interposed_class = _interposed_class(type(pipe), self.skips, placed)

    def oracle(self, prompt: str | None, steps: int, arguments: Mapping[str, Any]) -> AnyOracle:
        """The pipeline at one prompt, `steps` steps and further `arguments` of its call, such as guidance_scale.

        Raises UserError for an argument that it does not take, that steering sets itself, or that it refuses.
        """
        return AnyOracle(self, prompt, steps, arguments)

    def default(self, argument: str) -> Any:
        """Of an argument of the pipeline's call; None when it takes no such argument."""
        found = arguments_of.parameters(type(self.pipe)).get(argument)
        return None if found is None else found.default

    def load_lora(self, folder: str | Path) -> None:
        """Load a LoRA (folder, file or hub id) as the pipeline itself does. Raises UserError if it does not fit."""
        name = type(self.pipe).__name__
        if not hasattr(self.pipe, "load_lora_weights"):
            raise UserError(f"a {name} takes no LoRA; leave it out")
        if not Path(folder).exists() and not looks_like_hub_id(str(folder)):
            raise UserError(f"LoRA folder '{folder}' does not exist; give a folder that holds a LoRA for a {name}")
        before = self.pipe.get_list_adapters()
        try:
            self.pipe.load_lora_weights(str(folder))
        except Exception as error:  # of the hub, the file and the fit, of many kinds
            raise UserError(f"cannot load the LoRA '{folder}': {reason(error)}; it must be one for a {name}") from error
        if self.pipe.get_list_adapters() == before:
            raise UserError(f"the LoRA '{folder}' fits no part of this {name}; load the model that it was trained on")
        for part in self._modules().values():
            part.requires_grad_(False)

    def _modules(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}

    @staticmethod
    def _cast(part: Any, dtype: torch.dtype) -> None:
        if part.dtype != dtype:  # diffusers warns of a cast after loading
            part.to(dtype)

    @contextmanager
    def encoders_here(self) -> Iterator[None]:
        """Inside, offloaded text encoders are on the device."""
        encoders = [part for name, part in self._modules().items() if self.offload and name.startswith("text_encoder")]
        try:
            for encoder in encoders:
                encoder.to(self.device)
            yield
        finally:
            for encoder in encoders:
                encoder.to("cpu")
            if encoders and self.device.type == "cuda":
                torch.cuda.empty_cache()

    @contextmanager
    def interposed(self, tape: Tape, methods: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
        """Inside, the pipeline's loop obeys the tape, and it has these methods instead of its own."""
        own, state = type(self.pipe), vars(self.pipe)
        saved = dict(state)
        self.scheduler.tape = tape
        try:
            self.pipe.__class__ = self._interposed_class
            # Past DiffusionPipeline.__setattr__, which would write the class of the scheduler to the pipeline's config.
            state.update(scheduler=self.scheduler, _progress_bar_config={"disable": True}, **methods)
            yield
        finally:
            self.pipe.__class__ = own
            state.clear()
            state.update(saved)
            del self.scheduler.tape  # it holds the states of the call, and their graph


def _interposed_class(own: type, skips: bool, device: torch.device | None) -> type:
    """The pipeline's class, whose loop asks the tape whether to skip, and which is where its parts were put."""
    properties: dict[str, Any] = {"__module__": own.__module__, "__doc__": own.__doc__}
    if skips:
        properties["interrupt"] = property(lambda pipe: pipe.scheduler.tape.skips())
    if device is not None:  # diffusers takes the first part's device, and that may be an offloaded text encoder's
        properties["_execution_device"] = property(lambda pipe: device)
    return type(own.__name__, (own,), properties)
