"""The report of an evaluation: index.html with its pictures, report.json and report.md, from the folder alone."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from diffalign.eval import gallery, gallery_files, gallery_lineage, gallery_tables, lineage, tables, wall
from diffalign.eval import votes as voting
from diffalign.eval.gallery_view import percent, view
from diffalign.eval.pictures import Mode, Pictures
from diffalign.eval.report import number, signed
from diffalign.eval.signs import signs
from diffalign.types import UserError
from diffalign.writing import REMEDIES, sync

PAGE, NUMBERS, TABLE = "index.html", "report.json", "report.md"
LARGE = 50_000_000  # bytes of a single page above which browsers become slow


def write(folder: Path | str, mode: Mode = "folder", votes: Sequence[Path | str] = ()) -> Path:
    """Write EVAL/index.html, EVAL/report.json and EVAL/report.md and return the page; pictures in EVAL/img, or inside
    the page with `mode` single. Needs no model: the same folder gives the same bytes.

    Args:
        votes: files of votes that the page exported; they become a judge called people.

    Raises UserError when the folder is no evaluation, one of its files is damaged, or the disk is full; then the
    pages that were there stay as they were.
    """
    found = gallery.read(folder)
    cast = voting.read(votes)
    voting.check(cast, found)
    files = gallery_files.inspect(found)
    pictures = Pictures(found.folder, mode)
    try:
        gallery_wall = wall.build(found, files, pictures, originals=mode == "folder")
        trees = gallery_lineage.trees(found, files, pictures)
        # while threads encode the pictures
        numbers = tables.numbers(found, files, voting.wins(cast, list(found.entries)) if cast else None)
        page = rendered(found, numbers, gallery_wall, trees, mode)
        pictures.finish()
        put_all({
            found.folder / NUMBERS: json.dumps(numbers, ensure_ascii=False, indent=1, allow_nan=False) + "\n",
            found.folder / TABLE: gallery_tables.markdown(numbers),
            found.folder / PAGE: page,
        })  # fmt: skip
        pictures.sweep()
    except OSError as error:
        why, remedy = os.strerror(error.errno or 0), REMEDIES.get(error.errno or 0, "make the folder writable")
        raise UserError(
            f"could not write the report into '{found.folder}': {why}; {remedy}; an older page is intact"
        ) from error
    finally:
        pictures.close()
    if mode == "single" and len(page) > LARGE:
        print(
            f"warning: {PAGE} has {len(page) / 1e6:.0f} MB, which browsers open slowly; use --mode folder",
            file=sys.stderr,
        )
    return found.folder / PAGE


def put_all(texts: Mapping[Path, str]) -> None:
    """Write all of these files or none: only when each lies whole beside its place they take their places."""
    beside = {path: path.with_name(path.name + ".tmp") for path in texts}
    try:
        for path, text in texts.items():
            beside[path].write_text(text, "utf-8")
            sync(beside[path])
        for path in texts:
            os.replace(beside[path], path)
    finally:
        for temporary in beside.values():
            temporary.unlink(missing_ok=True)


def rendered(
    found: gallery.Gallery,
    numbers: tables.Numbers,
    gallery_wall: Markup,
    trees: Sequence[Mapping[str, Any]],
    mode: Mode,
) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number, "signed": signed, "percent": percent, "mark": gallery_tables.mark,
        "counted": gallery_tables.counted,
    }  # fmt: skip
    template = environment.from_string(own("gallery_page.html"))
    look = own("report.html").partition("<style>")[2].partition("</style>")[0]
    # All are files of this package, which nothing of the evaluation gets into.
    style = Markup("\n".join([look, lineage.style(), own("gallery_page.css"), wall.style()]))
    script = Markup("\n".join([own("gallery_page.js"), wall.script()]))
    sources = "data:" if mode == "single" else "data: 'self' file:"
    return template.render(
        view(found, numbers, signs(found)),
        wall=gallery_wall,
        lineages=trees,
        tones=range(lineage.TONES),
        style=style,
        script=script,
        sources=Markup(sources),
    )


def own(name: str) -> str:
    return (files("diffalign.eval") / name).read_text("utf-8")
