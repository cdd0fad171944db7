"""Settings that lower the memory of a run: which would make it fit a card, and what to say when it did not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from diffalign import sizes
from diffalign.estimate import GIB, estimate
from diffalign.sections import Lora

if TYPE_CHECKING:
    from diffalign.config import Config
    from diffalign.sizes import ModelSizes


def knobs(config: Config) -> Iterator[tuple[str, Any]]:
    """(key, value) of the settings that lower memory and are not in use yet; those that cost least come first."""
    t = config.trainer
    if config.model.dtype == "fp32":
        yield "model.dtype", "bf16"
    if config.model.encoders == "resident":
        yield "model.encoders", "offload"
    for batch in (t.micro_batch // 2, t.micro_batch // 4):
        if batch > 1:
            yield "trainer.micro_batch", batch
    if not t.gradient_checkpointing:
        yield "trainer.gradient_checkpointing", True
    if t.micro_batch > 1:
        yield "trainer.micro_batch", 1
    if not isinstance(config.adapter, Lora):
        yield "adapter", "lora"


def first_turns(config: Config) -> list[tuple[str, Any]]:
    found = list(knobs(config))
    return [knob for i, knob in enumerate(found) if knob[0] not in {key for key, _ in found[:i]}]


def changed(config: Config, key: str, value: Any) -> Config:
    """The configuration with one knob turned."""
    section, _, name = key.partition(".")
    if section == "adapter":
        return config.model_copy(update={"adapter": Lora()})
    return config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})


def turned(config: Config, changes: dict[str, Any]) -> Config:
    for key, value in changes.items():
        config = changed(config, key, value)
    return config


def fitting(config: Config, model: ModelSizes, card: int, processes: int = 1) -> dict[str, Any] | None:
    """The cheapest changes found that make a run fit a card of so many GiB: {} if it fits, None if nothing helps."""

    def fits(changes: dict[str, Any]) -> bool:
        return estimate(turned(config, changes), model, processes).fits(card)

    changes: dict[str, Any] = {}
    for key, value in knobs(config):
        if fits(changes):
            break
        changes[key] = value
    if not fits(changes):
        return None
    for key in list(changes):
        less = {k: v for k, v in changes.items() if k != key}
        if fits(less):
            changes = less
    return changes


def savings(config: Config, model: ModelSizes, processes: int = 1) -> dict[tuple[str, Any], int]:
    """Bytes that each knob's first turn alone would save, largest first; what saves less than 0.05 GiB is left out."""
    before = estimate(config, model, processes).total
    found = {knob: before - estimate(changed(config, *knob), model, processes).total for knob in first_turns(config)}
    best = sorted(found.items(), key=lambda entry: -entry[1])
    return {knob: less for knob, less in best if less >= 0.05 * GIB}


def reworded(error: Exception, config: Config) -> str:
    """One sentence for an accelerator that ran out of memory: how much it has, and the settings that would help."""
    asked, owned = (re.search(p, str(error)) for p in (r"allocate ([\d.]+ \w+)", r"total capacity of ([\d.]+ \w+)"))
    found = [f"{asked[1]} more were asked for" if asked else "", f"it has {owned[1]}" if owned else ""]
    facts = ", ".join(fact for fact in found if fact)
    model = sizes.find(config.model)
    saved = savings(config, model) if model is not None else {}
    advice = [
        f"{key}={text(value)}" + (f" (saves about {saved[key, value] / GIB:.1f} GiB)" if saved else "")
        for key, value in saved or first_turns(config)
        if key != "adapter"  # a checkpoint cannot go on with another adapter
    ]
    if advice:
        remedy = f"set {' or '.join(advice)}, and go on with --resume auto"
    else:
        remedy = "take an accelerator with more memory, or smaller images; every setting that saves it is in use"
    if not isinstance(config.adapter, Lora):
        remedy += "; a new run with adapter=lora needs far less"
    return f"the accelerator is out of memory{f' ({facts})' if facts else ''}; {remedy}"


def text(value: Any) -> str:
    """As an override on the command line spells it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
