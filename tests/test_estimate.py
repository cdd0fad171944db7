"""The estimated memory of a run against what autograd really keeps, on full-size networks that hold no numbers."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from accelerate.commands.config.config_args import load_config_from_file
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from diffalign import decoder_memory, estimate, knobs, loading, pipelines, sizes
from diffalign.config import Config
from diffalign.estimate import GIB
from diffalign.pipelines import SD3_LORA_TARGETS
from diffalign.sections import Full, ModelRef

ROOT = Path(__file__).parent.parent
TINY = sizes.find(ModelRef(path="tiny-sd3"))
assert TINY is not None
SHORT = sizes.MEDIUM | {"num_layers": 6, "dual_attention_layers": (0, 1, 2)}
NETWORKS: dict[str, Any] = {
    "medium": sizes.MEDIUM,
    "large": sizes.LARGE,
    "tiny": TINY.network,
    "short": SHORT,
    "short, plain": SHORT | {"dual_attention_layers": (), "qk_norm": None},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def known(network: Any, text: int = 333) -> sizes.ModelSizes:
    vae = TINY.vae if network is TINY.network else sizes.KNOWN_VAE
    return sizes.ModelSizes("", network, sizes.sd3_tensors(network), sizes.KNOWN_PARTS, vae, text, 0)


def config(preset: str = "sd35_medium_grpo", *overrides: str) -> Config:
    return loading.load(preset, overrides)


def meta(network: Any) -> SD3Transformer2DModel:
    settings = {k: v for k, v in network.items() if not k.startswith("_")}
    with torch.device("meta"):
        return SD3Transformer2DModel(**settings | {"caption_projection_dim": known(network).width})


@contextmanager
def layer_norms_as_on_a_gpu(dtype: torch.dtype) -> Iterator[None]:
    """The rule in which autocast of CUDA differs from that of the CPU: layer norms run in fp32."""
    plain = torch.nn.functional.layer_norm

    def fp32(x: torch.Tensor, *args: Any) -> torch.Tensor:
        return plain(x.float(), *args) if dtype != torch.float32 else plain(x, *args)

    torch.nn.functional.layer_norm = fp32
    try:
        yield
    finally:
        torch.nn.functional.layer_norm = plain


class Live(TorchDispatchMode):
    """Bytes of the tensors that are made inside and still alive, and their peak."""

    def __init__(self, existing: set[int]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = dict.fromkeys(existing, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, storage._cdata)
        return out

    def drop(self, key: int) -> None:
        self.now -= self.seen.pop(key, 0)


class Measured:
    """A network of that configuration without numbers, ready to run under FakeTensorMode."""

    def __init__(self, network: Any, dtype: str, trained: str, text: int, batch: int, side: int) -> None:
        self.dtype = DTYPES[dtype]
        self.net = meta(network).requires_grad_(False).eval()
        if trained == "lora":
            targets = list(SD3_LORA_TARGETS)
            self.net.add_adapter(LoraConfig(r=32, lora_alpha=64, init_lora_weights=True, target_modules=targets))
        with FakeTensorMode() as self.mode:
            for module in self.net.modules():
                for name, p in [*module._parameters.items(), *module._buffers.items()]:
                    if p is None:
                        continue
                    fp32 = trained == "full" or "lora" in type(module).__name__.lower() or p.requires_grad
                    new: Any = torch.empty(p.shape, dtype=torch.float32 if fp32 else self.dtype)
                    if isinstance(p, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, requires_grad=fp32)
                        module._parameters[name] = new
                    else:
                        module._buffers[name] = new
            self.inputs: dict[str, Any] = {
                "hidden_states": torch.empty(batch, network["in_channels"], side, side),
                "timestep": torch.empty(batch),
                "encoder_hidden_states": torch.empty(batch, text, network["joint_attention_dim"], dtype=self.dtype),
                "pooled_projections": torch.empty(batch, network["pooled_projection_dim"], dtype=self.dtype),
            }
        existing = [*self.net.parameters(), *self.net.buffers(), *self.inputs.values()]
        self.existing = {t.untyped_storage()._cdata for t in existing}

    def forward(self) -> torch.Tensor:
        half = self.dtype != torch.float32
        with layer_norms_as_on_a_gpu(self.dtype), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return self.net(**self.inputs, return_dict=False)[0]

    def saved(self) -> int:
        """Bytes that autograd keeps after a forward, each storage once, without weights and inputs."""
        storages: dict[int, Any] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.existing:
                storages[storage._cdata] = storage
            return tensor

        with self.mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = self.forward()  # noqa: F841  # the graph must be alive while it is measured
            return sum(storage.nbytes() for storage in storages.values())

    def peak(self, graphs: int = 1, beside: int = 0) -> int:
        """Most bytes at once in so many forward passes and one backward pass, gradients included; before the backward
        pass one without a gradient on `beside` times the batch."""
        with self.mode, layer_norms_as_on_a_gpu(self.dtype), Live(self.existing) as live:
            outputs = [self.forward().float() for _ in range(graphs)]
            if beside:
                own = self.inputs
                self.inputs = {name: torch.cat([t] * beside) for name, t in own.items()}
                with torch.no_grad():
                    self.forward()
                self.inputs = own
            sum(output.square().mean() for output in outputs).backward()  # type: ignore[union-attr]
        return live.peak


def test_parameters_are_those_of_the_published_networks() -> None:
    for name, network in [*sizes.KNOWN.items(), ("tiny", TINY.network)]:
        real = {key: tuple(t.shape) for key, t in meta(network).state_dict().items()}
        assert sizes.sd3_tensors(network) == real, name
    assert TINY.tensors == sizes.sd3_tensors(TINY.network)  # read from the file
    numbers = {name: round(sizes.elements(sizes.sd3_tensors(n)) / 1e6) for name, n in sizes.KNOWN.items()}
    assert sorted(set(numbers.values())) == [2085, 2470, 8146]  # the position table included

    def clip(width: int, layers: int, heads: int) -> CLIPTextModelWithProjection:
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
        sizes_ = {"vocab_size": 49408, "num_hidden_layers": layers, "num_attention_heads": heads}
        return CLIPTextModelWithProjection(CLIPTextConfig(**shape, **sizes_))

    with torch.device("meta"):
        t5 = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
        parts = {
            "text_encoder": clip(768, 12, 12),
            "text_encoder_2": clip(1280, 32, 20),
            "text_encoder_3": T5EncoderModel(T5Config(**t5, feed_forward_proj="gated-gelu")),
            "vae": sd3_vae(),
        }
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()} == sizes.KNOWN_PARTS


def sd3_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=sizes.KNOWN_VAE["block_out_channels"],
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


@pytest.mark.parametrize("targets", [None, ["attn.to_q", "ff.net.2"], ["to_q"]])
def test_trained_weights_are_those_of_the_adapter(targets: list[str] | None) -> None:
    chosen = [] if targets is None else [f"adapter.targets={json.dumps(targets)}"]
    c, model = config("sd35_medium_grpo", "adapter.rank=8", *chosen), known(SHORT)
    net = meta(SHORT).requires_grad_(False)
    net.add_adapter(LoraConfig(r=8, target_modules=targets or list(SD3_LORA_TARGETS)))
    assert sizes.elements(estimate.trained_tensors(c, model)) == sum(
        p.numel() for p in net.parameters() if p.requires_grad
    )
    full = c.model_copy(update={"adapter": Full(name="full")})
    assert sizes.elements(estimate.trained_tensors(full, model)) == sum(p.numel() for p in meta(SHORT).parameters())


@pytest.mark.parametrize(
    ("name", "batch", "side", "text"),
    [
        ("medium", 1, 64, 333),
        ("medium", 2, 32, 77),
        ("large", 1, 64, 333),
        ("large", 1, 32, 333),
        ("tiny", 16, 8, 14),
        ("tiny", 4, 16, 14),
    ],
)
def test_activations_of_a_lora_are_what_autograd_saves(name: str, batch: int, side: int, text: int) -> None:
    model = known(NETWORKS[name], text)
    side_px = side * model.vae_factor
    c = config("sd35_medium_grpo", f"sampling.height={side_px}", f"sampling.width={side_px}")
    real = Measured(NETWORKS[name], "bf16", "lora", text, batch, side).saved()
    assert estimate.saved(c, model, batch) == pytest.approx(real, rel=0.06)


@pytest.mark.parametrize("name", ["short", "short, plain"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_activations_of_every_kind_of_training(name: str, dtype: str, trained: str) -> None:
    model = known(NETWORKS[name])
    c = knobs.changed(config(), "model.dtype", dtype)
    if trained == "full":
        c = c.model_copy(update={"adapter": Full(name="full")})
    real = Measured(NETWORKS[name], dtype, trained, 333, 1, 64)
    assert estimate.saved(c, model, 1) == pytest.approx(real.saved(), rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_training_pass(checkpointing: bool) -> None:
    model = known(SHORT)
    c = config("sd35_medium_grpo", f"trainer.gradient_checkpointing={str(checkpointing).lower()}")
    real = Measured(SHORT, "bf16", "lora", 333, 2, 64)
    if checkpointing:
        real.net.enable_gradient_checkpointing()
    gradients = 4 * sizes.elements(estimate.trained_tensors(c, model))
    guess = estimate.saved(c, model, 2) + estimate.work(c, model, 2) + gradients
    assert guess == pytest.approx(real.peak(), rel=0.15)


DISTILLED = ["trainer.micro_batch=2", "model.encoders=offload"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "graphs", "beside"), [("training", 1, 2), ("fake score", 3, 0)])
def test_peaks_of_distillation(kind: str, graphs: int, beside: int, checkpointing: bool) -> None:
    c = config("sd35_medium_acdmd", *DISTILLED, f"trainer.gradient_checkpointing={str(checkpointing).lower()}")
    real = Measured(SHORT, "bf16", "lora", 333, 2, 64)
    if checkpointing:
        real.net.enable_gradient_checkpointing()
    parts = estimate.estimate(c, known(SHORT)).phases
    [guess] = [n for name, n in parts.items() if name.startswith(f"{kind} on 2 images")]
    assert guess == pytest.approx(real.peak(graphs, beside), rel=0.2)


def test_distillation_is_counted_whole() -> None:
    model = known(sizes.MEDIUM)

    def parts(preset: str, *overrides: str) -> estimate.Estimate:
        return estimate.estimate(config(preset, *overrides), model)

    def phase(found: estimate.Estimate, name: str) -> int:
        return next((n for key, n in found.phases.items() if key.startswith(name)), 0)

    one, two = parts("sd35_medium_acdmd", *DISTILLED), parts("sd35_medium_rtdmd", *DISTILLED)
    trained = one.held["LoRA, fp32"]
    for found in (one, two):
        own = ["fake score, fp32", "its first moments, fp32", "its second moments, fp32", "moving average"]
        assert {found.held[name] for name in own} == {trained} and found.held["AdamW's moments"] == 2 * trained
        assert not any("teacher" in name or "reference" in name for name in found.held)  # it is the model, adapters off
    assert two.held["LoRA to start from, fp32"] == trained and "LoRA to start from, fp32" not in one.held
    assert sum(one.held.values()) < 1.35 * one.held["transformer, bf16"]  # of which 0.07 is the VAE
    other = parts("sd35_medium_acdmd", *DISTILLED, "algorithm.teacher=someone/something")
    assert other.held["teacher, bf16"] == other.held["transformer, bf16"]
    full = parts("sd35_medium_acdmd", *DISTILLED, "adapter=full")
    assert "reference copy, bf16" in full.held and full.held["fake score, fp32"] > 100 * trained

    alone = parts("sd35_medium_acdmd", *DISTILLED, "algorithm.fake.consistency.weight=0")
    biased = parts("sd35_medium_acdmd", *DISTILLED, "algorithm.fake.consistency.paths=1")
    assert phase(alone, "fake score") < phase(biased, "fake score") < phase(one, "fake score")
    assert phase(alone, "fake score") > 0.3 * phase(one, "fake score")
    weightless = parts("sd35_medium_rtdmd", *DISTILLED, "algorithm.backpropagated={weight: 0, rewards: []}")
    graph = decoder_memory.decoder_graph(config("sd35_medium_rtdmd", *DISTILLED), model)
    assert 5 * GIB < graph < 6 * GIB and graph / 2 < phase(two, "training") - phase(weightless, "training") < graph
    assert (
        phase(parts("sd35_medium_rtdmd", *DISTILLED, "algorithm.matching=0", "algorithm.warmup=0"), "fake score") == 0
    )
    assert phase(parts("sd35_medium_acdmd", *DISTILLED, "evaluation={every: 0}"), "decoding") == 0
    assert phase(one, "decoding") > 0


@pytest.mark.parametrize(("name", "batch", "side"), [("sd3", 2, 64), ("sd3", 1, 128), ("tiny", 8, 8)])
def test_peak_of_decoding_with_a_gradient(name: str, batch: int, side: int) -> None:
    model = known(TINY.network if name == "tiny" else sizes.MEDIUM)
    with FakeTensorMode():
        vae = (sd3_vae() if name == "sd3" else AutoencoderKL.from_config(dict(TINY.vae))).eval().requires_grad_(False)
        existing = {t.untyped_storage()._cdata for t in vae.state_dict().values()}
        latents = torch.empty(batch, model.vae["latent_channels"], side, side, requires_grad=True)
        with Live(existing) as live:
            vae.decode(latents).sample.sum().backward()
    pixels = batch * (side * model.vae_factor) ** 2
    assert 4 * pixels * decoder_memory.kept_by_decoder(model) == pytest.approx(live.peak, rel=0.05)


def test_peak_of_decoding() -> None:
    with torch.no_grad(), FakeTensorMode():
        vae = sd3_vae().eval()
        existing = {t.untyped_storage()._cdata for t in vae.state_dict().values()}
        with Live(existing) as live:
            vae.decode(torch.empty(4, 16, 64, 64))
    assert estimate.decoded(config()) == 4  # of 512 x 512, which is what the pipeline decodes at once
    assert estimate.decode_work(config(), known(sizes.MEDIUM)) == pytest.approx(live.peak, rel=0.05)


def test_the_parts_add_up() -> None:
    found = estimate.Estimate({"a": 10, "b": 5}, {"c": 7}, {estimate.ENCODING: 20, "training": 14, "rollout": 1})
    assert found.total == 15 + 7 + 14  # encoding comes before anything is stored
    assert estimate.Estimate({"a": 0}, {}, {"x": int(21.6 * GIB)}).fits(24)
    assert not estimate.Estimate({"a": GIB}, {}, {"x": int(21.6 * GIB)}).fits(24)


def test_settings_move_the_numbers_that_they_should() -> None:
    model = known(sizes.MEDIUM)

    def parts(*overrides: str, processes: int = 1) -> estimate.Estimate:
        return estimate.estimate(config("sd35_medium_grpo", *overrides), model, processes)

    base = parts()
    weights = 2 * sum(n for name, n in sizes.KNOWN_PARTS.items() if name != "vae")
    assert base.held["text encoders, bf16"] == weights
    away = parts("model.encoders=offload")
    assert "text encoders, bf16" not in away.held and base.total - away.total == weights
    assert away.phases[estimate.ENCODING] - base.phases[estimate.ENCODING] == weights

    def latents(found: estimate.Estimate) -> int:
        return next(n for name, n in found.stored.items() if "transitions" in name)

    assert latents(base) == 1152 * 16 * 64 * 64 * 4 * (1 + 2 * 9)
    assert latents(parts(processes=8)) * 8 == latents(base)
    assert latents(parts("algorithm.window={size: 3, range: [0, 5]}")) == 1152 * 16 * 64 * 64 * 4 * (1 + 2 * 3)

    def training(found: estimate.Estimate) -> int:
        return next(n for name, n in found.phases.items() if name.startswith("training"))

    assert training(parts("sampling.guidance=1")) < 0.51 * training(base)
    assert training(parts("algorithm.cfg=false")) == training(parts("sampling.guidance=1"))
    assert training(parts("trainer.micro_batch=4")) < 0.51 * training(base)
    assert training(parts("trainer.gradient_checkpointing=true")) < 0.2 * training(base)
    assert "moving average" not in parts("trainer.ema=0", "trainer.ema_every=1").held
    full = parts("adapter=full")
    trained = sizes.elements(model.tensors) - math.prod(model.tensors["pos_embed.pos_embed"])
    assert full.held["AdamW's moments"] == 8 * trained and "reference copy, bf16" in full.held
    assert "reference copy, bf16" not in parts("adapter=full", "algorithm.kl.weight=0").held


def test_sizes_come_from_a_folder_the_hub_cache_or_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    name = "stabilityai/stable-diffusion-3.5-medium"
    from_table = sizes.find(ModelRef(path=name))
    assert from_table is not None and from_table.origin == "the known configuration" and from_table.t5_tokens == 256
    without = sizes.find(ModelRef(path=name, max_sequence_length=0))
    assert without is not None and "text_encoder_3" not in without.parts
    assert sizes.find(ModelRef(path="someone/something")) is None
    assert sizes.find(ModelRef(path=str(tmp_path))) is None

    folder = tiny_models.sd3_folder(tmp_path / "model", with_t5=True)
    found = sizes.find(ModelRef(path=str(folder)))
    assert found is not None and found.origin == "the model's files"
    pipe = pipelines.load(folder, device="cpu").pipe
    for part, elements in found.parts.items():
        assert elements == sum(p.numel() for p in getattr(pipe, part).parameters()), part
    assert found.tensors == {k: tuple(t.shape) for k, t in pipe.transformer.state_dict().items()}
    assert (found.clip_tokens, found.width, found.vae_factor) == (tiny_models.TOKENS, 32, 8)

    cache = tmp_path / "cache" / "models--owner--name"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    pipe.save_pretrained(cache / "snapshots" / "abc", max_shard_size="60KB")
    assert (cache / "snapshots/abc/transformer/diffusion_pytorch_model.safetensors.index.json").is_file()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for revision in (None, "abc"):
        cached = sizes.find(ModelRef(path="owner/name", revision=revision))
        assert cached is not None and (cached.tensors, cached.parts) == (found.tensors, found.parts)
    assert sizes.find(ModelRef(path="owner/name", revision="other")) is None

    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 20)
    assert sizes.find(ModelRef(path=str(folder))) is None


def test_what_would_make_it_fit_does() -> None:
    model = known(sizes.LARGE)
    for card in estimate.CARDS:
        c = config("sd35_medium_grpo")
        changes = knobs.fitting(c, model, card)
        if changes is None:
            assert not estimate.estimate(knobs.turned(c, dict(knobs.knobs(c))), model).fits(card)
        else:
            assert bool(changes) != estimate.estimate(c, model).fits(card)
            assert estimate.estimate(knobs.turned(c, changes), model).fits(card)
    saved = knobs.savings(config(), model)
    assert list(saved.values()) == sorted(saved.values(), reverse=True) and min(saved.values()) > 0
    (key, value), most = next(iter(saved.items()))
    less = estimate.estimate(config("sd35_medium_grpo", f"{key}={knobs.text(value)}"), model)
    assert estimate.estimate(config(), model).total - less.total == most


def test_out_of_memory_in_one_sentence() -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.2 GiB is free."
    )
    said = knobs.reworded(error, config())
    assert said.startswith("the accelerator is out of memory (2.50 GiB more were asked for, it has 23.64 GiB); set ")
    assert "model.encoders=offload (saves about 10.4 GiB)" in said and "trainer.micro_batch=4" in said
    assert "trainer.gradient_checkpointing=true" in said and "--resume auto" in said and "\n" not in said
    assert "dtype" not in said and "adapter" not in said  # in use already
    thrifty = ["model.encoders=offload", "trainer.micro_batch=1", "trainer.gradient_checkpointing=true"]
    assert "every setting that saves it is in use" in knobs.reworded(error, config("sd35_medium_grpo", *thrifty))
    full = knobs.reworded(error, config("sd35_medium_grpo", "adapter=full"))
    assert full.endswith("and go on with --resume auto; a new run with adapter=lora needs far less")
    small = config("shapes_demo", "trainer.micro_batch=2")  # on a card that others fill: nothing here would save much
    said = knobs.reworded(error, small)
    assert "set model.encoders=offload or trainer.gradient_checkpointing=true or trainer.micro_batch=1, and" in said
    elsewhere = knobs.reworded(torch.OutOfMemoryError("?"), config("sd35_medium_grpo", "model=someone/something"))
    assert elsewhere.startswith("the accelerator is out of memory; set model.dtype=bf16 or model.encoders=offload or ")


def sd35_presets() -> list[str]:
    return sorted(name for name in loading.presets() if name.startswith("sd35_"))


@pytest.mark.parametrize("preset", sd35_presets())
def test_presets_fit_the_cards_that_they_name(preset: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    text = loading.presets()[preset]
    default = re.search(r"[Ff]or\s(?:#\s)?cards of (\d+) GB", text)
    assert default is not None and f"train {preset} " in text
    variants = {int(card): overrides.split() for card, overrides in re.findall(r"^#   (\d+) GB: (.+)$", text, re.M)}
    assert {int(default[1]), *variants} == set(estimate.CARDS)
    for card, overrides in {int(default[1]): [], **variants}.items():
        c = config(preset, *overrides)
        model = sizes.find(c.model)
        assert model is not None and estimate.estimate(c, model).fits(card), (preset, card)


def test_launch_files_are_what_accelerate_reads() -> None:
    processes = {"multi_gpu.yaml": 8, "cpu.yaml": 2}
    files = list((ROOT / "configs" / "accelerate").glob("*.yaml"))
    assert {file.name for file in files} == set(processes)
    for file in files:
        loaded = load_config_from_file(str(file))
        assert loaded.num_processes == processes[file.name] and loaded.mixed_precision == "no" and not loaded.use_cpu


def test_copies_of_the_weights_and_a_gradient_for_each_reward_are_counted() -> None:
    model = known(sizes.MEDIUM)
    sampling = ["sampling.guidance=1", "sampling.kernel=dpm2", "advantage=group"]
    rewards = "rewards=[jpeg, {name: jpeg, label: a}, {name: jpeg, label: b}]"

    def parts(method: str, *overrides: str) -> estimate.Estimate:
        c = config("sd35_medium_grpo", *sampling, f"algorithm={method}", *overrides)
        return estimate.estimate(c, model)

    def training(found: estimate.Estimate) -> int:
        return next(n for name, n in found.phases.items() if name.startswith("training"))

    nft = parts("nft")
    trained = nft.held["moving average"]
    assert nft.held["old policy, fp32"] == parts("awm").held["slow copy, fp32"] == trained
    assert nft.total - parts("raft", "advantage=sft").total == trained
    assert parts("{name: awm, anchor: 0}").held == parts("raft", "advantage=sft").held
    full = parts("nft", "adapter=full")
    assert full.held["old policy, fp32"] == full.held["moving average"] > 100 * trained
    apart = {name: training(parts("nft", rewards, f"multireward={name}")) for name in ("pcgrad", "marble")}
    assert set(apart.values()) == {training(nft) + 4 * trained}
    two = "multireward={name: marble, groups: {both: [a, b]}}"
    assert training(parts("nft", rewards, two)) == training(nft) + 3 * trained
    assert training(parts("nft", rewards, "multireward={name: marble, alphas: fixed}")) == training(nft)


@pytest.mark.parametrize("preset", ["sd35_large_grpo", "shapes_nft", "shapes_marble"])
def test_estimating_imports_no_torch(preset: str) -> None:
    code = (
        f"import sys; from diffalign import loading, summary; summary.summary(loading.load('{preset}'));"
        "assert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
