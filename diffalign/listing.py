"""What there is to choose from: the files of a package and their first lines, read without importing them."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import pkgutil
from pathlib import Path


def _folders(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None, package
    return list(spec.submodule_search_locations)


def available(package: str) -> list[str]:
    """Names of the methods in a package such as 'diffalign.algorithms', without importing them."""
    return sorted(m.name for m in pkgutil.iter_modules(_folders(package)) if not m.name.startswith("_"))


def summaries(package: str) -> dict[str, str]:
    """First docstring line of each method in a package, read from its source without importing it."""
    files = {name: Path(folder, f"{name}.py") for folder in _folders(package) for name in available(package)}
    docs = {n: ast.get_docstring(ast.parse(f.read_text("utf-8"))) if f.is_file() else None for n, f in files.items()}
    return {name: (doc or "").partition("\n")[0] for name, doc in docs.items()}


def nearest(name: str, known: list[str]) -> str:
    """'did you mean ...?', or the known names when none is near."""
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean '{near[0]}'?" if near else "known: " + (", ".join(known) or "none")
