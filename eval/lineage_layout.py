"""Where the states of a steering run are drawn: steps from left to right, families together, no two in one place."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

WIDTH, SIDE, TOP, BOTTOM = 640, 12, 10, 30  # px of the unscaled drawing
NARROW, WIDE, USUAL = 6.5, 20.0, 340.0  # px between two dots of a step, and about how tall a drawing is
TO_SCALE = 12  # px between two steps, below which they are drawn evenly spaced
MOST, MOST_OF_A_STEP = 600, 72  # dots that are drawn, about
FIRM = 1e4  # how much less the line of the returned image gives way to its neighbours

Key = tuple[int, int]  # (node, column): a node, or its line where it passes a later column
Standing = Literal["kept", "alive", "dead"]


class Family(BaseModel):
    """Nodes by number, parents before children and at an earlier step."""

    model_config = ConfigDict(frozen=True)

    step: list[int]
    parent: list[int | None]
    reward: list[float | None]

    @model_validator(mode="after")
    def _is_a_tree(self) -> Family:
        if not len(self.step) == len(self.parent) == len(self.reward):
            raise ValueError("step, parent and reward differ in length")
        for n, p in enumerate(self.parent):
            if p is not None and not (0 <= p < n and self.step[p] < self.step[n]):
                raise ValueError(f"node {n} does not come after its parent")
        return self

    def path(self, node: int) -> list[int]:
        """From a node up to its root."""
        found = [node]
        while (parent := self.parent[found[-1]]) is not None:
            found.append(parent)
        return found


@dataclass(frozen=True)
class Layout:
    """Places in px. Each dot is right of its parent, and dots of a step are `gap` apart or more."""

    dots: dict[int, tuple[float, float]]
    lines: list[tuple[Standing, tuple[float, float], tuple[float, float]]]
    standing: dict[int, Standing]  # kept: ancestor of the returned image; alive: of something at the last step
    columns: dict[int, float]  # step -> x
    gap: float
    radius: float
    height: float


def drawn(family: Family, leaf: int) -> list[int]:
    """The line of `leaf`, then whole lines of other childless nodes by falling reward while their steps have room."""
    most = min(MOST_OF_A_STEP, MOST // len(set(family.step)) + 1)
    parents = set(family.parent)
    ends = [n for n in range(len(family.step)) if n not in parents and n != leaf]
    ends.sort(key=lambda n: -math.inf if (r := family.reward[n]) is None else r, reverse=True)
    chosen: set[int] = set()
    held: Counter[int] = Counter()
    for end in [leaf, *ends]:
        new = [n for n in family.path(end) if n not in chosen]
        if all(held[family.step[n]] < most for n in new):
            chosen.update(new)
            held.update(family.step[n] for n in new)
    return sorted(chosen)


def layout(family: Family, leaf: int, chosen: Sequence[int]) -> Layout:
    """Steps from left to right; within each, children next to their parents, so that no two lines cross.

    A node whose children are of later steps than the next one goes on as a line in the steps between.
    """
    steps = sorted({family.step[n] for n in chosen})
    column = {n: steps.index(family.step[n]) for n in chosen}
    above = _above(family, chosen, column)
    rows, order = _rows(above, _ancestors(above, [(leaf, column[leaf])]), len(steps))
    most = max(map(len, rows))
    gap = min(WIDE, max(NARROW, USUAL / most))
    y = _heights(rows, above, order, gap)
    x = _across(steps)
    top = min(y.values())
    place = {key: (x[key[1]], TOP + gap / 2 + y[key] - top) for key in order}
    kept = _ancestors(above, [(leaf, column[leaf])])
    alive = _ancestors(above, rows[-1])
    standing: dict[Key, Standing] = {k: "kept" if k in kept else "alive" if k in alive else "dead" for k in order}
    room = min([gap, *(b - a for a, b in zip(x, x[1:], strict=False))])
    return Layout(
        dots={n: place[n, column[n]] for n in chosen},
        lines=[(standing[k], place[p], place[k]) for k in order if (p := above[k]) is not None],
        standing={n: standing[n, column[n]] for n in chosen},
        columns=dict(zip(steps, x, strict=True)),
        gap=gap,
        radius=min(4.5, 0.4 * room),
        height=max(p[1] for p in place.values()) + gap / 2 + BOTTOM,
    )


def _above(family: Family, chosen: Sequence[int], column: Mapping[int, int]) -> dict[Key, Key | None]:
    """Parent of each key; keys come column by column."""
    last = dict(column)  # where a node's line ends
    for n in chosen:
        if (p := family.parent[n]) is not None:
            last[p] = max(last[p], column[n] - 1)
    found: dict[Key, Key | None] = {}
    for n in chosen:
        p = family.parent[n]
        found[n, column[n]] = None if p is None else (p, column[n] - 1)
        found |= {(n, c): (n, c - 1) for c in range(column[n] + 1, last[n] + 1)}
    return dict(sorted(found.items(), key=lambda entry: (entry[0][1], entry[0][0])))


def _ancestors(above: Mapping[Key, Key | None], keys: Sequence[Key]) -> set[Key]:
    found: set[Key] = set()
    for key in keys:
        at: Key | None = key
        while at is not None and at not in found:
            found.add(at)
            at = above[at]
    return found


def _rows(above: Mapping[Key, Key | None], kept: set[Key], columns: int) -> tuple[list[list[Key]], dict[Key, float]]:
    """Keys of each column from top to bottom, and every key's weight: large families in the middle of each litter."""
    weight = {key: FIRM if key in kept else 1.0 for key in above}
    litters: dict[Key | None, list[Key]] = {}
    for key in reversed(list(above)):
        parent = above[key]
        litters.setdefault(parent, []).append(key)
        if parent is not None and key not in kept:
            weight[parent] += weight[key]
    rows: list[list[Key]] = [[] for _ in range(columns)]
    waiting = [*reversed(_middle_out(litters[None], weight))]
    while waiting:
        key = waiting.pop()
        rows[key[1]].append(key)
        waiting += reversed(_middle_out(litters.get(key, []), weight))
    return rows, weight


