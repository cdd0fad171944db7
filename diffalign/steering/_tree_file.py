"""A tree on disk: safetensors, with the nodes as JSON in its header. Nothing in it is executed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as unpacked
from safetensors.torch import save as packed
from torch import Tensor

from diffalign.steering._tree import Node, Tree
from diffalign.types import UserError
from diffalign.writing import put, try_out

COLUMNS = ("step", "parent", "visits", "psi", "reward")
PARTS = ("x", "x0", "eps")
SAME_LAM = 1e-6  # relative; lam of a pilot differs in its last bits from machine to machine
SHOWN = 60  # characters of a value in a message


def save(tree: Tree, settings: dict[str, Any], path: Path) -> None:
    """Write the tree, whole or not at all. `settings` are what it depends on."""
    tensors: dict[str, Tensor] = {"control": tree.control.get_state()}
    if tree.leaves:
        tensors["leaves"] = torch.stack(list(tree.leaves.values()))
    for k, part in enumerate(PARTS if tree.states else ()):
        tensors[part] = torch.stack([state[k] for state in tree.states.values()])
    about = {
        "settings": settings,
        "nodes": {c: [getattr(n, c) for n in tree.nodes] for c in COLUMNS},
        "states": list(tree.states),
        "leaves": list(tree.leaves),
        "nfe": tree.nfe,
        "history": tree.history,
    }
    try:
        put(path, packed(tensors, {"tree": json.dumps(about)}))
    except OSError as error:
        raise _unwritable(path, error) from error


def opened(path: Path, settings: dict[str, Any]) -> tuple[Tree, float] | None:
    """The tree in a file and its lam, or None where there is none yet and one can be written.

    Raises UserError when the file is damaged, or its tree was grown with other settings.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try_out(path)
        data = path.read_bytes() if path.exists() else None
    except OSError as error:
        raise _unwritable(path, error) from error
    if data is None:
        return None
    try:
        about = json.loads(_header(data)["__metadata__"]["tree"])
        was = dict(about["settings"])
        lam = float(was["lam"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    now = json.loads(json.dumps(settings))  # tuples become lists
    if math.isclose(lam, now["lam"], rel_tol=SAME_LAM):
        now["lam"] = was["lam"]
    if (other := _difference(was, now)) is not None:
        raise UserError(
            f"tree file '{path}' was grown with another {other}; give the same, name another folder or remove the file"
        )
    try:
        return _tree(about, unpacked(data)), lam
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _tree(about: dict[str, Any], tensors: dict[str, Tensor]) -> Tree:
    nodes = [Node(*row) for row in zip(*(about["nodes"][c] for c in COLUMNS), strict=True)]
    for n, node in enumerate(nodes[1:], 1):
        nodes[node.parent or 0].children.append(n)
    control = torch.Generator()
    control.set_state(tensors["control"])
    leaves = dict(zip(about["leaves"], tensors["leaves"], strict=True))
    kept = zip(*(tensors[part] for part in PARTS), strict=True) if about["states"] else ()
    states = {n: (x, x0, eps) for n, (x, x0, eps) in zip(about["states"], kept, strict=True)}
    return Tree(control, nodes, states, leaves, about["nfe"], about["history"])


def _header(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _difference(was: Any, now: Any, name: str = "") -> str | None:
    """The first thing that differs, and its values where they are short."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [*now, *(k for k in was if k not in now)]:
            inside = key if name in ("", "about") else f"{name}.{key}"
            if (found := _difference(was.get(key), now.get(key), inside)) is not None:
                return found
        return None
    if was == now:
        return None
    short = not isinstance(was, list | dict) and not isinstance(now, list | dict)
    values = f", {was!r}, not {now!r}"
    return name + values if short and len(values) <= SHOWN else name


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot read tree file '{path}' ({error}); remove it to begin anew")


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write tree file '{path}': {os.strerror(error.errno or 0)}; choose another folder")
