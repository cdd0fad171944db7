"""How often a reward prefers the picture that the exact detector finds right: 1,080 held-out pictures, pair by pair.

    python benchmarks/reward_ranking.py --reward pickscore:model=tiny-clip --reward artifact_head:model=tiny-artifact

Half of the 240 held-out prompts each. `renders`: a true scene, a scene of a prompt that differs in one thing, a true
scene with a fault, and a sample of tiny-sd3. `samples`: five samples of tiny-sd3. Within a prompt, every pair of which
the detector finds one right (strict GenEval 1) and the other wrong counts; ties count half. Intervals are 95 %, by
bootstrap over prompts. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import itertools
import random

import numpy as np
import torch
from rollout import table
from torch import Tensor

from diffalign import pipelines, rewards
from diffalign.eval.statistics import bootstrap_mean
from diffalign.reward_entries import HELP, parse
from diffalign.rollout import collect, sample_seed
from diffalign.sections import Sampling
from diffalign.shapes import corruptions, prompts, questions
from diffalign.shapes.world import SIZE, render

SAMPLES, SEED = 5, 987_654_321


def sampled(metas: list[prompts.Metadata], each: int) -> Tensor:
    """[P, each, 3, H, W]: tiny-sd3 without guidance, 20 steps."""
    pairs = [(p, j) for p in range(len(metas)) for j in range(each)]
    seeds = torch.tensor([sample_seed(SEED, 0, p, j) for p, j in pairs])
    sampling = Sampling(steps=20, kernel="ode", eta=0.0, height=SIZE, width=SIZE)
    group = torch.tensor([p for p, _ in pairs])
    rollout = collect(
        pipelines.load("tiny-sd3", dtype="bf16"), [metas[p] for p, _ in pairs], group, seeds, sampling, (), 50
    )
    assert rollout.images is not None
    return rollout.images.unflatten(0, (len(metas), each))


def drawn(include: list[prompts.Metadata], rng: random.Random) -> Tensor:
    return torch.from_numpy(render(prompts.scene(rng, include)).copy()).permute(2, 0, 1) / 255


def near(include: list[prompts.Metadata], rng: random.Random) -> list[prompts.Metadata]:
    """The clauses with one thing changed, so that the prompt is no longer true."""
    edits = list(questions._edits(include, prompts.scene(rng, include)))
    return rng.choice(edits)[1]


def pictures() -> dict[str, tuple[list[prompts.Metadata], Tensor]]:
    """Name of the set -> (prompts, images [P, K, 3, H, W])."""
    rng, every = random.Random(SEED), prompts.test_prompts()
    half = len(every) // 2
    rows = []
    for include in (meta["include"] for meta in every[:half]):
        true, other = drawn(include, rng), drawn(near(include, rng), rng)
        rows.append(torch.stack([true, other, corruptions.corrupt(drawn(include, rng), rng)]))
    return {
        "renders": (every[:half], torch.cat([torch.stack(rows), sampled(every[:half], 1)], 1)),
        "samples": (every[half:], sampled(every[half:], SAMPLES)),
    }


def agreement(exact: Tensor, scores: Tensor) -> tuple[list[float], int]:
    """(share of right preferences of each prompt that has a pair, pairs in all); both [P, K]."""
    shares, pairs = [], 0
    for truth, score in zip(exact.tolist(), scores.tolist(), strict=True):
        won = [
            float(score[a] > score[b]) + 0.5 * float(score[a] == score[b])
            for a, b in itertools.permutations(range(len(truth)), 2)
            if truth[a] > truth[b]
        ]
        pairs += len(won)
        shares += [sum(won) / len(won)] if won else []
    return shares, pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", action="append", required=True, help=HELP)
    scorers = rewards.build(parse(parser.parse_args().reward))
    judge = rewards.build(["geneval"])
    found: dict[str, dict[str, list[float]]] = {name: {} for name in scorers}
    counts: dict[str, int] = {}
    for kind, (metas, images) in pictures().items():
        flat, metadata = images.flatten(0, 1), [m for m in metas for _ in range(images.shape[1])]
        texts = [m["prompt"] for m in metadata]
        exact = rewards.score(judge, flat, texts, metadata, 64)["geneval"].scores.view(len(metas), -1)
        with torch.no_grad():
            outputs = rewards.score(scorers, flat, texts, metadata, 50)
        for name, output in outputs.items():
            found[name][kind], counts[kind] = agreement(exact, output.scores.view(len(metas), -1))
    print(table([{"reward": name} | columns(shares, counts) for name, shares in found.items()]))


def columns(shares: dict[str, list[float]], counts: dict[str, int]) -> dict[str, str]:
    every = {"all": [share for part in shares.values() for share in part], **shares}
    counts = {"all": sum(counts.values()), **counts}
    return {f"{kind} ({counts[kind]} pairs)": told(part) for kind, part in every.items()}


def told(shares: list[float]) -> str:
    low, high = bootstrap_mean(shares)
    return f"{np.mean(shares):.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
