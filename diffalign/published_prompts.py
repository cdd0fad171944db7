"""Prompts of published benchmarks, read from where they are kept on disk: none of them is part of diffalign."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign import prompts
from diffalign.rewards.ocr import quoted
from diffalign.types import UserError

Entry = dict[str, Any]
Found = tuple[list[Entry], list[str]]  # the prompts, equal ones too, and what is to be said of them

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
STYLES = ("anime", "concept-art", "paintings", "photo")
AXES = ("identity", "style", "layout", "tonal")


def geneval(path: Path) -> Found:
    """GenEval's own metadata (arXiv 2310.11513)."""
    records = _records(path)
    for n, record in enumerate(records, 1):
        if record.get("tag") not in TAGS or not isinstance(record.get("include"), list) or not record["include"]:
            raise UserError(
                f'{path}: prompt {n} is not GenEval\'s: expected a "tag" of {", ".join(TAGS)} and a list under '
                '"include"; give its evaluation_metadata.jsonl'
            )
    return [record | {"prompt": _text(record, "prompt", path, n)} for n, record in enumerate(records, 1)], []


def ocr(path: Path) -> Found:
    """Lines; what stands between the first two straight double quotes, as the reward 'ocr' has it, is the "text"."""
    found = prompts.load(str(path))
    silent = sum(quoted(entry["prompt"]) is None for entry in found)
    note = f"prompts that quote nothing between straight double quotes, which the reward 'ocr' leaves out: {silent}"
    return [{"tag": "text", "text": quoted(e["prompt"]), **e} for e in found], [note] * (silent > 0)


def drawbench(path: Path) -> Found:
    """Lines, or a CSV table with Prompts and Category (arXiv 2205.11487)."""
    if path.suffix == ".txt":
        return prompts.load(str(path)), []
    records = _records(path)
    name = "prompts" if records and "prompts" in records[0] else "prompt"
    return [
        {"prompt": _text(r, name, path, n), "tag": _text(r, "category", path, n)} for n, r in enumerate(records, 1)
    ], []


def parti(path: Path) -> Found:
    """A table with Prompt, Category and Challenge between tabs (arXiv 2206.10789)."""
    return [
        {"prompt": _text(r, "prompt", path, n)}
        | {"tag": _text(r, "category", path, n), "challenge": _text(r, "challenge", path, n)}
        for n, r in enumerate(_records(path), 1)
    ], []


def dpg(folder: Path) -> Found:
    """A text file each, in prompts/ or the folder itself, and dpg_bench.csv with the questions (arXiv 2403.05135).

    A question counts for nothing if one of those it "needs" is answered no. The "tag" is the set that the prompt was
    taken from, as the name of its file says.
    """
    table = folder / "dpg_bench.csv"
    asked: dict[str, list[Entry]] = {}
    for n, row in enumerate(_records(table), 1):
        said = {k: _text(row, k, table, n) for k in ("item_id", "proposition_id", "dependency", "category_broad")}
        try:
            number, needs = int(said["proposition_id"]), [int(i) for i in said["dependency"].split(",")]
        except ValueError as error:
            raise UserError(
                f"{table}: entry {n}: expected whole numbers under 'proposition_id' and 'dependency'; give the "
                "published file"
            ) from error
        question = {"id": number, "question": _text(row, "question_natural_language", table, n)}
        needed = {"needs": [i for i in needs if i != 0], "category": said["category_broad"]}
        asked.setdefault(said["item_id"], []).append(question | needed)
    inner = folder / "prompts"
    found = []
    for name in _names(inner if inner.is_dir() else folder, ".txt"):
        text = _content(inner / name if inner.is_dir() else folder / name).strip()
        item = name.removesuffix(".txt")
        origin = re.sub(r"\d+$", "", item)
        tag = {"tag": origin} if origin else {}
        found.append({"prompt": text, "item": item} | tag | {"questions": asked.get(item, [])})
    items = {entry["item"] for entry in found}
    blank = [entry["item"] for entry in found if not entry["prompt"]]
    if blank:
        raise UserError(f"{folder}: '{blank[0]}.txt' holds no prompt; give the published folder")
    silent = sum(not entry["questions"] for entry in found)
    lost = sum(item not in items for item in asked)
    notes = [f"prompts without a question in dpg_bench.csv: {silent}"] * (silent > 0)
    return found, notes + [f"prompts of dpg_bench.csv without a text file, left out: {lost}"] * (lost > 0)


def t2i_compbench(folder: Path) -> Found:
    """A text file a category (arXiv 2307.06350); where some are called *_val.txt, those are the test prompts."""
    names = _names(folder, ".txt")
    test = [name for name in names if name.endswith("_val.txt")] or names
    out = len(names) - len(test)
    found = [
        {"prompt": entry["prompt"], "tag": name.removesuffix(".txt").removesuffix("_val")}
        for name in test
        for entry in prompts.load(str(folder / name))
    ]
    return found, [f"text files left out, since the test prompts are those in *_val.txt: {out}"] * (out > 0)


def hpdv2(folder: Path) -> Found:
    """Four lists of prompts in JSON, one a style (arXiv 2306.09341)."""
    found = []
    for style in STYLES:
        path = folder / f"{style}.json"
        for n, text in enumerate(_list(path), 1):
            found.append({"prompt": _text({"prompt": text}, "prompt", path, n), "tag": style})
    return found, []


def densealign(path: Path) -> Found:
    """Objects with a "caption", in JSON lines or one JSON list (arXiv 2604.12652)."""
    return [
        {k: v for k, v in record.items() if k != "caption"} | {"prompt": _text(record, "caption", path, n)}
        for n, record in enumerate(_records(path), 1)
    ], []


