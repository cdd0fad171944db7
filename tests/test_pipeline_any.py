"""Any diffusers pipeline as steering sees it, against the pipeline's own call, on tiny random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from any_pipelines import CASES, STEPS, agrees, every_pipeline, generators, native, ode
from diffusers import (
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor

from diffalign import adapters, pipelines
from diffalign.pipelines.any import AnyPipeline
from diffalign.pipelines.sd3 import SD3
from diffalign.types import UserError


@every_pipeline
def test_the_ode_is_the_pipelines_own_call(name: str) -> None:
    pipe, arguments = CASES[name]()
    agrees(pipe, arguments, native(pipe, arguments))
    oracle = AnyPipeline(pipe).oracle(None, STEPS, arguments)
    with torch.no_grad():
        images = oracle.decode(ode(oracle, oracle.start(generators(0))))
    assert images.shape == (1, 3, 32, 32) and images.dtype == torch.float32 and images.std() > 0.02
    torch.testing.assert_close(images, native(pipe, arguments, "pt"), atol=1e-5, rtol=0)


@every_pipeline
def test_a_sample_does_not_depend_on_those_beside_it(name: str) -> None:
    pipe, arguments = CASES[name]()
    oracle = AnyPipeline(pipe).oracle(None, STEPS, arguments)
    x = oracle.start(generators(0, 1, 2))
    assert x.shape == (3, *oracle.shape) and x.dtype == torch.float32
    with torch.no_grad():
        together = (*oracle.predict(x, 1), oracle.decode(x))
        for j in range(3):
            one = oracle.start(generators(j))
            assert torch.equal(one, x[j : j + 1])
            for a, b in zip((*oracle.predict(one, 1), oracle.decode(one)), together, strict=True):
                torch.testing.assert_close(a, b[j : j + 1], atol=1e-5, rtol=1e-5)
    assert (x[0] - x[1]).abs().max() > 0.5 and (together[0][0] - together[0][1]).abs().max() > 0.1


@every_pipeline
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    pipe, arguments = CASES[name]()
    oracle = AnyPipeline(pipe).oracle(None, STEPS, arguments)
    x = oracle.start(generators(0, 1))
    weights = tiny_pipelines.embeddings(5, 2, 3, 32, 32)
    direction = tiny_pipelines.embeddings(6, *x.shape)

    def reward(state: Tensor) -> Tensor:
        x0, eps = oracle.predict(state, STEPS - 1)
        return (oracle.decode(x0) * weights).sum() + eps.square().mean()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x), x)
    with torch.no_grad():
        difference = (reward(x + 2e-3 * direction) - reward(x - 2e-3 * direction)) / 4e-3
    along = (gradient * direction).sum()
    assert along.abs() > 0.1
    torch.testing.assert_close(along, difference, rtol=0.03, atol=0.02)


class Kept:
    """What a pipeline is, to be compared with later."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.type, self.state = pipe, type(pipe), dict(vars(pipe))
        self.config = dict(pipe.config)
        self.scheduler = {k: v for k, v in vars(pipe.scheduler).items() if k != "_internal_dict"}

    def check(self) -> None:
        assert type(self.pipe) is self.type
        now = vars(self.pipe)
        assert list(now) == list(self.state) and all(now[k] is v for k, v in self.state.items())
        assert dict(self.pipe.config) == self.config
        scheduler = vars(self.pipe.scheduler)
        assert all(scheduler[k] is v for k, v in self.scheduler.items())


@every_pipeline
def test_the_pipeline_is_left_as_it_was(name: str) -> None:
    pipe, arguments = CASES[name]()
    del pipe._progress_bar_config
    before, noise = Kept(pipe), torch.get_rng_state()
    oracle = AnyPipeline(pipe).oracle(None, STEPS, arguments)
    x = oracle.start(generators(0))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            oracle.decode(oracle.predict(x, 2)[0])
    assert oracle.cost in (1, 2)
    before.check()
    assert torch.equal(torch.get_rng_state(), noise)


