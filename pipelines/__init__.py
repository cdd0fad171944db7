"""Loading a model by name. One file per family: SERVES lists the diffusers classes it serves, wrap() wraps one.

any.py serves every other text-to-image pipeline, for steering alone.
"""

from __future__ import annotations

import importlib
import pkgutil
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from diffalign.few_steps import FewSteps
from diffalign.pipelines import _note
from diffalign.pipelines._note import SIDECAR
from diffalign.types import UserError

__all__ = ["SIDECAR", "embedded_names", "embedded_path", "family", "few_steps", "load", "looks_like_hub_id", "outline"]
DTYPES = ("fp32", "bf16", "fp16")
ENCODERS = ("resident", "offload")

# Here rather than in sd3.py, because memory is estimated from them without importing torch.
ENCODE_BATCH = 32  # prompts that the text encoders take at once
DECODE_BATCH = 8  # images that the VAE decodes at once, unless they hold more pixels than this together:
DECODED_PIXELS = 1 << 20  # four images of 512 x 512; more are no faster and take 3 KiB of memory a pixel
GRADED_PIXELS = 1 << 18  # with a gradient one of 512 x 512, for what is kept of it takes 22 KiB a pixel

# Flow-GRPO (arXiv 2505.05470): the joint attention alone. "attn.to_q" does not end the name "attn2.to_q", so the
# second, image-only attention of SD3.5-medium's first 13 blocks stays frozen, as in the paper's code.
SD3_LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


def embedded_names() -> list[str]:
    """Names of the text-to-image models that ship with the package."""
    root = Path(str(files("diffalign.shapes"))) / "weights"
    return sorted(p.name for p in root.iterdir() if (p / "model_index.json").is_file()) if root.is_dir() else []


def embedded_path(name: str) -> Path:
    """Folder of the embedded model `name`, such as 'tiny-sd3'. Raises UserError for an unknown name."""
    if name not in embedded_names():
        known = ", ".join(embedded_names()) or "none in this installation"
        raise UserError(f"'{name}' is not an embedded model; embedded models: {known}")
    return Path(str(files("diffalign.shapes"))) / "weights" / name


def family(class_name: Any, steering: bool = False) -> ModuleType:
    """The module here that serves a diffusers pipeline class; an exact name wins over a pattern, a longer one over '*'.

    any.py, which serves every class, is considered for steering alone.
    """
    names = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names if steering or name != "any"]
    served = [(pattern, module) for module in modules for pattern in module.SERVES]
    for pattern, module in sorted(served, key=lambda entry: ("*" in entry[0], -len(entry[0]))):
        if fnmatch(str(class_name), pattern):
            return module
    known = ", ".join(sorted(pattern for pattern, _ in served))
    raise UserError(
        f"no adapter for a {class_name}; use a model of one of these diffusers classes: {known}; `diffalign steer` "
        "takes any text-to-image pipeline"
    )


def load(
    path: str | Path,
    revision: str | None = None,
    dtype: str = "fp32",
    device: str | None = None,
    max_sequence_length: int | None = None,
    encoders: str = "resident",
    steering: bool = False,
) -> Any:
    """Load an embedded model ('tiny-sd3'), a diffusers folder or a hub id, and wrap it: a :class:`Pipeline`.

    Args:
        revision: branch, tag or commit of a hub id.
        dtype: 'fp32', 'bf16' or 'fp16': storage of the frozen weights and precision of the network's forward.
        device: 'cpu', 'cuda', 'cuda:1' ...; by default the GPU when there is one.
        max_sequence_length: T5 tokens of the prompt; 0 does without T5 and does not load it. By default what diffusers
            uses (256 for SD3), but 0 for an embedded model, whose T5 is empty, and for a model exported from one.
        encoders: 'resident' on the device, or 'offload': in main memory, and on the device only to encode.
        steering: a class that no family file serves gives an AnyPipeline, which can be steered and not trained.

    A distilled model remembers its steps as `few_steps`, for generation, evaluation and steering.

    Raises UserError when the model cannot be found, reached, read or is of an unknown family.
    """
    import torch
    from diffusers import DiffusionPipeline

    if dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is not one of {', '.join(DTYPES)}")
    if encoders not in ENCODERS:
        raise UserError(f"encoders '{encoders}' is not one of {', '.join(ENCODERS)}")
    source, local = _locate(str(path), revision)
    chosen = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device '{device}' needs a GPU and PyTorch sees none; set device: cpu")
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    config, module = _index(path, source, local, revision, steering)
    note = _note.read(Path(source)) if local else _note.fetch(source, revision)
    if max_sequence_length is None:
        max_sequence_length = note.max_sequence_length
    try:
        # The VAE stays in fp32: it decodes the images that are rewarded.
        dtypes: Any = {"default": torch_dtype, "vae": torch.float32}
        # A part saved as null, such as the T5 of an SD3 without it, must be passed as None.
        absent: Any = {name: None for name, part in config.items() if part == [None, None]}
        absent |= dict.fromkeys(module.unused(max_sequence_length))
        pipe = DiffusionPipeline.from_pretrained(
            source, revision=revision, dtype=dtypes, use_safetensors=True, **absent
        )
    except Exception as error:
        raise UserError(_unreadable(path, local, error)) from error
    _check_tokenizers(path, pipe)
    if note.scheduler is not None:  # the saved one knows the few steps alone
        pipe.scheduler = type(pipe.scheduler).from_config(note.scheduler)
    offload = encoders == "offload"
    wrapped = module.wrap(pipe, torch_dtype, chosen, max_sequence_length, (source, revision), offload)
    wrapped.few_steps = note.few_steps
    return wrapped


