"""Objects of the embedded shapes world, as `geneval` asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffalign.types import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from diffalign.rewards._mask2former import Seen


class Shapes:
    """The exact detector of flat shapes."""

    @property
    def names(self) -> Sequence[str]:
        from diffalign.shapes.world import SHAPES

        return SHAPES

    @property
    def colors(self) -> Sequence[str]:
        from diffalign.shapes.world import COLORS

        return list(COLORS)

    def find(self, images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> list[Seen]:
        import torch

        from diffalign.shapes.world import SIZE

        if images.shape[2:] != (SIZE, SIZE):
            raise UserError(
                f"the shapes detector reads {SIZE}x{SIZE} images, got {images.shape[3]}x{images.shape[2]}; set "
                f"sampling.height and sampling.width to {SIZE}"
            )
        pixels = (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1)
        return [observe(image) for image in pixels.numpy()]


def observe(image: np.ndarray) -> Seen:
    """image uint8 [H, W, 3] -> (objects, colors) in GenEval's form; malformed or two-coloured ones have class ""."""
    from diffalign.shapes.detector import detect

    objects: dict[str, list[tuple[float, ...]]] = {}
    colors: dict[str, list[str]] = {}
    for found in sorted(detect(image), key=lambda d: -d.score):
        name = found.shape if found.color else ""
        objects.setdefault(name, []).append((*found.box, found.score))
        colors.setdefault(name, []).append(found.color)
    return objects, colors
