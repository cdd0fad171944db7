"""A diffusers pipeline at one prompt: prior samples, what its network sees in a state, and the image of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from diffalign.pipelines import _any_arguments as arguments_of
from diffalign.pipelines._any_scheduler import Tape, levels
from diffalign.schedules import Schedule
from diffalign.types import UserError

if TYPE_CHECKING:
    from diffalign.pipelines.any import AnyPipeline


class Called(NamedTuple):
    """What one call of the pipeline left."""

    tape: Tape
    latents: Tensor  # [n, ...] in the layout of the loop, as it went in
    output: Any


class AnyOracle:
    """A pipeline at one prompt, one number of steps and one set of arguments, as steering sees it.

    States x are [n, *shape] fp32 in the layout of the pipeline's own loop (packed for FLUX); n may differ from call to
    call. The prompt is encoded once, and one step is tried. Gradients flow to x where they are enabled.
    """

    def __init__(self, pipeline: AnyPipeline, prompt: str | None, steps: int, arguments: Mapping[str, Any]) -> None:
        arguments_of.check(type(pipeline.pipe), prompt, arguments)
        if steps < 1:
            raise UserError(f"sampling needs at least one step, got {steps}")
        self.pipeline = pipeline
        self.schedule: Schedule = pipeline.schedule
        takes = arguments_of.parameters(type(pipeline.pipe))
        fixed = {"num_inference_steps": steps, "num_images_per_prompt": 1, "return_dict": False}
        self._fixed = {name: value for name, value in fixed.items() if name in takes}
        self._arguments = dict(arguments)
        if pipeline.max_sequence_length is not None:
            self._arguments.setdefault("max_sequence_length", pipeline.max_sequence_length)
        if prompt is not None:
            self._arguments["prompt"] = prompt
        self._encoded: list[Any] = []  # what each encode_prompt of a call returned, for one sample
        try:
            with torch.no_grad():
                probe = self._call(1)
                self.sigmas = levels(probe.tape, pipeline.scheduler)  # [T+1] fp32, from noise to data
                self.shape = tuple(probe.latents.shape[1:])  # of one state
                # Network forwards that one sample takes in a step, counted half-way: 2 with guidance by a second one.
                self.cost = self._count((len(self.sigmas) - 1) // 2)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the pipeline's checks of its arguments raise what they like
            name = type(pipeline.pipe).__name__
            raise UserError(f"a {name} does not take these arguments: {reason(error)}; mend them") from error

    def _count(self, i: int) -> int:
        """Forwards of the network for one sample at step i."""
        samples = 0

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal samples
            samples += next(len(v) for v in (*args, *kwargs.values()) if isinstance(v, (Tensor, list)))

        handle = self.pipeline.network.register_forward_pre_hook(count, with_kwargs=True)
        try:
            self.predict(torch.zeros(1, *self.shape, device=self.pipeline.device), i)
        finally:
            handle.remove()
        return samples

    def start(self, generators: Sequence[torch.Generator]) -> Tensor:
        """[n, *shape] fp32 prior samples, drawn as the pipeline does; sample j depends on generators[j] alone."""
        with torch.no_grad():
            return self._call(len(generators), generators=generators).latents.float()

    def predict(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """(x0, eps), each [n, *shape] fp32, that the guided network sees in x [n, *shape] at level sigmas[i].

        Raises UserError when the pipeline's loop is not the usual one, or lets no gradient through that is asked for.
        """
        steps = len(self.sigmas) - 1
        if not 0 <= i < steps:
            raise ValueError(f"step {i} of {steps}")
        tape, latents, _ = self._call(len(x), only=i, x=x)
        name = type(self.pipeline.pipe).__name__
        if len(tape.taken) != 1 or tape.taken[0].timestep != float(tape.timesteps[i]):
            raise UserError(f"a {name} does not take one scheduler step an iteration; it cannot be steered")
        output, _, sample = tape.taken[0]
        if sample.shape != latents.shape or not torch.equal(sample, latents):
            raise UserError(f"a {name} changes its latents before the loop; it cannot be steered")
        if torch.is_grad_enabled() and x.requires_grad and not output.requires_grad:
            raise UserError(f"a {name} lets no gradients through; use a steering method that needs none")
        return self.schedule.to_x0_eps(output.float(), x.float(), self.sigmas[i])

    def decode(self, x0: Tensor) -> Tensor:
        """x0 [n, *shape] -> images [n, 3, H, W] fp32 in [0, 1], in the precision of the VAE."""
        images = self._call(len(x0), x=x0.to(self.pipeline.pipe.vae.dtype), output_type="pt").output
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[:2] != (len(x0), 3):
            raise UserError(f"a {type(self.pipeline.pipe).__name__} makes no images; load a text-to-image pipeline")
        return images.float()

    def _call(
        self,
        n: int,
        only: int | None = None,
        x: Tensor | None = None,
        output_type: str = "latent",
        generators: Sequence[torch.Generator] | None = None,
    ) -> Called:
        """One call for n samples, of iteration `only` or none, from x or from the pipeline's own prior sample."""
        pipe, tape = self.pipeline.pipe, Tape(only=only, window=not self.pipeline.skips)
        encode, prepare = pipe.encode_prompt, pipe.prepare_latents
        calls, used = 0, torch.empty(0)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if calls == len(self._encoded):
                if n != 1:
                    raise UserError(f"a {type(pipe).__name__} encodes its prompt in its loop; it cannot be steered")
                with torch.no_grad(), self.pipeline.encoders_here():
                    self._encoded.append(encode(*args, **kwargs))
            calls += 1
            return arguments_of.expanded(self._encoded[calls - 1], n)

        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            nonlocal used
            made = prepare(*args, **kwargs)  # with the ids of the latents, in many pipelines
            used = made[0] if isinstance(made, tuple) else made
            if x is None:
                return made
            if x.shape != used.shape:
                raise ValueError(f"latents {tuple(x.shape)} for a pipeline of {tuple(used.shape)}")
            used = x.to(used.device, x.dtype if only is None else used.dtype)
            return (used, *made[1:]) if isinstance(made, tuple) else used

        methods: dict[str, Callable[..., Any]] = {"encode_prompt": encode_prompt, "prepare_latents": prepare_latents}
        gradients = torch.is_grad_enabled()
        if gradients and pipe.components.get("safety_checker") is not None:
            methods["run_safety_checker"] = _straight_through(pipe.run_safety_checker)
        # Where the draw is thrown away it must not come from the global generator.
        draws = torch.Generator(self.pipeline.device) if generators is None else list(generators)
        given = arguments_of.for_samples(self._arguments, n)
        call = arguments_of.undecorated(type(pipe)) if gradients else type(pipe).__call__
        with self.pipeline.interposed(tape, methods):
            output = call(pipe, **given, **self._fixed, generator=draws, output_type=output_type)[0]
        return Called(tape, used, output)


def _straight_through(check: Callable[..., Any]) -> Callable[..., Any]:
    """A safety checker reads images as numpy: its result, with the gradient of what it was given."""

    def run_safety_checker(image: Tensor, *args: Any, **kwargs: Any) -> Any:
        checked, flags = check(image.detach().clone(), *args, **kwargs)
        return checked + (image - image.detach()), flags

    return run_safety_checker


def reason(error: Exception) -> str:
    """The first line of an error that a library raised, for the middle of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