def few_steps(path: str | Path, lora: str | Path | None = None, revision: str | None = None) -> FewSteps | None:
    """How a distilled model is sampled: what its LoRA remembers, or else the model itself; None for any other model.

    Either is a folder or a hub id, whose note is read from the hub or its cache; a LoRA may be a file in its folder.
    """
    own = None if lora is None else _remembered(lora, None)
    return own or _remembered(path, revision)


def _remembered(path: str | Path, revision: str | None) -> FewSteps | None:
    place = Path(path).expanduser()
    if not place.exists() and looks_like_hub_id(str(path)):
        return _note.fetch(str(path), revision).few_steps
    return _note.read(place.parent if place.is_file() else place).few_steps


def looks_like_hub_id(path: str) -> bool:
    """'owner/name': what may be asked of the hub when no such folder exists."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith("/")


def outline(path: str | Path, revision: str | None = None) -> Any:
    """What `load(..., steering=True)` gives, of its configuration files alone: every part is there, on the device
    "meta" and without weights, so it tells its size and whether a LoRA fits. It has no tokenizers.

    Raises UserError for what `load` would refuse of these files, and for weights on this machine that are cut off or
    missing; other errors for a class that cannot be made without weights.
    """
    import torch
    from diffusers import DiffusionPipeline

    from diffalign.pipelines import _outline

    source, local = _locate(str(path), revision)
    config, module = _index(path, source, local, revision, steering=True)
    tokens = (_note.read(Path(source)) if local else _note.fetch(source, revision)).max_sequence_length
    parts = _outline.parts(source, revision, config) | dict.fromkeys(module.unused(tokens))
    if local:
        _outline.check_weights(Path(source), parts)
    pipe = DiffusionPipeline.from_pretrained(source, revision=revision, **parts)
    return module.wrap(pipe, torch.float32, torch.device("meta"), tokens, (source, revision))


def _index(
    path: str | Path, source: str, local: bool, revision: str | None, steering: bool
) -> tuple[dict[str, Any], ModuleType]:
    """model_index.json, and the family that serves it."""
    from diffusers import DiffusionPipeline

    try:
        config: dict[str, Any] = DiffusionPipeline.load_config(source, revision=revision)
    except Exception as error:  # the hub client raises many kinds, none of which the user should meet as a traceback
        raise UserError(_unreadable(path, local, error)) from error
    if "_class_name" not in config:
        raise UserError(f"model_index.json of '{path}' names no _class_name; save the model with save_pretrained")
    return config, family(config["_class_name"], steering)


def _locate(path: str, revision: str | None) -> tuple[str, bool]:
    """(folder or hub id, is it on this machine)."""
    local = path in embedded_names() or Path(path).expanduser().is_dir()
    if local and revision is not None:
        raise UserError(f"revision '{revision}' applies to hub ids only, and '{path}' is on this machine; leave it out")
    if local:
        return str(embedded_path(path) if path in embedded_names() else Path(path).expanduser()), True
    if not looks_like_hub_id(path):
        known = ", ".join(embedded_names())
        raise UserError(f"model folder '{path}' does not exist; give a folder, a hub id or an embedded name ({known})")
    return path, False


def _check_tokenizers(path: str | Path, pipe: Any) -> None:
    # transformers gives a tokenizer without its files a vocabulary of special tokens, and every prompt would look alike
    from transformers import PreTrainedTokenizerBase

    for name, part in pipe.components.items():
        encoder = pipe.components.get(name.replace("tokenizer", "text_encoder"))
        if not isinstance(part, PreTrainedTokenizerBase) or not name.startswith("tokenizer") or encoder is None:
            continue  # FLUX.2 has a processor of text and images there
        words, known = encoder.config.get_text_config().vocab_size, len(part)
        if 2 * known < words:
            raise UserError(
                f"cannot load model '{path}': its {name} knows {known} of the text encoder's {words} tokens; "
                f"put the vocabulary (tokenizer.json, or vocab.json and merges.txt) into its folder {name}"
            )


def _unreadable(path: str | Path, local: bool, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    fix = (
        "the folder must be complete, as save_pretrained writes it"
        if local
        else "check the name and the network, or run `hf auth login` for a gated model"
    )
    return f"cannot load model '{path}': {reason}; {fix}"
