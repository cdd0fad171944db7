"""Heads published as five linear layers without activations: one affine map of a feature vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffalign.rewards import _loading
from diffalign.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

LAYERS = (0, 2, 4, 6, 7)  # dropout, which scoring leaves out, stood between them


def collapsed(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """(w [D], b []) fp32 with w.e + b equal to all layers in turn; keys `layers.N.weight` and `layers.N.bias`.

    Raises UserError when a key is missing or unexpected, or when the layers do not fit together.
    """
    import torch

    keys = [f"layers.{n}.{part}" for n in LAYERS for part in ("weight", "bias")]
    _loading.complain(f"'{name}'", [k for k in keys if k not in state], [k for k in state if k not in keys], [])
    layers = [(state[f"layers.{n}.weight"].double(), state[f"layers.{n}.bias"].double()) for n in LAYERS]
    try:
        probe = torch.randn(8, layers[0][0].shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        expected = probe
        w, b = torch.eye(probe.shape[1], dtype=torch.float64), torch.zeros(probe.shape[1], dtype=torch.float64)
        for weight, bias in layers:
            expected = expected @ weight.T + bias
            w, b = weight @ w, weight @ b + bias
        torch.testing.assert_close((probe @ w.T + b).float(), expected.float())
        return w.squeeze(0).float(), b.squeeze(0).float()
    except (RuntimeError, IndexError, AssertionError) as error:
        raise UserError(
            f"the layers of '{name}' do not make one affine map ({error}); give the official head"
        ) from error
