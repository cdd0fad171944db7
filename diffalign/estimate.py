"""Memory of a run on one accelerator, estimated without loading the model.

Activations are what autograd keeps for the backward pass: tokens x blocks x width x constants, which are sums over the
tensors that one block of diffusers' MMDiT saves. Tests hold them against autograd itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffalign import sizes
from diffalign.decoder_memory import decode_work, decoded, decoder_graph
from diffalign.pipelines import ENCODE_BATCH, SD3_LORA_TARGETS
from diffalign.sections import Lora, ModelRef
from diffalign.sizes import ModelSizes, elements

if TYPE_CHECKING:
    from diffalign.config import Config

GIB = 2**30
CARDS = (24, 48, 80)  # GiB
RESERVE = 0.1  # of a card, for the CUDA context, libraries' workspaces and fragmentation
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
ENCODING = "encoding prompts"

# Bytes that one block keeps of each token and unit of width, in 16 bits under autocast and in fp32.
ATTENTION = {2: 8, 4: 16}  # q, k, v and the output of joint attention
QK_NORM = {2: 12, 4: 8}  # of q and k: the input, and in 16 bits an fp32 copy of it
GELU = {2: 8, 4: 16}  # its input, four widths
LAYER_NORM = {2: 8, 4: 8}  # two inputs, always fp32
# Beside those, when the block's own weights are trained:
LINEAR_INPUTS = {2: 18, 4: 24}  # of q, k, v (in 16 bits a cast for each), of the projection out and of the feed-forward
MODULATION = {2: 12, 4: 16}  # both norms' outputs, which the trained scales multiply, and what the gates multiply
QK_WEIGHT = {2: 8, 4: 8}  # the normalised q and k, which the trained weights multiply
WORKING = {2: 30, 4: 60}  # largest set of temporaries of a block, for each image token and unit of width
T5_FEED_FORWARD = 6 * 10240  # of T5-XXL, for each token: six tensors of its gated feed-forward


@dataclass(frozen=True)
class Estimate:
    """Bytes by part. `held` is there all the time, `stored` from rollout to update, of `phases` one at a time."""

    held: dict[str, int]
    stored: dict[str, int]
    phases: dict[str, int]

    @property
    def total(self) -> int:
        stored = sum(self.stored.values())
        return sum(self.held.values()) + max(n + (0 if name == ENCODING else stored) for name, n in self.phases.items())

    def fits(self, card: int) -> bool:
        """Within a card of so many GiB less the reserve."""
        return self.total <= card * GIB * (1 - RESERVE)


def estimate(config: Config, model: ModelSizes, processes: int = 1) -> Estimate:
    """Memory of one of `processes` processes. Of what a method keeps for itself, copies of the weights are counted."""
    images = -(-config.trainer.prompts * config.trainer.images_per_prompt // processes)
    return Estimate(held(config, model), stored(config, model, images), phases(config, model, images))


def held(config: Config, model: ModelSizes) -> dict[str, int]:
    """Weights and what the optimizer and the average keep of them."""
    dtype, lora = config.model.dtype, isinstance(config.adapter, Lora)
    network, trained = elements(model.tensors), elements(trained_tensors(config, model))
    found = {f"transformer, {dtype if lora else 'fp32'}": network * (BYTES[dtype] if lora else 4)}
    if config.model.encoders == "resident":
        found[f"text encoders, {dtype}"] = encoders(config, model)
    found["VAE, fp32"] = 4 * model.parts["vae"]
    if lora:
        found["LoRA, fp32"] = 4 * trained
    if below := elements(start_tensors(config, model)):
        found["LoRA to start from, fp32"] = 4 * below
    found["AdamW's moments"] = 8 * trained
    if config.trainer.ema:
        found["moving average"] = 4 * trained
    found |= {f"{name}, fp32": 4 * trained for name in config.algorithm.copies}
    if not lora and config.algorithm.needs_reference:
        found[f"reference copy, {dtype}"] = network * BYTES[dtype]
    if teacher := settings(config).get("teacher"):
        other = sizes.find(ModelRef(path=teacher))
        found[f"teacher, {dtype}"] = BYTES[dtype] * (network if other is None else elements(other.tensors))
    return found


def stored(config: Config, model: ModelSizes, images: int) -> dict[str, int]:
    """What an epoch keeps of its images: latents, transitions (x, x'), embeddings of the prompts."""
    t = config.trainer
    kept = kept_steps(config)
    means = kept if settings(config).get("ratio_norm", False) and t.updates_per_rollout * t.passes > 1 else 0
    prompt = prompt_tokens(model) * model.number("joint_attention_dim") + model.number("pooled_projection_dim")
    transitions = f", {kept} transitions" if kept else ""
    return {
        f"{images} images: latents{transitions}": images * latent(config, model) * (1 + 2 * kept + means),
        "their prompts": min(t.prompts, images) * prompt * BYTES[config.model.dtype],
    }


def phases(config: Config, model: ModelSizes, images: int) -> dict[str, int]:
    """What is there for a while, one after the other."""
    t = config.trainer
    trained = 4 * elements(trained_tensors(config, model))
    batch = min(t.micro_batch, images)
    sampled, cast = passes(config.sampling.guidance), casts(config, model)
    moved = encoders(config, model) if config.model.encoders == "offload" else 0
    found = {
        ENCODING: moved + encode_work(config, model),  # before anything is stored
        f"rollout of {batch} images": work(config, model, batch * sampled) + cast,
    }
    if config.algorithm.rewarded or config.evaluation.every:
        found[f"decoding {decoded(config)} images"] = decode_work(config, model)
    for kind, graphs in config.algorithm.graphs(config.sampling.steps).items():
        main = kind == "training"
        gradients = trained * (1 + separate_gradients(config) * main)
        found[f"{kind} on {batch} images, gradients {gradients / GIB:.1f}"] = gradients + training_peak(
            config, model, batch, graphs, besides(config, model, batch) if main else 0
        )
    found["optimizer step"] = trained + trained  # gradients, and a temporary of AdamW
    if config.evaluation.every:
        samples = t.micro_batch * passes(config.evaluation_sampling.guidance)
        set_aside = trained if t.ema else 0  # while the average is in their place
        found["evaluation"] = work(config, model, samples) + cast + set_aside
    return found


def learned(config: Config) -> int:
    """Samples that one image takes in a forward with a gradient."""
    options = settings(config)
    if "fake" in options or not options.get("cfg", True):
        return 1
    return passes(options.get("guidance") or config.sampling.guidance)


def training_peak(config: Config, model: ModelSizes, batch: int, graphs: int, beside: int) -> int:
    """Activations of so many forward passes, and the larger of a backward pass and of what runs before it."""
    samples = batch * learned(config)
    kept, again = activations(config, model, samples)
    return graphs * kept + max(again + work(config, model, samples), beside)


def besides(config: Config, model: ModelSizes, batch: int) -> int:
    """What runs while activations are kept: a teacher under guidance; the decoder, which keeps its own when the images'
    gradient is taken."""
    options = settings(config)
    teacher = work(config, model, 2 * batch) if "fake" in options and options["guidance"] != 1 else 0
    return max(teacher, decoder_graph(config, model) if config.algorithm.ascends() else 0)


def separate_gradients(config: Config) -> int:
    """Gradients that are kept apart while losses are split: one a reward, and the penalties'."""
    method = config.multireward
    if method is None or not method.splits:
        return 0
    return len(method.grouped([r.key for r in config.rewards])) + 1


def passes(guidance: float) -> int:
    """Samples that one image takes in a forward."""
    return 1 if guidance == 1 else 2


def encoders(config: Config, model: ModelSizes) -> int:
    return BYTES[config.model.dtype] * sum(n for name, n in model.parts.items() if name != "vae")


def kept_steps(config: Config) -> int:
    return len(config.algorithm.kept(config.sampling.steps, config.seed, 0))


def latent(config: Config, model: ModelSizes) -> int:
    """Bytes of one image's latents, always fp32."""
    height, width = (side // model.vae_factor for side in (config.sampling.height, config.sampling.width))
    return 4 * model.number("in_channels") * height * width


def settings(config: Config) -> dict[str, Any]:
    """The method's own keys: `cfg` and `ratio_norm`, where a method has them, change what is kept."""
    return config.algorithm.model_dump()


def start_tensors(config: Config, model: ModelSizes) -> sizes.Shapes:
    """Shapes of the frozen LoRA that `adapter.start` names: of its file, or as large as the new one."""
    if not isinstance(config.adapter, Lora) or config.adapter.start is None:
        return {}
    return sizes.lora_tensors(config.adapter.start) or trained_tensors(config, model)


def trained_tensors(config: Config, model: ModelSizes) -> sizes.Shapes:
    """Shapes of what the optimizer gets: the two factors of every adapted layer, or every weight."""
    if not isinstance(config.adapter, Lora):
        return {name: shape for name, shape in model.tensors.items() if name != "pos_embed.pos_embed"}
    rank = config.adapter.rank
    found: sizes.Shapes = {}
    for name, (out, into) in adapted(config, model).items():
        found |= {f"{name}.lora_A": (rank, into), f"{name}.lora_B": (out, rank)}
    return found


def adapted(config: Config, model: ModelSizes) -> dict[str, tuple[int, int]]:
    """Layers that carry a LoRA, as name -> (out, in)."""
    assert isinstance(config.adapter, Lora)
    targets = config.adapter.targets or SD3_LORA_TARGETS
    found = {}
    for name, shape in model.tensors.items():
        layer = name.removesuffix(".weight")
        if layer != name and len(shape) > 1 and any(layer == t or layer.endswith(f".{t}") for t in targets):
            found[layer] = (shape[0], math.prod(shape[1:]))
    return found


def prompt_tokens(model: ModelSizes) -> int:
    return model.clip_tokens + model.t5_tokens


def image_tokens(config: Config, model: ModelSizes) -> int:
    patch = model.vae_factor * model.number("patch_size")
    return (config.sampling.height // patch) * (config.sampling.width // patch)


def saved(config: Config, model: ModelSizes, samples: int) -> int:
    """Bytes kept for the backward pass of `samples` forwards (two an image under guidance)."""
    return sum(activations(config, model, samples))


def activations(config: Config, model: ModelSizes, samples: int) -> tuple[int, int]:
    """(those that are kept until the backward pass, those of a block that it computes again)."""
    layers, width = model.number("num_layers"), model.width
    image, text = image_tokens(config, model), prompt_tokens(model)
    tokens, size = image + text, BYTES[config.model.dtype]
    dual, normed = len(model.network["dual_attention_layers"]), model.network["qk_norm"] is not None
    second = ATTENTION[size] + normed * QK_NORM[size]
    plain = second + GELU[size] + LAYER_NORM[size]
    if isinstance(config.adapter, Lora):
        inputs = sum((text if of_text(n) else image) * width_in for n, width_in in lora_inputs(config, model, size))
        own = size * inputs
    else:
        weights = LINEAR_INPUTS[size] + MODULATION[size] + normed * QK_WEIGHT[size]
        own = weights * tokens * width * layers
        second += (5 if size == 2 else 2) * size + normed * QK_WEIGHT[size]  # its linears' inputs and its gate
    blocks = width * (plain * tokens * layers + second * image * dual)
    whole = samples * (blocks + own)
    cast = casts(config, model)
    if not config.trainer.gradient_checkpointing:
        return whole + cast, 0
    # Each block keeps its two inputs; in the backward pass one at a time is computed again and keeps everything.
    return samples * (size * tokens * width * layers), max((whole + cast) // layers, cast)


def casts(config: Config, model: ModelSizes) -> int:
    """Autocast holds 16-bit copies of the trained weights, which are fp32, during a forward pass, and of a LoRA's below
    them."""
    if config.model.dtype == "fp32":
        return 0
    return 2 * (elements(trained_tensors(config, model)) + elements(start_tensors(config, model)))


def lora_inputs(config: Config, model: ModelSizes, size: int) -> Iterator[tuple[str, int]]:
    """(layer, elements of a token) that LoRA layers keep: their input, and its product with the first factor."""
    assert isinstance(config.adapter, Lora)
    seen = set()
    for name, (_, into) in adapted(config, model).items():
        # In 16 bits every layer casts its input for itself; in fp32 q, k and v keep the same tensor.
        source = name if size == 2 else re.sub(r"\.(to|add)_[qkv](_proj)?$", r".\1", name)
        yield name, config.adapter.rank + (0 if source in seen else into)
        seen.add(source)


def of_text(layer: str) -> bool:
    return ".add_" in layer or ".to_add_" in layer or "context" in layer


def work(config: Config, model: ModelSizes, samples: int) -> int:
    """Temporaries of a forward or backward pass: those of the largest block, and the prompts' embeddings."""
    size = BYTES[config.model.dtype]
    inputs = prompt_tokens(model) * model.number("joint_attention_dim") * size
    block = WORKING[size] * image_tokens(config, model) * model.width
    return samples * (block + inputs)


def encode_work(config: Config, model: ModelSizes) -> int:
    """Temporaries of T5, the largest text encoder, or of what is made in its place."""
    prompts, size = min(ENCODE_BATCH, config.trainer.prompts), BYTES[config.model.dtype]
    if "text_encoder_3" not in model.parts:
        return prompts * prompt_tokens(model) * model.number("joint_attention_dim") * size
    return prompts * model.t5_tokens * T5_FEED_FORWARD * size
