"""How large a model is, from the headers of its files or a table of known configurations; nothing is loaded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.pipelines import SIDECAR, embedded_names, embedded_path

if TYPE_CHECKING:
    from diffalign.sections import ModelRef

Shapes = dict[str, tuple[int, ...]]  # tensor name -> shape

SD3_CLASS = "StableDiffusion3Pipeline"
SD3_TOKENS = 256  # of T5, unless the configuration says otherwise
MISSING = {"dual_attention_layers": (), "qk_norm": None}  # keys that SD3's first transformer/config.json lacks

# transformer/config.json of the released models
MEDIUM: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
LARGE = MEDIUM | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}
KNOWN = {
    "stabilityai/stable-diffusion-3-medium-diffusers": MEDIUM
    | {"pos_embed_max_size": 192, "dual_attention_layers": (), "qk_norm": None},
    "stabilityai/stable-diffusion-3.5-medium": MEDIUM,
    "stabilityai/stable-diffusion-3.5-large": LARGE,
    "stabilityai/stable-diffusion-3.5-large-turbo": LARGE,
}
KNOWN_PARTS = {  # CLIP-L, CLIP-G, the encoder of T5-XXL, and the autoencoder with 16 latent channels
    "text_encoder": 123_650_304,
    "text_encoder_2": 694_659_840,
    "text_encoder_3": 4_762_310_656,
    "vae": 83_819_683,
}
KNOWN_VAE = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16, "layers_per_block": 2}
CLIP_CONTEXT = 77
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for


@dataclass(frozen=True)
class ModelSizes:
    """What memory and work depend on."""

    origin: str  # where the numbers are from, for the user
    network: Mapping[str, Any]  # its config.json
    tensors: Shapes  # of the network, buffers included
    parts: Mapping[str, int]  # elements of the other parts, by their names in the diffusers pipeline
    vae: Mapping[str, Any]  # its config.json
    clip_tokens: int
    t5_tokens: int  # 0: T5 is not loaded

    def number(self, key: str) -> int:
        """A whole number of the network's configuration."""
        return int(self.network[key])

    @property
    def width(self) -> int:
        return self.number("attention_head_dim") * self.number("num_attention_heads")

    @property
    def vae_factor(self) -> int:
        """Pixels along one side of a latent."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))


def find(model: ModelRef) -> ModelSizes | None:
    """Sizes of an SD3 model: of the folder or the hub's cache, else of the known table. None if neither has it."""
    folder = _folder(model)
    if folder is not None:
        try:
            return _read(folder, model.max_sequence_length)
        except (OSError, ValueError, KeyError, TypeError):  # incomplete, or of a family that is not known here
            pass
    network = KNOWN.get(model.path)
    if network is None:
        return None
    tokens = SD3_TOKENS if model.max_sequence_length is None else model.max_sequence_length
    parts = {name: n for name, n in KNOWN_PARTS.items() if tokens or name != "text_encoder_3"}
    shapes = sd3_tensors(network)
    return ModelSizes("the known configuration", network, shapes, parts, KNOWN_VAE, CLIP_CONTEXT, tokens)


