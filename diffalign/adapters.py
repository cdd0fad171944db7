"""What is trained, a LoRA (one or several, named) or every weight; the reference policy; export for diffusers."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffalign.few_step_export import complete_model
from diffalign.lora_tensors import START, adapter_names, is_start, keep_fp32, lora_layers, misfit, summed
from diffalign.pipelines import looks_like_hub_id
from diffalign.sections import Sampling
from diffalign.sizes import LORA_FILE
from diffalign.types import UserError
from diffalign.writing import scratch_folder

INITS: dict[str, str | bool] = {"gaussian": "gaussian", "kaiming": True}  # of A; B starts at 0 and changes nothing


class Adaptable(Protocol):
    """The part of a pipeline that this file works on."""

    pipe: Any  # the diffusers pipeline
    network: Any  # its denoising network, never wrapped
    trainable: nn.Module  # what the denoiser calls: the network, or a trainer's wrapped form of it
    frozen: nn.Module | None  # the initial network of a full fine-tuning, or a teacher
    lora_targets: tuple[str, ...]
    source: tuple[str, str | None] | None  # (path, revision) it was loaded from
    max_sequence_length: int | None  # None for a family without T5


def add_lora(
    pipeline: Adaptable,
    rank: int,
    alpha: float,
    init: str = "gaussian",
    targets: Sequence[str] | None = None,
    name: str = "default",
) -> None:
    """W + (alpha / rank) B A on the target layers, as the active and trained adapter (arXiv 2106.09685); on top of the
    frozen one, if :func:`load_frozen` has put one there.

    `targets` are module-name suffixes; by default the family's. A and B are fp32 whatever the base's dtype. Raises
    UserError for a rank below 1, an unknown init, a name in use, or a target that matches no module.
    """
    network = pipeline.network
    if rank < 1:
        raise UserError(f"the LoRA rank must be at least 1, got {rank}")
    if init not in INITS:
        raise UserError(f"LoRA init '{init}' is unknown; use one of {', '.join(INITS)}")
    _unused(network, name)
    chosen = list(pipeline.lora_targets if targets is None else targets)
    modules = [n for n, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d, BaseTunerLayer))]
    if not chosen:
        raise UserError("the LoRA has no targets; name at least one layer, such as attn.to_q")
    for target in chosen:
        if not any(m == target or m.endswith(f".{target}") for m in modules):
            raise UserError(f"LoRA target '{target}' matches no layer; give the end of a name, such as attn.to_q")
    # peft calls alpha an int and computes with any number
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=INITS[init], target_modules=chosen)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        network.add_adapter(config, name)
    keep_fp32(network)
    _use(network, name)


def add_full(pipeline: Adaptable, reference: bool = False) -> None:
    """Train every weight of the network, in fp32 whatever it was loaded in: load fp32 if the file is fp32.

    `reference` keeps a frozen copy of the initial weights, in the dtype they were loaded in, for :func:`reference`.
    """
    if adapter_names(pipeline.network):
        raise UserError("the model has a LoRA; train either the LoRA or all weights")
    if reference:
        pipeline.frozen = copy.deepcopy(pipeline.network).requires_grad_(False)
    pipeline.network.float().requires_grad_(True)


@contextmanager
def reference(pipeline: Adaptable) -> Iterator[None]:
    """Inside, the pipeline is the model that training started from: the frozen copy, or all adapters off.

    Raises UserError when all weights are trained and no copy was kept.
    """
    layers = lora_layers(pipeline.network)
    if pipeline.frozen is not None or not layers:
        if pipeline.frozen is None:
            raise UserError("no reference policy: add a LoRA, or keep a copy with add_full(pipeline, reference=True)")
        called, pipeline.trainable = pipeline.trainable, pipeline.frozen
        try:
            yield
        finally:
            pipeline.trainable = called
    elif layers[0].disable_adapters:  # already inside
        yield
    else:
        with _gradients_as_they_are(pipeline.network):
            pipeline.network.disable_adapters()
            try:
                yield
            finally:
                pipeline.network.enable_adapters()


@contextmanager
def active(pipeline: Adaptable, name: str) -> Iterator[None]:
    """Inside, adapter `name` (an old policy, a fake score) is the one in use, on top of the frozen one, if there is
    one. What is trained does not change."""
    if name not in adapter_names(pipeline.network):
        known = ", ".join(adapter_names(pipeline.network)) or "none"
        raise UserError(f"there is no adapter '{name}'; adapters: {known}")
    before = pipeline.network.active_adapters()
    with _gradients_as_they_are(pipeline.network):
        _use(pipeline.network, name)
        try:
            yield
        finally:
            pipeline.network.set_adapter(before)


def trainable_parameters(pipeline: Adaptable) -> list[nn.Parameter]:
    """What the optimizer gets: the active adapter's parameters, or all."""
    return [p for p in pipeline.network.parameters() if p.requires_grad]


