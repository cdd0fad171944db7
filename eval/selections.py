"""Which pictures a page shows first, by rule, so that nobody picks cherries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from diffalign.eval.gallery import Gallery
from diffalign.eval.records import Key

MOST = 8  # pictures of a list
RULE = (
    "Pairs of pictures of one prompt and seed, from a contestant and from the baseline, whose scores differ most. "
    "Every prompt counts once, with its most extreme pair; of equal ones the first."
)
RULE_ALONE = (
    "The pictures with the highest and the lowest score. Every prompt counts once, with its most extreme picture."
)
RULE_DISAGREE = (
    "z is a pair's difference in one reward over the standard deviation of that reward's differences. The rewards "
    "disagree where one rises and another falls, by max z - min z. Every prompt counts once."
)


@dataclass(frozen=True)
class Pick:
    """A picture, and what it was picked for: its score, a difference of scores, or a disagreement."""

    name: str
    key: Key
    value: float


def rivals(gallery: Gallery) -> list[str]:
    """Those compared with the baseline: all but itself and contestants that are another with other seeds."""
    return [n for n, e in gallery.entries.items() if n != gallery.asked.baseline and e.about.again is None]


def scores(gallery: Gallery, name: str, reward: str) -> np.ndarray:
    """[P, K] float64; NaN where the reward said nothing."""
    entry, count = gallery.entries[name], gallery.asked.images_per_prompt
    values = [entry.value(reward, key) for key in gallery.keys]
    return np.array(values, dtype=np.float64).reshape(len(gallery.prompts), count)


def differences(gallery: Gallery, reward: str) -> np.ndarray:
    """[M, P, K]: each rival minus the baseline at the same prompt and seed."""
    base = scores(gallery, gallery.asked.baseline, reward)
    names = rivals(gallery)
    return np.array([scores(gallery, name, reward) - base for name in names]).reshape(len(names), *base.shape)


def extremes(gallery: Gallery, reward: str, most: int = MOST, of: str | None = None) -> tuple[list[Pick], list[Pick]]:
    """(best, worst): the largest differences above zero and the smallest below it, at most one of a prompt in each.

    Where the baseline is alone: its highest and its lowest scores, no prompt in both lists. `of`: of this rival alone.
    """
    names = rivals(gallery)
    if names:
        d = differences(gallery, reward)
        if of is not None:
            d, names = d[[names.index(of)]], [of]
        return _first(gallery, names, np.where(d > 0, d, np.nan), most), [
            Pick(p.name, p.key, -p.value) for p in _first(gallery, names, np.where(d < 0, -d, np.nan), most)
        ]
    names, values = [gallery.asked.baseline], scores(gallery, gallery.asked.baseline, reward)[None]
    best = _first(gallery, names, values, most)
    shown = {pick.key[0] for pick in best}
    rest = np.array([prompt["id"] not in shown for prompt in gallery.prompts])
    worst = _first(gallery, names, np.where(rest[None, :, None], -values, np.nan), most)
    return best, [Pick(p.name, p.key, -p.value) for p in worst]


def disagreement(gallery: Gallery) -> np.ndarray:
    """[M, P, K] of the rivals: max z - min z over rewards where one rises and another falls; else NaN."""
    z = np.array([_scaled(differences(gallery, reward)) for reward in gallery.rewards])
    if len(z) < 2 or not z.size:
        return np.full(z.shape[1:], np.nan)
    known = ~np.isnan(z)
    high = np.where(known, z, -np.inf).max(0)
    low = np.where(known, z, np.inf).min(0)
    apart: np.ndarray = np.where((high > 0) & (low < 0), high - low, np.nan)
    return apart


def disagreements(gallery: Gallery, most: int = MOST) -> list[Pick]:
    names = rivals(gallery)
    return _first(gallery, names, disagreement(gallery), most) if names else []


def _scaled(d: np.ndarray) -> np.ndarray:
    """Over the standard deviation; all NaN where that is zero or unknown, since nothing tells large from small then."""
    known = d[~np.isnan(d)]
    spread = known.std() if known.size > 1 else 0.0
    return d / spread if spread > 0 else np.full_like(d, np.nan)


def _first(gallery: Gallery, names: list[str], values: np.ndarray, most: int) -> list[Pick]:
    """The largest values [M, P, K], a prompt once; of equal ones the first prompt, contestant and image."""
    found = sorted(_largest(gallery, names, values), key=lambda pick: -pick.value)
    return found[:most]


def _largest(gallery: Gallery, names: list[str], values: np.ndarray) -> Iterator[Pick]:
    filled = np.where(np.isnan(values), -np.inf, values)
    for p, prompt in enumerate(gallery.prompts):
        m, k = np.unravel_index(int(filled[:, p].argmax()), filled[:, p].shape)
        if np.isfinite(filled[m, p, k]):
            yield Pick(names[m], (prompt["id"], int(k)), float(filled[m, p, k]))
