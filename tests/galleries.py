"""Small evaluation folders with scores and pictures that follow from a seed, for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffalign.eval.records import digest_of, features_file, line, stem

TAGS = ("colors", "counting", "position")
REWARDS: dict[str, dict[str, Any]] = {"geneval": {"name": "geneval"}, "pickscore": {"name": "pickscore"}}
Values = Callable[[str, str, int, int, np.random.Generator], float | None]  # (model, reward, prompt, k, rng)


def normal(model: str, reward: str, prompt: int, k: int, rng: np.random.Generator) -> float:
    """Every contestant but the baseline and its twin is half a deviation better."""
    return float(np.sin(prompt) + rng.normal() + 0.5 * (model not in ("base", "base-again")))


def write(
    folder: Path,
    models: Sequence[str] = ("base", "tuned"),
    prompts: int = 6,
    images: int = 2,
    rewards: Mapping[str, Mapping[str, Any]] = REWARDS,
    values: Values = normal,
    picture: Callable[[str, int, int, np.random.Generator], np.ndarray] | None = None,
    about: Mapping[str, Mapping[str, Any]] | None = None,
    texts: Sequence[str] = (),
    size: int = 32,
) -> Path:
    """An evaluation in `folder`; 'base-again' is the baseline's noise floor. `about` changes a contestant's run.json,
    `texts` the first prompts, `picture` (model, prompt, k, rng) gives [H, W, 3] uint8."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = {
        "prompts": "a test", "images_per_prompt": images, "seed": 0, "height": size, "width": size,
        "baseline": "base", "contestants": list(models), "rewards": {k: dict(v) for k, v in rewards.items()},
    }  # fmt: skip
    (folder / "eval.json").write_text(json.dumps(asked))
    entries = [
        {"id": f"{p:04d}", "prompt": texts[p] if p < len(texts) else f"picture number {p}", "tag": TAGS[p % 3]}
        for p in range(prompts)
    ]
    (folder / "prompts.jsonl").write_text("".join(line(e) for e in entries), "utf-8")
    for number, model in enumerate(models):
        own = folder / model
        (own / "images").mkdir(parents=True, exist_ok=True)
        run = {
            "name": model, "spec": f"{model}=tiny-sd3", "kind": "model", "model": "tiny-sd3", "steps": 4,
            "guidance": 1.0, "kernel": "ode", "seed": int(model == "base-again"),
            "again": "base" if model == "base-again" else None, "command": "diffalign eval", "date": "2026-01-01",
        }  # fmt: skip
        (own / "run.json").write_text(json.dumps({**run, **dict((about or {}).get(model, {}))}))
        made, scored, looks, features = [], [], [], {}
        for p in range(prompts):
            for k in range(images):
                rng = np.random.default_rng([number, p, k])
                pixels = (
                    rng.integers(0, 256, (size, size, 3), np.uint8) if picture is None else picture(model, p, k, rng)
                )
                path = own / "images" / f"{stem((entries[p]['id'], k))}.png"
                Image.fromarray(pixels).save(path)
                key = {"id": entries[p]["id"], "k": k, "digest": digest_of(path.read_bytes())}
                made.append({**key, "seed": 100 * p + k, "nfe": 4, "seconds": 0.5})
                looks.append({**key, "values": {"saturation": float(rng.random()), "contrast": float(rng.random())}})
                features[key["digest"]] = rng.normal(size=8).astype(np.float16)
                for reward, settings in rewards.items():
                    score = values(model, reward, p, k, rng)
                    scored.append({**key, "reward": reward, "by": digest_of(dict(settings)), "score": score})
        for name, lines in {"made": made, "scores": scored, "looks": looks}.items():
            (own / f"{name}.jsonl").write_text("".join(line(entry) for entry in lines), "utf-8")
        np.savez(features_file(own, ""), **features)
    return folder