@pytest.mark.parametrize("name", ["sd3", "pixart"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_pipeline_is_left_as_it_was_by_an_exception(name: str, error: type[BaseException]) -> None:
    pipe, arguments = CASES[name]()
    native(pipe, arguments)
    pipe.set_progress_bar_config(desc="mine", disable=True)
    before = Kept(pipe)
    steered = AnyPipeline(pipe)
    oracle = steered.oracle(None, STEPS, arguments)
    x = oracle.start(generators(0))

    def fail(*_: Any) -> None:
        raise error("inside")

    for part, act in ((steered.network, lambda: oracle.predict(x, 1)), (pipe.vae.decoder, lambda: oracle.decode(x))):
        hook = part.register_forward_pre_hook(fail)
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(error, match="inside"):
                act()
            before.check()
        hook.remove()
    assert not steered.network._forward_pre_hooks
    with torch.no_grad():
        oracle.predict(x, 1)  # and goes on
    before.check()


def test_features_that_depend_on_the_step_see_the_true_one() -> None:
    pipe, arguments = tiny_pipelines.sd3()
    plain = native(pipe, arguments, steps=6)
    arguments |= {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.6}
    arguments |= {"skip_layer_guidance_scale": 8.0}
    skipped = native(pipe, arguments, steps=6)
    assert (skipped - plain).abs().max() > 1e-3
    agrees(pipe, arguments, skipped, steps=6)
    assert AnyPipeline(pipe).oracle(None, 6, arguments).cost == 3


@pytest.mark.parametrize(
    "name, arguments, cost",
    [
        ("sd15", {}, 2),
        ("sd15", {"guidance_scale": 1.0}, 1),
        ("sd3", {}, 2),
        ("flux", {}, 1),
        ("flux_true_cfg", {}, 2),
        ("zimage", {"guidance_scale": 0.0}, 1),
        ("zimage", {}, 2),
        ("pixart", {}, 2),
    ],
)
def test_cost_is_what_the_network_is_asked(name: str, arguments: dict[str, Any], cost: int) -> None:
    pipe, given = CASES[name]()
    assert AnyPipeline(pipe).oracle(None, STEPS, {**given, **arguments}).cost == cost


@pytest.fixture(scope="module")
def family() -> SD3:
    return pipelines.load("tiny-sd3", device="cpu")


def text_arguments(family: SD3, guidance: float = 3.0) -> dict[str, Any]:
    assert family.max_sequence_length is not None
    size = {"height": 64, "width": 64, "max_sequence_length": family.max_sequence_length}
    return {"guidance_scale": guidance, "negative_prompt": "a blue star", **size}


def test_it_agrees_with_the_family_file(family: SD3) -> None:
    arguments = text_arguments(family)
    oracle = AnyPipeline(family.pipe).oracle("two red squares", 5, arguments)
    x = oracle.start(generators(0, 1))
    with torch.no_grad():
        cond, negative = family.encode(["two red squares"] * 2), family.encode(["a blue star"])
        denoiser = family.denoiser(cond, 3.0, negative)
        torch.testing.assert_close(oracle.sigmas, family.sigmas(5, 64, 64))
        for i in range(5):
            expected, got = denoiser.predict(x, oracle.sigmas[i]), oracle.predict(x, i)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(oracle.decode(x), family.decode(x), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            ode(oracle, oracle.start(generators(0))),
            native(family.pipe, {**arguments, "prompt": "two red squares"}, steps=5),
            atol=2e-5,
            rtol=0,
        )


def test_the_prompt_is_encoded_once(family: SD3) -> None:
    seen: list[int] = []
    hook = family.pipe.text_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    try:
        oracle = AnyPipeline(family.pipe).oracle("two red squares", STEPS, text_arguments(family))
        assert sum(seen) == 2  # the prompt and the negative one
        x = oracle.start(generators(0, 1, 2))
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                oracle.decode(oracle.predict(x, 1)[0])
        assert oracle.predict(x[:1], 0)[0].shape == x[:1].shape
        assert sum(seen) == 2
        other = AnyPipeline(family.pipe).oracle("a green circle", STEPS, text_arguments(family))
        assert sum(seen) == 4
        assert (other.predict(x, 0)[0] - oracle.predict(x, 0)[0]).abs().max() > 1e-3
    finally:
        hook.remove()


@every_pipeline
def test_bf16_is_close_to_fp32(name: str) -> None:
    pipe, arguments = CASES[name]()
    oracle = AnyPipeline(pipe).oracle(None, STEPS, arguments)
    x = oracle.start(generators(0, 1))
    with torch.no_grad():
        expected = (*oracle.predict(x, 2), oracle.decode(x))
    half = AnyPipeline(pipe, torch.bfloat16, "cpu")
    cast = {k: _bf16(v) for k, v in arguments.items()}
    assert half.network.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    with torch.no_grad():
        other = half.oracle(None, STEPS, cast)
        for a, b in zip((*other.predict(x, 2), other.decode(x)), expected, strict=True):
            assert a.dtype == torch.float32
            assert (a - b).norm() < 0.1 * b.norm()


def _bf16(value: Any) -> Any:
    if isinstance(value, list):
        return [_bf16(v) for v in value]
    return value.bfloat16() if isinstance(value, Tensor) else value


def test_a_safety_checker_lets_gradients_through() -> None:
    plain, arguments = tiny_pipelines.sd15()
    config = CLIPConfig(
        text_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        projection_dim=8,
    )
    checker = StableDiffusionSafetyChecker(config).eval()
    parts = {
        name: part for name, part in plain.components.items() if name not in ("safety_checker", "feature_extractor")
    }
    pipe = StableDiffusionPipeline(
        **parts, safety_checker=checker, feature_extractor=CLIPImageProcessor(size=32, crop_size=32)
    )
    oracle, free = AnyPipeline(pipe).oracle(None, STEPS, arguments), AnyPipeline(plain).oracle(None, STEPS, arguments)
    x = oracle.start(generators(0, 1)).requires_grad_()
    for threshold, black in ((2.0, False), (-2.0, True)):  # of a cosine similarity
        checker.concept_embeds_weights.fill_(threshold)
        images = oracle.decode(x)
        with torch.no_grad():
            torch.testing.assert_close(images, oracle.decode(x), atol=1e-6, rtol=0)
        assert bool((images == 0).all()) == black
        (gradient,) = torch.autograd.grad(images.sum(), x)
        assert black or torch.allclose(gradient, torch.autograd.grad(free.decode(x).sum(), x)[0], atol=1e-5)
    assert "run_safety_checker" not in vars(pipe)


def test_a_lora_in_the_diffusers_format(family: SD3, tmp_path: Path) -> None:
    trained: Any = pipelines.load("tiny-sd3", device="cpu")
    adapters.add_lora(trained, 2, 2.0)
    for p in adapters.trainable_parameters(trained):
        torch.nn.init.normal_(p, std=0.2, generator=generators(0)[0])
    adapters.export_lora(trained, tmp_path / "lora")
    steered = AnyPipeline(pipelines.load("tiny-sd3", device="cpu").pipe)
    oracle = steered.oracle("a star", STEPS, text_arguments(family, 1.0))
    x = oracle.start(generators(0))
    with torch.no_grad():
        before = oracle.predict(x, 1)[0]
        steered.load_lora(tmp_path / "lora")
        after = oracle.predict(x, 1)[0]
        expected = trained.denoiser(trained.encode(["a star"])).predict(x, oracle.sigmas[1])[0]
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    assert (after - before).abs().max() > 1e-2
    assert not any(p.requires_grad for p in steered.network.parameters())

    other, arguments = tiny_pipelines.sd3()
    kept = AnyPipeline(other)
    for folder, message in (
        (tmp_path / "lora", "cannot load the LoRA .* must be one for a StableDiffusion3Pipeline"),
        (tmp_path / "none", "does not exist"),
        (tmp_path, "cannot load the LoRA"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            kept.load_lora(folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="fits no part of this StableDiffusionPipeline"):
        AnyPipeline(tiny_pipelines.sd15()[0]).load_lora(tmp_path / "lora")
    with pytest.raises(UserError, match="a PixArtSigmaPipeline takes no LoRA"):
        AnyPipeline(tiny_pipelines.pixart()[0]).load_lora(tmp_path / "lora")


def test_loading_by_name(tmp_path: Path) -> None:
    pipe, arguments = tiny_pipelines.zimage()
    pipe.save_pretrained(tmp_path / "zimage")
    with pytest.raises(UserError, match="no adapter for a ZImagePipeline; .*`diffalign steer` takes any text-to-image"):
        pipelines.load(tmp_path / "zimage", device="cpu")
    loaded = pipelines.load(tmp_path / "zimage", device="cpu", steering=True)
    assert isinstance(loaded, AnyPipeline) and loaded.device == torch.device("cpu")
    oracle = loaded.oracle(None, STEPS, arguments)
    final = ode(oracle, oracle.start(generators(0)))
    torch.testing.assert_close(final, native(pipe, arguments), atol=2e-5, rtol=0)
    assert isinstance(pipelines.load("tiny-sd3", device="cpu", steering=True), SD3)


def test_offloaded_encoders_come_to_encode(family: SD3) -> None:
    seen: list[str] = []

    class Watched(AnyPipeline):
        def encoders_here(self) -> Any:
            seen.append("here")
            return super().encoders_here()

    oracle = Watched(family.pipe, torch.float32, "cpu", 0, offload=True).oracle(
        "a star", STEPS, {"guidance_scale": 1.0}
    )
    oracle.predict(oracle.start(generators(0)), 0)
    assert seen == ["here"]
