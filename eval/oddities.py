"""What a reader must know before comparing: images that are not there yet, or were not made under equal conditions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from diffalign.eval.gallery import Entry, Gallery
from diffalign.eval.gallery_files import Files, Found
from diffalign.eval.records import LOOKS, MADE, SCORES, Key, parts, stem


def oddities(gallery: Gallery, files: Files) -> list[str]:
    """One sentence each, in the order of the page; none when all is as it should be."""
    found = []
    for name, entry in gallery.entries.items():
        found += _unscored(gallery, name, entry) + _cut_off(name, entry.folder)
        found += _changed(name, entry, files[name]) + _seeds(gallery, name, entry) + _size(gallery, name, files[name])
    return found


def _changed(name: str, entry: Entry, files: Mapping[Key, Found]) -> list[str]:
    """Files that are not those which were made and scored; the evaluation makes them again."""
    damaged = [key for key, file in files.items() if file.size is None]
    others = [key for key, file in files.items() if file.size is not None and not file.same]
    found, of = [], len(entry.made)
    if damaged:
        found.append(
            f"{name}: {len(damaged)} of {of} images cannot be read, such as {stem(damaged[0])}.png; the scores are of "
            "what they were. Run the evaluation again, which makes them anew."
        )
    if others:
        found.append(
            f"{name}: {len(others)} of {of} images are not those that were scored, such as {stem(others[0])}.png: "
            "somebody changed the files. Run the evaluation again, which makes them anew."
        )
    return found


def _unscored(gallery: Gallery, name: str, entry: Entry) -> list[str]:
    found = []
    for reward in gallery.rewards:
        lacking = sum(key not in entry.scores[reward] for key in entry.made)
        if lacking:
            found.append(f"{name}: {lacking} of {len(entry.made)} images have no score of {reward} yet.")
        failed = [s for s in entry.scores[reward].values() if not s.valid]
        if failed:
            why = str(failed[0].details.get("error") or "it gave no reason")
            found.append(
                f"{name}: {reward} could not score {len(failed)} of {len(entry.made)} images, which are left out: {why}"
            )
    return found


def _cut_off(name: str, folder: Path) -> list[str]:
    """Files whose last line was cut off when the evaluation was killed."""
    cut = []
    for path in [path for name in (MADE, SCORES, LOOKS) for path in parts(folder, name)]:
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    cut.append(path.name)
    return [f"{name}: {file} ends in half a line, which does not count; run the evaluation on." for file in cut]


def _seeds(gallery: Gallery, name: str, entry: Entry) -> list[str]:
    """Equal noise makes pairs; without it differences are as honest and less sure."""
    base = gallery.baseline
    if name == gallery.asked.baseline or entry.about.again:
        return []
    both = [key for key in entry.made if key in base.made]
    other = sum(entry.made[key].seed != base.made[key].seed for key in both)
    if not other:
        return []
    return [
        f"{name}: {other} of {len(both)} images start from other seeds than those of {gallery.asked.baseline}, so they "
        "share the prompt but not the noise; do not read them as pairs."
    ]


def _size(gallery: Gallery, name: str, files: Mapping[Key, Found]) -> list[str]:
    found, asked = [], (gallery.asked.width, gallery.asked.height)
    sizes = Counter(file.size for file in files.values() if file.size is not None)
    if strange := {size: n for size, n in sizes.items() if size != asked}:
        told = " and ".join(f"{n} of {w} by {h} pixels" for (w, h), n in sorted(strange.items()))
        found.append(
            f"{name}: {told} instead of {asked[0]} by {asked[1]}; compare with care, for "
            "rewards and looks depend on the size."
        )
    return found
