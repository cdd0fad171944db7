"""What reward heads read from their checkpoints: tensors, frozen transformers models and tokenizers; strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffalign.rewards._hub import PICKLED, SAFE, complaint, matches
from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Dtype = Literal["fp32", "bf16"]
Colour = Sequence[float]  # one number a channel


def weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU: of a file, or of the one checkpoint of a folder, split into shards or not.

    A pickled file is read with `weights_only`, so that it can run nothing. Raises UserError when it cannot be read.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    parts = [Path(path)] if Path(path).is_file() else _shards(Path(path))
    state: dict[str, Any] = {}
    for part in parts:
        try:
            safe = part.suffix == ".safetensors"
            state |= load_file(part) if safe else torch.load(part, map_location="cpu", weights_only=True)
        except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise UserError(
                f"cannot read the weights '{part}' ({complaint(error)}); download the file again"
            ) from error
        except Exception as error:  # pickle's own error, for a file that holds more than tensors
            raise UserError(
                f"'{part}' holds more than tensors ({complaint(error)}); save its state dict alone"
            ) from error
    return state


def without(state: Mapping[str, Tensor], drop: Sequence[str]) -> dict[str, Tensor]:
    """The entries whose key matches none of the patterns."""
    return {k: t for k, t in state.items() if not matches(k, drop)}


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose key begins with `prefix`, without it."""
    return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}


def complain(name: str, missing: Collection[str], unexpected: Collection[str], misshapen: Collection[str]) -> None:
    """Raise UserError if any of the keys is given; it names the first of each kind."""
    kinds = {"lacks": missing, "has the unknown": unexpected, "has another shape of": misshapen}
    found = [f"{kind} {_first(keys)}" for kind, keys in kinds.items() if keys]
    if found:
        raise UserError(
            f"{name} does not fit the model: it {' and '.join(found)}; use the checkpoint meant for this head"
        )


def pretrained(
    cls: Any,
    name: str,
    source: str | None = None,
    config: Any = None,
    state: Mapping[str, Tensor] | None = None,
    more: Mapping[str, Any] | None = None,
    dtype: Dtype = "fp32",
) -> Any:
    """A frozen transformers model, from the folder `source`, or from `config` and the tensors `state`.

    more: further arguments of the class, beside `config`.

    Raises UserError when it cannot be read, or when a key is missing, unexpected or of another shape. Keys that a part
    of the model declares unused do not count: files of older versions hold buffers that are computed today.
    """
    given: dict[str, Any] = {} if state is None else {"config": config, "state_dict": dict(state), **(more or {})}
    try:
        model, info = cls.from_pretrained(
            source, dtype=torch_dtype(dtype), output_loading_info=True, ignore_mismatched_sizes=True, **given
        )  # other sizes are named below
    except Exception as error:  # files that are absent, cut short or of another model raise many kinds
        raise UserError(
            f"cannot load '{name}' ({complaint(error)}); give the checkpoint meant for this head"
        ) from error
    absent, unused = unneeded(model)
    missing = [k for k in info["missing_keys"] if not any(re.search(p, k) for p in absent)]
    unexpected = [k for k in info["unexpected_keys"] if not any(re.search(p, k) for p in unused)]
    complain(f"'{name}'", missing, unexpected, [str(k[0]) for k in info["mismatched_keys"]])
    return model.eval().requires_grad_(False)


def unneeded(model: torch.nn.Module) -> tuple[set[str], set[str]]:
    """Patterns of keys that a file may lack, and may hold, since some transformers model within `model` says so.

    transformers itself heeds only those of parts that are models all the way up, which Mask2Former's Swin is not.
    """
    from transformers import PreTrainedModel

    def union(declared: Iterable[Collection[str] | None]) -> set[str]:
        return {pattern for patterns in declared for pattern in patterns or ()}

    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return (
        union(part._keys_to_ignore_on_load_missing for part in parts),
        union(part._keys_to_ignore_on_load_unexpected for part in parts),
    )


def configuration(source: str, name: str, wanted: str) -> Any:
    """The transformers configuration in the folder `source`. wanted: what the model should be, for the message."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # no config.json, or one that transformers cannot read
        raise UserError(f"'{name}' is no transformers checkpoint ({complaint(error)}); give {wanted}") from error


def pixel_scale(source: str, mean: Colour, std: Colour) -> tuple[Colour, Colour]:
    """Mean and std of the channels as preprocessor_config.json in the folder `source` states them, else as given."""
    note = Path(source, "preprocessor_config.json")
    try:
        stated = json.loads(note.read_text("utf-8")) if note.is_file() else {}
        return stated.get("image_mean", mean), stated.get("image_std", std)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read '{note}' ({complaint(error)}); download the model again") from error


def tokenizer(source: str, words: int) -> Any:
    """The tokenizer in the folder `source`, for a text encoder that knows `words` tokens."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # likewise
        raise UserError(f"cannot load the tokenizer of '{source}' ({complaint(error)}); download it again") from error
    # without its files transformers gives one of special tokens alone, to which every prompt looks alike
    if 2 * len(found) < words or len(found) > words:
        raise UserError(
            f"the tokenizer of '{source}' knows {len(found)} tokens and the text encoder {words}; "
            f"give the one the encoder was trained with"
        )
    return found


def torch_dtype(name: Dtype) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def _first(keys: Collection[str], count: int = 3) -> str:
    shown = ", ".join(sorted(keys)[:count])
    return f"{shown} and {len(keys) - count} more keys" if len(keys) > count else shown


def _shards(root: Path) -> list[Path]:
    for patterns in (SAFE, PICKLED):
        if found := sorted(p for p in root.iterdir() if matches(p.name, patterns)):
            return found
    raise UserError(f"'{root}' holds no weights ({SAFE[0]} or {PICKLED[0]}); download the model again")
