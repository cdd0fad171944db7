"""YAML that remembers where each value came from: a file's line, or a command-line override."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from diffalign.types import UserError

Path = tuple[str | int, ...]  # ("rewards", 0, "weight")

# A string in one of these places is short for the section {key: string}, so an override can reach inside it.
NAMED = ("algorithm", "advantage", "curriculum", "rewards", "multireward", "adapter")
SHORTHAND = {"model": "path", **dict.fromkeys(NAMED, "name")}


class _Loader(yaml.SafeLoader):
    """Plain scalars as in YAML 1.2: `3e-4` is a number, `no`, `1:30` and `2024-01-01` are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))

_SCALARS = {f"tag:yaml.org,2002:{t}" for t in ("str", "bool", "null", "int", "float")}


@dataclass(frozen=True)
class Source:
    """Nested dicts, lists and scalars, with the origin ('run.yaml:5' or 'override seed=1') of every path."""

    data: dict[str, Any]
    origins: dict[Path, str]

    def origin(self, path: Path) -> str:
        """Where the value at `path` was written, or else the nearest section around it."""
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]


def read(text: str, name: str) -> Source:
    """Parse a YAML mapping. UserError 'name:line: ...' for bad syntax, a repeated key, or anything else."""
    origins: dict[Path, str] = {(): f"{name}:1"}
    data = _parse(text, name, (), origins)
    if not isinstance(data, dict):
        raise UserError(f"{name}:1: expected a mapping of keys to values, such as 'model: tiny-sd3'")
    return Source(data, origins)


def override(source: Source, assignments: Iterable[str]) -> Source:
    """A copy of `source` with dotted assignments such as 'trainer.lr=3e-4' or 'rewards.0.weight=2' laid over it."""
    data: dict[str, Any] = _copy(source.data)
    origins = dict(source.origins)
    for text in assignments:
        where = f"override {text}"
        dotted, equals, value = text.partition("=")
        if not equals or not all(dotted.split(".")):
            raise UserError(f"{where}: expected KEY=VALUE, such as trainer.lr=3e-4")
        path: Path = tuple(int(p) if p.isdigit() else p for p in dotted.split("."))
        parent, key = _descend(data, path, where), path[-1]
        for known in [p for p in origins if p[: len(path)] == path]:
            del origins[known]
        if isinstance(parent, list) and key == len(parent):
            parent.append(None)
        parent[key] = _parse(value, where, path, origins, lines=False)
        origins[path] = where
    return Source(data, origins)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _descend(data: dict[str, Any], path: Path, where: str) -> Any:
    """The dict or list that holds path[-1]; missing sections are made, and `name` strings become {name: ...}."""
    value: Any = data
    for depth, key in enumerate(path):
        here = ".".join(map(str, path[:depth]))
        if isinstance(value, list):
            last = depth == len(path) - 1
            if not isinstance(key, int) or key >= len(value) + last:
                raise UserError(f"{where}: '{here}' is a list of {len(value)}; write {here}.0 for its first item")
        elif not isinstance(value, dict):
            raise UserError(f"{where}: '{here}' is {value!r}, not a section with keys")
        if depth == len(path) - 1:
            break
        if isinstance(value, dict):
            value.setdefault(key, {})
        field = next((p for p in reversed(path[: depth + 1]) if isinstance(p, str)), "")
        listed = isinstance(key, int)
        if isinstance(value[key], str) and field in SHORTHAND and listed == (field == "rewards"):
            value[key] = {SHORTHAND[field]: value[key]}
        value = value[key]
    return value


def _parse(text: str, name: str, root: Path, origins: dict[Path, str], lines: bool = True) -> Any:
    def place(node: yaml.Node) -> str:
        return f"{name}:{node.start_mark.line + 1}" if lines else name

    def walk(node: yaml.Node, path: Path, above: tuple[yaml.Node, ...]) -> Any:
        origins.setdefault(path, place(node))
        if any(node is n for n in above):
            raise UserError(f"{place(node)}: an anchor that contains itself")
        if isinstance(node, yaml.SequenceNode):
            return [walk(child, (*path, i), (*above, node)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            out: dict[str, Any] = {}
            for key, child in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise UserError(f"{place(key)}: a key must be a plain word")
                if key.value in out:
                    raise UserError(f"{place(key)}: '{key.value}' is given twice; remove one")
                inner: Path = (*path, key.value)
                origins[inner] = place(key)
                out[key.value] = walk(child, inner, (*above, node))
            return out
        if node.tag not in _SCALARS:
            raise UserError(f"{place(node)}: the tag '{node.tag}' is not supported; write a plain value")
        return loader.construct_object(node)

    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else walk(node, root, ())
    except yaml.MarkedYAMLError as error:
        at = f"{name}:{error.problem_mark.line + 1}" if lines and error.problem_mark is not None else name
        raise UserError(f"{at}: not valid YAML: {error.problem or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name}: not valid YAML: {error}") from error
    finally:
        loader.dispose()
