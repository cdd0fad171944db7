"""Reading a configuration: file or preset, then overrides, then every check that needs no model."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import yaml
from pydantic import ValidationError

from diffalign import config_help, prompts, source
from diffalign.config import Config
from diffalign.listing import nearest
from diffalign.pipelines import embedded_names, looks_like_hub_id
from diffalign.rewards._applies import unmatched
from diffalign.source import Path as KeyPath
from diffalign.types import UserError


def presets() -> dict[str, str]:
    """Text of each YAML preset that ships with diffalign, by its bare name."""
    found = [f for f in files("diffalign.configs").iterdir() if f.name.endswith(".yaml")]
    return {f.name.removesuffix(".yaml"): f.read_text("utf-8") for f in sorted(found, key=lambda f: f.name)}


def read(name: str, overrides: Sequence[str] = ()) -> source.Source:
    """Parse a YAML file, or a preset by its bare name (a file wins), and lay `overrides` over it."""
    if os.path.isfile(name):
        text = Path(name).read_text("utf-8")
    elif name in presets():
        text, name = presets()[name], f"{name}.yaml"
    else:
        raise UserError(f"no file or preset '{name}'; {nearest(name, list(presets()))}")
    return source.override(source.read(text, name), overrides)


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration file or preset.

    Raises UserError with one line per mistake, each naming its place: 'run.yaml:5: trainer.lr: expected ...'.
    """
    found = read(name, overrides)
    try:
        config = Config.model_validate(found.data)
    except ValidationError as error:
        raise UserError(config_help.describe(error, found)) from None
    missing = [f"{found.origin(path)}: {config_help.dotted(path)}: {said}" for path, said in _missing(config)]
    if missing:
        raise UserError("\n".join(missing))
    return config


def _missing(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """(key, sentence) for what the configuration names and this machine lacks."""
    model = config.model.path
    if Path(model).expanduser().is_dir() and model not in embedded_names():
        if not (Path(model).expanduser() / "model_index.json").is_file():
            yield ("model",), f"'{model}' is no diffusers folder: it has no model_index.json"
    elif model not in embedded_names() and not looks_like_hub_id(model):
        yield ("model",), f"no folder or embedded model '{model}'; {nearest(model, embedded_names())}"
    wanted: list[tuple[str, str | tuple[str, ...], str, int]] = [
        ("train", config.prompts.train, "trainer", config.trainer.prompts)
    ]
    if config.prompts.test is not None:
        asked = config.evaluation.prompts if config.evaluation.every else 0
        wanted.append(("test", config.prompts.test, "evaluation", asked))
    for key, where, section, asked in wanted:
        try:
            found = prompts.load(where)
        except UserError as error:
            yield ("prompts", key), str(error)
            continue
        held = len(found)
        if asked > held:
            holds = f"'{where}' holds" if isinstance(where, str) else f"{' + '.join(where)} hold"
            yield (section, "prompts"), f"{asked} prompts asked, but {holds} {held}; ask for {held} or fewer"
        if key == "train":
            idle = ((i, unmatched(reward.only, found)) for i, reward in enumerate(config.rewards))
            yield from ((("rewards", i, "only"), said) for i, said in idle if said)
            yield from config.curriculum.conflicts(found, asked if asked <= held else 0)
    for i, tracker in enumerate(config.log_with):
        if importlib.util.find_spec(tracker) is None:
            yield ("log_with", i), f"{tracker} is not installed; pip install {tracker.replace('_', '-')}"


def save(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that `load` reads back to an equal one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), "utf-8")
    os.replace(temporary, path)