def trainable_state(pipeline: Adaptable) -> dict[str, Tensor]:
    """The trained tensors by parameter name, live (not copied): the form in which the exports take EMA weights."""
    return {name: p.detach() for name, p in pipeline.network.named_parameters() if p.requires_grad}


def export_lora(
    pipeline: Adaptable, folder: str | Path, state: Mapping[str, Tensor] | None = None, name: str = "default"
) -> Path:
    """Write adapter `name` as diffusers reads it: `pipe.load_lora_weights(folder)` gives the same images. On top of a
    frozen one the file holds the sum of both.

    The file carries rank and alpha. `state` overrides the weights, keyed as :func:`trainable_state`. Returns the file.
    """
    network = pipeline.network
    if name not in adapter_names(network):
        raise UserError(f"there is no LoRA named '{name}' to export; a full fine-tuning is exported with export_full")
    layers = get_peft_model_state_dict(network, adapter_name=name)
    if state is not None:
        known, layers = layers.keys(), get_peft_model_state_dict(network, state_dict=dict(state), adapter_name=name)
        if known != layers.keys():
            raise ValueError(f"the given weights are not those of adapter '{name}'")
    config = network.peft_config[name]
    if START in adapter_names(network):
        layers, config = summed(network, {START: get_peft_model_state_dict(network, adapter_name=START), name: layers})
    component = _component(pipeline)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target / ".new") as scratch:
        weights = {k: t.detach().float().cpu().contiguous() for k, t in layers.items()}
        parts = {
            f"{component}_lora_layers": weights,
            f"{component}_lora_adapter_metadata": config.to_dict(),
        }
        pipeline.pipe.save_lora_weights(scratch, **parts)
        os.replace(scratch / LORA_FILE, target / LORA_FILE)
    return target / LORA_FILE


def load_lora(pipeline: Adaptable, folder: str | Path, name: str = "default") -> None:
    """Load a diffusers LoRA (folder, file or hub id), with its rank and alpha, as a new adapter: active and trained.

    Raises UserError for a name in use, and for a file that is missing, no LoRA of diffusers, or does not fit.
    """
    network, component = pipeline.network, _component(pipeline)
    _unused(network, name)
    if not Path(folder).exists() and not looks_like_hub_id(str(folder)):
        raise UserError(f"LoRA folder '{folder}' does not exist; give a folder that holds {LORA_FILE}")
    try:
        state, metadata = pipeline.pipe.lora_state_dict(str(folder), weight_name=LORA_FILE, return_lora_metadata=True)
    except Exception as error:  # hub and file errors of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"cannot read a LoRA from '{folder}': {reason}; it must hold {LORA_FILE}") from error
    foreign = [k for k in state if not k.startswith(f"{component}.") or ".lora_" not in k]
    if foreign or not state:
        found = f"it holds '{foreign[0]}'" if foreign else "it is empty"
        raise UserError(f"the LoRA in '{folder}' is not one of a {component} in the diffusers format: {found}")
    layers = {k.removeprefix(f"{component}."): t for k, t in state.items()}
    if wrong := misfit(network, layers):
        raise UserError(f"the LoRA in '{folder}' does not fit: {wrong}; load the model that it was trained on")
    network.load_lora_adapter(state, prefix=component, adapter_name=name, metadata=metadata)
    keep_fp32(network)
    _use(network, name)


