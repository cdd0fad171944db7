"""Field types of the configuration: strict sections, numbers with bounds, and methods that are found by their name."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, Strict

from diffalign.advantages import Advantage
from diffalign.algorithms import Algorithm
from diffalign.curriculums import Curriculum
from diffalign.methods import Method, lookup
from diffalign.multireward import MultiReward
from diffalign.rewards import FunctionReward, Reward, resolve
from diffalign.types import UserError

M = TypeVar("M", bound=Method)
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(gt=0, multiple_of=8)]
YAML_LIST = Strict(False)  # a strict tuple would refuse the list that YAML gives; its items stay strict
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Unknown keys, wrong types, infinities and changes after the fact are all errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def spelled_out(key: str, default: str | None = None) -> BeforeValidator:
    """A string stands for {key: string}; a section without `key` gets `default`."""

    def spell(value: Any) -> Any:
        if isinstance(value, str):
            return {key: value}
        return {key: default, **value} if default is not None and isinstance(value, dict) else value

    return BeforeValidator(spell)


def method(package: str, base: type[M]) -> BeforeValidator:
    """A name, or a section with a name, becomes that method's own validated model."""

    def find(value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            return value
        if not isinstance(value.get("name"), str):
            return {k: v for k, v in value.items() if k == "name"}  # so that only the name is complained about
        chosen = method_class(package, base, value["name"]).model_validate_json(json.dumps(value), strict=True)
        return resolve(value) if isinstance(chosen, FunctionReward) else chosen

    return BeforeValidator(find)


def method_class(package: str, base: type[M], name: str) -> type[M]:
    """The class that validates a method's section. ValueError if there is none: pydantic adds its place."""
    try:
        found = lookup(package, name, base)
    except UserError as error:
        raise ValueError(str(error)) from error
    if inspect.isclass(found) and issubclass(found, base):
        chosen: type[M] = found
        return chosen
    if issubclass(FunctionReward, base) and callable(found) and not inspect.isclass(found):
        return cast("type[M]", FunctionReward)
    raise ValueError(f"'{name}' is no {base.__name__} class" + (" and no function" if base is Reward else ""))


Rewards = Annotated[tuple[Annotated[SerializeAsAny[Reward], method("diffalign.rewards", Reward)], ...], YAML_LIST]
AlgorithmChoice = Annotated[SerializeAsAny[Algorithm], method("diffalign.algorithms", Algorithm)]
AdvantageChoice = Annotated[SerializeAsAny[Advantage], method("diffalign.advantages", Advantage)]
CurriculumChoice = Annotated[SerializeAsAny[Curriculum], method("diffalign.curriculums", Curriculum)]
MultiRewardChoice = Annotated[SerializeAsAny[MultiReward], method("diffalign.multireward", MultiReward)]
