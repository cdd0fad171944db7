"""What there is to choose from, with one line on each, read from the sources without importing them."""

from __future__ import annotations

import ast
from importlib.resources import files
from typing import get_args

from diffalign import loading, prompts
from diffalign.listing import summaries
from diffalign.rewards._hub import embedded
from diffalign.sections import Kernel


def everything() -> dict[str, dict[str, str]]:
    """Kind -> name -> summary."""
    return {
        "algorithms": summaries("diffalign.algorithms"),
        "advantages": summaries("diffalign.advantages"),
        "curriculums": summaries("diffalign.curriculums"),
        "rewards": summaries("diffalign.rewards"),
        "multireward": summaries("diffalign.multireward"),
        "steering": summaries("diffalign.steering"),
        "pipelines": summaries("diffalign.pipelines"),
        "kernels": _kernels(),
        "embedded models": dict.fromkeys(embedded(), ""),
        "presets": {name: text.partition("\n")[0].lstrip("# ") for name, text in loading.presets().items()},
        "prompt sets": prompts.EMBEDDED,
    }


def _kernels() -> dict[str, str]:
    docs: dict[str, str] = {}
    for file in ("samplers.py", "solvers.py"):
        tree = ast.parse((files("diffalign") / file).read_text("utf-8"))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        docs |= {node.name.removeprefix("_"): ast.get_docstring(node) or "" for node in functions}
    return {kernel: docs[kernel].partition("\n")[0] for kernel in get_args(Kernel)}
