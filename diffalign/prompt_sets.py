"""The prompts an evaluation is made on: embedded sets, files, and published benchmarks from disk, each prompt once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from diffalign import prompts, published_prompts
from diffalign.published_prompts import FORMATS, Entry, Found
from diffalign.types import UserError

MINI = "diffalign-mini"
EMBEDDED = (*prompts.EMBEDDED, MINI)
HELP = (
    f"{', '.join(EMBEDDED)} (64 prompts of eight kinds), a text file with one prompt a line, a .jsonl file with "
    f"metadata, or FORMAT:PATH for a published set that you have on disk, where FORMAT is one of {', '.join(FORMATS)}; "
    "several with commas between them; of equal prompts the first is kept"
)
_WHERE = ("prompt", "source", "item")  # what may differ between equal prompts without a word


def load(source: str) -> Found:
    """Metadata of each prompt, its text under "prompt", and sentences on what was left out or is unusual.

    Of several sources the prompts follow each other, and each is told its source's name under "source". Of equal
    prompts the first is kept. UserError for a source that is missing, empty or not of its form.
    """
    parts = [source] if _is_one(source) else [part.strip() for part in source.split(",")]
    if len(parts) == 1:
        entries, notes = _load(source)
    else:
        entries, notes = [], []
        for name, part in _named(parts).items():
            found, said = _load(part)
            entries += [{"source": name, **entry} for entry in found]
            notes += [f"{name}: {sentence}" for sentence in said]
    kept, repeated = _once(entries)
    return kept, [*notes, *repeated]


def _load(source: str) -> Found:
    if source == MINI:
        return prompts.load(str(Path(__file__).parent / "prompt_data" / f"{MINI}.jsonl")), []
    if source in EMBEDDED or os.path.isfile(os.path.expanduser(source)):
        return prompts.load(source), []
    form, _, path = source.partition(":")
    if form in FORMATS:
        kind = FORMATS[form]
        if not path:
            raise UserError(
                f"the prompts of {form} are not part of diffalign; get {kind.takes} ({kind.origin}) and write "
                f"{form}:PATH"
            )
        return published_prompts.load(form, path)
    raise UserError(
        f"no prompt set or file '{source}'; give a file, one of {', '.join(EMBEDDED)}, or FORMAT:PATH with a format of "
        f"{', '.join(FORMATS)}"
    )


def _is_one(source: str) -> bool:
    """Is it one source, though its path may hold commas?"""
    form, _, path = source.partition(":")
    return os.path.exists(os.path.expanduser(path if form in FORMATS and path else source))


def _named(parts: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for part in parts:
        form = part.partition(":")[0]
        name = part if part in EMBEDDED else form if form in FORMATS else Path(part).stem
        if name in named:
            raise UserError(
                f"the prompt sources '{named[name]}' and '{part}' are both called '{name}'; rename one, or list it once"
            )
        named[name] = part
    return named


def _once(entries: list[Entry]) -> Found:
    kept: dict[str, Entry] = {}
    differing = 0
    for entry in entries:
        first = kept.setdefault(entry["prompt"].strip(), entry)
        differing += any(first.get(key) != entry.get(key) for key in {*first, *entry}.difference(_WHERE))
    out = len(entries) - len(kept)
    if not out:
        return entries, []
    was = "prompt was" if out == 1 else "prompts were"
    note = f"{out:,} repeated {was} left out: {len(entries):,} lines, {len(kept):,} prompt{'s' * (len(kept) != 1)}"
    more = f"; the metadata of {differing:,} of them differed from that of the first, which is kept"
    return list(kept.values()), [note + more * (differing > 0)]
