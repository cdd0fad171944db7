"""CLIP as reward heads use it: unit embeddings in fp32, each prompt encoded once, pixels prepared here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffalign.rewards import _loading
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._preprocess import CLIP_MEAN, CLIP_STD, normalise
from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REMEMBERED = 4096  # prompts whose embeddings are kept
View = Callable[["Tensor", int], "Tensor"]  # images, side -> [B, 3, side, side] in [0, 1]


@dataclass(frozen=True)
class Clip:
    """A transformers CLIPModel with its tokenizer and its way of looking at pictures."""

    model: Any
    words: Any
    view: View
    scale: float  # exp(logit_scale), read in fp32: bf16 would be off by 1 %
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    known: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> unit vectors [B, D] fp32, with gradients."""
        side = self.model.config.vision_config.image_size
        return embed_images(self.model, normalise(self.view(images, side), self.mean, self.std))

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [B, D] fp32. What exceeds the context is cut off; new prompts are encoded once."""
        import torch

        new = [p for p in dict.fromkeys(prompts) if p not in self.known]
        if new:
            context = self.model.config.text_config.max_position_embeddings
            ids = self.words(new, padding=True, truncation=True, max_length=context, return_tensors="pt").input_ids
            with torch.no_grad():
                self.known.update(zip(new, embed_texts(self.model, ids.to(self.model.device)), strict=True))
        found = torch.stack([self.known[p] for p in prompts])
        while len(self.known) > REMEMBERED:
            del self.known[next(iter(self.known))]
        return found

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """cos of each image with its own prompt, [B] fp32."""
        return (self.images(images) * self.texts(prompts)).sum(-1)


def embed_images(model: Any, pixels: Tensor) -> Tensor:
    """Normalised pixels -> unit vectors [B, D]; the encoder's precision ends before the norm is taken."""
    import torch.nn.functional as F

    return F.normalize(model.get_image_features(pixel_values=pixels.to(model.dtype)).pooler_output.float(), dim=-1)


def embed_texts(model: Any, ids: Tensor) -> Tensor:
    """Token ids [B, T] -> unit vectors [B, D]. Attention is causal, so padding after the end needs no mask."""
    import torch.nn.functional as F

    return F.normalize(model.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)


def ready(model: Any, words: str, view: View, dtype: _loading.Dtype, device: torch.device | str) -> Clip:
    """`model` in its dtype on its device, with the tokenizer, mean and std of folder `words`."""
    scale = float(model.logit_scale.exp())
    return Clip(
        model.to(device, _loading.torch_dtype(dtype)),
        _loading.tokenizer(words, model.config.text_config.vocab_size),
        view,
        scale,
        *_loading.pixel_scale(words, CLIP_MEAN, CLIP_STD),
    )


def load(
    model: Checkpoint,
    processor: Checkpoint,
    view: View,
    dtype: _loading.Dtype,
    device: torch.device | str,
    local_files_only: bool,
) -> Clip:
    """A checkpoint in transformers' format, with the tokenizer, mean and std of `processor`."""
    source = model.folder(local_files_only)
    words = processor.folder(local_files_only)
    return ready(from_folder(source, model.model), words, view, dtype, device)


def from_folder(source: str, name: str) -> Any:
    """The CLIPModel in a folder, fp32 and frozen. Raises UserError for a model of another kind."""
    from transformers import CLIPModel

    kind = _loading.configuration(source, name, "a CLIP model").model_type
    if kind != "clip":
        raise UserError(f"'{name}' is a model of type '{kind}'; this head needs a CLIP model")
    return _loading.pretrained(CLIPModel, name, source)
