"""Prompt sets: the embedded ones, text files with one prompt a line, and JSONL with metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Strict, Tag

from diffalign.types import UserError

# told apart before they are checked, so that a mistake is complained of once
Texts = Annotated[
    Annotated[str, Tag("text")] | Annotated[tuple[str, ...], Strict(False), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "text"),
]

EMBEDDED = {
    "shapes-train": "prompts of the embedded shapes world to train on, with GenEval metadata",
    "shapes-test": "held-out prompts of the embedded shapes world, with GenEval metadata",
}


def load(source: str | Sequence[str]) -> list[dict[str, Any]]:
    """Metadata of each prompt, its text under "prompt".

    `source` is an embedded set, a .jsonl file of objects with a "prompt", or any other text file, whose non-empty
    lines are prompts. Of a list of them the prompts follow each other, equal ones too, and each is told its source's
    name (the file's without its ending) under "source", unless it brings one. UserError for a missing or empty file,
    for a line that is no prompt, naming it, and for two sources of one name.
    """
    return list(chain(*_parts(source)))


def first(source: str | Sequence[str], count: int) -> list[dict[str, Any]]:
    """The first `count` prompts; of several sources one prompt each in turn, as far as they reach."""
    turns = zip_longest(*_parts(source))
    return [entry for turn in turns for entry in turn if entry is not None][:count]


def label(entry: Mapping[str, Any], key: str) -> str | None:
    """What a prompt's metadata says under `key`, as the text that sorts prompts; None where it says nothing."""
    value = entry.get(key)
    return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)


def _parts(source: str | Sequence[str]) -> list[list[dict[str, Any]]]:
    """The prompts of each source, read once."""
    if isinstance(source, str):
        return [_load(source)]
    if not source:
        raise UserError("the list of prompt sources is empty; name a file, or one of " + ", ".join(EMBEDDED))
    return [[{"source": name, **entry} for entry in _load(one)] for name, one in _named(source).items()]


def _named(sources: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for source in sources:
        name = source if source in EMBEDDED else Path(source).stem
        if name in named:
            raise UserError(
                f"the prompt sources '{named[name]}' and '{source}' are both called '{name}'; rename one, or list it "
                "once"
            )
        named[name] = source
    return named


def _load(source: str) -> list[dict[str, Any]]:
    if source in EMBEDDED:
        from diffalign.shapes import prompts

        return prompts.train_prompts() if source == "shapes-train" else prompts.test_prompts()
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"no prompt file '{source}'; give a file or one of {', '.join(EMBEDDED)}")
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"'{source}' is not UTF-8 text") from error
    numbered = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"'{source}' holds no prompt")
    if path.suffix == ".jsonl":
        return [_record(line, f"{source}:{n}") for n, line in numbered]
    return [{"prompt": line} for _, line in numbered]


def _record(line: str, place: str) -> dict[str, Any]:
    try:
        record = parse(line)
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise UserError(f'{place}: expected an object with a text under "prompt"')
    return record


def parse(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, which says why, for what nobody could use."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError:
        raise
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair is no text; write whole characters") from error
    except RecursionError as error:
        raise ValueError("it nests too deeply; make it flatter") from error
    except ValueError as error:  # CPython's limit of digits
        raise ValueError("a number has thousands of digits; shorten it") from error
    return value
