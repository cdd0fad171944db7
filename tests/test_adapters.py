"""LoRA and full fine-tuning on a tiny SD3: what is trained, what the reference is, and exports that diffusers reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from benchmarks.rollout import LARGE, MEDIUM
from diffalign import adapters, pipelines
from diffalign.pipelines.sd3 import LORA_TARGETS, SD3
from diffalign.samplers import denoise, drain
from diffalign.types import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.sd3_folder(tmp_path_factory.mktemp("sd3") / "base")


def ours(folder: Path, dtype: str = "fp32") -> SD3:
    return pipelines.load(folder, dtype=dtype, device="cpu", max_sequence_length=0)


def theirs(folder: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)


def shaken(pipe: SD3, std: float = 0.3) -> SD3:
    """As if trained: every trained weight has moved."""
    generator = torch.Generator().manual_seed(1)
    for p in adapters.trainable_parameters(pipe):
        p.data += std * torch.randn(p.shape, generator=generator)
    return pipe


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def predict(pipe: SD3) -> torch.Tensor:
    return pipe.denoiser(pipe.encode(["a red circle", "a star"]), 2.0).predict(noise(), 0.7)[0]


@torch.no_grad()
def images(pipe: SD3) -> torch.Tensor:
    cond = pipe.encode(["a red circle", "a star"])
    return pipe.decode(drain(denoise(pipe.denoiser(cond, 2.0), noise(), pipe.sigmas(3, 64, 64))))


def native_images(pipe: StableDiffusion3Pipeline) -> torch.Tensor:
    size = {"height": 64, "width": 64, "num_inference_steps": 3, "max_sequence_length": 0}
    prompts = ["a red circle", "a star"]
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompts, latents=noise(), guidance_scale=2.0, output_type="pt", **size).images


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_new_lora_changes_nothing_and_trains_in_fp32(folder: Path, dtype: str) -> None:
    pipe = ours(folder, dtype)
    base = predict(pipe)
    adapters.add_lora(pipe, rank=4, alpha=8)
    assert torch.equal(predict(pipe), base)
    trained = adapters.trainable_parameters(pipe)
    assert len(trained) == 2 * (2 * len(LORA_TARGETS) - 1) and {p.dtype for p in trained} == {torch.float32}
    assert set(adapters.trainable_state(pipe)) == {n for n, _ in pipe.network.named_parameters() if ".lora_" in n}
    pipe.denoiser(pipe.encode(["a"] * 2)).predict(noise(), 0.5)[0].square().mean().backward()
    still = {n for n, p in pipe.network.named_parameters() if ".lora_B." in n and not p.grad.abs().sum() > 0}
    # the last block puts out no text, so nothing depends on what its text asks for
    assert still == {"transformer_blocks.1.attn.add_q_proj.lora_B.default.weight"}
    assert (predict(shaken(pipe)) - base).abs().max() > 1e-2


def test_alpha_over_rank_scales_the_lora(folder: Path) -> None:
    pipe = ours(folder)
    linear = pipe.network.transformer_blocks[0].attn.to_q
    x = torch.randn(1, 3, 32)
    before = linear(x)
    adapters.add_lora(pipe, rank=4, alpha=6, targets=["attn.to_q"])
    shaken(pipe)
    layer = pipe.network.transformer_blocks[0].attn.to_q
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), before + 1.5 * x @ a.T @ b.T)


def test_bad_lora_settings(folder: Path) -> None:
    pipe = ours(folder)
    for settings, message in (
        ({"rank": 0}, "rank must be at least 1"),
        ({"init": "magic"}, "'magic' is unknown; use one of gaussian, kaiming"),
        ({"targets": ["attn.to_q", "attn.to_x"]}, "'attn.to_x' matches no layer"),
        ({"targets": []}, "no targets"),
    ):
        with pytest.raises(UserError, match=message):
            adapters.add_lora(pipe, **({"rank": 2, "alpha": 2} | settings))
    assert adapters.trainable_parameters(pipe) == []  # nothing was added on the way
    adapters.add_lora(pipe, 2, 2)
    with pytest.raises(UserError, match="exists already"):
        adapters.add_lora(pipe, 2, 2)
    with pytest.raises(UserError, match="LoRA or all weights"):
        adapters.add_full(pipe)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_reference_is_the_base_to_the_last_bit(folder: Path, dtype: str) -> None:
    pipe = ours(folder, dtype)
    base = predict(pipe)
    adapters.add_lora(pipe, 4, 8)
    changed = predict(shaken(pipe))
    trained = adapters.trainable_parameters(pipe)
    with adapters.reference(pipe):
        with adapters.reference(pipe):
            assert torch.equal(predict(pipe), base)
        assert torch.equal(predict(pipe), base)
    with pytest.raises(RuntimeError), adapters.reference(pipe):
        raise RuntimeError
    assert torch.equal(predict(pipe), changed) and not torch.equal(changed, base)
    assert [id(p) for p in adapters.trainable_parameters(pipe)] == [id(p) for p in trained]


def test_reference_inside_a_training_step_leaves_the_gradient_alone(folder: Path) -> None:
    pipe = ours(folder)
    adapters.add_lora(pipe, 4, 8)
    shaken(pipe)
    denoiser = pipe.denoiser(pipe.encode(["a", "a star"]))

    def gradients(kl: bool) -> list[torch.Tensor]:
        pipe.network.zero_grad()
        x0, _ = denoiser.predict(noise(), 0.5)
        if kl:
            with torch.no_grad(), adapters.reference(pipe):
                denoiser.predict(noise(), 0.5)
        x0.square().mean().backward()
        return [p.grad.clone() for p in adapters.trainable_parameters(pipe)]

    for with_kl, without in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(with_kl, without)


def test_named_adapters_switch_and_keep_what_is_trained(folder: Path) -> None:
    pipe = ours(folder)
    base = predict(pipe)
    adapters.add_lora(pipe, 4, 8, name="old")
    old = predict(shaken(pipe))
    adapters.add_lora(pipe, 4, 8)
    trained = {id(p) for p in adapters.trainable_parameters(pipe)}
    assert torch.equal(predict(pipe), base)  # the new one is in use
    with adapters.active(pipe, "old"):
        assert torch.equal(predict(pipe), old)
        assert {id(p) for p in adapters.trainable_parameters(pipe)} != trained
        with adapters.reference(pipe):
            assert torch.equal(predict(pipe), base)
        assert torch.equal(predict(pipe), old)
    assert torch.equal(predict(pipe), base)
    assert {id(p) for p in adapters.trainable_parameters(pipe)} == trained
    with pytest.raises(UserError, match="no adapter 'older'; adapters: old, default"), adapters.active(pipe, "older"):
        pass


def test_a_new_lora_is_drawn_as_peft_draws_it(folder: Path) -> None:
    pipe = ours(folder)
    torch.manual_seed(0)
    adapters.add_lora(pipe, rank=16, alpha=32)
    layers = dict(pipe.network.named_parameters())
    drawn = torch.cat([p.detach().flatten() for name, p in layers.items() if ".lora_A." in name])
    assert len(drawn) > 5000 and drawn.std().item() == pytest.approx(1 / 16, rel=0.05)  # not 1
    assert not any(p.any() for name, p in layers.items() if ".lora_B." in name)


PAIR = ("start", "default")


@pytest.fixture(scope="module")
def cold(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained LoRA of rank 3, which adapts a layer that the family's LoRA does not."""
    pipe = ours(folder)
    adapters.add_lora(pipe, rank=3, alpha=5, targets=["attn.to_q", "attn.to_v", "ff.net.2"])
    return adapters.export_lora(shaken(pipe), tmp_path_factory.mktemp("cold")).parent


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_lora_on_a_frozen_one(folder: Path, cold: Path, dtype: str) -> None:
    pipe = ours(folder, dtype)
    base = predict(pipe)
    alone = ours(folder, dtype)
    adapters.load_lora(alone, cold)
    start = predict(alone)
    adapters.load_frozen(pipe, cold)
    frozen = {name: p.clone() for name, p in pipe.network.named_parameters() if ".start." in name}
    assert torch.equal(predict(pipe), start) and adapters.trainable_parameters(pipe) == []
    adapters.add_lora(pipe, rank=4, alpha=8)
    assert torch.equal(predict(pipe), start)  # the new one begins at zero
    trained = {name for name, p in pipe.network.named_parameters() if p.requires_grad}
    assert trained == {name for name in dict(pipe.network.named_parameters()) if ".default." in name}
    pipe.denoiser(pipe.encode(["a"] * 2)).predict(noise(), 0.5)[0].square().mean().backward()
    assert any(p.grad is not None for p in adapters.trainable_parameters(pipe))
    changed = predict(shaken(pipe))
    assert (changed - start).abs().max() > 1e-2
    with adapters.reference(pipe):
        assert torch.equal(predict(pipe), base)  # both are off
    with adapters.active(pipe, "default"):
        assert torch.equal(predict(pipe), changed)
    with adapters.active(pipe, "start"):
        assert torch.equal(predict(pipe), start)
    assert torch.equal(predict(pipe), changed)
    assert {name for name, p in pipe.network.named_parameters() if p.requires_grad} == trained
    after = dict(pipe.network.named_parameters())
    assert frozen and all(torch.equal(after[name], p) for name, p in frozen.items())


