"""Comparing the first and the last evaluation of a run, prompt by prompt at equal seeds."""

from __future__ import annotations

import math

from diffalign.eval.run_folder import Evaluation, Run
from diffalign.eval.statistics import Paired, paired


def main_metric(run: Run) -> str | None:
    """The metric of the headline: the first one of the last evaluation."""
    metrics = run.evaluations[-1].metrics if run.evaluations else []
    return metrics[0] if metrics else None


def main_result(run: Run) -> Paired | None:
    metric = main_metric(run)
    return compare(run.base, run.final, metric) if run.base and run.final and metric else None


def compare(base: Evaluation, final: Evaluation, metric: str, tag: str | None = None) -> Paired | None:
    """final - base over prompts, each the mean of the images that both evaluations scored; None without any."""
    before = {(s.prompt, s.seed): s.score(metric) for s in base.samples if tag in (None, s.tag)}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for s in final.samples:
        pair = s.score(metric), before.get((s.prompt, s.seed), math.nan)
        if tag in (None, s.tag) and not any(map(math.isnan, pair)):
            pairs.setdefault(s.prompt, []).append(pair)
    if not pairs:
        return None
    after, earlier = ([sum(p[side] for p in same) / len(same) for same in pairs.values()] for side in (0, 1))
    return paired(after, earlier)


def prompt_means(evaluation: Evaluation, metric: str, tag: str | None = None) -> list[float]:
    """One mean over images for every prompt to which the metric applies."""
    scores: dict[str, list[float]] = {}
    for s in evaluation.samples:
        if tag in (None, s.tag) and not math.isnan(s.score(metric)):
            scores.setdefault(s.prompt, []).append(s.score(metric))
    return [sum(v) / len(v) for v in scores.values()]


def mean_score(evaluation: Evaluation, metric: str, tag: str | None = None) -> float:
    means = prompt_means(evaluation, metric, tag)
    return sum(means) / len(means) if means else math.nan


def verdict(run: Run, result: Paired | None) -> tuple[str, str]:
    """(class, sentence): up, down or open, and what may be concluded."""
    if run.base is None:
        return "open", "This run has no held-out evaluation yet."
    if run.final is None:
        return "open", f"Only one held-out evaluation so far ({run.base.name}), so there is nothing to compare."
    if result is None:
        return "open", f"No prompt and seed was scored both at {run.base.name} and at {run.final.name}."
    if result.n < 2:
        return "open", "A single prompt allows no conclusion."
    way, sign = ("better", "above") if result.mean > 0 else ("worse", "below")
    if direction(result) != "open":
        return direction(result), f"{way.capitalize()}: the whole interval lies {sign} zero."
    if result.low > 0 or result.high < 0:
        return (
            "open",
            f"Leaning {way}: the interval lies {sign} zero, but the sign test over prompts does not confirm it.",
        )
    return "open", "Undecided: the interval contains zero, so chance among prompts may explain the difference."


def direction(result: Paired) -> str:
    """up or down when the bootstrap interval excludes zero and the sign test agrees, else open.

    The bootstrap alone is too sure of itself when few prompts changed: four of sixty, all one way, exclude zero.
    """
    if not (result.low > 0 or result.high < 0) or result.sign_test_p > 0.05:
        return "open"
    return "up" if result.mean > 0 else "down"
