"""What a run will do, and how much memory it will need, in the words of `diffalign check`."""

from __future__ import annotations

import os
from itertools import groupby
from typing import TYPE_CHECKING

from diffalign import estimate, knobs, sizes
from diffalign.sections import Lora

if TYPE_CHECKING:
    from diffalign.config import Config
    from diffalign.estimate import Estimate

GIB = estimate.GIB


def summary(config: Config) -> str:
    """A few lines on the run, then a table of its memory on one accelerator."""
    processes = int(os.environ.get("WORLD_SIZE", 1))  # as set by `accelerate launch`
    return f"{plan(config, processes)}\n\n{memory(config, processes)}"


def plan(config: Config, processes: int = 1) -> str:
    """What is sampled, trained and written."""
    t, s, e = config.trainer, config.sampling, config.evaluation
    images = t.prompts * t.images_per_prompt
    updates = t.updates_per_rollout * t.passes
    rewards = " + ".join(f"{r.weight:g} {r.key}" for r in config.rewards)
    judged = f" on {rewards}" if rewards else ", without rewards"
    balanced = f", balanced by {config.multireward.name}" if config.multireward is not None else ""
    lines = {
        "model": f"{config.model.path}, {config.model.dtype}, {config.adapter.name} adapter{below(config)}",
        "method": f"{config.algorithm.name}{judged}{balanced}{teacher(config)}",
        "epoch": f"{t.prompts} prompts x {t.images_per_prompt} images = {images} images of {s.width}x{s.height}",
        "sampling": f"{s.steps} steps{noise(config)}, guidance {s.guidance:g}",
        "training": training(config),
        "forwards": f"an epoch {forwards(config)}",
        "run": f"{t.epochs} epochs, {t.epochs * updates} updates, {t.epochs * images} images"
        + (f", on {processes} processes" if processes > 1 else ""),
        "evaluation": f"every {e.every} epochs: {e.prompts} x {e.images_per_prompt} images, "
        f"{config.evaluation_sampling.steps} steps"
        if e.every
        else "never",
        "output": config.output,
    }
    return "\n".join(f"{name + ':':12}{text}" for name, text in lines.items())


def below(config: Config) -> str:
    a = config.adapter
    return f" on top of {a.start}" if isinstance(a, Lora) and a.start is not None else ""


def teacher(config: Config) -> str:
    """The other model that is matched, if there is one."""
    path = estimate.settings(config).get("teacher")
    return f", teacher {path}" if path else ""


def noise(config: Config) -> str:
    """Which steps are stochastic, and which of those are trained if any are."""
    s, a = config.sampling, config.algorithm
    if s.deterministic:
        return f" of {s.kernel}"
    first = a.stochastic(s.steps, config.seed, 0), a.kept(s.steps, config.seed, 0)
    noisy, kept = first
    if not noisy:
        return ""
    if not kept and len(noisy) == s.steps:
        return f" of {s.kernel} with eta {s.eta:g}"
    told = f", {len(noisy)} of them {s.kernel} with eta {s.eta:g}"
    if not kept:
        return told
    epochs = range(1, min(config.trainer.epochs, 100))
    moves = any((a.stochastic(s.steps, config.seed, n), a.kept(s.steps, config.seed, n)) != first for n in epochs)
    own, others = [i for i in kept if i in noisy], len([i for i in kept if i not in noisy])
    which = "all of those" if own == noisy else f"{len(own)} of those"
    which += f" and {others} other{'s' * (others > 1)}" if others else ""
    if a.until(s.steps, config.seed, 0) is not None:
        told += ", up to one that each epoch draws"
    spans = f" (numbers {ranges(kept)} of 0-{s.steps - 1}{' in the first epoch' if moves else ''})"
    return f"{told}, {which} trained{spans}"


def training(config: Config) -> str:
    """At how many noise levels; with how many optimizer steps."""
    t = config.trainer
    levels = counted(config.algorithm.levels(config.sampling.steps), "noise level")
    passes = f" in each of {t.passes} passes" if t.passes > 1 else ""
    return f"each image at {levels}{passes}, {counted(t.updates_per_rollout * t.passes, 'update')} an epoch"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def ranges(numbers: list[int]) -> str:
    """'0-2, 5' for [0, 1, 2, 5]."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda entry: entry[1] - entry[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def forwards(config: Config) -> str:
    """Forward passes of the network, each of one image; guidance doubles them. At most: flat groups are not trained.
    The mean over epochs, where they differ."""
    t, s, a = config.trainer, config.sampling, config.algorithm
    images = t.prompts * t.images_per_prompt
    training = a.forwards(s.steps, t.updates_per_rollout, t.passes)
    ends = [a.until(s.steps, config.seed, n) for n in range(min(t.epochs, 1000))]
    taken = sum(s.steps if end is None else end for end in ends) / len(ends)
    parts = {"to sample": round(images * taken), **{what: round(images * n) for what, n in training.items()}}
    doubled = "all" if estimate.settings(config).get("cfg", True) else "those to sample"
    if s.guidance != 1:
        guided = f", {doubled} doubled by guidance"
    else:
        taught = "of the teacher" in parts and estimate.settings(config)["guidance"] != 1
        guided = ", the teacher's doubled by guidance" if taught else ""
    return " + ".join(f"{n} {what}" for what, n in parts.items()) + guided


def memory(config: Config, processes: int = 1) -> str:
    """The table, the cards that are large enough, and what would make the run fit the others."""
    model = sizes.find(config.model)
    if model is None:
        return (
            f"memory:     not estimated: '{config.model.path}' is no SD3 model that is whole on this machine or in the "
            "table of known ones"
        )
    found = estimate.estimate(config, model, processes)
    lines = [
        f"memory on the accelerator, per process, estimated from {model.origin} (GiB)",
        *table(found),
        "  not counted: reward models",
    ]
    good = [card for card in estimate.CARDS if found.fits(card)]
    keep = f"{estimate.RESERVE:.0%} kept free"
    if good:
        lines.append(f"fits cards of {', '.join(map(str, good))} GB ({keep})")
    for card in (c for c in estimate.CARDS if c not in good):
        changes = knobs.fitting(config, model, card, processes)
        if changes is None:
            tried = " ".join(f"{key}={knobs.text(value)}" for key, value in dict(knobs.knobs(config)).items())
            lines.append(
                f"too large for {card} GB ({keep}), even with {tried}" if tried else f"too large for {card} GB"
            )
            continue
        fitted = estimate.estimate(knobs.turned(config, changes), model, processes)
        told = " ".join(f"{key}={knobs.text(value)}" for key, value in changes.items())
        lines.append(f"too large for {card} GB ({keep}); needs {fitted.total / GIB:.1f} with {told}")
    if len(good) < len(estimate.CARDS):
        saved = knobs.savings(config, model, processes)
        told = ", ".join(f"{key}={knobs.text(value)} {less / GIB:.1f}" for (key, value), less in saved.items())
        lines.append(f"each alone would save: {told}" if saved else "no setting would lower it")
    return "\n".join(lines)


def table(found: Estimate) -> list[str]:
    sections = {
        "all the time": found.held,
        "from rollout to update": found.stored,
        "one at a time, of which the largest counts": found.phases,
    }
    lines = []
    for heading, parts in sections.items():
        lines.append(f"  {heading}")
        lines += [f"    {name:46}{gib(size):>8}" for name, size in parts.items()]
    return [*lines, f"  {'total':48}{gib(found.total):>8}"]


def gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size >= 0.05 * GIB or not size else "<0.1"
