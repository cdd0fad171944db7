"""All numbers of an evaluation, ready for JSON: what the page shows, and report.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffalign.eval import ranking
from diffalign.eval.gallery import Entry, Gallery
from diffalign.eval.gallery_files import Files
from diffalign.eval.oddities import oddities
from diffalign.eval.set_tables import cost, diversity, looks
from diffalign.eval.statistics import Paired, bootstrap_mean, paired, wilson

FEW = 50  # prompts below which intervals are corrected for bias and skew
FEWEST = 6  # prompts below which not even all of one sign are beyond chance (sign test)
DISTANCE = "diversity"  # the axis of trade-offs that is no reward: mean 1 - cos within a prompt
Numbers = dict[str, Any]


def numbers(gallery: Gallery, files: Files, people: np.ndarray | None = None) -> Numbers:
    """Everything that tables and charts show; what is not known is None.

    Args:
        files: what lies in the places of the images; see :func:`inspect`.
        people: [M, M], how often people preferred a contestant to another, ties as half; in the order of the page.
    """
    names = list(gallery.entries)
    scores = {r: np.stack([gallery.per_prompt(name, r) for name in names]) for r in gallery.rewards}
    varied = diversity(gallery)
    rewards = {r: _reward(gallery, r, scores[r]) for r in gallery.rewards}
    _adjust(rewards, noise(gallery))
    axes = dict(scores)
    if varied and np.isfinite(varied["models"][gallery.asked.baseline]["distance"]["per_prompt"]).any():
        axes[DISTANCE] = np.array([varied["models"][name]["distance"]["per_prompt"] for name in names])
    found: Numbers = {
        "asked": gallery.asked.model_dump(mode="json"),
        "prompts": len(gallery.prompts),
        "contestants": [
            {**recorded(e), "images": len(e.made), "of": len(gallery.keys)} for e in gallery.entries.values()
        ],
        "noise": noise(gallery),
        "problems": [*gallery.problems, *oddities(gallery, files)],
        "rewards": rewards,
        "categories": {r: rows for r in gallery.rewards if (rows := _categories(gallery, scores[r]))},
        "wins": {r: _wins(names, scores[r]) for r in gallery.rewards},
        "people": _people(names, people),
        "tradeoffs": _tradeoffs(gallery, axes),
        "diversity": varied,
        "looks": looks(gallery),
        "cost": cost(gallery),
    }
    return {key: plain(value) for key, value in found.items()}


def recorded(entry: Entry) -> dict[str, Any]:
    """What a contestant's file says; None for a precision that older ones leave out."""
    known = entry.about.model_dump(mode="json")
    return known if "dtype" in entry.about.model_fields_set else {**known, "dtype": None}


def noise(gallery: Gallery) -> list[str]:
    """The contestants that are the baseline again with other seeds: they show what chance alone does."""
    return [name for name, e in gallery.entries.items() if e.about.again == gallery.asked.baseline]


def plain(value: Any) -> Any:
    """The same in what JSON knows; NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any] | None:
    """a - b over the prompts [P] that both know; None without any."""
    both = np.isfinite(a) & np.isfinite(b)
    if not both.any():
        return None
    few = both.sum() < FEW
    found = paired(a[both].tolist(), b[both].tolist(), method="BCa" if few else "percentile")
    low, high = wilson(found.wins, found.wins + found.losses)
    return {
        "mean": found.mean, "low": found.low, "high": found.high, "standard_error": found.standard_error,
        "n": found.n, "wins": found.wins, "ties": found.ties, "losses": found.losses,
        "win_rate": found.win_rate, "decided_low": low, "decided_high": high,
        "p": found.sign_test_p, "direction": direction(found),
    }  # fmt: skip


def direction(found: Paired) -> str:
    """up or down where the interval of the difference excludes zero, else open; so few prompts show nothing."""
    if found.n < FEWEST:
        return "open"
    return "up" if found.low > 0 else "down" if found.high < 0 else "open"


def mean(values: np.ndarray) -> dict[str, Any]:
    """Mean over prompts [P] with its 95 % bootstrap interval; NaN are left out."""
    known = values[np.isfinite(values)]
    low, high = bootstrap_mean(known)
    return {
        "mean": float(known.mean()) if len(known) else math.nan,
        "low": low, "high": high, "half": (high - low) / 2, "n": len(known),
    }  # fmt: skip


def _reward(gallery: Gallery, reward: str, scores: np.ndarray) -> dict[str, Any]:
    names, floor = list(gallery.entries), noise(gallery)
    base = scores[names.index(gallery.asked.baseline)]
    models = {}
    for name, own in zip(names, scores, strict=True):
        said = gallery.entries[name].scores[reward].values()
        delta = None if name == gallery.asked.baseline else difference(own, base)
        errors = sorted({str(s.details["error"]) for s in said if not s.valid and s.details.get("error")})
        models[name] = {
            **mean(own), "delta": delta, "scored": len(said),
            "invalid": sum(not s.valid for s in said), "errors": errors[:3],
            "trained": reward in gallery.trained(gallery.entries[name]),
        }  # fmt: skip
    means = {name: m["mean"] for name, m in models.items() if name not in floor and math.isfinite(m["mean"])}
    top = max(means.values(), default=math.nan)
    return {
        "settings": gallery.asked.rewards[reward],
        "trained": [name for name, m in models.items() if m["trained"]],
        "models": models,
        "best": [name for name, value in means.items() if value == top] if len(means) > 1 else [],
    }


def _adjust(rewards: Mapping[str, dict[str, Any]], floor: Sequence[str]) -> None:
    """Adds to every difference its p over all rewards and contestants (Holm); the noise floor is no claim."""
    each = [(name, m["delta"]) for r in rewards.values() for name, m in r["models"].items() if m["delta"]]
    for _, delta in each:
        delta |= {"holm": None, "holds": False}
    claims = [delta for name, delta in each if name not in floor]
    for delta, p in zip(claims, ranking.holm([delta["p"] for delta in claims]), strict=True):
        delta |= {"holm": p, "holds": delta["direction"] != "open" and p <= 0.05}


def _categories(gallery: Gallery, scores: np.ndarray) -> list[dict[str, Any]]:
    """A row a tag of the prompts, and the unweighted mean over them; none when the prompts have no tags or one."""
    names = list(gallery.entries)
    rows: list[dict[str, Any]] = []
    base = scores[names.index(gallery.asked.baseline)]
    tagged = [tags(prompt) for prompt in gallery.prompts]
    for tag in dict.fromkeys(t for found in tagged for t in found):
        member = np.array([tag in found for found in tagged])
        if not np.isfinite(scores[:, member]).any():
            continue
        models = {
            name: {
                **mean(own[member]),
                "delta": None if name == gallery.asked.baseline else difference(own[member], base[member]),
            }
            for name, own in zip(names, scores, strict=True)
        }
        rows.append({"tag": tag, "prompts": int(member.sum()), "models": models})
    if len(rows) < 2:
        return []
    over = {name: [row["models"][name]["mean"] for row in rows] for name in names}
    models = {name: {"mean": float(np.mean(values)), "delta": None} for name, values in over.items()}
    return [*rows, {"tag": None, "prompts": len(gallery.prompts), "models": models}]


def tags(prompt: Mapping[str, Any]) -> list[str]:
    """Of a prompt's metadata: "tag", and the list "tags" where there are several."""
    more = prompt.get("tags")
    found = [prompt.get("tag"), *(more if isinstance(more, list) else [])]
    return list(dict.fromkeys(t for t in found if isinstance(t, str) and t))


