"""Reward against cost of every steering method on tiny-sd3, with exact GenEval as a judge that steers nothing.

    python benchmarks/steering.py --reward pickscore --out runs/steering      # about an hour on one core
    python benchmarks/steering.py --reward vlm_echo --rows bon fk_8 svdd_4 prune_16 dts_star --out runs/steering

Held-out prompts, 20 steps, without guidance. Every row is saved prompt by prompt and not made again. Best of N for all
smaller N comes from the one run of the largest: the expected best of N drawn without replacement, and the judge's
score of it. Anytime methods give their best at each cost. Differences are paired over prompts, with 95 % bootstrap
intervals. Prints markdown tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rollout import table

STEPS = 20
REWARDS: dict[str, dict[str, Any]] = {
    "pickscore": {"name": "pickscore", "model": "tiny-clip"},
    "vlm_echo": {"name": "vlm_echo", "model": "tiny-vlm"},
    "geneval": {"name": "geneval"},
}
ROWS: dict[str, tuple[dict[str, Any], str | None]] = {  # (method, kernel)
    "bon": ({"name": "best_of_n", "particles": 32}, None),
    "bon_sde": ({"name": "best_of_n", "particles": 16}, "flow_sde:0.7"),
    "fk_4": ({"name": "fk", "particles": 4}, None),
    "fk_8": ({"name": "fk", "particles": 8}, None),
    "fk_16": ({"name": "fk", "particles": 16}, None),
    "svdd_4": ({"name": "svdd", "particles": 4}, None),
    "svdd_8": ({"name": "svdd", "particles": 8}, None),
    "prune_16": ({"name": "prune", "particles": 16}, None),
    "prune_32": ({"name": "prune", "particles": 32}, None),
    "zero_order": ({"name": "noise_search", "particles": 4, "budget_nfe": 320}, None),
    "paths": ({"name": "noise_search", "algorithm": "paths", "particles": 4, "paths": 2}, None),
    "das_4": ({"name": "das", "particles": 4}, None),
    "fk_8_untempered": ({"name": "fk", "particles": 8, "temper": "none"}, None),
    "dts_star": ({"name": "dts_star", "budget_nfe": 640, "batch": 4}, None),
    "dts": ({"name": "dts", "budget_nfe": 320, "batch": 4}, None),
}


def measure(row: str, reward: str, count: int, out: Path) -> list[dict[str, Any]]:
    """A record a prompt: reward and judge of all returned images, best first, cost, and the curve of anytime runs."""
    from diffalign import pipelines
    from diffalign.prompts import load
    from diffalign.rewards import build
    from diffalign.steer import Steer
    from diffalign.steering import resolve

    path = out / f"{reward}_{row}.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    prompts = load("shapes-test")[:count]
    if len(done) >= count:
        return done[:count]
    options, kernel = ROWS[row]
    steer = Steer(pipelines.load("tiny-sd3"), REWARDS[reward], resolve(options), kernel, micro_batch=16)
    judge = build([REWARDS["geneval"]])["geneval"]
    method = steer.calibrated(prompts, STEPS, 0, {})[0]  # up to 640 forwards once, not counted below
    steer = steer.using(method, kernel)
    out.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as lines:
        for index in range(len(done), count):
            prompt = prompts[index]
            found = steer(prompt["prompt"], STEPS, 0, prompt, index)
            n = len(found.pixels)
            record = {
                "index": index,
                "rewards": found.rewards.tolist(),
                "geneval": judge(found.pixels, [found.prompt] * n, [prompt] * n).scores.tolist(),
                "nfe": found.nfe,
                "reward_calls": found.reward_calls,
                "seconds": found.seconds,
                "curve": [(h["nfe"], h["best"]) for h in found.history if "nfe" in h],
                "lam": dict(method).get("lam"),
            }
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            done.append(record)
    return done


def best_of(record: Mapping[str, Any], n: int) -> tuple[float, float]:
    """(expected reward, expected judge) of the best of n images drawn from a record's N, which are best first."""
    total = len(record["rewards"])
    log_choose = np.cumsum(np.log(np.arange(1, total + 1)))
    ways = lambda a, b: 0.0 if b in (0, a) else log_choose[a - 1] - log_choose[b - 1] - log_choose[a - b - 1]  # noqa: E731
    ranks = [k for k in range(total) if total - 1 - k >= n - 1]
    weight = np.array([np.exp(ways(total - 1 - k, n - 1) - ways(total, n)) for k in ranks])
    values = (np.array(record[key])[ranks] for key in ("rewards", "geneval"))
    reward, judge = (float(weight @ v) for v in values)
    return reward, judge


