"""Trees of the steered contestants: how the pictures came about that gained and lost most, and that of the first."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from diffalign.eval import lineage, selections, wall
from diffalign.eval.gallery import Entry, Gallery
from diffalign.eval.gallery_files import Files
from diffalign.eval.lineage_layout import Family
from diffalign.eval.pictures import Pictures
from diffalign.eval.records import LINEAGE, Key, parts, whole_lines

EACH = 2  # trees of the largest gains of a contestant, and of its largest losses
FIRST = "the first of the set"


def trees(gallery: Gallery, files: Files, pictures: Pictures) -> list[dict[str, Any]]:
    """One entry a steered contestant that left a lineage: its name, the reward of the choice, and its trees."""
    found = []
    for name, entry in gallery.entries.items():
        told = lines(entry) if entry.about.steering is not None else {}
        if told:
            reward = followed(gallery, entry)
            drawn = [
                tree
                for key, why in chosen(gallery, name, reward).items()
                if key in told and (tree := _tree(gallery, files, pictures, entry, key, why, told[key])) is not None
            ]
            found.append({"name": name, "reward": reward, "trees": drawn, "of": len(told)})
    return [one for one in found if one["trees"]]


def lines(entry: Entry) -> dict[Key, dict[str, Any]]:
    """Of the images that are there; the last of equal ones counts."""
    every = [line for path in parts(entry.folder, LINEAGE) for _, line in whole_lines(path)]
    told = {(line.get("id"), line.get("k")): line for line in every}
    return {key: told[key] for key in entry.made if key in told}


def followed(gallery: Gallery, entry: Entry) -> str | None:
    """The evaluated reward that steered it, else the first one."""
    own = {str(section.get("name", key)) for key, section in entry.about.steered_by.items()}
    rewards = {key: str(section.get("name", key)) for key, section in gallery.asked.rewards.items()}
    return next((key for key, head in rewards.items() if head in own), next(iter(rewards), None))


def chosen(gallery: Gallery, name: str, reward: str | None) -> dict[Key, str]:
    """Images and why they are chosen: the largest gains on the baseline, the largest losses, and the first of all."""
    picks: dict[Key, str] = {}
    if reward is not None and name in selections.rivals(gallery):
        best, worst = selections.extremes(gallery, reward, EACH, name)
        picks |= {pick.key: "rose most" for pick in best} | {pick.key: "fell most" for pick in worst}
    return {**picks, gallery.keys[0]: picks.get(gallery.keys[0], FIRST)}


def _tree(
    gallery: Gallery, files: Files, pictures: Pictures, entry: Entry, key: Key, why: str, line: dict[str, Any]
) -> dict[str, Any] | None:
    """None for a line that is no tree."""
    try:
        family = Family.model_validate(line)
        leaf = range(len(family.step))[line["leaves"][0]]
    except (ValidationError, KeyError, IndexError, TypeError):
        return None
    prompt, file = gallery.prompts[int(key[0])]["prompt"], files[entry.about.name].get(key)
    seen = file is not None and file.size is not None
    return {
        "id": key[0],
        "k": key[1],
        "why": why,
        "prompt": prompt,
        "alt": wall.alt(prompt, entry.about.name, entry.made[key].seed),
        "address": pictures.file(entry.image(key), file.digest, wall.SIDE) if seen and file else None,
        "drawn": lineage.picture(family, leaf, lineage.unit(entry.about.steering or {})),
    }
