"""Pipelines and arguments that cannot be steered, each with one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_pipelines
import torch
from any_pipelines import STEPS, generators
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    Lumina2Pipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionPipeline,
)

from diffalign.pipelines import _any_arguments
from diffalign.pipelines.any import AnyPipeline
from diffalign.types import UserError


def test_pipelines_that_are_not_text_to_image() -> None:
    pipe, _ = tiny_pipelines.sd3()
    other = StableDiffusion3Img2ImgPipeline(
        **{k: v for k, v in pipe.components.items() if "image" not in k and "feature" not in k}
    )
    with pytest.raises(UserError, match="a StableDiffusion3Img2ImgPipeline is not a text-to-image .* takes 'strength'"):
        AnyPipeline(other)
    with pytest.raises(UserError, match="a DDIMScheduler is not a text-to-image pipeline"):
        AnyPipeline(DDIMScheduler())
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(UserError, match="a model with a EDMEulerScheduler cannot be steered; use"):
        AnyPipeline(pipe)
    with pytest.raises(UserError, match="has no max_sequence_length"):
        AnyPipeline(tiny_pipelines.sd15()[0], max_sequence_length=5)


def test_arguments_that_do_not_fit() -> None:
    pipe, arguments = tiny_pipelines.sd3()
    steered = AnyPipeline(pipe)
    two = torch.cat([arguments["prompt_embeds"]] * 2)

    def fails(message: str, steps: int = STEPS, **changes: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            steered.oracle(None, steps, {**arguments, **changes})
        assert "\n" not in str(caught.value)

    fails("takes no argument 'guidence_scale'; did you mean 'guidance_scale'", guidence_scale=3.0)
    for name in ("latents", "generator", "num_images_per_prompt", "output_type", "return_dict", "callback_on_step_end"):
        fails(f"'{name}' is set by steering itself", **{name: None})
    fails("'prompt' is set by steering itself", prompt="a star")
    fails("'prompt_embeds' has 2 entries", prompt_embeds=two)
    fails("there is no prompt", prompt_embeds=None)
    fails("at least one step, got 0", steps=0)
    fails("a StableDiffusion3Pipeline does not take these arguments: .*divisible", height=33)
    fails("rise", sigmas=[0.2, 0.9])
    with pytest.raises(
        UserError, match="'cfg_trunc_ratio' depends on the step, which a Lumina2Pipeline cannot be told"
    ):
        _any_arguments.check(Lumina2Pipeline, "a star", {"cfg_trunc_ratio": 0.5})
    oracle = steered.oracle(None, STEPS, arguments)
    x = oracle.start(generators(0))
    with pytest.raises(ValueError, match="step 4 of 4"):
        oracle.predict(x, STEPS)
    with pytest.raises(ValueError, match="latents"):
        oracle.predict(x[..., 1:], 0)
    AnyPipeline(pipe)  # and the pipeline is whole


class Another(StableDiffusionPipeline):
    """A loop of its own, which may do what cannot be steered."""

    flaw = ""

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=50, latents=None, output_type="pil", generator=None):
        noise = self.prepare_latents(len(prompt), 4, 32, 32, torch.float32, "cpu", generator, latents)
        x = 2 * noise if self.flaw == "scaled" else noise
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            if self.interrupt:
                continue
            output = 0.1 * x.detach() if self.flaw == "detached" else 0.1 * x
            x = self.scheduler.step(output, t, x).prev_sample
            if self.flaw == "twice":  # as a sampler of second order does
                x = self.scheduler.step(output, t, x).prev_sample
        return (x,)


@pytest.mark.parametrize(
    "flaw, message",
    [
        ("twice", "does not take one scheduler step an iteration; it cannot be steered"),
        ("scaled", "changes its latents before the loop; it cannot be steered"),
        ("detached", "lets no gradients through; use a steering method that needs none"),
        ("", "makes no images; load a text-to-image pipeline"),
    ],
)
def test_pipelines_with_another_loop(flaw: str, message: str) -> None:
    pipe = Another(**tiny_pipelines.sd15()[0].components, requires_safety_checker=False)
    pipe.flaw = flaw
    with pytest.raises(UserError, match=f"an? Another {message}"):
        oracle = AnyPipeline(pipe).oracle("a star", STEPS, {})
        x = oracle.start(generators(0)).requires_grad_()
        x0, eps = oracle.predict(x, 0)
        torch.testing.assert_close(eps, 0.1 * x)
        oracle.decode(x0)