def divgen(path: Path) -> Found:
    """Prompts with an axis of diversity each, as DivGenBench has them (arXiv 2512.24146)."""
    found = []
    for n, record in enumerate(_records(path), 1):
        axis = _text(record, "axis", path, n).lower()
        if axis not in AXES:
            raise UserError(f"{path}: prompt {n}: the axis '{axis}' is unknown; use one of {', '.join(AXES)}")
        found.append(record | {"prompt": _text(record, "prompt", path, n), "tag": axis})
    return found, []


@dataclass(frozen=True)
class Format:
    read: Callable[[Path], Found]
    takes: str
    """What PATH is."""
    origin: str
    """Where it is published, and its licence."""
    count: int | None = None
    """Prompts of the published set."""
    folder: bool = False


FORMATS: Mapping[str, Format] = {
    "geneval": Format(geneval, "prompts/evaluation_metadata.jsonl", "github.com/djghosh13/geneval, MIT", 553),
    "ocr": Format(ocr, "dataset/ocr/test.txt", "github.com/yifan123/flow_grpo, MIT", 1018),
    "drawbench": Format(drawbench, "a CSV with Prompts and Category, or a text file", "arXiv 2205.11487", 200),
    "parti": Format(parti, "PartiPrompts.tsv", "github.com/google-research/parti, Apache-2.0", 1632),
    "dpg": Format(
        dpg, "the folder dpg_bench", "github.com/TencentQQGYLab/ELLA, Apache-2.0", 1065, folder=True
    ),
    "t2i-compbench": Format(
        t2i_compbench, "the folder examples/dataset", "github.com/Karine-Huang/T2I-CompBench", 2400, folder=True
    ),
    "hpdv2": Format(
        hpdv2, "a folder with " + ", ".join(f"{s}.json" for s in STYLES), "huggingface.co/datasets/zhwang/HPDv2",
        3200, folder=True,
    ),
    "densealign": Format(densealign, "metadata.jsonl", "github.com/roooobotx/prompt_echo", 2000),
    "divgen": Format(divgen, "a .jsonl, .json or .csv file with prompt and axis", "your own; see arXiv 2512.24146"),
}  # fmt: skip


def load(name: str, path: str) -> Found:
    """The prompts of format `name` in `path`. UserError for what is not of that form."""
    kind = FORMATS[name]
    place = Path(os.path.expanduser(path))
    if not (os.path.isdir(place) if kind.folder else os.path.isfile(place)):
        what = "folder" if kind.folder else "file"
        raise UserError(f"no {what} '{path}'; {name}:PATH takes {kind.takes} ({kind.origin})")
    found, notes = kind.read(place)
    if not found:
        raise UserError(f"'{path}' holds no prompt; {name}:PATH takes {kind.takes} ({kind.origin})")
    given, different = len(found), len({entry["prompt"].strip() for entry in found})
    if kind.count not in (None, given, different):
        notes = [*notes, f"{name} was published with {kind.count:,} prompts, here are {given:,}"]
    return found, notes


def _records(path: Path) -> list[Entry]:
    """The objects of JSON lines or a JSON list, or the rows of a table, whose column names are taken in lower case."""
    if path.suffix == ".jsonl":
        lines = [line for line in _content(path).split("\n") if line.strip()]
        found: Iterable[Any] = (_parsed(line, f"{path}: prompt {n}") for n, line in enumerate(lines, 1))
    elif path.suffix == ".json":
        found = _list(path)
    elif path.suffix in (".csv", ".tsv"):
        found = _table(path)
    else:
        raise UserError(f"'{path}' must end in .jsonl, .json, .csv or .tsv, which says how it is read; rename it")
    records = []
    for n, record in enumerate(found, 1):
        if not isinstance(record, dict):
            raise UserError(f"{path}: prompt {n}: expected a JSON object; give the published file")
        records.append(record)
    return records


def _table(path: Path) -> list[Entry]:
    # no quoting between tabs: PartiPrompts has a prompt that begins with a quotation mark of its own
    text = io.StringIO(_content(path))
    table = csv.reader(text, strict=True) if path.suffix == ".csv" else csv.reader(text, "excel-tab", quoting=3)
    try:
        rows = [row for row in table if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"{path}:{table.line_num}: {error}; export the table again as CSV") from error
    if not rows:
        return []
    names = [name.strip().lower() for name in rows[0]]
    for n, row in enumerate(rows[1:], 1):
        if len(row) > len(names):
            raise UserError(
                f"{path}: entry {n} has {len(row)} columns, the heading {len(names)}; quote cells with commas"
            )
    return [dict(zip(names, row, strict=False)) for row in rows[1:]]


def _list(path: Path) -> list[Any]:
    value = _parsed(_content(path), str(path))
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a JSON list; give the published file")
    return value


def _parsed(text: str, place: str) -> Any:
    try:
        return prompts.parse(text)
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON: {error}") from error


def _content(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}); give the published files") from error


def _names(folder: Path, ending: str) -> list[str]:
    names = sorted(name for name in os.listdir(folder) if name.endswith(ending) and (folder / name).is_file())
    odd = [name for name in names if not name.isprintable()]  # bytes that are no UTF-8 come as half a surrogate pair
    if odd:
        raise UserError(f"'{folder}' holds a file with an unprintable name, {odd[0]!a}; rename it")
    return names


def _text(record: Entry, key: str, path: Path, n: int) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{path}: entry {n}: expected a text under '{key}'; give the published file")
    return value.strip()
