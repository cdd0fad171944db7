"""Explaining the configuration: pydantic's errors as sentences, keys by their docstrings, and a JSON schema."""

from __future__ import annotations

import inspect
import json
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from diffalign.advantages import Advantage
from diffalign.algorithms import Algorithm
from diffalign.config import Config
from diffalign.curriculums import Curriculum
from diffalign.fields import method_class
from diffalign.listing import available, nearest
from diffalign.methods import Method
from diffalign.multireward import MultiReward
from diffalign.rewards import Reward
from diffalign.source import Path, Source
from diffalign.types import UserError

S = TypeVar("S", bound=BaseModel)
PACKAGES: dict[type[Method], str] = {
    Algorithm: "diffalign.algorithms",
    Advantage: "diffalign.advantages",
    Curriculum: "diffalign.curriculums",
    MultiReward: "diffalign.multireward",
    Reward: "diffalign.rewards",
}
EXPECTED = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a section with keys",
    "model": "a section with keys",
}


def describe(error: ValidationError, source: Source) -> str:
    """One line per mistake: 'run.yaml:7: trainer.lr: expected a number, got 'fast''."""
    said: dict[Path, str] = {}
    for one in error.errors(include_url=False):
        path = _written(one["loc"], one["type"], source.data)
        said.setdefault(path, f"{source.origin(path)}: {dotted(path)}: {_sentence(one, path, source.data)}")
    return "\n".join(said.values())


def dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "configuration"


def _written(loc: Path, kind: str, data: Any) -> Path:
    """`loc` less what pydantic adds to name a member of a union, which the user never wrote."""
    path: Path = ()
    for i, key in enumerate(loc):
        if isinstance(data, dict) and key in data:
            data = data[key]
        elif isinstance(data, list) and isinstance(key, int):
            data = data[key] if key < len(data) else None
        elif not (i == len(loc) - 1 and kind in ("missing", "conflict")):
            continue
        path = (*path, key)
    return (*path, "name") if kind in ("union_tag_invalid", "union_tag_not_found") else path


def _sentence(error: ErrorDetails, path: Path, data: dict[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    got = f", got {shown(error['input'])}"
    if kind == "extra_forbidden":
        return f"unknown key; {nearest(str(path[-1]), [n for m in models_at(path[:-1], data) for n in m.model_fields])}"
    if kind in ("missing", "union_tag_not_found"):
        return "one more item is required" if isinstance(path[-1], int) else "this key is required"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("literal_error", "enum"):
        options = context["expected"]
        return f"expected {options}{got}"
    if kind == "union_tag_invalid":
        return f"expected a section with the name {context['expected_tags'].replace(', ', ' or ')}{got}"
    if kind == "too_long":
        return f"expected at most {context['max_length']} items{got}"
    stem = kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_from_float")
    if stem in EXPECTED:
        return f"expected {EXPECTED[stem]}{got}"
    return error["msg"].replace("Input should", "must", 1) + ("" if kind == "conflict" else got)


def shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _models(annotation: Any) -> list[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in get_args(annotation) for m in _models(a)]


def _concrete(models: list[type[BaseModel]], value: Any) -> list[type[BaseModel]]:
    """The models that `value` chooses by its name; every method of that kind when it chooses none."""
    name = value.get("name") if isinstance(value, dict) else value
    found: list[type[BaseModel]] = []
    for model in models:
        base = next((b for b in PACKAGES if model is b), None)
        if base is not None:
            names = [name] if isinstance(name, str) else available(PACKAGES[base])
            found += [method_class(PACKAGES[base], base, n) for n in names]
            continue
        field = model.model_fields.get("name")
        if len(models) == 1 or not isinstance(name, str) or field is None or name in get_args(field.annotation):
            found.append(model)
    return found


def models_at(path: Path, data: Any) -> list[type[BaseModel]]:
    """The models that may stand at `path` of a configuration; [] if none can."""
    models: list[type[BaseModel]] = [Config]
    for key in path:
        if isinstance(key, int):
            data = data[key] if isinstance(data, list) and key < len(data) else None
        else:
            models = [m for c in models if key in c.model_fields for m in _models(c.model_fields[key].annotation)]
            data = data.get(key) if isinstance(data, dict) else None
        if not isinstance(data, list):
            models = _concrete(models, data)
    return models


def explain(key: str, data: dict[str, Any]) -> str:
    """Docstring, type and default of a dotted key in every section it may stand in, then the keys inside it.

    `data` is a configuration as read; its names choose among methods, and {} shows them all. UserError if unknown.
    """
    path: Path = tuple(int(p) if p.isdigit() else p for p in key.split("."))
    at = max((i for i, p in enumerate(path) if isinstance(p, str)), default=0)
    around, word = models_at(path[:at], data), str(path[at])
    holders = [m for m in around if word in m.model_fields]
    if not holders:
        keys = sorted({name for m in around for name in m.model_fields})
        raise UserError(f"{key}: unknown key; {nearest(word, keys)}")
    lines: list[str] = []
    for model in holders:
        field = model.model_fields[word]
        default = "" if field.is_required() else f" = {shown(field.get_default(call_default_factory=True))}"
        lines.append(f"{_title(model, holders)}{key}{default}: {field.description or ''}")
    inside = list(dict.fromkeys(models_at(path, data)))
    for model in inside:
        lines += [f"  {_title(model, inside)}{n}: {f.description or ''}" for n, f in model.model_fields.items()]
    return "\n".join(lines)


def validated(model: type[S], data: dict[str, Any], where: str) -> S:
    """A section from plain values; its mistakes become UserErrors that begin with `where`."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(describe(error, Source(data, {(): where}))) from None


def _title(model: type[BaseModel], among: list[type[BaseModel]]) -> str:
    return f"[{model.__name__}] " if len(among) > 1 else ""


def schema() -> dict[str, Any]:
    """JSON schema of a configuration file, with every method's own settings, for editors."""
    out = Config.model_json_schema(ref_template="#/$defs/{model}")
    definitions = out["$defs"]
    choices: dict[str, list[dict[str, Any]]] = {}
    for base, package in PACKAGES.items():
        definitions.pop(base.__name__, None)
        shapes: list[dict[str, Any]] = [{"type": "string"}]
        for name in available(package):
            one = method_class(package, base, name).model_json_schema(ref_template="#/$defs/{model}")
            definitions.update(one.pop("$defs", {}))
            one["properties"]["name"] = {"const": name, "description": one.get("description", "")}
            definitions[f"{base.__name__}.{name}"] = one
            shapes.append({"$ref": f"#/$defs/{base.__name__}.{name}"})
        own = {"type": "object", "properties": {"name": {"type": "string", "pattern": "\\."}}, "required": ["name"]}
        choices[base.__name__] = [*shapes, own]
        definitions[base.__name__] = {"anyOf": choices[base.__name__]}
    for key in ("model", "adapter"):
        out["properties"][key] = {"anyOf": [out["properties"][key], {"type": "string"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **out, "title": "diffalign run"}
