"""The small network of `artifact_head` on frozen features, as plain tensors; and the folder it is kept in.

Tokens [B, 1 + N, C] of a picture, CLS first, are standardised per channel. A patch's logit p_i comes from one network
that all patches share; a picture's logit is that of [CLS, mean patch] plus the mean of its highest p_i:

    logit = MLP([CLS, mean patch]) + mean of the top ceil(N / 16) p_i

High = artifact. Both are divided by the temperature when they are turned into probabilities.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.rewards import _clip, _dino, _loading
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._preprocess import CLIP_MEAN, CLIP_STD
from diffalign.types import UserError
from diffalign.writing import put

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHTS, NOTE = "artifact_head.safetensors", "artifact_head.json"
SAME = 0.98  # cosine of two probes of one backbone: bf16 leaves 0.9999, another model little
SHARE = 16  # one patch in so many decides for the picture: a fault is small
Weights = dict[str, "Tensor"]


@dataclass(frozen=True)
class Features:
    """The frozen backbone: a DINO, or the vision tower of a CLIP; pictures are squeezed to a square of side `size`."""

    model: str
    revision: str | None = None
    size: int | None = None  # the model's own

    def load(self, dtype: _loading.Dtype, device: torch.device | str, local_files_only: bool) -> _dino.Backbone:
        """Raises UserError for another kind of model, or a size that does not fit."""
        from transformers import CLIPVisionModel

        checkpoint = Checkpoint(self.model, self.revision)
        source = checkpoint.folder(local_files_only)
        kind = _loading.configuration(source, self.model, "a DINO or a CLIP").model_type
        if not kind.startswith("clip"):
            return _dino.load(checkpoint, self.size, dtype, device, local_files_only)
        whole = kind == "clip"
        model = (
            _clip.from_folder(source, self.model) if whole else _loading.pretrained(CLIPVisionModel, self.model, source)
        )
        own = model.config.vision_config.image_size if whole else model.config.image_size
        if self.size not in (None, own):
            raise UserError(f"'{self.model}' sees {own} x {own} pixels alone; leave the size out")
        tower = (model.vision_model if whole else model).to(device, _loading.torch_dtype(dtype))
        return _dino.Backbone(tower, own, 0, CLIP_MEAN, CLIP_STD)


@dataclass(frozen=True)
class Trained:
    """A finished head: what it reads, its tensors, and what was measured when it was trained."""

    features: Features
    weights: Weights
    report: Mapping[str, Any]


def shapes(channels: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor for features of `channels` channels."""
    return {
        "mean": (2, channels),  # of CLS, of patches
        "std": (2, channels),
        "whole.0.weight": (hidden, 2 * channels),
        "whole.0.bias": (hidden,),
        "whole.1.weight": (1, hidden),
        "whole.1.bias": (1,),
        "patch.0.weight": (hidden, channels),
        "patch.0.bias": (hidden,),
        "patch.1.weight": (1, hidden),
        "patch.1.bias": (1,),
        "temperature": (),
        "probe": (channels,),
    }


def initial(channels: int, hidden: int, generator: torch.Generator) -> Weights:
    """Random first layers, zero last ones: every logit is 0. Standardisation and temperature are the identity."""
    import torch

    weights = {name: torch.zeros(shape) for name, shape in shapes(channels, hidden).items()}
    for name in ("whole.0.weight", "patch.0.weight"):
        fan_in = weights[name].shape[1]
        weights[name] = torch.randn(weights[name].shape, generator=generator) * math.sqrt(2 / fan_in)
    return weights | {"std": torch.ones(2, channels), "temperature": torch.tensor(1.0)}


def logits(weights: Weights, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [B, 1 + N, C] -> (of the picture [B], of its highest patches alone [B], of each patch [B, N]), fp32."""
    import torch

    tokens = tokens.float()
    mean, std = weights["mean"], weights["std"]
    cls, patches = (tokens[:, 0] - mean[0]) / std[0], (tokens[:, 1:] - mean[1]) / std[1]
    each = _mlp(weights, "patch", patches)
    highest = each.topk(-(-each.shape[1] // SHARE), dim=1).values.mean(1)
    return _mlp(weights, "whole", torch.cat([cls, patches.mean(1)], -1)) + highest, highest, each


def probe(backbone: _dino.Backbone) -> Tensor:
    """[C]: what the backbone makes of a fixed picture, by which it is known again."""
    import torch

    with torch.no_grad():
        return backbone.tokens(torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32))[0, 0, 0].cpu()


def check(trained: Trained, backbone: _dino.Backbone, name: str) -> None:
    """Raises UserError when the backbone is another one than the head was trained on, though of the same name."""
    import torch.nn.functional as F

    known, found = trained.weights["probe"], probe(backbone)
    if known.shape != found.shape or F.cosine_similarity(known, found, dim=0) < SAME:
        raise UserError(
            f"'{name}' was trained on other features than those of '{trained.features.model}' as it is now; give the "
            f"backbone it was trained on, or train the head again"
        )


def _mlp(weights: Weights, name: str, x: Tensor) -> Tensor:
    import torch.nn.functional as F

    hidden = F.gelu(F.linear(x, weights[f"{name}.0.weight"], weights[f"{name}.0.bias"]))
    return F.linear(hidden, weights[f"{name}.1.weight"], weights[f"{name}.1.bias"])[..., 0]


def save(trained: Trained, folder: Path) -> None:
    """Two files; the note, which is written last, makes the folder a head."""
    from safetensors.torch import save as to_bytes

    folder.mkdir(parents=True, exist_ok=True)
    put(folder / WEIGHTS, to_bytes({k: t.detach().cpu().contiguous() for k, t in trained.weights.items()}))
    note = {"features": asdict(trained.features), "report": dict(trained.report)}
    put(folder / NOTE, json.dumps(note, indent=2) + "\n")


def load(folder: str, name: str) -> Trained:
    """Raises UserError for a folder that `diffalign train-artifact` did not write."""
    note = Path(folder, NOTE)
    if not note.is_file():
        raise UserError(f"'{name}' is no artifact head: it has no {NOTE}; make one with diffalign train-artifact")
    try:
        given = json.loads(note.read_text("utf-8"))
        features, report = Features(**given["features"]), given["report"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{note}' cannot be read; train the head again") from error
    weights = _loading.weights(Path(folder, WEIGHTS))
    first = weights.get("whole.0.weight")
    wanted = shapes(first.shape[1] // 2, first.shape[0]) if first is not None and first.ndim == 2 else shapes(0, 0)
    misshapen = [k for k, shape in wanted.items() if k in weights and weights[k].shape != shape]
    _loading.complain(f"'{name}'", wanted.keys() - weights.keys(), weights.keys() - wanted.keys(), misshapen)
    return Trained(features, {k: t.float() for k, t in weights.items()}, report)
