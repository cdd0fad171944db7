"""Rewards as one writes them on a command line: `pickscore,geneval:mode=dense`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from diffalign.rewards import Reward, resolve
from diffalign.types import UserError

WEIGHT = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
HELP = (
    "names with weights or options, such as pickscore:1,jpeg:0.5 or 'pickscore:0.5,model=tiny-clip,scale=raw', or one "
    "in YAML, such as '{name: jpeg, quality: 80}'; may be repeated"
)


def parse(texts: Sequence[str]) -> list[Reward]:
    """The rewards of each text, in order; importing their files, loading nothing.

    NAME[:OPTION=VALUE[,OPTION=VALUE...]] are separated by commas; an OPTION=VALUE without a name belongs to the reward
    before it, and a number after the colon is its weight. Values are read as YAML. A text that opens with '{' is the
    one reward's YAML mapping, for values with commas. Raises UserError for what cannot be read, an unknown name or
    option, or two rewards of one name.
    """
    rewards: dict[str, Reward] = {}
    for entry in (entry for text in texts for entry in _entries(text)):
        reward = resolve(entry)
        if reward.key in rewards:
            raise UserError(f"two rewards are called '{reward.key}'; add label=NAME to one of them")
        rewards[reward.key] = reward
    if not rewards:
        raise UserError("--reward names no reward; `diffalign list` shows them")
    return list(rewards.values())


def parse_fixed(texts: Sequence[str]) -> list[Reward]:
    """As `parse`; UserError also for a reward that means nothing before a run has trained it."""
    rewards = parse(texts)
    for reward in rewards:
        if reward.learns:
            raise UserError(f"'{reward.key}' is trained during a run and scores nothing without one; leave it out")
    return rewards


def _entries(text: str) -> Iterator[dict[str, Any]]:
    if text.lstrip().startswith("{"):
        entry = yaml_value(text)
        if not isinstance(entry, dict):
            raise UserError(f"--reward {text!r} is no YAML mapping; write it as '{{name: jpeg, quality: 80}}'")
        yield entry
        return
    entry = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        more = re.fullmatch(r"\w+=.*", part)
        if more is None:
            if entry:
                yield entry
            name, _, part = part.partition(":")
            entry = {"name": name.strip()}
        elif not entry:
            raise UserError(f"--reward {text!r}: {part!r} belongs to no reward; write NAME:{part}")
        if part:
            option, equals, value = part.partition("=")
            if re.fullmatch(WEIGHT, part):
                option, equals, value = "weight", "=", f"{float(part)!r}"
            if not equals:
                raise UserError(
                    f"--reward {text!r}: {part!r} is no option; write OPTION=VALUE, or a weight, after the colon"
                )
            entry[option.strip()] = yaml_value(value)
    if entry:
        yield entry


def yaml_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{text!r} is no YAML value; put it in quotes") from error