def _wins(names: Sequence[str], scores: np.ndarray) -> dict[str, Any]:
    """wins[i][j]: prompts on which i scores above j; ties[i][j] likewise; strengths of Bradley and Terry."""
    with np.errstate(invalid="ignore"):
        above, equal = scores[:, None] > scores[None], scores[:, None] == scores[None]
    ties = equal.sum(-1)
    np.fill_diagonal(ties, 0)
    low, high = ranking.bradley_terry_interval(scores)
    return {
        "wins": above.sum(-1), "ties": ties,
        "strengths": _strengths(names, ranking.wins_matrix(scores), low, high),
    }  # fmt: skip


def _people(names: Sequence[str], wins: np.ndarray | None) -> dict[str, Any] | None:
    if wins is None or not wins.any():
        return None
    unknown = np.full(len(names), np.nan)
    return {"wins": wins, "ties": np.zeros_like(wins), "strengths": _strengths(names, wins, unknown, unknown)}


def _strengths(names: Sequence[str], wins: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[dict[str, Any]]:
    theta = ranking.bradley_terry(wins)
    columns = [theta, low, high, ranking.elo(theta), ranking.elo(low), ranking.elo(high)]
    words = ("theta", "low", "high", "elo", "elo_low", "elo_high")
    rows = zip(names, zip(*columns, strict=True), strict=True)
    return [{"name": name, **dict(zip(words, row, strict=True))} for name, row in rows]


def _tradeoffs(gallery: Gallery, axes: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Every two axes: where the contestants stand, how sure that is, and who is beaten on both by nobody."""
    names, floor = list(gallery.entries), noise(gallery)
    pairs = []
    for i, x in enumerate(axes):
        for y in list(axes)[i + 1 :]:
            points = [(n, *_point(axes[x][k], axes[y][k])) for k, n in enumerate(names)]
            known = [p for p in points if np.isfinite(p[1]).all()]
            claims = [p for p in known if p[0] not in floor]
            front = (
                dict(zip([p[0] for p in claims], ranking.pareto(np.array([p[1] for p in claims])), strict=True))
                if claims
                else {}
            )
            pairs.append({
                "x": x, "y": y,
                "points": [{"name": n, "at": at, "covariance": c, "front": front.get(n, False)} for n, at, c in known],
            })  # fmt: skip
    return {"axes": list(axes), "pairs": pairs, "lines": training_order(gallery)}


def _point(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means [2] and the covariance [2, 2] of their bootstrap distribution; either may lack prompts of its own.

    Cov(mean x, mean y) = sum over common prompts of (x_i - mean x) (y_i - mean y) / (n_x n_y).
    """
    each = np.stack([x, y])
    known = np.isfinite(each)
    n = known.sum(1)
    if not n.all():
        return np.full(2, np.nan), np.zeros((2, 2))
    at = np.where(known, each, 0).sum(1) / n
    off = np.where(known, each - at[:, None], 0)
    return at, off @ off.T / np.outer(n, n)


def training_order(gallery: Gallery) -> list[list[str]]:
    """Contestants that are checkpoints of one training run, earlier ones first, and the finished run last."""
    runs: dict[str, list[tuple[float, str]]] = {}
    for name, entry in gallery.entries.items():
        source = re.split(r"[@+]", entry.about.spec.partition("=")[2])[0].rstrip("/")
        if entry.about.kind not in ("run", "lora") or entry.about.steering or name in noise(gallery):
            continue
        found = re.fullmatch(r"(.+)/checkpoints/(\d+)(/.*)?", source)
        run, epoch = (found[1], float(found[2])) if found else (source, math.inf)
        runs.setdefault(run, []).append((epoch, name))
    return [[name for _, name in sorted(found)] for found in runs.values() if len(found) > 1]
