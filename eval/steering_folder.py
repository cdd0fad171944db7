"""Reading the folder of a steering run, and comparing its arms prompt by prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffalign.eval.comparison import direction
from diffalign.eval.lineage_layout import Family
from diffalign.eval.statistics import Paired, paired
from diffalign.types import UserError

SETTINGS = "steer.json"
REWARD = None  # the score that steers, beside the judges by name
EQUAL = 0.05  # forwards that differ less count as equal
CHEAP = 0.67  # a share of the seconds that is worth telling
RIVALS = {"bon": "best-of-N", "base": "a plain image"}


class Arm(BaseModel):
    """One way to make images of a prompt, the best image first."""

    model_config = ConfigDict(frozen=True)

    images: list[str] = Field(min_length=1)
    rewards: list[float | None] = Field(min_length=1)
    judges: dict[str, list[float | None]]
    method: dict[str, Any]
    nfe: int
    reward_calls: int
    seconds: dict[str, float]
    log_z: float | None = None
    leaves: list[int] = Field(min_length=1)
    lineage: Family
    history: list[dict[str, Any]]
    warnings: list[str]

    @model_validator(mode="after")
    def _is_whole(self) -> Arm:
        lengths = {len(self.rewards), len(self.leaves), *map(len, self.judges.values())}
        if lengths != {len(self.images)}:
            raise ValueError("every image needs a reward, a leaf and a score of each judge")
        if not all(0 <= leaf < len(self.lineage.step) for leaf in self.leaves):
            raise ValueError("a leaf is no node of the lineage")
        return self

    def score(self, judge: str | None, k: int = 0) -> float:
        """Of image k; NaN where the reward or judge does not apply."""
        value = self.rewards[k] if judge is None else self.judges[judge][k] if judge in self.judges else None
        return math.nan if value is None else value


class Line(BaseModel):
    """All arms of one prompt."""

    model_config = ConfigDict(frozen=True)

    index: int
    prompt: str
    arms: dict[str, Arm]


@dataclass(frozen=True)
class SteeringRun:
    path: Path
    settings: dict[str, Any]
    settings_text: str
    lines: list[Line]  # prompts that are done, in order

    @property
    def method(self) -> str:
        return str(self.settings["method"]["name"])

    @property
    def reward(self) -> str:
        """The steering reward in words."""
        names = [_label(r) for r in self.settings.get("rewards") or []]
        return names[0] if len(names) == 1 else f"the sum of {' and '.join(names)}" if names else "the reward"

    @property
    def arms(self) -> list[str]:
        return [a for a in ("base", "bon") if a in (self.settings.get("compare") or [])] + [self.method]

    @property
    def judges(self) -> list[str]:
        return list(dict.fromkeys(j for line in self.lines for arm in line.arms.values() for j in arm.judges))

    def of(self, arm: str) -> list[Arm]:
        return [line.arms[arm] for line in self.lines if arm in line.arms]


def read(folder: Path | str) -> SteeringRun:
    """Raises UserError when the folder is no steering run or one of its files is damaged; half a last line is none."""
    path = Path(folder)
    note = path / SETTINGS
    if not note.is_file():
        raise UserError(f"{path} is not a folder of 'diffalign steer': it has no {SETTINGS}")
    text = note.read_text("utf-8")
    try:
        settings = json.loads(text)
        str(settings["method"]["name"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{note} does not hold the settings of a steering run; steer into a new folder") from error
    lines = {line.index: line for line in _lines(path / "run.jsonl")}
    return SteeringRun(path, settings, text, [lines[index] for index in sorted(lines)])


def _lines(path: Path) -> Iterator[Line]:
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    rows = text.split("\n")
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            yield Line.model_validate_json(row)
        except ValidationError as error:
            if number == len(rows):
                return  # the run was cut off, or is writing this very line
            raise UserError(f"{path}:{number} is no line of a steering run; delete it and --resume the run") from error


def _label(reward: dict[str, Any]) -> str:
    return str(reward.get("label") or reward.get("name")).rpartition(".")[2]


def against(run: SteeringRun, other: str, judge: str | None) -> Paired | None:
    """The method minus another arm over the prompts that both have a score for; None without any."""
    both = [(line.arms[run.method], line.arms[other]) for line in run.lines if {run.method, other} <= line.arms.keys()]
    pairs = [(a.score(judge), b.score(judge)) for a, b in both]
    known = [p for p in pairs if all(map(math.isfinite, p))]
    return paired([a for a, _ in known], [b for _, b in known]) if known else None


Compared = Mapping[tuple[str, str | None], Paired | None]  # (other arm, judge or REWARD) -> the method minus the other


def compared(run: SteeringRun) -> Compared:
    others = [a for a in ("bon", "base") if a in run.arms]
    return {(other, score): against(run, other, score) for score in (REWARD, *run.judges) for other in others}


def rival(run: SteeringRun, other: str) -> str:
    """The other arm in words, with what it cost beside the method; gradients cost seconds and no forwards."""

    def share(cost: Callable[[Arm], float]) -> float:
        its, mine = (sum(map(cost, run.of(name))) / max(1, len(run.of(name))) for name in (other, run.method))
        return its / mine if mine else math.nan

    forwards, seconds = share(lambda arm: arm.nfe), share(lambda arm: arm.seconds.get("total", math.nan))
    equal = abs(forwards - 1) <= EQUAL
    if other == "bon" and seconds < CHEAP:
        part = "equal forwards" if equal else f"{100 * forwards:.2g} % of the forwards"
        return f"{RIVALS[other]} ({part}, {100 * seconds:.2g} % of the seconds)"
    return f"{RIVALS[other]} at {'equal cost' if equal else f'{100 * forwards:.2g} % of the cost'}"


def verdict(run: SteeringRun, results: Compared, number: Callable[[float], str]) -> tuple[str, list[str]]:
    """(up, down or open; sentences): whether the method beats best-of-N, or a plain image, and what the judges say.

    A reward that rises while a judge falls is over-optimised. `number` formats a signed difference.
    """
    if not run.lines:
        return "open", ["No prompt is done yet."]
    if not results:
        return "open", [
            f"{run.method} ran alone, so there is nothing to compare it with; --compare base,bon adds both."
        ]
    other = next(iter(results))[0]
    result, against_it = results[other, REWARD], rival(run, other)
    if result is None:
        return "open", [f"No prompt has a reward both from {run.method} and from {against_it}."]
    if result.n < 2:
        return "open", [
            f"A single prompt allows no conclusion; {run.method} minus {against_it}: {number(result.mean)}."
        ]

    def told(p: Paired) -> str:
        interval = f" [{number(p.low)}, {number(p.high)}]" if p.n > 1 else ""
        return f"{number(p.mean)}{interval}, {p.n} prompt{'s' * (p.n != 1)}"

    kind = direction(result)
    if kind == "up":
        said = f"{run.method} beats {against_it} on {run.reward} by {told(result)}"
    elif kind == "down":
        said = f"{run.method} loses to {against_it} on {run.reward}: {told(result)}"
    elif leaning := _leaning(result):
        way = f"{run.method} leans {'above' if leaning > 0 else 'below'} {against_it} on {run.reward}"
        said = f"{way}, but too few prompts agree to be sure: {told(result)}"
    else:
        said = f"{run.method} and {against_it} cannot be told apart on {run.reward}: {told(result)}"
    opinions = [
        f"{_called(run, judge)} {_opinion(p, kind)}: {told(p)}"
        for judge in run.judges
        if (p := results[other, judge]) is not None
    ]
    warnings = [_over_optimised(results, o, run.judges) for o in dict.fromkeys(o for o, _ in results)]
    return "down" if any(warnings) else kind, ["; ".join([said, *opinions]) + ".", *filter(None, warnings)]


def _called(run: SteeringRun, judge: str) -> str:
    steers = judge in [_label(r) for r in run.settings.get("rewards") or []]
    return f"{judge}, which steers too," if steers else f"the held-out judge {judge}"


def _leaning(p: Paired) -> int:
    """Side of zero that the whole interval lies on, 0 for none."""
    return 1 if p.low > 0 else -1 if p.high < 0 else 0


def _opinion(p: Paired, kind: str) -> str:
    way = direction(p)
    if way == "open":
        return {1: "leans up", -1: "leans down", 0: "does not tell them apart"}[_leaning(p)]
    return "agrees" if way == kind else "rises" if way == "up" else "falls"


def _over_optimised(results: Compared, other: str, judges: Sequence[str]) -> str:
    """A sentence if the reward rises against the other arm while judges fall, else nothing."""
    reward = results[other, REWARD]
    fallen = [j for j in judges if (p := results[other, j]) is not None and direction(p) == "down"]
    if reward is None or direction(reward) != "up" or not fallen:
        return ""
    fall = f"{' and '.join(fallen)} fall{'s' * (len(fallen) == 1)}"
    return f"Over-optimised: against {RIVALS[other]} the steering reward rises while {fall}."
