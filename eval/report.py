"""The report of a training run: one HTML file without scripts or outside references, made from the run folder alone."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from diffalign.eval import charts, run_facts
from diffalign.eval.comparison import compare, direction, main_metric, main_result, mean_score, prompt_means, verdict
from diffalign.eval.run_folder import Run, Sample, read
from diffalign.eval.statistics import bootstrap_mean
from diffalign.types import UserError

SHOWN_IMAGES = 24
LARGEST_SIDE = 384  # px of an embedded image; larger ones are scaled down
HEALTH = {
    "loss": "Loss",
    "ratio": "Importance ratio",
    "clip_fraction": "Clipped fraction",
    "kl": "KL to the reference",
    "grad_norm": "Gradient norm",
    "logp_gap": "Log-prob gap, training against rollout",
    "zero_advantage_groups": "Prompts whose images all score alike",
    "trained_images": "Images trained on",
}


def write(run_folder: Path | str) -> Path:
    """Write `report.html` into the run folder and return its path. Works while the run is still under way.

    Raises UserError when the folder is no run folder or one of its files is damaged.
    """
    run = read(run_folder)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "signed": signed}
    template = environment.from_string((files("diffalign.eval") / "report.html").read_text(encoding="utf-8"))
    target = run.path / "report.html"
    temporary = target.with_suffix(".html.tmp")
    temporary.write_text(template.render(_page(run)), encoding="utf-8")
    os.replace(temporary, target)
    return target


def summary(run_folder: Path | str) -> dict[str, Any]:
    """The run in numbers: the first evaluated metric at the base model and now, with its paired interval.

    Keys: epochs, seconds, images, metric, base, final, delta, low, high, prompts, wins, ties, losses, verdict. What the
    run does not have yet is None.
    """
    run = read(run_folder)
    metric, result = main_metric(run), main_result(run)
    return {
        "epochs": len(run.train),
        "seconds": run_facts.seconds_spent(run),
        "images": run_facts.images_sampled(run),
        "metric": metric,
        "base": mean_score(run.base, metric) if run.base and metric else None,
        "final": mean_score(run.final, metric) if run.final and metric else None,
        "delta": result.mean if result else None,
        "low": result.low if result else None,
        "high": result.high if result else None,
        "prompts": result.n if result else None,
        "wins": result.wins if result else None,
        "ties": result.ties if result else None,
        "losses": result.losses if result else None,
        "verdict": verdict(run, result)[1],
    }


def number(x: float | None) -> str:
    """Three decimals for ordinary sizes, fewer for large values, powers of ten for tiny ones; a dash for none."""
    if x is None or not math.isfinite(x):
        return "\N{EN DASH}"
    size = abs(x)
    if size >= 1000:
        text = f"{x:,.0f}"
    elif size >= 10:
        text = f"{x:.2f}"
    elif size >= 0.01 or size == 0:
        text = f"{x:.3f}"
    else:
        text = charts.scientific(x, 1)
    return text.replace("-", charts.MINUS)


def signed(x: float | None) -> str:
    return ("+" if x is not None and x > 0 else "") + number(x)


def _page(run: Run) -> dict[str, Any]:
    metric, result = main_metric(run), main_result(run)
    kind, sentence = verdict(run, result)
    evaluated = list(dict.fromkeys(m for e in run.evaluations for m in e.metrics))
    trained = [
        key.removeprefix("reward/") for key in _keys(run) if key.startswith("reward/") and not key.endswith("_std")
    ]
    variants = {name: _variants(run, name) for name in [*evaluated, *trained]}
    return {
        "title": run.path.resolve().name,
        "subtitle": run_facts.subtitle(run),
        "metric": metric,
        "result": result,
        "kind": kind,
        "verdict": sentence,
        "base": run.base,
        "final": run.final,
        "base_score": mean_score(run.base, metric) if run.base and metric else None,
        "final_score": mean_score(run.final, metric) if run.final and metric else None,
        "variants": variants,
        "window": _window(run),
        "rewards": [(name, c) for name in dict.fromkeys([*evaluated, *trained]) if (c := _reward_chart(run, name))],
        "metrics": _rows(run, [(m, m, None) for m in evaluated], note=lambda m: _note(trained, variants, m)),
        "tags": _rows(run, [(tag or "no category", metric or "", tag) for tag in _tags(run)]),
        "tiles": _tiles(run, metric),
        "grids": [(e.name, uri(p)) for e in (run.base, run.final) if e and (p := run.grid(e))],
        "health": [(name, c) for key, name in _health(run).items() if (c := _health_chart(run, key, name))],
        "facts": run_facts.facts(run),
        "versions": run_facts.versions(),
        "config": run.config_text,
    }


def _timing(key: str) -> bool:
    return key in ("epoch", "seconds", "images_per_second") or key.startswith("seconds/")


def _keys(run: Run) -> list[str]:
    numeric = (k for line in run.train for k, v in line.items() if isinstance(v, int | float) and not _timing(k))
    return list(dict.fromkeys(numeric))


def _variants(run: Run, name: str) -> tuple[str, str]:
    """What sets the training and the evaluated reward of this name apart: (" (mode dense)", " (mode strict)")."""

    def settings(entries: Any) -> dict[str, Any]:
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, Mapping) and name == (entry.get("label") or str(entry.get("name")).rpartition(".")[2]):
                return {k: v for k, v in entry.items() if k not in ("weight", "label")}
        return {}

    train, held = settings(run.config.get("rewards")), settings((run.config.get("evaluation") or {}).get("rewards"))
    differ = [key for key in {**train, **held} if train.get(key) != held.get(key)] if train and held else []
    train_text, held_text = (", ".join(f"{k} {side[k]}" for k in differ if k in side) for side in (train, held))
    return f" ({train_text})" if train_text else "", f" ({held_text})" if held_text else ""


def _note(trained: Sequence[str], variants: Mapping[str, tuple[str, str]], metric: str) -> str:
    return f"trained on{variants[metric][0]}" if metric in trained else "not trained on"


def _window(run: Run) -> int:
    """Epochs averaged in the bold training curve; 1 for short runs, which need no smoothing."""
    return len(run.train) // 8 | 1 if len(run.train) >= 20 else 1


def _reward_chart(run: Run, name: str) -> Markup:
    series = []
    x, y = run.column("epoch"), run.column(f"reward/{name}")
    if _window(run) > 1:
        series.append(charts.Series(x, y, "faint"))
        series.append(charts.Series(x, charts.running_mean(y, _window(run)), "train"))
    else:
        series.append(charts.Series(x, y, "train"))
    held = [
        (e.epoch, mean_score(e, name), *bootstrap_mean(prompt_means(e, name)))
        for e in run.evaluations
        if name in e.metrics
    ]
    if held:
        epochs, means, low, high = zip(*held, strict=True)
        series.append(charts.Series(epochs, means, "held", low, high))
    return charts.chart(series, label=f"{name} by epoch")


def _health(run: Run) -> dict[str, str]:
    """Metric -> title: the known ones in their order, then whatever else the run logged."""
    keys = _keys(run)
    known = {key: name for key, name in HEALTH.items() if key in keys}
    spread = {key: f"Spread of {key[7:-4]} (std)" for key in keys if key.startswith("reward/") and key.endswith("_std")}
    return known | spread | {key: key for key in keys if key not in HEALTH and not key.startswith("reward/")}


def _health_chart(run: Run, key: str, name: str) -> Markup:
    line = charts.Series(run.column("epoch"), run.column(key), "train")
    reference = 1.0 if key == "ratio" else None
    return charts.chart([line], label=f"{name} by epoch", reference=reference, width=340, height=190)


def _tags(run: Run) -> list[str]:
    return list(dict.fromkeys(s.tag for s in run.base.samples)) if run.base and run.final else []


def _rows(run: Run, wanted: Sequence[tuple[str, str, str | None]], note: Any = None) -> list[dict[str, Any]]:
    """Table rows (label, metric, tag) -> base, final and their paired difference with its mark, on one common scale."""
    if not (run.base and run.final):
        return []
    found = [(label, m, tag, compare(run.base, run.final, m, tag)) for label, m, tag in wanted]
    rows = []
    for label, m, tag, p in found:
        if p is None:
            continue
        # Rewards have scales of their own; categories of one metric share theirs.
        together = [q for _, other, _, q in found if q and other == m]
        ends = [v for q in together for v in (q.low, q.high, q.mean, 0.0) if math.isfinite(v)]
        rows.append({
            "label": label, "note": note(m) if note else "", "n": p.n, "p": p, "kind": direction(p),
            "base": mean_score(run.base, m, tag), "final": mean_score(run.final, m, tag),
            "mark": charts.interval_mark(p.mean, p.low, p.high, (min(ends), max(ends))),
        })  # fmt: skip
    return rows


def _tiles(run: Run, metric: str | None) -> list[dict[str, Any]]:
    """The first samples as they come, each at the base and at the end where both have an image."""
    shown = [(e, run.images(e)) for e in (run.base, run.final) if e]
    if not shown or not all(images for _, images in shown):
        return []
    later = {(s.prompt, s.seed): i for i, s in enumerate(shown[-1][0].samples)}
    tiles: list[dict[str, Any]] = []
    for i, sample in enumerate(shown[0][0].samples):
        indices = [i] if len(shown) == 1 else [i, later.get((sample.prompt, sample.seed), -1)]
        if len(tiles) == SHOWN_IMAGES or not all(k in images for k, (_, images) in zip(indices, shown, strict=True)):
            continue
        pictures = [
            {"name": e.name, "src": uri(images[k]), "marks": _marks(run, e.samples[k], metric)}
            for k, (e, images) in zip(indices, shown, strict=True)
        ]
        tiles.append({"prompt": sample.prompt, "seed": sample.seed, "tag": sample.tag, "pictures": pictures})
    return tiles


def _marks(run: Run, sample: Sample, metric: str | None) -> list[dict[str, str]]:
    """A tick or a cross where every score of a metric in the run is 0 or 1, else the number."""
    marks = []
    for name in sorted(sample.scores, key=lambda name: name != metric):
        value = sample.score(name)
        if math.isnan(value):
            continue
        yes_no = all(
            s.score(name) in (0.0, 1.0) or math.isnan(s.score(name)) for e in run.evaluations for s in e.samples
        )
        kind, text = (("yes", "\N{CHECK MARK}") if value else ("no", "\N{BALLOT X}")) if yes_no else ("", number(value))
        marks.append({"name": name, "kind": kind, "text": text, "title": f"{name} = {number(value)}"})
    return marks


def uri(path: Path) -> str:
    """The picture as a data URI, re-encoded so that nothing but pixels enters the page."""
    buffer = io.BytesIO()
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except OSError as error:
        raise UserError(f"{path} is not a readable picture; delete it or run the evaluation again") from error
    if max(picture.size) > LARGEST_SIDE and path.parent.name != "images":
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