def load_frozen(pipeline: Adaptable, folder: str | Path) -> None:
    """Load a LoRA as :func:`load_lora` does, to stay as it is under the one that :func:`add_lora` adds next.

    The model then starts from base + LoRA, and its :func:`reference` is the base alone.
    """
    load_lora(pipeline, folder, START)


def export_full(
    pipeline: Adaptable,
    folder: str | Path,
    state: Mapping[str, Tensor] | None = None,
    sampling: Sampling | None = None,
) -> Path:
    """Write the whole pipeline as a diffusers folder, replacing `folder`; `state` as in :func:`export_lora`.

    Text encoders that were released are read again. diffusers will walk `sampling`'s timesteps, if it has any.
    """
    if adapter_names(pipeline.network):
        raise UserError("the model has a LoRA; export it with export_lora")
    pipe, target = _whole(pipeline), Path(folder)
    with scratch_folder(target.with_name(f".{target.name}.new")) as scratch:
        with _weights(pipeline.network, state):
            pipe.save_pretrained(scratch / "new")
        complete_model(scratch / "new", pipe, pipeline.max_sequence_length, sampling)
        if target.exists():
            os.replace(target, scratch / "old")
        os.replace(scratch / "new", target)
    return target


def _use(network: Any, name: str) -> None:
    """Adapter `name`, trained, on top of the frozen one."""
    network.set_adapter([START, name] if START in adapter_names(network) and name != START else [name])
    for key, p in network.named_parameters():
        if is_start(key):
            p.requires_grad_(False)


def _unused(network: Any, name: str) -> None:
    if name in adapter_names(network):
        raise UserError(f"an adapter named '{name}' exists already; give the new one another name")


@contextmanager
def _gradients_as_they_are(network: nn.Module) -> Iterator[None]:
    # switching adapters flips requires_grad; what is trained must be the same afterwards
    before = [(p, p.requires_grad) for p in network.parameters()]
    try:
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


@contextmanager
def _weights(network: nn.Module, state: Mapping[str, Tensor] | None) -> Iterator[None]:
    state = state or {}
    swapped = [(p, p.data, state[name]) for name, p in network.named_parameters() if name in state]
    if len(swapped) != len(state):
        raise ValueError("the given weights are not those of the network")
    try:
        for p, live, other in swapped:
            p.data = other.detach().to(live)
        yield
    finally:
        for p, live, _ in swapped:
            p.data = live


def _component(pipeline: Adaptable) -> str:
    """'transformer' or 'unet': the network's name in the diffusers pipeline."""
    return next(str(name) for name, part in pipeline.pipe.components.items() if part is pipeline.network)


def _whole(pipeline: Adaptable) -> Any:
    """The diffusers pipeline with all parts its source has: encoders that were released or never loaded are read."""
    if pipeline.source is None and pipeline.pipe.text_encoder is None:
        raise UserError("the text encoders were released; export before release_encoders()")
    if pipeline.source is None:
        return pipeline.pipe
    path, revision = pipeline.source
    config = DiffusionPipeline.load_config(path, revision=revision)
    absent = {name: None for name, part in config.items() if part == [None, None]}
    missing = {name for name, part in pipeline.pipe.components.items() if part is None and name in config}
    if missing <= absent.keys():
        return pipeline.pipe
    own = {"vae": pipeline.pipe.vae, "scheduler": pipeline.pipe.scheduler}
    parts = {**absent, **own, _component(pipeline): pipeline.network}
    return DiffusionPipeline.from_pretrained(path, revision=revision, **parts)