def test_a_lora_on_a_frozen_one_is_exported_as_their_sum(folder: Path, cold: Path, tmp_path: Path) -> None:
    pipe = ours(folder)
    adapters.load_frozen(pipe, cold)
    adapters.add_lora(pipe, rank=4, alpha=10)
    shaken(pipe)
    live = native_images(pipe.pipe)
    file = adapters.export_lora(pipe, tmp_path / "sum")
    tensors = load_file(file)
    assert {t.shape[0 if ".lora_A." in name else 1] for name, t in tensors.items()} == {3 + 4}
    layer = pipe.network.transformer_blocks[0].attn.to_q
    update = sum(layer.scaling[n] * layer.lora_B[n].weight.double() @ layer.lora_A[n].weight.double() for n in PAIR)
    a, b = (tensors[f"transformer.transformer_blocks.0.attn.to_q.lora_{half}.weight"].double() for half in "AB")
    torch.testing.assert_close(b @ a, update, rtol=1e-6, atol=1e-7)
    native = theirs(folder)
    native.load_lora_weights(tmp_path / "sum")
    torch.testing.assert_close(native_images(native), live, atol=1e-5, rtol=0)
    for name in PAIR:  # neither alone gives the same
        pipe.network.set_adapter(name)
        assert (native_images(pipe.pipe) - live).abs().max() > 1e-3

    again = ours(folder)  # the next stage starts from the sum
    adapters.load_frozen(again, tmp_path / "sum")
    adapters.add_lora(again, rank=2, alpha=2)
    torch.testing.assert_close(native_images(again.pipe), live, atol=1e-5, rtol=0)

    other = ours(folder)
    adapters.load_frozen(other, cold)
    adapters.add_lora(other, rank=4, alpha=10)
    average = {name: 0.5 * t for name, t in adapters.trainable_state(shaken(other)).items()}
    adapters.export_lora(other, tmp_path / "sum", state=average)  # of the new one alone
    for p in adapters.trainable_parameters(other):
        p.data *= 0.5
    native = theirs(folder)
    native.load_lora_weights(tmp_path / "sum")
    torch.testing.assert_close(native_images(native), native_images(other.pipe), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_full_fine_tuning_and_its_reference(folder: Path, dtype: str) -> None:
    pipe = ours(folder, dtype)
    base = predict(pipe)
    with pytest.raises(UserError, match="no reference policy"), adapters.reference(pipe):
        pass
    adapters.add_full(pipe, reference=True)
    trained = adapters.trainable_parameters(pipe)
    assert len(trained) == len(list(pipe.network.parameters())) and {p.dtype for p in trained} == {torch.float32}
    changed = predict(shaken(pipe, 0.1))
    with adapters.reference(pipe):
        assert torch.equal(predict(pipe), base)
    assert torch.equal(predict(pipe), changed) and not torch.equal(changed, base)


def test_exported_lora_gives_the_same_images_in_diffusers(folder: Path, tmp_path: Path) -> None:
    pipe = ours(folder)
    base = native_images(pipe.pipe)
    adapters.add_lora(pipe, rank=4, alpha=10)
    shaken(pipe)
    adapters.add_lora(pipe, rank=2, alpha=2, name="other")  # must not leak into the file
    pipe.network.set_adapter("default")
    live = native_images(pipe.pipe)
    torch.testing.assert_close(images(pipe), live, atol=1e-5, rtol=0)
    file = adapters.export_lora(pipe, tmp_path / "lora")
    assert [p.name for p in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"] == [file.name]
    assert {t.dtype for t in load_file(file).values()} == {torch.float32}

    native = theirs(folder)
    native.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(native_images(native), live, atol=1e-6, rtol=0)
    assert (live - base).abs().max() > 1e-3

    ema = {name: 0.5 * t for name, t in adapters.trainable_state(pipe).items()}
    adapters.export_lora(pipe, tmp_path / "lora", state=ema)  # over the first one
    native = theirs(folder)
    native.load_lora_weights(tmp_path / "lora")
    averaged = native_images(native)
    assert (averaged - live).abs().max() > 1e-3
    assert torch.equal(native_images(pipe.pipe), live)  # exporting other weights leaves the live ones alone
    for p in adapters.trainable_parameters(pipe):
        p.data *= 0.5
    torch.testing.assert_close(averaged, native_images(pipe.pipe), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="not those of adapter"):
        adapters.export_lora(pipe, tmp_path / "lora", state=dict(list(ema.items())[:3]))


def test_a_lora_comes_back_with_its_alpha_ready_to_train(folder: Path, tmp_path: Path) -> None:
    pipe = ours(folder)
    adapters.add_lora(pipe, rank=4, alpha=10)
    expected = predict(shaken(pipe))
    adapters.export_lora(pipe, tmp_path)
    for where in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        again = ours(folder)
        adapters.load_lora(again, where)
        assert torch.equal(predict(again), expected)
        assert len(adapters.trainable_parameters(again)) == len(adapters.trainable_parameters(pipe))
    with pytest.raises(UserError, match="exists already"):
        adapters.load_lora(again, tmp_path)


def test_a_lora_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    pipe = ours(folder)
    adapters.add_lora(pipe, 4, 8)
    good = load_file(adapters.export_lora(pipe, tmp_path / "good"))
    first = "transformer.transformer_blocks.0.attn.to_q"
    changes = {
        "for size 48, and the module's is 32": {f"{first}.lora_A.weight": torch.zeros(4, 48)},
        "different ranks": {f"{first}.lora_A.weight": torch.zeros(3, 32)},
        "has no layer 'transformer_blocks.7.attn.to_q'": {
            f"transformer.transformer_blocks.7.attn.to_q.lora_{half}.weight": torch.zeros(4, 32)
            if half == "A"
            else torch.zeros(32, 4)
            for half in "AB"
        },
        "not half of a LoRA pair": {"transformer.transformer_blocks.0.attn.to_z.lora_A.weight": torch.zeros(4, 32)},
        "not one of a transformer .* it holds 'text_encoder.x.lora_A.weight'": {
            "text_encoder.x.lora_A.weight": torch.zeros(4, 32)
        },
    }
    for number, (message, change) in enumerate(changes.items()):
        bad = tmp_path / str(number)
        bad.mkdir()
        save_file(good | change, bad / adapters.LORA_FILE)
        fresh = ours(folder)
        base = predict(fresh)
        with pytest.raises(UserError, match=message):
            adapters.load_lora(fresh, bad)
        assert torch.equal(predict(fresh), base) and adapters.trainable_parameters(fresh) == []
    with pytest.raises(UserError, match="does not exist"):
        adapters.load_lora(pipe, tmp_path / "nowhere", name="other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot read a LoRA"):
        adapters.load_lora(pipe, tmp_path / "empty", name="other")
    with pytest.raises(UserError, match="no LoRA named"):
        adapters.export_lora(ours(folder), tmp_path)


def test_exported_model_is_a_diffusers_folder(folder: Path, tmp_path: Path) -> None:
    pipe = ours(folder)
    adapters.add_full(pipe)
    shaken(pipe, 0.1)
    live, live_native = images(pipe), native_images(pipe.pipe)
    pipe.release_encoders()  # the export reads them again from the source
    target = tmp_path / "out" / "model"
    for _ in range(2):  # replaces what is there
        adapters.export_full(pipe, target)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model"]
    torch.testing.assert_close(native_images(theirs(target)), live_native, atol=1e-6, rtol=0)
    again = pipelines.load(target, device="cpu")
    assert again.max_sequence_length == 0  # remembered, though 256 is the default
    assert torch.equal(images(again), live)

    halved = {name: 0.5 * t for name, t in adapters.trainable_state(pipe).items()}
    before = predict_without_encoders(pipe, again)
    adapters.export_full(pipe, target, state=halved)
    assert torch.equal(predict_without_encoders(pipe, again), before)
    weights = pipelines.load(target, device="cpu").network.state_dict()
    assert all(torch.equal(weights[name], t) for name, t in halved.items())
    adapters.add_lora(again, 2, 2)
    with pytest.raises(UserError, match="export it with export_lora"):
        adapters.export_full(again, target)


@torch.no_grad()
def predict_without_encoders(pipe: SD3, encoder: SD3) -> torch.Tensor:
    return pipe.denoiser(encoder.encode(["a", "b"])).predict(noise(), 0.7)[0]


@pytest.mark.parametrize("config, low, high", [(MEDIUM, 2.2e9, 2.55e9), (LARGE, 8.0e9, 8.2e9)], ids=["medium", "large"])
def test_lora_hits_the_papers_layers_of_the_real_models(config: dict, low: float, high: float) -> None:
    with torch.device("meta"):
        network = SD3Transformer2DModel(**config)
        learned = sum(p.numel() for p in network.parameters())
        assert low < learned < high

        class Real:
            lora_targets = LORA_TARGETS
            pipe, frozen, source, max_sequence_length = None, None, None, 256

        real = Real()
        real.network = real.trainable = network
        adapters.add_lora(real, rank=32, alpha=64)
    layers, width = config["num_layers"], config["num_attention_heads"] * config["attention_head_dim"]
    hit = {n.removesuffix(".lora_A.default.weight") for n, _ in network.named_parameters() if ".lora_A." in n}
    # all eight projections of every block, but the last one has no text output
    assert hit == {f"transformer_blocks.{i}.{t}" for i in range(layers) for t in LORA_TARGETS} - {
        f"transformer_blocks.{layers - 1}.attn.to_add_out"
    }
    assert len(hit) == {24: 191, 38: 303}[layers]
    assert not any("attn2" in name for name in hit)
    # each pair holds rank x (in + out) = 32 x 2 width
    assert sum(p.numel() for p in adapters.trainable_parameters(real)) == len(hit) * 32 * 2 * width
