"""Where checkpoints of reward heads are: an embedded name, a path of this machine, or a Hugging Face hub id."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Protocol, runtime_checkable

from diffalign.types import UserError

SAFE = ("model.safetensors", "model-*-of-*.safetensors")  # transformers' names; repositories hold other formats beside
PICKLED = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")
TEXT = ("*.json", "*.txt", "*.model", "*.jinja")  # configurations, vocabularies and templates


@dataclass(frozen=True)
class Checkpoint:
    """What a head loads.

    Attributes:
        model: an embedded name, a folder or file of this machine, or a hub id 'owner/name'.
        revision: branch, tag or commit of a hub id.
        only: patterns of the files that are needed; by default weights as safetensors (or pickled where there are
            none) and the text files beside them, all at the top level.
    """

    model: str
    revision: str | None = None
    only: tuple[str, ...] = ()

    def folder(self, local_files_only: bool = False) -> str:
        """The folder that holds it. A hub id comes from the cache or, its size and licence printed, is downloaded.

        local_files_only: use the cache alone, as HF_HUB_OFFLINE=1 does for every model.

        Raises UserError when the model cannot be had, in one sentence with the fix.
        """
        if self._here.is_dir():
            if self.revision is not None:
                raise UserError(
                    f"revision '{self.revision}' applies to hub ids only, and '{self.model}' is on this machine; "
                    f"leave it out"
                )
            return str(self._here)
        if not self.on_hub:
            names = ", ".join(embedded()) or "none in this installation"
            raise UserError(
                f"model folder '{self.model}' does not exist; give a folder, a hub id or an embedded name ({names})"
            )
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return self._from_cache("HF_HUB_OFFLINE is set")
        return self._from_cache("local_files_only is set") if local_files_only else self._fetched()

    def file(self, local_files_only: bool = False) -> Path:
        """The one file that `only` names; `model` may also be the path of such a file itself."""
        if self._here.is_file():
            return self._here
        (name,) = self.only
        path = Path(self.folder(local_files_only), name)
        if not path.is_file():
            raise UserError(
                f"'{self.model}' holds no file '{name}'; give the model, the folder or the file that is meant"
            )
        return path

    def cached(self) -> Path | None:
        """Where an embedded, local or cached model is, None when files would have to be downloaded."""
        if self._here.exists():
            return self._here
        root = self._snapshot()
        names = [p.relative_to(root).as_posix() for p in root.rglob("*")] if root else []
        # a download that was interrupted leaves a snapshot with less
        return root if any(matches(n, self.only or (*SAFE, *PICKLED)) for n in names) else None

    @property
    def command(self) -> str:
        """What puts a hub id into the cache."""
        patterns = any("*" in name for name in self.only)  # beside which names would be ignored
        wanted = [word for name in self.only for word in (["--include", name] if patterns else [name])]
        revision = ["--revision", self.revision] if self.revision else []
        return shlex.join(["hf", "download", self.model, *wanted, *revision])

    @property
    def _here(self) -> Path:
        return embedded().get(self.model) or Path(self.model).expanduser()

    @property
    def on_hub(self) -> bool:
        """'owner/name': what may be asked of the hub when no such folder exists."""
        return self.model.count("/") == 1 and not self.model.startswith((".", "/", "~")) and self.model[-1] != "/"

    def _snapshot(self) -> Path | None:
        """The cached files of that revision, be they all of the repository's or, as here, those that were wanted."""
        if not self.on_hub:
            return None
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        base = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=self.model, repo_type="model"))
        name = self.revision or "main"
        note = base / "refs" / name
        root = base / "snapshots" / (note.read_text("utf-8").strip() if note.is_file() else name)
        return root if root.is_dir() else None

    def _from_cache(self, why: str) -> str:
        found = self.cached()
        if found is None:
            raise UserError(
                f"'{self.model}' is not in the hub cache and {why}; run `{self.command}` where there is a network, or "
                f"give a local folder"
            )
        return str(found)

    def _fetched(self) -> str:
        from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        model, revision = self.model, self.revision
        try:
            info = HfApi().model_info(model, revision=revision, files_metadata=True)
            sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
            names = wanted(list(sizes), self.only)
            new = [n for n in names if not isinstance(try_to_load_from_cache(model, n, revision=info.sha), str)]
            if new:
                card = info.card_data
                licence = (card.get("license_name") or card.get("license")) if card is not None else None
                size = f"{sum(sizes[n] for n in new) / 1e9:.2f} GB"
                said = f"downloading {model}: {size}, licence: {licence or 'none stated'}"
                print(said, file=sys.stderr, flush=True)
            return snapshot_download(model, revision=revision, allow_patterns=names)
        except GatedRepoError as error:
            raise UserError(
                f"'{model}' is gated; accept its licence at its hub page, then run `hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise UserError(f"'{model}' has no revision '{revision}'; leave it out for the newest one") from error
        except RepositoryNotFoundError as error:
            raise UserError(
                f"the hub has no model '{model}'; check the name, or run `hf auth login` if it is private"
            ) from error
        except (
            Exception
        ) as error:  # mostly no network, for which every HTTP client of the hub library has its own kinds
            return self._from_cache(f"fetching it failed ({complaint(error)})")


@runtime_checkable
class Hosted(Protocol):
    """A head that can say what it loads."""

    def checkpoints(self) -> list[Checkpoint]: ...


def embedded() -> dict[str, Path]:
    """Folders of the models that ship with the package, by name."""
    root = Path(str(files("diffalign.shapes"))) / "weights"
    return {p.name: p for p in sorted(root.iterdir()) if p.is_dir()} if root.is_dir() else {}


def wanted(names: Sequence[str], only: Sequence[str] = ()) -> list[str]:
    """Which files of a repository to fetch; see :class:`Checkpoint`."""
    top = [n for n in names if "/" not in n]
    safe = any(matches(n, SAFE) for n in top)
    patterns = only or (*TEXT, *(SAFE if safe else PICKLED))
    return [n for n in (names if only else top) if matches(n, patterns)]


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def complaint(error: Exception) -> str:
    """The first line of what it says."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
