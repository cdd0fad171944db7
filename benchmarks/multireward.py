"""What several rewards cost in training: one reward, MARBLE between solves and at them, and MARBLE in full.

    python benchmarks/multireward.py shapes_marble --out runs/multireward_speed

Trains each setting for one solve period after the warm-up step, without evaluations, and prints the mean seconds of the
update and of the whole epoch. Rewards are scored in every setting, also for the single reward, so that the whole epochs
differ by the gradients alone; the update's seconds hold no scoring.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

from diffalign import loading, trainer

SETTINGS = {
    "one reward": ["multireward={name: marble, alphas: fixed}"],  # one backward pass at one mixture of advantages
    "MARBLE": [],
    "MARBLE, all losses split at every step": ["multireward={name: marble, every: 1, losses: null}"],
}


def measure(config: str, overrides: list[str], folder: Path, epochs: int) -> tuple[float, float]:
    """Mean seconds of the update and of the epoch, the first one left out."""
    quiet = [f"output={folder}", f"trainer.epochs={epochs}", "evaluation.every=0", "checkpoint.every=0"]
    trainer.train(loading.load(config, [*overrides, *quiet]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()][1:]
    return fmean(line["seconds/train"] for line in lines), fmean(line["seconds"] for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("runs/multireward_speed"))
    parser.add_argument("--epochs", type=int, default=11)
    args = parser.parse_args()
    found = {
        name: measure(args.config, [*args.overrides, *settings], args.out / str(i), args.epochs)
        for i, (name, settings) in enumerate(SETTINGS.items())
    }
    update, epoch = found["one reward"]
    print("| setting | s/update | speed | s/epoch | speed |\n|---|---|---|---|---|")
    for name, (own_update, own_epoch) in found.items():
        print(f"| {name} | {own_update:.2f} | {update / own_update:.2f} | {own_epoch:.2f} | {epoch / own_epoch:.2f} |")