def _folder(model: ModelRef) -> Path | None:
    if model.path in embedded_names():
        return Path(embedded_path(model.path))
    local = Path(model.path).expanduser()
    if local.is_dir():
        return local
    home = os.environ.get("HF_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    cache = Path(home, "hub")
    stored = Path(os.environ.get("HF_HUB_CACHE", cache)).expanduser() / f"models--{model.path.replace('/', '--')}"
    revision = model.revision or "main"
    named = stored / "refs" / revision
    snapshot = stored / "snapshots" / (named.read_text().strip() if named.is_file() else revision)
    return snapshot if snapshot.is_dir() else None


def _read(folder: Path, tokens: int | None) -> ModelSizes:
    """Raises OSError, ValueError, KeyError or TypeError for a folder that does not hold a whole SD3 pipeline."""
    index = _json(folder / "model_index.json")
    if index["_class_name"] != SD3_CLASS:
        raise ValueError(f"not a {SD3_CLASS}")
    if tokens is None:
        note = folder / SIDECAR
        tokens = int(_json(note)["max_sequence_length"]) if note.is_file() else SD3_TOKENS
    present = {name for name, part in index.items() if isinstance(part, list) and part != [None, None]}
    if tokens == 0:
        present.discard("text_encoder_3")
    parts = {name: elements(_tensors(folder / name)) for name in KNOWN_PARTS if name in present}
    return ModelSizes(
        origin="the model's files",
        network=MISSING | _json(folder / "transformer" / "config.json"),
        tensors=_tensors(folder / "transformer"),
        parts=parts,
        vae=_json(folder / "vae" / "config.json"),
        clip_tokens=int(_json(folder / "text_encoder" / "config.json")["max_position_embeddings"]),
        t5_tokens=tokens,
    )


def lora_tensors(start: str) -> Shapes:
    """Shapes of a LoRA in a folder or file; none where there is no such file yet."""
    path = Path(start).expanduser()
    try:
        return _header(path / LORA_FILE if path.is_dir() else path)
    except (OSError, ValueError):
        return {}


def _json(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text("utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} holds no object")
    return found


def _tensors(folder: Path) -> Shapes:
    """Shapes of a part's tensors, from the headers of its safetensors files; the fp16 copy beside them is left out."""
    shapes: Shapes = {}
    for stem in ("diffusion_pytorch_model", "model"):
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.is_file():
            files = [folder / name for name in sorted(set(_json(index)["weight_map"].values()))]
        elif single.is_file():
            files = [single]
        else:
            continue
        for file in files:
            shapes |= _header(file)
        return shapes
    raise FileNotFoundError(f"no safetensors in {folder}")


def _header(file: Path) -> Shapes:
    """A safetensors file begins with the length of a JSON header, 8 bytes little-endian, and that header."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"{file.name} is no safetensors file")
        entries = json.loads(stream.read(length))
    return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}


def elements(tensors: Shapes) -> int:
    return sum(math.prod(shape) for shape in tensors.values())


def sd3_tensors(config: Mapping[str, Any]) -> Shapes:
    """Every tensor of diffusers' SD3Transformer2DModel of that configuration, the position table included."""
    head, patch, layers = config["attention_head_dim"], config["patch_size"], config["num_layers"]
    width = head * config["num_attention_heads"]
    dual, normed = set(config["dual_attention_layers"]), config["qk_norm"] is not None
    linears = {  # name -> (out, in)
        "time_text_embed.timestep_embedder.linear_1": (width, 256),
        "time_text_embed.timestep_embedder.linear_2": (width, width),
        "time_text_embed.text_embedder.linear_1": (width, config["pooled_projection_dim"]),
        "time_text_embed.text_embedder.linear_2": (width, width),
        "context_embedder": (width, config["joint_attention_dim"]),
        "norm_out.linear": (2 * width, width),
        "proj_out": (patch**2 * config["out_channels"], width),
    }
    norms = []
    for i in range(layers):
        block, last = f"transformer_blocks.{i}", i == layers - 1  # the last block drops the text afterwards
        linears[f"{block}.norm1.linear"] = ((9 if i in dual else 6) * width, width)
        linears[f"{block}.norm1_context.linear"] = ((2 if last else 6) * width, width)
        square = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
        square += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", *([] if last else ["attn.to_add_out"])]
        square += ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"] if i in dual else []
        linears |= {f"{block}.{name}": (width, width) for name in square}
        for ff in ("ff", *([] if last else ["ff_context"])):
            linears[f"{block}.{ff}.net.0.proj"] = (4 * width, width)
            linears[f"{block}.{ff}.net.2"] = (width, 4 * width)
        norms += [f"{block}.attn.{name}" for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
        norms += [f"{block}.attn2.{name}" for name in ("norm_q", "norm_k")] if i in dual else []
    shapes: Shapes = {
        "pos_embed.pos_embed": (1, config["pos_embed_max_size"] ** 2, width),
        "pos_embed.proj.weight": (width, config["in_channels"], patch, patch),
        "pos_embed.proj.bias": (width,),
    }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes | ({f"{name}.weight": (head,) for name in norms} if normed else {})
