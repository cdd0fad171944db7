"""What a training log tells the warning signs: how a reward went, and whether it still tells images apart."""

from __future__ import annotations

import math

import numpy as np

from diffalign.eval._sign import Change, Finding, Sign, Topic, by_prompt, change, graded
from diffalign.eval.gallery import Entry, Gallery
from diffalign.eval.records import METRICS

EXHAUSTED = Topic("exhausted", "A training reward with nothing more to tell")
FLAT = 0.5  # of the prompts trained on: half of the work is then for nothing
MOSTLY_FLAT = 0.8
TOP = 0.01  # of the range of scores below the highest
AT_TOP = 0.8  # share of images; a reward of 0 or 1 may well reach half
ALL_AT_TOP = 0.95
PARTS, LEAST = 10, 5  # the first and the last tenth of the epochs, of at least five


def exhausted(gallery: Gallery, entry: Entry) -> Sign:
    """The images of more than FLAT of the prompts get one and the same reward at the end of training, more than at its
    start; or more than AT_TOP of the images lie within TOP of the highest training reward, more than the baseline's.
    """
    findings = []
    if (c := log_rise(entry, "zero_advantage_groups")) is not None:
        level = graded(c.own, FLAT, MOSTLY_FLAT, c.mean > 0 and c.sure())
        said = (
            f"At the end of training all images were equal to the reward for {c.own:.0%} of the prompts, "
            f"at the start for {c.base:.0%}."
        )
        findings.append(Finding("prompts without a difference", level, c, c.own, FLAT, said))
    for reward in (r for r in gallery.rewards if r in gallery.trained(entry)):
        share = change(*at_top(gallery, entry, reward))
        if share is None:
            continue
        level = graded(share.own, AT_TOP, ALL_AT_TOP, share.mean > 0 and share.sure())
        said = f"{share.own:.0%} of its images have the highest {reward}, of the baseline's {share.base:.0%}."
        findings.append(Finding(f"{reward} at its highest", level, share, share.own, AT_TOP, said))
    if not findings:
        reason = "No reward that it was trained on was evaluated, and there is no training log of ten epochs or more."
        return EXHAUSTED.unknown(entry, reason)
    return EXHAUSTED.verdict(entry, findings, "Its training reward still tells images apart.")


def at_top(gallery: Gallery, entry: Entry, reward: str) -> tuple[np.ndarray, np.ndarray]:
    """[P] of the contestant and of the baseline: share of a prompt's images within TOP of the highest score of both."""
    scores = [{key: e.value(reward, key) for key in gallery.keys} for e in (entry, gallery.baseline)]
    every = [value for found in scores for value in found.values() if not math.isnan(value)]
    if not every or min(every) == max(every):
        return np.full(len(gallery.prompts), np.nan), np.full(len(gallery.prompts), np.nan)
    least = max(every) - TOP * (max(every) - min(every))
    own, base = (
        by_prompt(gallery, {key: float(value >= least) for key, value in found.items() if not math.isnan(value)})
        for found in scores
    )
    return own, base


def log_rise(entry: Entry, name: str) -> Change | None:
    """The last tenth of the training epochs against the first, in a number of `metrics.jsonl`; None if they are few.

    The variance of an epoch is half the mean square of the steps from epoch to epoch (von Neumann), so that a rise
    within the first tenth does not hide itself.
    """
    lines = [line for line in entry.lines(METRICS) if line.get("phase") == "train"]
    logged = np.array(
        [v for line in lines if isinstance(v := line.get(name), (int, float)) and math.isfinite(v)], float
    )
    part = max(LEAST, len(logged) // PARTS)
    if len(logged) < 2 * part:
        return None
    first, last = logged[:part], logged[-part:]
    error = float(np.sqrt(np.square(np.diff(logged)).mean() / part))  # of a difference of two means
    return Change(2 * part, float(last.mean()), float(first.mean()), float(last.mean() - first.mean()), error)


def logged_rewards(entry: Entry) -> dict[str, Change]:
    """Of every reward in the training log, by the name that it had there."""
    numbers = {name for line in entry.lines(METRICS) if line.get("phase") == "train" for name in line}
    names = sorted(n for n in numbers if n.startswith("reward/") and n + "_std" in numbers)
    return {n.removeprefix("reward/"): c for n in names if (c := log_rise(entry, n)) is not None}
