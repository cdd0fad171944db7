"""What training on a reward does to it, and to what it does not see: a short Flow-GRPO run on tiny-sd3 for each.

    python benchmarks/reward_runs.py                             # one run for each reward in ROWS, about 4 minutes each
    python benchmarks/reward_runs.py --rows pickscore pickscore+artifact_head --seeds 0 1 2 --epochs 60

Every run is `shapes_grpo` with other rewards and fewer epochs, measured on the 240 held-out prompts before and after:
the reward itself, exact GenEval, and `whole`, the share of images in which the detector finds nothing malformed. A
reward that rises while the other two fall was hacked. Discriminators, which are not the same before and after, are
measured by `MEASURED` instead. Differences have 95 % intervals, by paired bootstrap over prompts. Finished runs are not
repeated. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

PICK = {"name": "pickscore", "model": "tiny-clip"}
CLEAN = {"name": "artifact_head"}
# References that discriminators learn from. tiny-clip prefers deep colours to samples, so there is nothing to learn of.
DEEP, OUTLINE = "shapes-deep", "shapes-outline"


def likeness(references: str) -> dict[str, Any]:
    return {"name": "dino", "model": "tiny-dino", "references": references, "label": "likeness"}


ROWS: dict[str, list[dict[str, Any]]] = {
    "geneval": [{"name": "geneval", "mode": "dense", "label": "partial credit"}],
    "pickscore": [PICK],
    "pickscore+artifact_head": [PICK, CLEAN],
    "clip_score": [{"name": "clip_score", "model": "tiny-clip"}],
    "hpsv2": [{"name": "hpsv2", "model": "tiny-clip"}],
    "image_reward": [{"name": "image_reward", "model": "tiny-image-reward"}],
    "aesthetic": [{"name": "aesthetic", "model": "tiny-clip"}],
    "vlm_echo": [{"name": "vlm_echo", "model": "tiny-vlm"}],
    "yes_probability": [{"name": "yes_probability", "model": "tiny-vlm"}],
    "artifact_vlm": [{"name": "artifact_vlm", "model": "tiny-vlm"}],
    "artifact_head": [CLEAN],
    "dino": [{"name": "dino", "model": "tiny-dino", "references": "shapes-dusk"}],
    "dino_adversarial": [{"name": "dino_adversarial", "model": "tiny-dino", "references": DEEP, "lr": 3e-4}],
    "pickscore_adversarial": [
        {"name": "pickscore_adversarial", "model": "tiny-clip", "references": OUTLINE, "lr": 1e-4}
    ],
    "jpeg": [{"name": "jpeg"}],
}
MEASURED = {"dino_adversarial": [likeness(DEEP)], "pickscore_adversarial": [likeness(OUTLINE), PICK]}
JUDGES = [{"name": "geneval"}, {"name": "reward_runs.whole", "label": "whole"}]


def whole(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
    """1 where the exact detector finds every object of a picture well formed and of one colour, else 0."""
    from diffalign.shapes.artifact import is_whole

    return [float(is_whole((image * 255).round().byte())) for image in images.cpu()]


def command(row: str, seed: int, epochs: int, folder: Path) -> list[str]:
    rewards = ROWS[row]
    measured = [*MEASURED.get(row, rewards), *JUDGES]
    overrides = {
        "seed": seed,
        "output": str(folder),
        "trainer.epochs": epochs,
        "rewards": rewards,
        "advantage": {"name": "gdpo"},  # each reward by its own spread, for their scales differ
        "evaluation.every": epochs,
        "evaluation.rewards": measured,
    }
    written = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()}"
        for key, value in overrides.items()
    ]
    return [sys.executable, "-m", "diffalign", "train", "shapes_grpo", "--resume", "auto", *written]


def scores(folder: Path, epoch: int) -> dict[str, np.ndarray]:
    """Reward -> its scores, image by image."""
    samples = json.loads((folder / "eval" / f"{epoch:04d}.json").read_text())["samples"]
    return {name: np.array([s["scores"][name] for s in samples], float) for name in samples[0]["scores"]}


def change(before: np.ndarray, after: np.ndarray) -> str:
    from diffalign.eval.statistics import bootstrap_mean

    low, high = bootstrap_mean((after - before).tolist())
    return f"{before.mean():.3f} → {after.mean():.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--runs", type=Path, default=Path("runs/rewards"), help="where the runs go")
    arguments = parser.parse_args()
    results = []
    for row in arguments.rows:
        for seed in arguments.seeds:
            folder = arguments.runs / f"{row}_{arguments.epochs}_{seed}"
            if not (folder / "eval" / f"{arguments.epochs:04d}.json").exists():
                paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
                run = command(row, seed, arguments.epochs, folder)
                subprocess.run(run, check=True, env={**os.environ, "PYTHONPATH": paths}, stdout=sys.stderr)
            before, after = scores(folder, 0), scores(folder, arguments.epochs)
            trained = [r.get("label", r["name"]) for r in MEASURED.get(row, ROWS[row])]
            results.append(
                {
                    "trained on": row,
                    "seed": seed,
                    "reward": ", ".join(change(before[name], after[name]) for name in trained),
                    "GenEval": change(before["geneval"], after["geneval"]),
                    "whole": change(before["whole"], after["whole"]),
                }
            )
    from rollout import table

    print(table(results))


if __name__ == "__main__":
    main()
