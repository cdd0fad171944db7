"""The charts and tables of docs/nft.md and docs/marble.md.

    python -m docs.rl_figure nft GROUP=RUN,RUN,... GROUP=RUN,...   the first group of run folders is drawn grey
    python -m docs.rl_figure marble GROUP=RUN,RUN,... ...          the first group is drawn red

`nft` draws held-out GenEval over images and over seconds of training, and prints what each run needed to gain 0.15 and
0.25; the seconds are those that the runs themselves logged. `marble` prints every reward before and after with 95 %
intervals over prompts, and draws them over epochs.
"""

from __future__ import annotations

import sys
from itertools import accumulate

import numpy as np

from diffalign.eval.charts import Series, chart
from diffalign.eval.comparison import mean_score
from diffalign.eval.run_folder import Run, read
from docs.figures import FOLDER, styled

Groups = dict[str, list[Run]]


def images(run: Run, epoch: int) -> float:
    t = run.config["trainer"]
    return float(epoch * t["prompts"] * t["images_per_prompt"])


def seconds(run: Run, epoch: int) -> float:
    """Of the training epochs up to this one, evaluations not counted."""
    return [0.0, *accumulate(run.column("seconds"))][epoch]


def held(run: Run, metric: str) -> list[float]:
    return [mean_score(e, metric) for e in run.evaluations]


def needed(run: Run, metric: str, gain: float) -> float | None:
    """Epoch at which the base's score plus `gain` is reached first, on the line between two evaluations."""
    scores, epochs = held(run, metric), [e.epoch for e in run.evaluations]
    target = scores[0] + gain
    for (e0, s0), (e1, s1) in zip(
        zip(epochs, scores, strict=True), zip(epochs[1:], scores[1:], strict=True), strict=False
    ):
        if s1 >= target:
            return e0 + (e1 - e0) * (target - s0) / (s1 - s0)
    return None


def between(values: list[float], at: float) -> float:
    """The value at a fractional epoch."""
    return float(np.interp(at, range(len(values)), values))


def nft(groups: Groups, metric: str = "geneval") -> None:
    for axis, cost in (("images", images), ("seconds", seconds)):
        lines = [
            Series(
                [cost(run, e.epoch) for e in run.evaluations],
                held(run, metric),
                "held" if number else "train",
                name=name if run is runs[0] else "",
            )
            for number, (name, runs) in enumerate(groups.items())
            for run in runs
        ]
        drawn = chart(lines, label=f"held-out {metric}", x_label=axis, width=640, height=320)
        (FOLDER / f"nft_{axis}.svg").write_text(styled(str(drawn)), "utf-8")
    print("| method | seed | base | last (epoch) | +0.15: images | seconds | +0.25: images | seconds |\n|" + "---|" * 8)
    for name, runs in groups.items():
        for run in runs:
            scores, cells = held(run, metric), []
            for gain in (0.15, 0.25):
                epoch = needed(run, metric, gain)
                spent = [0.0, *accumulate(run.column("seconds"))]
                cells += (
                    ["-", "-"] if epoch is None else [f"{images(run, 1) * epoch:.0f}", f"{between(spent, epoch):.0f}"]
                )
            print(
                f"| {name} | {run.config['seed']} | {scores[0]:.3f} | "
                f"{scores[-1]:.3f} ({run.evaluations[-1].epoch}) | " + " | ".join(cells) + " |"
            )


def gains(runs: list[Run], metric: str, draws: int = 10_000) -> tuple[float, float, float, float, float]:
    """Mean before and after, their difference and its 95 % interval: prompts are resampled, with all their seeds."""
    before, after = (
        np.array([[sample.score(metric) for sample in run.evaluations[i].samples] for run in runs]) for i in (0, -1)
    )
    applies = ~np.isnan(before + after).any(0)
    rise = (after - before)[:, applies].mean(0)
    rng = np.random.default_rng(0)
    means = rise[rng.integers(0, len(rise), (draws, len(rise)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.nanmean(before)), float(np.nanmean(after)), float(rise.mean()), float(low), float(high)


def marble(groups: Groups) -> None:
    first = next(iter(groups.values()))
    names = list(first[0].evaluations[0].samples[0].scores)
    print("| trained with | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    print("| base | " + " | ".join(f"{gains(first, name)[0]:.3f}" for name in names) + " |")
    for group, runs in groups.items():
        found = [gains(runs, name) for name in names]
        cells = [f"{after:.3f} ({rise:+.3f} [{low:.3f}, {high:.3f}])" for _, after, rise, low, high in found]
        print(f"| {group} ({len(runs)}) | " + " | ".join(cells) + " |")
    for name in names:
        lines = [
            Series([e.epoch for e in run.evaluations], held(run, name), "train" if number else "held",
                   name=group if run is runs[0] else "")
            for number, (group, runs) in enumerate(groups.items())
            for run in runs
        ]  # fmt: skip
        drawn = chart(lines, label=f"held-out {name}", width=320, height=220)
        (FOLDER / f"marble_{name}.svg").write_text(styled(str(drawn)), "utf-8")


if __name__ == "__main__":
    kind, *given = sys.argv[1:]
    groups = {g.partition("=")[0]: [read(folder) for folder in g.partition("=")[2].split(",")] for g in given}
    {"nft": nft, "marble": marble}[kind](groups)