def at_cost(records: Sequence[Mapping[str, Any]], nfe: float) -> np.ndarray:
    """[P, 2] best of N images at a cost, between whole N linearly."""
    n = max(1.0, nfe / STEPS)
    low = int(n)
    pairs = np.array([[best_of(r, low), best_of(r, min(low + 1, len(r["rewards"])))] for r in records])
    return pairs[:, 0] + (n - low) * (pairs[:, 1] - pairs[:, 0])


def equal_cost(records: Sequence[Mapping[str, Any]], reward: float) -> float | None:
    """Forwards at which best of N reaches a mean reward; None where its largest N does not."""
    total = len(records[0]["rewards"])
    means = [np.mean([best_of(r, n)[0] for r in records]) for n in range(1, total + 1)]
    if means[-1] < reward:
        return None
    k = int(np.searchsorted(means, reward))
    return STEPS * (k + 1 if k == 0 else k + (reward - means[k - 1]) / (means[k] - means[k - 1]))


def described(row: str, records: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    from diffalign.eval.statistics import bootstrap_mean

    nfe = float(np.mean([r["nfe"] for r in records]))
    mine = np.array([[r["rewards"][0], r["geneval"][0]] for r in records])
    beside = at_cost(plain, nfe)
    spans = [bootstrap_mean((mine[:, k] - beside[:, k]).tolist()) for k in (0, 1)]
    seconds = {
        phase: np.mean([r["seconds"].get(phase, 0.0) for r in records])
        for phase in ("model", "decode", "reward", "total")
    }
    needed = equal_cost(plain, float(mine[:, 0].mean()))
    return {
        "method": row,
        "forwards": f"{nfe:.0f}",
        "scored": f"{np.mean([r['reward_calls'] for r in records]):.0f}",
        "reward": f"{mine[:, 0].mean():.3f}",
        "over best of N": f"{(mine - beside)[:, 0].mean():+.3f} [{spans[0][0]:+.3f}, {spans[0][1]:+.3f}]",
        "best of N needs": f"{needed / nfe:.2f}x" if needed else f"> {STEPS * len(plain[0]['rewards']) / nfe:.1f}x",
        "GenEval": f"{mine[:, 1].mean():.3f}",
        "over best of N ": f"{(mine - beside)[:, 1].mean():+.3f} [{spans[1][0]:+.3f}, {spans[1][1]:+.3f}]",
        "seconds": f"{seconds['total']:.2f}",
        "loop": f"{1 - (seconds['model'] + seconds['decode'] + seconds['reward']) / seconds['total']:.1%}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", choices=REWARDS, default="pickscore")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/steering"))
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    found = {row: measure(row, arguments.reward, arguments.prompts, arguments.out) for row in arguments.rows}
    plain = found.get("bon") or measure("bon", arguments.reward, arguments.prompts, arguments.out)
    largest = len(plain[0]["rewards"])
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= largest]
    rows = [(n, at_cost(plain, n * STEPS).mean(0)) for n in sizes]
    print(
        table(
            [
                {"N": str(n), "forwards": str(n * STEPS), "reward": f"{m[0]:.3f}", "GenEval": f"{m[1]:.3f}"}
                for n, m in rows
            ]
        )
    )
    print()
    print(table([described(row, records, plain) for row, records in found.items() if row != "bon"]))


if __name__ == "__main__":
    main()
