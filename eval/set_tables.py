"""What is told of sets of images: how varied they are, how they look, and what they cost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from diffalign.eval import set_metrics
from diffalign.eval.gallery import Entry, Gallery
from diffalign.eval.statistics import bootstrap_mean

VARIED = {"vendi": set_metrics.vendi, "distance": set_metrics.pairwise_distance}


def diversity(gallery: Gallery) -> dict[str, Any] | None:
    """Within the images of a prompt: Vendi score and mean 1 - cos. `alike`: mean cosine between different prompts.
    `fid` and `kid`: to the reference pictures, where there are any.

    None when no contestant has embeddings.
    """
    if not any(e.features for e in gallery.entries.values()):
        return None
    models = {name: _varied(gallery, e) for name, e in gallery.entries.items()}
    base = models[gallery.asked.baseline]
    for found in models.values():
        for kind in VARIED:
            own, other = (np.array(m[kind]["per_prompt"]) for m in (found, base))
            found[kind] |= _summary(own) | {"change": _change(own, other)}
    reference = gallery.reference
    if reference is not None:
        for name, entry in gallery.entries.items():
            own = np.array(list(entry.features.values()), np.float64)
            for kind, distance in {"fid": set_metrics.fid, "kid": set_metrics.kid}.items():
                models[name][kind] = distance(own, reference.astype(np.float64)) if len(own) > 1 else math.nan
    return {
        "images_per_prompt": gallery.asked.images_per_prompt,
        "reference": 0 if reference is None else len(reference),
        "models": models,
    }


def _varied(gallery: Gallery, entry: Entry) -> dict[str, Any]:
    found: dict[str, list[float]] = {kind: [] for kind in VARIED}
    centres = []
    for prompt in gallery.prompts:
        keys = [(prompt["id"], k) for k in range(gallery.asked.images_per_prompt)]
        own = np.array([entry.features[key] for key in keys if key in entry.features], np.float64)
        for kind, measure in VARIED.items():
            found[kind].append(float(measure(own)) if len(own) > 1 else math.nan)
        if len(own):
            unit = own / np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-12)
            centres.append(unit.mean(0))
    # sum over ordered pairs of prompts of the dot product of their mean unit vectors, without a prompt and itself
    total, n = np.array(centres), len(centres)
    pairs = float((total.sum(0) ** 2).sum() - (total**2).sum()) if n else 0.0
    alike = pairs / (n * (n - 1)) if n > 1 else math.nan
    return {**{kind: {"per_prompt": values} for kind, values in found.items()}, "alike": alike}


def _summary(values: np.ndarray) -> dict[str, float]:
    known = values[np.isfinite(values)]
    low, high = bootstrap_mean(known)
    return {"mean": float(known.mean()) if len(known) else math.nan, "low": low, "high": high, "n": len(known)}


def _change(own: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Of the mean over common prompts, as a share of the baseline's, with its paired interval."""
    both = np.isfinite(own) & np.isfinite(base)
    centre = float(base[both].mean()) if both.any() else 0.0
    if not centre:
        return {"mean": math.nan, "low": math.nan, "high": math.nan}
    off = (own - base)[both]
    low, high = bootstrap_mean(off)
    return {"mean": float(off.mean()) / centre, "low": low / centre, "high": high / centre}


def looks(gallery: Gallery) -> dict[str, Any] | None:
    """Measures of the pixels, and how far their mean drifts from the baseline's, in deviations of its images.

    None when they were not measured.
    """
    base = gallery.baseline
    names = list(
        dict.fromkeys(name for entry in gallery.entries.values() for own in entry.looks.values() for name in own)
    )
    if not names or not base.looks:
        return None
    found: dict[str, Any] = {}
    for look in names:
        each = {name: _per_prompt(gallery, entry, look) for name, entry in gallery.entries.items()}
        values = np.array([own[look] for own in base.looks.values() if look in own])
        deviation = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        models = {}
        for name, own in each.items():
            off = (own - each[gallery.asked.baseline])[np.isfinite(own - each[gallery.asked.baseline])]
            low, high = bootstrap_mean(off)
            scale = deviation if deviation > 0 else math.nan
            drift = {
                "mean": float(off.mean()) / scale if len(off) else math.nan,
                "low": low / scale,
                "high": high / scale,
            }
            models[name] = {"mean": float(np.nanmean(own)) if np.isfinite(own).any() else math.nan, "drift": drift}
        found[look] = {"deviation": deviation, "models": models}
    return found


def _per_prompt(gallery: Gallery, entry: Entry, look: str) -> np.ndarray:
    """[P] mean over a prompt's images; NaN where none was measured."""
    means = []
    for prompt in gallery.prompts:
        keys = [(prompt["id"], k) for k in range(gallery.asked.images_per_prompt)]
        own = [entry.looks[key][look] for key in keys if look in entry.looks.get(key, {})]
        means.append(sum(own) / len(own) if own else math.nan)
    return np.array(means)


def cost(gallery: Gallery) -> dict[str, Any]:
    """Means an image: network forwards with guidance counted twice, seconds, and images scored on the way."""
    found: dict[str, Any] = {}
    for name, entry in gallery.entries.items():
        made = list(entry.made.values())
        n = max(1, len(made))
        found[name] = {
            "images": len(made),
            "nfe": sum(m.nfe for m in made) / n,
            "seconds": sum(m.seconds for m in made) / n,
            "reward_calls": sum(m.reward_calls for m in made) / n,
            "total_seconds": sum(m.seconds for m in made),
        }
    base = found[gallery.asked.baseline]
    for row in found.values():
        row["times"] = row["nfe"] / base["nfe"] if base["nfe"] else math.nan
    return found
