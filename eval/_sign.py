"""What the warning signs share: the verdict, and when a difference from the baseline is more than chance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from diffalign.eval.gallery import Entry, Gallery

Level = Literal["red", "amber", "green", "unknown"]
WORSE: tuple[Level, ...] = ("green", "amber", "red")
# A sign compares up to seven numbers; together they may exceed chance in one of a thousand evaluations, so that the
# base model against itself with other seeds stays green.
CHANCE = 0.001
FEWEST = 8  # prompts; below, an interval of a mean says little
EXAMPLES = 8  # prompts named as evidence


@dataclass(frozen=True)
class Sign:
    """One warning sign of one contestant.

    `evidence` is ready for JSON. Under "rows" it has a line for every number looked at: measure, base, own, change,
    error (its standard error), limit (where amber begins), level; what else there is, each sign says itself.
    """

    key: str
    level: Level
    contestant: str
    title: str
    sentence: str
    evidence: dict[str, Any]


@dataclass(frozen=True)
class Topic:
    """What one sign is about."""

    key: str
    title: str

    def unknown(self, entry: Entry, reason: str) -> Sign:
        return Sign(self.key, "unknown", entry.about.name, self.title, reason, {"rows": []})

    def verdict(self, entry: Entry, findings: Iterable[Finding], fine: str, **evidence: Any) -> Sign:
        """The worst findings say what is wrong, the sentence `fine` that nothing is."""
        found = list(findings)
        level = max((f.level for f in found), key=WORSE.index)
        said = [f.sentence for f in found if f.level == level] if level != "green" else [fine]
        rows = [f.row() for f in found]
        return Sign(self.key, level, entry.about.name, self.title, " ".join(said), {"rows": rows, **evidence})


@dataclass(frozen=True)
class Change:
    """own - base over n prompts."""

    n: int
    own: float
    base: float
    mean: float  # of the differences
    error: float  # its standard error

    def sure(self, tests: int = 1) -> bool:
        """Whether chance puts one of `tests` such means so far from 0 in less than CHANCE of cases (Student's t)."""
        if self.n < FEWEST or self.mean == 0:
            return False
        if self.error == 0:
            return True
        return bool(2 * stats.t.sf(abs(self.mean) / self.error, self.n - 1) < CHANCE / tests)


@dataclass(frozen=True)
class Finding:
    """One number of a sign against its limit."""

    measure: str
    level: Level
    change: Change
    size: float  # what is compared with the limit
    limit: float  # where amber begins
    sentence: str  # said when it is not green

    @property
    def hedge(self) -> str:
        """For a green one: why a size beyond the limit is no sign."""
        return ", which chance among prompts may explain" if abs(self.size) > abs(self.limit) else ""

    def row(self) -> dict[str, Any]:
        c = self.change
        return {
            "measure": self.measure, "level": self.level, "n": c.n, "base": c.base, "own": c.own, "change": c.mean,
            "error": c.error, "size": self.size, "limit": self.limit,
        }  # fmt: skip


def change(own: np.ndarray, base: np.ndarray, *, inflate: float = 1.0) -> Change | None:
    """Of values [P], a prompt each; where either is NaN it does not count. None for fewer than FEWEST prompts.

    `inflate` multiplies the standard error: 2 for means over pairs of prompts, whose variance is four times that of
    independent ones (Hoeffding's of a statistic of two arguments).
    """
    known = np.isfinite(own) & np.isfinite(base)
    a, b = own[known], base[known]
    if len(a) < FEWEST:
        return None
    d = a - b
    error = inflate * float(d.std(ddof=1)) / len(d) ** 0.5
    return Change(len(d), float(a.mean()), float(b.mean()), float(d.mean()), error)


def graded(size: float, amber: float, red: float, sure: bool) -> Level:
    if not sure or not size > amber:
        return "green"
    return "red" if size > red else "amber"


def by_prompt(gallery: Gallery, values: dict[tuple[str, int], float]) -> np.ndarray:
    """[P]: means over the images of each prompt; NaN where there are none."""
    kept: dict[str, list[float]] = {p["id"]: [] for p in gallery.prompts}
    for (prompt, _), value in values.items():
        if prompt in kept and np.isfinite(value):
            kept[prompt].append(value)
    return np.array([np.mean(v) if v else np.nan for v in kept.values()], dtype=np.float64)


def worst(gallery: Gallery, size: np.ndarray) -> list[str]:
    """The ids of the prompts where size [P] is largest, and above 0."""
    order = np.argsort(np.where(np.isfinite(size), -size, np.inf), kind="stable")[:EXAMPLES]
    return [gallery.prompts[i]["id"] for i in order if size[i] > 0]


def number(value: float) -> str:
    return f"{value:.3g}"
