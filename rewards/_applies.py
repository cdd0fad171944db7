"""Which images a reward is for, by the metadata of their prompts; its head does not see the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffalign.listing import nearest
from diffalign.prompts import Texts, label
from diffalign.types import RewardOutput

if TYPE_CHECKING:
    from torch import Tensor

Only = dict[str, Texts]
Entry = Mapping[str, Any]


def rows(only: Only, metadata: Sequence[Entry]) -> list[int]:
    """Numbers of the entries that have one of the wanted values under every key."""
    return [i for i, entry in enumerate(metadata) if all(label(entry, key) in _some(only[key]) for key in only)]


def spread(output: RewardOutput | None, at: Sequence[int], images: Tensor) -> RewardOutput:
    """What was said of the images numbered `at`, None if there are none, as said of all `images`: the others are NaN.

    Images left out have a gradient too, of 0: a batch of them alone is no special case for whoever differentiates.
    """
    import torch

    scores = images.flatten(1)[:, 0].float() * 0 + torch.nan
    valid = torch.ones(len(images), dtype=torch.bool, device=images.device)
    if output is None:
        return RewardOutput(scores, {}, valid)
    assert output.valid is not None
    index = torch.tensor(at, device=images.device)
    extra = {name: _listed(values, at, len(images)) for name, values in output.extra.items()}
    return RewardOutput(scores.index_copy(0, index, output.scores), extra, valid.index_copy(0, index, output.valid))


def _listed(values: Any, at: Sequence[int], total: int) -> list[Any]:
    """A list even of a tensor's rows: no number says that nothing was said."""
    known = dict(zip(at, values, strict=True))
    return [known.get(i) for i in range(total)]


def unmatched(only: Only, prompts: Sequence[Entry]) -> str | None:
    """Why no prompt is wanted, to follow on 'the reward'; None if one is."""
    if rows(only, prompts):
        return None
    for key, wanted in only.items():
        known = sorted({value for entry in prompts if (value := label(entry, key)) is not None})
        if not known:
            keys = sorted({name for entry in prompts for name in entry})
            return f"scores no training prompt: `only` asks for their '{key}', and none has one; {nearest(key, keys)}"
        if not set(_some(wanted)) & set(known):
            asked = " or ".join(f"'{value}'" for value in _some(wanted))
            return f"scores no training prompt: none has the {key} {asked}; {nearest(_some(wanted)[0], known)}"
    return f"scores no training prompt: none has the {' and the '.join(only)} of `only` together; ask for less"


def _some(wanted: str | tuple[str, ...]) -> tuple[str, ...]:
    return (wanted,) if isinstance(wanted, str) else wanted
