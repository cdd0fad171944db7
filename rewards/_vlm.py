"""A local vision-language model of the Qwen-VL family: what it would say next, and how likely it finds a text.

The processor is put together here: transformers' own needs torchvision for the newer models, works on 8-bit pictures,
and so carries no gradients.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.rewards import _loading
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._preprocess import normalise, resize, unit
from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class Look:
    """How a model of the family looks at a picture."""

    patch: int  # side of a patch in pixels
    merge: int  # merge x merge patches are one token
    time: int  # frames of a patch; a picture is repeated
    mean: Sequence[float]
    std: Sequence[float]
    low: int  # least number of pixels
    high: int  # largest

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The nearest size that is whole tokens each way; scaled to between `low` and `high` pixels if it is not."""
        side = self.patch * self.merge
        sides = [round(n / side) * side for n in (height, width)]
        if sides[0] * sides[1] > self.high:
            scale = math.sqrt(height * width / self.high)
            sides = [max(side, math.floor(n / scale / side) * side) for n in (height, width)]
        elif sides[0] * sides[1] < self.low:
            scale = math.sqrt(self.low / (height * width))
            sides = [math.ceil(n * scale / side) * side for n in (height, width)]
        return sides[0], sides[1]

    def fit(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> the same of size :meth:`size`, rounded to 8 bits; gradients pass unchanged."""
        return resize(unit(images), self.size(*images.shape[2:]))

    def tokens(self, image: Tensor) -> int:
        return image.shape[-2] * image.shape[-1] // (self.patch * self.merge) ** 2

    def patches(self, image: Tensor) -> Tensor:
        """[3, H, W] in [0, 1] -> [H W / P^2, 3 T P^2], the patches of one token being neighbours."""
        p, m = self.patch, self.merge
        x = normalise(image, self.mean, self.std)
        c, h, w = x.shape
        x = x.expand(self.time, c, h, w).reshape(self.time, c, h // p // m, m, p, w // p // m, m, p)
        return x.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(-1, c * self.time * p * p)

    def grid(self, image: Tensor) -> list[int]:
        return [1, image.shape[-2] // self.patch, image.shape[-1] // self.patch]


@dataclass(frozen=True)
class Row:
    """One sequence: token ids up to the model's turn, one for every image token, and the ids it is made to say."""

    images: Sequence[Tensor]  # each [3, H, W] in [0, 1], as `Look.fit` gives them
    prefix: Sequence[int]
    label: Sequence[int] = ()


@dataclass(frozen=True)
class Vlm:
    """A frozen model with its tokenizer and its way of looking."""

    model: Any
    words: Any
    look: Look

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are no more than their spelling: prompts are anyone's text."""
        return list(self.words(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    def prefix(self, images: Sequence[Tensor], text: str, text_first: bool = False) -> list[int]:
        """A user's turn, pictures first unless `text_first`, and the opening of the model's; no system prompt."""
        config, ids = self.model.config, []
        for image in images:
            places = [config.image_token_id] * self.look.tokens(image)
            ids += [config.vision_start_token_id, *places, config.vision_end_token_id]
        said = self.encode(text)
        turn = [*said, *ids] if text_first else [*ids, *said]
        return [*self._chat("<|im_start|>user\n"), *turn, *self._chat(TURN)]

    @property
    def end(self) -> int:
        """The token that ends the model's turn."""
        return self._chat("<|im_end|>")[0]

    def echo(self, rows: Sequence[Row]) -> list[Tensor]:
        """log p of every label token given all before it, one [L] fp32 a row (float64 for a float64 model)."""
        import torch

        hidden = self._hidden(rows)
        ends = [h[len(r.prefix) - 1 : len(r.prefix) + len(r.label) - 1] for h, r in zip(hidden, rows, strict=True)]
        labels = torch.tensor([i for r in rows for i in r.label], device=hidden.device)
        logp = self._log_probs(torch.cat(ends)).gather(1, labels[:, None])[:, 0]
        return list(logp.split([len(r.label) for r in rows]))

    def next(self, rows: Sequence[Row]) -> Tensor:
        """log p of the token after each prefix, [B, V] fp32 (float64 for a float64 model)."""
        import torch

        last = torch.tensor([len(r.prefix) - 1 for r in rows])
        return self._log_probs(self._hidden(rows)[torch.arange(len(rows)), last])

    def _hidden(self, rows: Sequence[Row]) -> Tensor:
        """[B, T, D], shorter rows padded on the right, where a causal model does not look."""
        import torch

        device = self.model.device
        whole = [[*r.prefix, *r.label] for r in rows]
        longest = max(map(len, whole))
        ids = torch.tensor([w + [w[0]] * (longest - len(w)) for w in whole], device=device)
        mask = torch.tensor([[1] * len(w) + [0] * (longest - len(w)) for w in whole], device=device)
        images = [image for r in rows for image in r.images]
        seen = {}
        if images:
            pixels = torch.cat([self.look.patches(image) for image in images]).to(device, self.model.dtype)
            grid = torch.tensor([self.look.grid(image) for image in images], device=device)
            seen = {"pixel_values": pixels, "image_grid_thw": grid}
        kinds = (ids == self.model.config.image_token_id).int()
        out = self.model.model(input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, use_cache=False, **seen)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _log_probs(self, hidden: Tensor) -> Tensor:
        """The vocabulary is large, so only the rows that are read go through it; the softmax is never below fp32."""
        import torch

        logits: Tensor = self.model.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def _chat(self, text: str) -> list[int]:
        return list(self.words(text, add_special_tokens=False).input_ids)


TURN = "<|im_end|>\n<|im_start|>assistant\n"


def load(
    model: Checkpoint,
    dtype: _loading.Dtype,
    pixels: int | None,
    device: torch.device | str,
    local_files_only: bool = False,
) -> Vlm:
    """A checkpoint of transformers; `pixels` replaces both bounds on the size of its pictures.

    Raises UserError when it cannot be had, is of another family, or does not fit its own configuration.
    """
    from transformers import AutoModelForImageTextToText

    source = model.folder(local_files_only)
    config = _loading.configuration(source, model.model, "a Qwen-VL model")
    if config.model_type not in FAMILIES:
        raise UserError(
            f"'{model.model}' is a model of type '{config.model_type}'; give one of type {', '.join(FAMILIES)}, "
            f"or set `server` to a server that runs it"
        )
    body = _loading.pretrained(AutoModelForImageTextToText, model.model, source, dtype=dtype)
    words = _loading.tokenizer(source, config.text_config.vocab_size)
    look = read_look(Path(source), config.vision_config, pixels)
    return Vlm(body.to(device), words, look)


def read_look(folder: Path, vision: Any, pixels: int | None) -> Look:
    """From the model's configuration and the preprocessor_config.json beside it."""
    try:
        stated = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        size = stated.get("size") or {}
        low = stated["min_pixels"] if "min_pixels" in stated else size["shortest_edge"]
        high = stated["max_pixels"] if "max_pixels" in stated else size["longest_edge"]
        mean, std = stated["image_mean"], stated["image_std"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot read '{folder / 'preprocessor_config.json'}' ({error}); download the model again"
        ) from error
    return Look(
        vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, mean, std, pixels or low,
        pixels or high,
    )  # fmt: skip
