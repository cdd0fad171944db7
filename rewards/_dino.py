"""DINO as reward heads use it: tokens of a frozen transformers backbone, with gradients to the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffalign.rewards import _loading
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._preprocess import normalise, resize, unit
from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OFFICIAL = (
    "facebook/dinov2-base"  # the weights of timm's vit_base_patch14_dinov2.lvd142m; Apache-2.0, as DINOv3's are not
)
KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Backbone:
    """A Dinov2Model, or one with registers, or a DINOv3ViTModel, and the square of pixels it sees."""

    model: Any
    side: int
    registers: int
    mean: Sequence[float]
    std: Sequence[float]

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def tokens(self, images: Tensor | Sequence[Tensor], layers: Sequence[int] = ()) -> Tensor:
        """[B, L, 1 + N, D] fp32: CLS, then the N patches row by row; register tokens are left out.

        Args:
            images: [B, 3, H, W] in [0, 1], or B images [3, H, W] of any sizes.
            layers: the blocks, counted from 0, whose outputs are the L features; by default one feature, the output
                of the last block after the final norm.
        """
        import torch

        if isinstance(images, torch.Tensor):
            pixels = self.pixels(images)
        else:
            pixels = torch.cat([self.pixels(image[None]) for image in images])
        pixels = pixels.to(self.model.device, self.model.dtype)
        output = self.model(pixel_values=pixels, output_hidden_states=bool(layers))
        found = [output.hidden_states[i + 1] for i in layers] or [output.last_hidden_state]
        tokens = torch.stack(found, 1).float()
        return torch.cat([tokens[:, :, :1], tokens[:, :, 1 + self.registers :]], 2)

    def pixels(self, images: Tensor) -> Tensor:
        """Squeezed to a square, as Adv-GRPO does, but with anti-aliasing; rounded to 8 bits, as references are."""
        return normalise(resize(unit(images), (self.side, self.side)), self.mean, self.std)


def load(
    model: Checkpoint,
    side: int | None,
    dtype: _loading.Dtype,
    device: torch.device | str,
    local_files_only: bool,
    layers: Sequence[int] = (),
) -> Backbone:
    """The frozen backbone. Raises UserError for another kind of model, a side or layers that do not fit it."""
    from transformers import AutoModel

    source = model.folder(local_files_only)
    config = _loading.configuration(source, model.model, "a DINO model")
    if config.model_type not in KINDS:
        raise UserError(f"'{model.model}' is a model of type '{config.model_type}'; use one of {', '.join(KINDS)}")
    side = config.image_size if side is None else side
    if side < 1 or side % config.patch_size:
        raise UserError(f"size {side} is no multiple of the {config.patch_size} pixels of a patch of '{model.model}'")
    if layers and not 0 <= min(layers) <= max(layers) < config.num_hidden_layers:
        raise UserError(f"layers must be among 0 to {config.num_hidden_layers - 1} of '{model.model}', got {[*layers]}")
    return Backbone(
        _loading.pretrained(AutoModel, model.model, source).to(device, _loading.torch_dtype(dtype)),
        side,
        config.to_dict().get("num_register_tokens", 0),  # plain DINOv2 has no such entry
        *_loading.pixel_scale(source, IMAGENET_MEAN, IMAGENET_STD),
    )