def _middle_out(keys: Sequence[Key], weight: Mapping[Key, float]) -> list[Key]:
    found: deque[Key] = deque()
    for k, key in enumerate(sorted(keys, key=lambda key: (-weight[key], key))):
        (found.append if k % 2 else found.appendleft)(key)
    return list(found)


def _heights(
    rows: Sequence[Sequence[Key]], above: Mapping[Key, Key | None], weight: Mapping[Key, float], gap: float
) -> dict[Key, float]:
    """Close to the parent, then to the children, then to the parent again: wide litters push their roots apart."""
    y: dict[Key, float] = {}
    below: dict[Key, list[Key]] = {}
    for key, parent in above.items():
        if parent is not None:
            below.setdefault(parent, []).append(key)

    def settle(row: Sequence[Key], wanted: Sequence[float]) -> None:
        y.update(zip(row, apart(wanted, [weight[k] for k in row], gap), strict=True))

    def centre(keys: Sequence[Key]) -> float:
        return sum(weight[k] * y[k] for k in keys) / sum(weight[k] for k in keys)

    def near_parent(row: Sequence[Key], start: Sequence[float]) -> list[float]:
        return [s if (p := above[k]) is None else y[p] for k, s in zip(row, start, strict=True)]

    for row in rows:
        settle(row, near_parent(row, [i * gap for i in range(len(row))]))
    for row in reversed(rows):
        settle(row, [centre(below[k]) if k in below else y[k] for k in row])
    for row in rows:
        settle(row, near_parent(row, [y[k] for k in row]))
    return y


def apart(wanted: Sequence[float], weight: Sequence[float], gap: float) -> list[float]:
    """argmin_y sum_i w_i (y_i - wanted_i)^2 with y_{i+1} >= y_i + gap, by pooling adjacent violators."""
    blocks: list[tuple[float, float, int]] = []  # mean of wanted_i - i gap, weight, length
    for i, (target, w) in enumerate(zip(wanted, weight, strict=True)):
        block = (target - i * gap, w, 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, mass, length = blocks.pop()
            total = mass + block[1]
            block = ((mean * mass + block[0] * block[1]) / total, total, length + block[2])
        blocks.append(block)
    flat = [mean for mean, _, length in blocks for _ in range(length)]
    return [mean + i * gap for i, mean in enumerate(flat)]


def _across(steps: Sequence[int]) -> list[float]:
    """x of each step, to scale where that leaves room for the dots."""
    if len(steps) == 1:
        return [WIDTH / 2]
    room = WIDTH - 2 * SIDE
    to_scale = [SIDE + room * (s - steps[0]) / (steps[-1] - steps[0]) for s in steps]
    if min(b - a for a, b in zip(to_scale, to_scale[1:], strict=False)) >= TO_SCALE:
        return to_scale
    return [SIDE + room * i / (len(steps) - 1) for i in range(len(steps))]
