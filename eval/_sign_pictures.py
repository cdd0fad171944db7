"""Warning signs in the pictures themselves: less variety, another look, one picture for many prompts."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffalign.eval._sign import EXAMPLES, Finding, Sign, Topic, by_prompt, change, graded, number, worst
from diffalign.eval.gallery import Entry, Gallery
from diffalign.eval.looks import MEANINGS
from diffalign.eval.records import Key
from diffalign.eval.set_metrics import pairwise_distance, unit, vendi

DIVERSITY = Topic("diversity", "Less variety")
LESS = 0.15  # of the baseline's variety; the share that the specification of these signs names
MUCH_LESS = 0.30

LOOK = Topic("look", "Another look")
DRIFT = 0.5  # of the standard deviation of the baseline's images: visible at a glance, "medium" by Cohen's convention
FAR_DRIFT = 1.5  # most images then lie outside the middle 87 % of the baseline's
MOST_DRIFT = 99.0  # shown for a number that hardly varies in the baseline
LEAST_SPREAD = {"clipped": 0.002}  # two pixels of a thousand are seen by nobody, however rare they are in the baseline

DUPLICATES = Topic("duplicates", "One picture for different prompts")
ALIKE = 0.98  # cosine
ALIKE_IN_BASE = 0.05  # share of the baseline's images that may have a double; a small world needs a higher cosine
ALIKE_AT_MOST = 0.9995  # above it half precision cannot tell pictures apart
MORE_ALIKE = 0.10  # share of images beyond the baseline's
MOSTLY_ALIKE = 0.50
ROWS = 1024  # of the matrix of cosines held at once

NO_FEATURES = "No embeddings of its images or of the baseline's were computed."


def diversity(gallery: Gallery, entry: Entry) -> Sign:
    """Vendi score and mean distance of a prompt's images, and mean distance between images of different prompts.

    Each is raised when it lies more than LESS below the baseline's.
    """
    keys = shared(gallery, entry.features, gallery.baseline.features)
    if not keys:
        return DIVERSITY.unknown(entry, NO_FEATURES)
    own, base = (variety(gallery, keys, e.features) for e in (entry, gallery.baseline))
    words = {
        "Vendi score": "A prompt's images are fewer different ones: Vendi score {own} against {base}, {less:.0%} less.",
        "distance within prompts": "A prompt's images are {less:.0%} closer to each other: {own} against {base}.",
        "distance between prompts": "Images of different prompts are {less:.0%} closer: {own} against {base}.",
    }
    changes = {m: change(own[m], base[m], inflate=2 if m.endswith("between prompts") else 1) for m in words}
    known = {m: c for m, c in changes.items() if c is not None and c.base > 0}
    if not known:
        return DIVERSITY.unknown(entry, "There are too few prompts with embedded images of both to compare.")
    findings = []
    for measure, c in known.items():
        less = 1 - c.own / c.base
        level = graded(less, LESS, MUCH_LESS, c.sure(len(known)))
        said = words[measure].format(own=number(c.own), base=number(c.base), less=less)
        findings.append(Finding(measure, level, c, less, LESS, said))
    gone = base["distance within prompts"] - own["distance within prompts"]
    most = max(findings, key=lambda f: f.size)
    fine = f"Its images vary as the baseline's do: the largest loss is {max(most.size, 0):.0%}{most.hedge}."
    return DIVERSITY.verdict(entry, findings, fine, prompts=worst(gallery, gone))


def variety(gallery: Gallery, keys: list[Key], features: dict[Key, np.ndarray]) -> dict[str, np.ndarray]:
    """Measure -> [P]; those within a prompt are NaN where it has fewer than two images."""
    groups: dict[str, list[np.ndarray]] = {p["id"]: [] for p in gallery.prompts}
    for key in keys:
        groups[key[0]].append(features[key])
    scores, near, between = (np.full(len(groups), np.nan) for _ in range(3))
    total, n = unit(np.stack([features[key] for key in keys])).sum(0), len(keys)
    for i, group in enumerate(groups.values()):
        if len(group) > 1:
            scores[i], near[i] = vendi(np.stack(group)), pairwise_distance(np.stack(group))
        if group and len(group) < n:
            mine = unit(np.stack(group)).sum(0)
            between[i] = 1 - mine @ (total - mine) / (len(group) * (n - len(group)))
    return {"Vendi score": scores, "distance within prompts": near, "distance between prompts": between}


def look(gallery: Gallery, entry: Entry) -> Sign:
    """Means of the numbers of eval/looks.py, in standard deviations of the baseline's images.

    Raised for a drift of more than DRIFT either way.
    """
    keys = shared(gallery, entry.looks, gallery.baseline.looks)
    names = [n for n in MEANINGS if keys and all(n in e.looks[k] for e in (entry, gallery.baseline) for k in keys)]
    findings, moved = [], np.zeros(len(gallery.prompts))
    for name in names:
        own, base = ({key: e.looks[key][name] for key in keys} for e in (entry, gallery.baseline))
        per_own, per_base = by_prompt(gallery, own), by_prompt(gallery, base)
        c = change(per_own, per_base)
        if c is None:
            continue
        spread = max(deviation(base) or deviation(own), LEAST_SPREAD.get(name, 1e-6))
        drift = float(np.clip(c.mean / spread, -MOST_DRIFT, MOST_DRIFT))
        level = graded(abs(drift), DRIFT, FAR_DRIFT, c.sure(len(names)))
        if level != "green":
            moved = np.maximum(moved, np.nan_to_num(np.abs(per_own - per_base) / spread))
        said = (
            f"{name.replace('_', ' ').capitalize()} {'rose' if drift > 0 else 'fell'} by {abs(drift):.1f} standard "
            f"deviations of the baseline's images ({number(c.base)} to {number(c.own)})."
        )
        findings.append(Finding(name, level, c, drift, DRIFT, said))
    if not findings:
        return LOOK.unknown(entry, "The looks of too few images of both were measured.")
    most = max(findings, key=lambda f: abs(f.size))
    moves = f"{most.measure.replace('_', ' ')} moved most, by {most.size:+.2f} standard deviations"
    fine = f"Its images look as the baseline's do: {moves}{most.hedge}."
    return LOOK.verdict(entry, findings, fine, prompts=worst(gallery, moved))


def deviation(values: dict[Key, float]) -> float:
    found = np.fromiter(values.values(), np.float64)
    return 0.0 if np.ptp(found) == 0 else float(found.std(ddof=1))


def duplicates(gallery: Gallery, entry: Entry) -> Sign:
    """Share of images that have a double among the images of other prompts.

    A double is nearer than ALIKE, or than all but ALIKE_IN_BASE of the baseline's images are to their nearest one, so
    that a world of few pictures raises no sign. Raised when the share exceeds the baseline's by MORE_ALIKE. Evidence:
    "cosine", and "pairs" of images with their cosine.
    """
    keys = shared(gallery, entry.features, gallery.baseline.features)
    if len({key[0] for key in keys}) < 2:
        return DUPLICATES.unknown(entry, NO_FEATURES)
    (own, partner), (base, _) = (nearest(keys, e.features) for e in (entry, gallery.baseline))
    cosine = max(ALIKE, float(np.quantile(base, 1 - ALIKE_IN_BASE)))
    if cosine > ALIKE_AT_MOST:
        return DUPLICATES.unknown(
            entry, "To the embedding many images of different prompts are equal in the baseline already."
        )
    shares = [by_prompt(gallery, dict(zip(keys, (found > cosine).astype(float), strict=True))) for found in (own, base)]
    c = change(*shares, inflate=2**0.5)  # doubles come in twos
    if c is None:
        return DUPLICATES.unknown(entry, "There are too few prompts with embedded images of both to compare.")
    level = graded(c.mean, MORE_ALIKE, MOSTLY_ALIKE, c.sure())
    said = (
        f"{c.own:.0%} of its images have a double among other prompts (cosine above {cosine:.3f}), "
        f"of the baseline's {c.base:.0%}."
    )
    finding = Finding("images with a double", level, c, c.mean, MORE_ALIKE, said)
    pairs: dict[tuple[Key, Key], float] = {}
    for i in np.argsort(-own, kind="stable"):
        if own[i] > cosine and len(pairs) < EXAMPLES:
            pairs.setdefault((min(keys[i], keys[partner[i]]), max(keys[i], keys[partner[i]])), min(1.0, float(own[i])))
    listed: list[Any] = [[list(a), list(b), value] for (a, b), value in pairs.items()]
    return DUPLICATES.verdict(entry, [finding], f"{said[:-1]}{finding.hedge}.", cosine=cosine, pairs=listed)


def nearest(keys: list[Key], features: dict[Key, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(cosine to the nearest image of another prompt [n], its place among the keys [n])."""
    x = unit(np.stack([features[key] for key in keys])).astype(np.float32)
    prompt = np.unique([key[0] for key in keys], return_inverse=True)[1]
    best, place = np.empty(len(keys), np.float64), np.empty(len(keys), int)
    for start in range(0, len(keys), ROWS):
        rows = slice(start, start + ROWS)
        cosines = x[rows] @ x.T
        cosines[prompt[rows, None] == prompt[None]] = -np.inf
        place[rows] = cosines.argmax(1)
        best[rows] = cosines.max(1)
    return best, place


def shared(gallery: Gallery, a: dict[Key, Any], b: dict[Key, Any]) -> list[Key]:
    return [key for key in gallery.keys if key in a and key in b]
