"""Finding a method by name: one file = one method, and adding a file edits no other file."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from diffalign.listing import available, nearest
from diffalign.types import UserError


class Method(BaseModel):
    """A frozen pydantic model that is its own configuration. Subclass it once in a method's file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    name: str
    """The method's file name, or the dotted path of your own class."""

    def changed(self, options: Sequence[str]) -> list[str]:
        """Those of `options` that are not at their default; a saved configuration names the others as well."""
        return [option for option in options if dict(self)[option] != type(self).model_fields[option].default]


M = TypeVar("M", bound=Method)


def lookup(package: str, name: str, base: type[M]) -> Any:
    """The subclass of `base` in file `<package>/<name>.py`, or the object that a dotted path names.

    Raises UserError for an unknown name (with the nearest known one) or a file that defines no such class.
    """
    kind = package.rpartition(".")[2].rstrip("s")
    if "." in name:
        module_name, _, attribute = name.rpartition(".")
        if module_name in available(package):
            raise UserError(f"no {kind} is called '{name}'; write '{module_name}' and set its options")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise UserError(f"cannot import '{name}': {error}; is its folder on PYTHONPATH?") from error
        except Exception as error:  # whatever the user's module does wrong while it is imported
            raise UserError(f"cannot import '{name}': {type(error).__name__}: {error}; mend that module") from error
        try:
            return inspect.getattr_static(module, attribute)
        except AttributeError as error:
            raise UserError(f"module '{module_name}' has no '{attribute}'") from error
    known = available(package)
    if name not in known:
        raise UserError(f"unknown {kind} '{name}'; {nearest(name, known)}")
    module = importlib.import_module(f"{package}.{name}")
    found = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, base) and c.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UserError(f"{module.__name__} must define exactly one {base.__name__}, found {len(found)}")
    return found[0]


def configured(kind: type[M], options: Mapping[str, Any], what: str) -> M:
    """`kind` validated from its options, of which "name" is one; `what` it is, such as 'reward'.

    Raises UserError: one sentence on the first wrong option.
    """
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ").replace("Input", "input", 1)
        if first["type"] == "extra_forbidden":
            said = f"there is no such option; {nearest(where, sorted(set(kind.model_fields) - {'name'}))}"
        raise UserError(f"{what} '{options['name']}'{', ' * bool(where)}{where}: {said}") from error
