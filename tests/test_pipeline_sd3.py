"""The SD3 adapter against diffusers' own pipeline, on tiny random weights, and the loading of models by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusion3Pipeline

from diffalign import adapters, pipelines
from diffalign.pipelines.sd3 import SD3
from diffalign.samplers import denoise, drain
from diffalign.types import Conditioning, UserError

PROMPTS = ["a red circle", "two green squares", "a red circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.sd3_folder(tmp_path_factory.mktemp("sd3") / "plain")


@pytest.fixture(scope="module")
def folder_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.sd3_folder(tmp_path_factory.mktemp("sd3") / "t5", with_t5=True, dynamic_shift=True)


def ours(folder: Path, tokens: int | None = 0, dtype: str = "fp32") -> SD3:
    return pipelines.load(folder, dtype=dtype, device="cpu", max_sequence_length=tokens)


def theirs(folder: Path) -> StableDiffusion3Pipeline:
    absent = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(pipe: SD3, batch: int, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    shape = (batch, *pipe.latent_shape(height, width))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(pipe: SD3, cond: Conditioning, x: torch.Tensor, steps: int, height: int, width: int, guidance: float):
    return drain(denoise(pipe.denoiser(cond, guidance), x, pipe.sigmas(steps, height, width)))


@pytest.mark.parametrize("t5, tokens", [(False, 0), (False, 5), (True, 8)])
@pytest.mark.parametrize("guidance, steps, height, width", [(1.0, 1, 64, 64), (4.5, 4, 48, 80), (7.0, 6, 128, 32)])
def test_ode_equals_diffusers(
    folder: Path, folder_t5: Path, t5: bool, tokens: int, guidance: float, steps: int, height: int, width: int
) -> None:
    chosen = folder_t5 if t5 else folder
    pipe, native = ours(chosen, tokens), theirs(chosen)
    x = noise(pipe, len(PROMPTS), height, width)
    latents = sample(pipe, pipe.encode(PROMPTS), x, steps, height, width, guidance)
    size = {"height": height, "width": width, "num_inference_steps": steps}
    call = {"prompt": PROMPTS, "latents": x, "guidance_scale": guidance, "max_sequence_length": tokens, **size}
    expected = native(**call, output_type="latent").images
    assert (latents - x).abs().max() > 0.5  # the model moves the latents
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(pipe.decode(latents), native(**call, output_type="pt").images, atol=1e-5, rtol=0)


def test_guidance_and_prompts_matter(folder: Path) -> None:
    pipe = ours(folder)
    x = noise(pipe, 1)
    red, star = pipe.encode(["a red circle"]), pipe.encode(["a yellow star above"])
    base = sample(pipe, red, x, 3, 64, 64, 1.0)
    assert (sample(pipe, star, x, 3, 64, 64, 1.0) - base).abs().max() > 1e-3
    assert (sample(pipe, red, x, 3, 64, 64, 4.0) - base).abs().max() > 1e-3


def test_guidance_is_the_formula_and_negative_prompts_are_used(folder: Path) -> None:
    pipe = ours(folder)
    x = noise(pipe, 2)
    cond, negative = pipe.encode(["a red circle", "two stars"]), pipe.encode(["blue"])

    def velocity(denoiser):
        x0, eps = denoiser.predict(x, 0.6)
        return eps - x0

    with torch.no_grad():
        guided = velocity(pipe.denoiser(cond, 3.0, negative))
        v_u, v_c = velocity(pipe.denoiser(negative[torch.tensor([0, 0])])), velocity(pipe.denoiser(cond))
        torch.testing.assert_close(guided, v_u + 3 * (v_c - v_u), atol=1e-4, rtol=1e-4)
        native = velocity(pipe.denoiser(cond, 3.0))
        torch.testing.assert_close(native, velocity(pipe.denoiser(cond, 3.0, pipe.encode([""]))))
        assert (native - guided).abs().max() > 1e-3


def test_sigmas_are_the_schedulers(folder: Path, folder_t5: Path) -> None:
    pipe, native = ours(folder), theirs(folder)
    native.scheduler.set_timesteps(7)
    assert torch.equal(pipe.sigmas(7, 64, 64), native.scheduler.sigmas)
    dynamic = ours(folder_t5, 8)
    before = dynamic.pipe.scheduler.sigmas.clone()
    assert not torch.equal(dynamic.sigmas(7, 64, 64), dynamic.sigmas(7, 128, 128))  # the shift follows the size
    assert torch.equal(dynamic.pipe.scheduler.sigmas, before)


def test_unique_prompts_are_encoded_once(folder: Path) -> None:
    pipe = ours(folder)
    seen: list[int] = []
    pipe.pipe.text_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    cond = pipe.encode(["a", "b", "a", "a", "b"])
    assert sum(seen) == 3  # a, b and the empty prompt
    assert cond.index.tolist() == [0, 1, 0, 0, 1] and all(len(t) == 2 for t in cond.tensors.values())
    pipe.encode(["a"])
    assert sum(seen) == 4  # the empty prompt is remembered
    pipe.denoiser(cond, 5.0)
    assert sum(seen) == 4
    many = [f"{i}" for i in range(70)]
    del seen[:]
    pipe.encode(many)
    assert sum(seen) == 70 and max(seen) < 70  # in batches
    torch.testing.assert_close(pipe.encode(many)[slice(69, 70)].rows(), pipe.encode(["69"]).rows())


def test_sampling_goes_on_without_the_encoders(folder: Path) -> None:
    pipe = ours(folder)
    x = noise(pipe, 2)
    cond = pipe.encode(["a red circle", "a star"])
    before = sample(pipe, cond, x, 2, 64, 64, 3.0)
    pipe.release_encoders()
    assert pipe.pipe.text_encoder is None and pipe.pipe.text_encoder_2 is None
    assert torch.equal(sample(pipe, cond, x, 2, 64, 64, 3.0), before)
    with pytest.raises(UserError, match="released"):
        pipe.encode(["a star"])


def test_released_before_any_prompt_still_guides(folder: Path) -> None:
    pipe, other = ours(folder), ours(folder)
    cond = other.encode(["a star"])
    pipe.release_encoders()
    x = noise(pipe, 1)
    assert torch.equal(sample(pipe, cond, x, 2, 64, 64, 3.0), sample(other, cond, x, 2, 64, 64, 3.0))


def test_decode_is_the_same_in_chunks(folder: Path) -> None:
    pipe = ours(folder)
    latents = noise(pipe, 5)
    with torch.no_grad():
        whole = pipe.decode(latents)
        pipe.decode_batch = 2
        torch.testing.assert_close(pipe.decode(latents), whole, atol=1e-5, rtol=0)
    assert whole.shape == (5, 3, 64, 64) and whole.dtype == torch.float32
    assert whole.min() >= 0 and whole.max() <= 1
    latents.requires_grad_()
    pipe.decode(latents).mean().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_times_per_sample(folder: Path, guidance: float) -> None:
    pipe = ours(folder)
    x = noise(pipe, 3)
    s = torch.tensor([0.9, 0.5, 0.1])
    denoiser = pipe.denoiser(pipe.encode(PROMPTS), guidance)
    with torch.no_grad():
        together = denoiser.predict(x, s)
        for i in range(3):
            scalar = denoiser.predict(x, s[i])
            for a, b in zip(together, scalar, strict=True):
                torch.testing.assert_close(a[i], b[i], atol=1e-5, rtol=1e-5)
        assert (denoiser.predict(x, 0.9)[0] - denoiser.predict(x, 0.1)[0]).abs().max() > 1e-2


def test_predictions_recompose_x_and_keep_its_precision(folder: Path) -> None:
    pipe = ours(folder)
    denoiser = pipe.denoiser(pipe.encode(["a star"]))
    for dtype, out, tolerance in ((torch.float64, torch.float64, 1e-12), (torch.bfloat16, torch.float32, 1e-5)):
        x = noise(pipe, 1).to(dtype)
        with torch.no_grad():
            x0, eps = denoiser.predict(x, 0.3)
        assert x0.dtype == eps.dtype == out
        torch.testing.assert_close(0.7 * x0 + 0.3 * eps, x.to(out), atol=tolerance, rtol=0)
    with pytest.raises(ValueError, match="2 latents for the 1 prompts"):
        denoiser.predict(noise(pipe, 2), 0.3)


def test_bf16_is_close_to_fp32(folder: Path) -> None:
    full, half = ours(folder), ours(folder, dtype="bf16")
    assert {p.dtype for p in half.trainable.parameters()} == {torch.bfloat16}
    x = noise(full, 2)
    a = sample(full, full.encode(["a star", "a"]), x, 4, 64, 64, 2.0)
    b = sample(half, half.encode(["a star", "a"]), x, 4, 64, 64, 2.0)
    assert b.dtype == torch.float32
    assert 1e-6 < (a - b).norm() / (a - x).norm() < 0.03
    with torch.no_grad():
        assert half.decode(b).dtype == torch.float32


def test_gradients_reach_the_network(folder: Path) -> None:
    pipe = ours(folder)
    assert not any(p.requires_grad for p in pipe.trainable.parameters())
    pipe.trainable.requires_grad_(True)
    x0, _ = pipe.denoiser(pipe.encode(["a star"]), 2.0).predict(noise(pipe, 1), 0.5)
    x0.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pipe.trainable.proj_out.parameters())


def test_sizes_and_settings_that_do_not_fit(folder: Path, folder_t5: Path) -> None:
    pipe = ours(folder)
    assert pipe.latent_shape(64, 48) == (4, 8, 6)
    for height, width in ((60, 64), (64, 8), (256, 64)):
        with pytest.raises(UserError, match="multiples of 16 up to 128"):
            pipe.latent_shape(height, width)
    cond = pipe.encode(["a", "b", "c"])
    with pytest.raises(UserError, match="at least 1"):
        pipe.denoiser(cond, 0.5)
    with pytest.raises(UserError, match="2 negative prompts for 3 prompts"):
        pipe.denoiser(cond, 2.0, pipe.encode(["x", "y"]))
    with pytest.raises(UserError, match="no prompts"):
        pipe.encode([])
    with pytest.raises(UserError, match="at least one step"):
        pipe.sigmas(0, 64, 64)
    with pytest.raises(UserError, match="1 to 512"):
        SD3(theirs(folder_t5), max_sequence_length=0)  # T5 cannot encode no tokens
    assert ours(folder_t5, 0).pipe.text_encoder_3 is None  # so it is not loaded for none
    native = theirs(folder)
    native.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler"):
        SD3(native)


def test_tokens_by_default(folder: Path, tmp_path: Path) -> None:
    assert ours(folder, None).max_sequence_length == 256
    assert ours(folder, None).encode(["a"]).tensors["embeds"].shape[1] == tiny_models.TOKENS + 256
    assert ours(folder, 0).encode(["a"]).tensors["embeds"].shape[1] == tiny_models.TOKENS


def test_loading_errors_are_one_sentence(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: str | Path, message: str, **settings: str | int) -> None:
        with pytest.raises(UserError, match=message) as caught:
            pipelines.load(path, **settings)
        assert "\n" not in str(caught.value)

    fails(tmp_path / "nowhere", "does not exist")
    fails("./nowhere/at-all", "does not exist")
    fails("tiny-unknown", "does not exist")
    fails(tmp_path, "cannot load model")
    fails(folder, "dtype 'fp8' is not one of fp32, bf16, fp16", dtype="fp8")
    fails(folder, "encoders 'gone' is not one of resident, offload", encoders="gone")
    fails(folder, "max_sequence_length must be 0 to 512 for this model, got 513", max_sequence_length=513)
    fails(folder, "revision 'main' applies to hub ids", revision="main")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("no-such-owner/no-such-model", "check the name and the network")

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    for file in (broken / "tokenizer").iterdir():
        file.unlink()
    fails(broken, "its tokenizer knows . of the text encoder's .* put the vocabulary")
    shutil.rmtree(broken / "transformer")
    fails(broken, "cannot load model .* the folder must be complete")
    index = broken / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusion3Pipeline", "SomeOtherPipeline"))
    fails(broken, "no adapter for a SomeOtherPipeline; .*StableDiffusion3Pipeline")
    index.write_text("{}")
    fails(broken, "_class_name")
    with pytest.raises(UserError, match="not an embedded model"):
        pipelines.embedded_path("../../secrets")


def test_a_family_is_added_by_adding_a_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "family_of_test.py").write_text(
        "SERVES = ('SomeOther*',)\n\n\ndef wrap(pipe, dtype, device, max_sequence_length, source, offload):\n    return source\n"
    )
    monkeypatch.setattr(pipelines, "__path__", [*pipelines.__path__, str(tmp_path)])
    assert pipelines.family("SomeOtherPipeline").__name__ == "diffalign.pipelines.family_of_test"
    assert pipelines.family("StableDiffusion3Pipeline").__name__ == "diffalign.pipelines.sd3"


def test_the_package_imports_without_torch() -> None:
    code = "import sys, diffalign.pipelines as p; p.embedded_names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


class Watched(SD3):
    """Notes where the text encoders go and when they work."""

    def encoders_to(self, device: torch.device | str) -> None:
        self.__dict__.setdefault("seen", []).append(f"to {device}")
        super().encoders_to(device)

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        self.seen.append("encode")
        return super()._encode(prompts)


def test_offloaded_encoders_come_only_to_encode(folder_t5: Path) -> None:
    resident = ours(folder_t5, 8)
    pipe = Watched(theirs(folder_t5), max_sequence_length=8, offload=True)
    assert pipe.seen == ["to cpu"]
    cond, expected = pipe.encode(PROMPTS), resident.encode(PROMPTS)
    assert pipe.seen == ["to cpu", "to cpu", "encode", "encode", "to cpu"]  # there, the empty prompt and ours, and back
    for name, tensor in expected.tensors.items():
        assert torch.equal(cond.tensors[name], tensor)
    x = noise(pipe, 3)
    assert torch.equal(sample(pipe, cond, x, 2, 64, 64, 3.0), sample(resident, expected, x, 2, 64, 64, 3.0))

    del pipe.seen[:]
    negative = pipe.encode(["blue"])
    assert pipe.seen == ["to cpu", "encode", "to cpu"]
    assert torch.equal(pipe.encode(["blue"]).rows()["embeds"], negative.rows()["embeds"])
    pipe.encode([""])
    assert len(pipe.seen) == 3  # what was encoded alone is remembered, so an update need not fetch the encoders
    pipe.encode(["", "blue"])
    assert pipe.seen[3:] == ["to cpu", "encode", "to cpu"]
    for i in range(20):
        pipe.encode([f"{i}"])
    assert len(pipe._alone) <= 8 and "" in pipe._alone
    with pytest.raises(ValueError):
        pipe.encode([None])  # type: ignore[list-item]
    assert pipe.seen[-1] == "to cpu"  # and back, whatever happens


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_encoders_wait_in_main_memory(folder_t5: Path) -> None:
    pipes = [pipelines.load(folder_t5, None, "bf16", "cuda", 8, encoders) for encoders in ("resident", "offload")]
    a, b = (pipe.encode(PROMPTS) for pipe in pipes)
    assert [next(pipe.pipe.text_encoder_3.parameters()).device.type for pipe in pipes] == ["cuda", "cpu"]
    for name, tensor in a.tensors.items():
        assert tensor.is_cuda and torch.equal(b.tensors[name], tensor)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_gradient_checkpointing_changes_no_gradient(folder: Path, dtype: str, guidance: float, trained: str) -> None:
    results = []
    for checkpointing in (False, True):
        pipe = ours(folder, dtype=dtype)
        torch.manual_seed(1)
        if trained == "lora":
            adapters.add_lora(pipe, rank=4, alpha=8)
            for name, p in pipe.network.named_parameters():
                if ".lora_B" in name:
                    torch.nn.init.normal_(p, std=0.1)  # at zero, the first factor has no gradient
        else:
            adapters.add_full(pipe, reference=True)
        if checkpointing:
            pipe.network.enable_gradient_checkpointing()
        runs: list[int] = []
        pipe.network.transformer_blocks[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        x0, eps = pipe.denoiser(pipe.encode(["a red circle", "a star"]), guidance).predict(noise(pipe, 2), 0.5)
        with torch.no_grad(), adapters.reference(pipe):  # as a KL penalty does between forward and backward
            pipe.denoiser(pipe.encode(["a red circle", "a star"])).predict(noise(pipe, 2), 0.5)
        before = len(runs)
        (x0.square().mean() + eps.mean()).backward()
        assert (len(runs) > before) == checkpointing  # the block was run again
        results.append((x0.detach(), [p.grad for p in adapters.trainable_parameters(pipe)]))
    (x0, gradients), (again, repeated) = results
    assert torch.equal(x0, again) and len(gradients) == len(repeated) > 8
    for a, b in zip(gradients, repeated, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 1e-3


def test_large_images_are_decoded_one_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ours(folder)
    sizes: list[int] = []
    pipe.pipe.vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        whole = pipe.decode(noise(pipe, 3))
        monkeypatch.setattr("diffalign.pipelines.sd3.DECODED_PIXELS", 2 * 64 * 64)
        torch.testing.assert_close(pipe.decode(noise(pipe, 3)), whole, atol=1e-5, rtol=0)
        monkeypatch.setattr("diffalign.pipelines.sd3.DECODED_PIXELS", 1)
        pipe.decode(noise(pipe, 2))
    assert sizes == [3, 2, 1, 1, 1]


def test_decoding_again_in_the_backward_pass_gives_the_same_gradient(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = ours(folder)
    sizes: list[int] = []
    pipe.pipe.vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    found = []
    for pixels in (1 << 18, 2 * 64 * 64):
        monkeypatch.setattr("diffalign.pipelines.sd3.GRADED_PIXELS", pixels)
        latents = noise(pipe, 3).requires_grad_()
        images = pipe.decode(latents)
        images.square().mean().backward()
        found.append((images.detach(), latents.grad))
    assert sizes == [3, 2, 1, 1, 2] or sizes == [3, 2, 1, 2, 1]
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    assert latents.grad is not None and latents.grad.abs().max() > 1e-6
