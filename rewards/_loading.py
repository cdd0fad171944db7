"""Checkpoints of reward heads: an embedded name, a folder or a hub id becomes a folder; files become strict weights."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Dtype = Literal["fp32", "bf16"]

SAFE = ("model.safetensors", "model-*-of-*.safetensors")  # transformers' names; repositories hold other formats beside
PICKLED = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")
TEXT = ("*.json", "*.txt", "*.model", "*.jinja")  # configurations, vocabularies and templates


@dataclass(frozen=True)
class Checkpoint:
    """What a head loads; the fields are those of :func:`folder`."""

    model: str
    revision: str | None = None
    only: tuple[str, ...] = ()

    def folder(self, local_files_only: bool = False) -> str:
        return folder(self.model, self.revision, self.only, local_files_only)

    def cached(self) -> Path | None:
        return cached(self.model, self.revision, self.only)


@runtime_checkable
class Hosted(Protocol):
    """A head that can say what it loads."""

    def checkpoints(self) -> list[Checkpoint]: ...


def embedded() -> dict[str, Path]:
    """Folders of the models that ship with the package, by name."""
    root = Path(str(files("diffalign.shapes"))) / "weights"
    return {p.name: p for p in sorted(root.iterdir()) if p.is_dir()} if root.is_dir() else {}


def folder(model: str, revision: str | None = None, only: Sequence[str] = (), local_files_only: bool = False) -> str:
    """The folder that holds `model`: an embedded name, a folder of this machine, or a hub id 'owner/name'.

    A hub id comes from the cache or is downloaded there, after its size and licence were printed.

    Args:
        revision: branch, tag or commit of a hub id.
        only: patterns of the files that are needed; by default weights as safetensors (or pickled where there are
            none) and the text files beside them, all at the top level.
        local_files_only: use the cache alone, as HF_HUB_OFFLINE=1 does for every model.

    Raises UserError when the model cannot be had, in one sentence with the fix.
    """
    found = embedded().get(model) or Path(model).expanduser()
    if found.is_dir():
        if revision is not None:
            raise UserError(
                f"revision '{revision}' applies to hub ids only, and '{model}' is on this machine; leave it out"
            )
        return str(found)
    if not is_hub_id(model):
        names = ", ".join(embedded()) or "none in this installation"
        raise UserError(f"model folder '{model}' does not exist; give a folder, a hub id or an embedded name ({names})")
    from huggingface_hub import constants

    if local_files_only or constants.HF_HUB_OFFLINE:
        return _cached(
            model, revision, only, "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "local_files_only is set"
        )
    return _fetched(model, revision, only)


def is_hub_id(model: str) -> bool:
    """'owner/name': what may be asked of the hub when no such folder exists."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith("/")


def cached(model: str, revision: str | None = None, only: Sequence[str] = ()) -> Path | None:
    """Where an embedded, local or cached model is, None when files would have to be downloaded."""
    found = embedded().get(model) or Path(model).expanduser()
    if found.exists():
        return found
    root = _snapshot(model, revision) if is_hub_id(model) else None
    names = [p.relative_to(root).as_posix() for p in root.rglob("*")] if root else []
    # a download that was interrupted leaves a snapshot with less
    return root if any(_any(n, only or (*SAFE, *PICKLED)) for n in names) else None


def _snapshot(model: str, revision: str | None) -> Path | None:
    """The cached files of that revision, be they all of the repository's or, as here, those that were wanted."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    base = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=model, repo_type="model"))
    note = base / "refs" / (revision or "main")
    commit = note.read_text("utf-8").strip() if note.is_file() else (revision or "main")
    root = base / "snapshots" / commit
    return root if root.is_dir() else None


def file(model: str, name: str, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The one file `name` of a model as in :func:`folder`; `model` may also be the path of such a file itself."""
    if Path(model).expanduser().is_file():
        return Path(model).expanduser()
    path = Path(folder(model, revision, (name,), local_files_only), name)
    if not path.is_file():
        raise UserError(f"'{model}' holds no file '{name}'; give the model, the folder or the file that is meant")
    return path


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
            raise UserError(f"cannot read the weights '{part}' ({_line(error)}); download the file again") from error
        except Exception as error:  # pickle's own error, for a file that holds more than tensors
            raise UserError(f"'{part}' holds more than tensors ({_line(error)}); save its state dict alone") from error
    return state


