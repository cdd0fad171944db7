"""Where commands compute."""

from __future__ import annotations

import torch

from diffalign.types import UserError


def choose(name: str | None) -> torch.device:
    """The device of this name; without one, the GPU when there is one. Raises UserError for one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch says AssertionError when it was built without CUDA
        raise UserError(f"cannot compute on the device '{name}'; use cpu, or cuda where there is a GPU") from error