def fill(
    model: torch.nn.Module, state: Mapping[str, Tensor], drop: Sequence[str] = (), name: str = "the checkpoint"
) -> None:
    """Load `state` into `model`, every key of both. Keys that match a pattern of `drop` are left out of `state`.

    Raises UserError that names the first missing, unexpected or misshapen keys.
    """
    kept = without(state, drop)
    own = model.state_dict()
    shapes = [k for k in own if k in kept and kept[k].shape != own[k].shape]
    complain(name, [k for k in own if k not in kept], [k for k in kept if k not in own], shapes)
    model.load_state_dict(kept)


def without(state: Mapping[str, Tensor], drop: Sequence[str]) -> dict[str, Tensor]:
    """The entries whose key matches none of the patterns."""
    return {k: t for k, t in state.items() if not _any(k, drop)}


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose key begins with `prefix`, without it."""
    return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}


def complain(name: str, missing: Collection[str], unexpected: Collection[str], misshapen: Collection[str]) -> None:
    """Raise UserError if any of the keys is given."""
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
) -> Any:
    """A transformers model in fp32, frozen, from the folder `source`, or from `config` and the tensors `state`.

    more: further arguments of the class, beside `config`.

    Raises UserError when it cannot be read, or when a key is missing or unexpected.
    """
    import torch

    given: dict[str, Any] = {} if state is None else {"config": config, "state_dict": dict(state), **(more or {})}
    try:
        model, info = cls.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **given)
    except Exception as error:  # files that are absent, cut short or of another model raise many kinds
        raise UserError(f"cannot load '{name}' ({_line(error)}); give the checkpoint meant for this head") from error
    complain(f"'{name}'", info["missing_keys"], info["unexpected_keys"], [str(k[0]) for k in info["mismatched_keys"]])
    return model.eval().requires_grad_(False)


def tokenizer(source: str, words: int) -> Any:
    """The tokenizer in the folder `source`, for a text encoder that knows `words` tokens."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # as above
        raise UserError(f"cannot load the tokenizer of '{source}' ({_line(error)}); download it again") from error
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
        if found := sorted(p for p in root.iterdir() if _any(p.name, patterns)):
            return found
    raise UserError(f"'{root}' holds no weights ({SAFE[0]} or {PICKLED[0]}); download the model again")


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _cached(model: str, revision: str | None, only: Sequence[str], why: str) -> str:
    found = cached(model, revision, only)
    if found is None:
        words = [
            "hf download",
            model,
            *(n for n in only if "*" not in n),
            *(["--revision", revision] if revision else []),
        ]
        raise UserError(
            f"'{model}' is not in the hub cache and {why}; run `{' '.join(words)}` where there is a network, or give a "
            f"local folder"
        )
    return str(found)


def download_command(model: str, revision: str | None, only: Sequence[str]) -> str:
    """What puts the files into the hub cache."""
    named = [n for n in only if "*" not in n]
    return " ".join(["hf download", model, *named, *(["--revision", revision] if revision else [])])


def _fetched(model: str, revision: str | None, only: Sequence[str]) -> str:
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True)
        sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
        names = wanted(list(sizes), only)
        new = [n for n in names if not isinstance(try_to_load_from_cache(model, n, revision=info.sha), str)]
        if new:
            card = info.card_data
            licence = (card.get("license_name") or card.get("license")) if card is not None else None
            size = sum(sizes[n] for n in new) / 1e9
            print(
                f"downloading {model}: {size:.2f} GB, licence: {licence or 'none stated'}", file=sys.stderr, flush=True
            )
        return snapshot_download(model, revision=revision, allow_patterns=names)
    except GatedRepoError as error:
        raise UserError(f"'{model}' is gated; accept its licence at its hub page, then run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise UserError(f"'{model}' has no revision '{revision}'; leave it out for the newest one") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model '{model}'; check the name, or run `hf auth login` if it is private"
        ) from error
    except Exception as error:  # no network: each HTTP client that the hub library uses has its own kinds
        return _cached(model, revision, only, f"the hub cannot be reached ({_line(error)})")


def wanted(names: Sequence[str], only: Sequence[str] = ()) -> list[str]:
    """Which files of a repository to fetch; see :func:`folder`."""
    top = [n for n in names if "/" not in n]
    safe = any(_any(n, SAFE) for n in top)
    patterns = only or (*TEXT, *(SAFE if safe else PICKLED))
    return [n for n in (names if only else top) if _any(n, patterns)]
