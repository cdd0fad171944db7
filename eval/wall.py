"""The gallery of a report: a row a prompt and a column a contestant, the pictures that a rule chose, and a lightbox."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from diffalign.eval import overlays, selections, votes
from diffalign.eval.gallery import Entry, Gallery
from diffalign.eval.gallery_files import Files
from diffalign.eval.gallery_tables import counted
from diffalign.eval.pictures import Pictures
from diffalign.eval.records import Key, stem
from diffalign.eval.report import number, signed

SIDE = 256  # px of a thumbnail at most
DIFFERENCES = 1000  # maps of differences that a page has at most: the first images of all prompts come first
LONGEST_ALT = 160  # characters of a prompt in the text of a picture
BAR, LINE = 72, 16  # px of the widest bar, and of a line of text
Addresses = Mapping[tuple[str, Key], str]  # of what is told of an image
ECHOES = {"log_probs": "log-probability in nats", "gain": "nats that the picture adds"}


def build(gallery: Gallery, files: Files, pictures: Pictures, originals: bool = False) -> Markup:
    """The sections of the gallery and the chosen pictures, with the lightbox and its data.

    The page adds `style()` and `script()` once. `originals`: the page lies in the evaluation's folder, so that the
    lightbox may show the files themselves.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "signed": signed, "counted": counted}
    template = environment.from_string(_part("wall.html"))
    addresses, differences = _addresses(gallery, files, pictures)
    rivals = selections.rivals(gallery)
    means = {reward: {name: gallery.per_prompt(name, reward) for name in gallery.entries} for reward in gallery.rewards}
    tags = dict.fromkeys(tag for prompt in gallery.prompts for tag in tags_of(prompt))
    data = json.dumps(_data(gallery, pictures, differences, means, originals), ensure_ascii=False, allow_nan=False)
    return Markup(
        template.render(
            rows=_rows(gallery, addresses, gone(gallery, files), means),
            lists=list(_lists(gallery, addresses, gone(gallery, files))) if addresses else [],
            rules=(selections.RULE if rivals else selections.RULE_ALONE, selections.RULE_DISAGREE),
            names=list(gallery.entries),
            baseline=gallery.asked.baseline,
            rivals=rivals,
            rewards=gallery.rewards,
            tags=list(tags),
            count=gallery.asked.images_per_prompt,
            size=(gallery.asked.width, gallery.asked.height),
            small=max(gallery.asked.width, gallery.asked.height) <= 128,
            data=Markup(data.replace("<", "\\u003c")),  # JSON without "<" cannot end its element
        )
    )


def style() -> Markup:
    return Markup(_part("wall.css"))


def script() -> Markup:
    return Markup(_part("wall.js"))


def tags_of(prompt: Mapping[str, Any]) -> list[str]:
    """A prompt's `tag` and `tags`, each once."""
    more = prompt.get("tags")
    found = [prompt.get("tag"), *(more if isinstance(more, list) else [])]
    return list(dict.fromkeys(tag for tag in found if isinstance(tag, str) and tag))


def alt(prompt: str, name: str, seed: int) -> str:
    short = prompt if len(prompt) <= LONGEST_ALT else prompt[: LONGEST_ALT - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return f"{short} ({name}, seed {seed})"


def _part(name: str) -> str:
    return (files("diffalign.eval") / name).read_text(encoding="utf-8")


def _rows(gallery: Gallery, addresses: Addresses, why: Addresses, means: Any) -> Iterator[dict[str, Any]]:
    base = gallery.asked.baseline
    widest = {reward: _widest(gallery, means[reward]) for reward in gallery.rewards}
    for p, prompt in enumerate(gallery.prompts):
        winners = _winners(gallery, means, p)
        cells = []
        for m, (name, entry) in enumerate(gallery.entries.items()):
            own = [float(means[reward][name][p]) for reward in gallery.rewards]
            deltas = [x - float(means[reward][base][p]) for x, reward in zip(own, gallery.rewards, strict=True)]
            keys = [(prompt["id"], k) for k in range(gallery.asked.images_per_prompt)]
            cells.append({
                "m": m, "name": name, "won": name in winners,
                "shots": [_shot(gallery, entry, key, addresses, why) for key in keys],
                "means": "\n".join(map(number, own)),
                "deltas": "" if name == base else "\n".join(signed(d) if math.isfinite(d) else "" for d in deltas),
                "bars": "" if name == base else bars(deltas, [widest[reward] for reward in gallery.rewards]),
            })  # fmt: skip
        yield {"p": p, "id": prompt["id"], "prompt": prompt["prompt"], "tags": tags_of(prompt), "cells": cells}


def _shot(gallery: Gallery, entry: Entry, key: Key, addresses: Addresses, why: Addresses) -> dict[str, Any]:
    values = [entry.value(reward, key) for reward in gallery.rewards]
    seed = entry.made[key].seed if key in entry.made else 0
    place = entry.about.name, key
    return {
        "k": key[1],
        "address": addresses.get(place),
        "why": why.get(place, "not made yet"),
        "alt": alt(gallery.prompts[int(key[0])]["prompt"], entry.about.name, seed),
        "scores": "\n".join(map(number, values)),
    }


def _winners(gallery: Gallery, means: Any, p: int) -> list[str]:
    """Those with the highest mean of the first reward; nobody when all are level."""
    if not gallery.rewards:
        return []
    values = {name: float(of[p]) for name, of in means[gallery.rewards[0]].items() if math.isfinite(of[p])}
    best = [name for name, value in values.items() if value == max(values.values())]
    return best if len(best) < len(values) else []


def _widest(gallery: Gallery, of: Mapping[str, np.ndarray]) -> float:
    """The difference from the baseline that fills a bar: few are larger."""
    apart = np.abs([of[name] - of[gallery.asked.baseline] for name in selections.rivals(gallery)])
    known = apart[~np.isnan(apart)]
    return float(np.quantile(known, 0.98)) if known.size else 0.0


def bars(deltas: list[float], widest: list[float]) -> Markup:
    """A bar for each difference, from the middle to the right where it is above zero, in an inline SVG."""
    paths = {"up": "", "down": ""}
    for n, (delta, full) in enumerate(zip(deltas, widest, strict=True)):
        if math.isfinite(delta) and delta and full > 0:
            x = max(-1.0, min(1.0, delta / full)) * (BAR / 2 - 1)
            paths["up" if x > 0 else "down"] += f"M{BAR // 2} {n * LINE + 4}h{x:.1f}v8h{-x:.1f}z"
    height = LINE * len(deltas)
    drawn = "".join(f'<path class="{kind}" d="{d}"/>' for kind, d in paths.items() if d)
    return Markup(  # of numbers alone
        f'<svg class="bars" width="{BAR}" height="{height}" viewBox="0 0 {BAR} {height}" aria-hidden="true">'
        f'<path class="zero" d="M{BAR // 2} 0v{height}"/>{drawn}</svg>'
    )


def _lists(gallery: Gallery, addresses: Addresses, why: Addresses) -> Iterator[dict[str, Any]]:
    """The lists of chosen pictures: the best and the worst of each reward, then the disagreements."""
    lone = not selections.rivals(gallery)
    for reward in gallery.rewards:
        best, worst = selections.extremes(gallery, reward)
        words = ("Highest", "Lowest") if lone else ("Rose most", "Fell most")
        parts = [
            (word, [_tile(gallery, addresses, why, pick, [reward]) for pick in picks])
            for word, picks in zip(words, (best, worst), strict=True)
        ]
        yield {"title": reward, "rule": 0, "parts": parts}
    if len(gallery.rewards) > 1 and not lone:
        picks = selections.disagreements(gallery)
        tiles = [_tile(gallery, addresses, why, pick, gallery.rewards) for pick in picks]
        yield {"title": "Rewards disagree", "rule": 1, "parts": [("Largest disagreements", tiles)]}


def _tile(
    gallery: Gallery, addresses: Addresses, why: Addresses, pick: selections.Pick, rewards: list[str]
) -> dict[str, Any]:
    base, own = gallery.baseline, gallery.entries[pick.name]
    prompt = gallery.prompts[int(pick.key[0])]["prompt"]
    shown = dict.fromkeys([base.about.name, pick.name])
    figures = [{**_shot(gallery, gallery.entries[name], pick.key, addresses, why), "name": name} for name in shown]
    lines = [(reward, base.value(reward, pick.key), own.value(reward, pick.key)) for reward in rewards]
    return {"id": pick.key[0], "k": pick.key[1], "prompt": prompt, "figures": figures, "lines": lines}


def _data(
    gallery: Gallery, pictures: Pictures, differences: dict[str, str], means: Any, originals: bool
) -> dict[str, Any]:
    """What the script needs: numbers to sort by, and what is drawn over pictures. Numbers have six digits."""
    names = list(gallery.entries)
    apart = selections.disagreement(gallery)
    highest = np.where(np.isnan(apart), -np.inf, apart).max((0, 2), initial=-np.inf) if apart.ndim == 3 else []
    return {
        "names": names,
        "baseline": names.index(gallery.asked.baseline),
        "rewards": gallery.rewards,
        "rivals": [names.index(name) for name in selections.rivals(gallery)],
        "means": [[_plain(means[reward][name]) for name in names] for reward in gallery.rewards],
        "disagreement": _plain(np.asarray(highest)),
        "evaluation": votes.fingerprint(gallery),
        "files": [stem((p["id"], 0))[:-3] for p in gallery.prompts],
        "originals": originals,
        "brightest": overlays.BRIGHTEST,
        "differences": differences,
        **_overlays(gallery, pictures),
    }


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()]


def _overlays(gallery: Gallery, pictures: Pictures) -> dict[str, Any]:
    """Addresses of difference maps and rewards' maps, and tones of prompts' tokens, by "contestant.prompt.image"."""
    maps: dict[str, dict[str, str]] = {}
    echoes: dict[str, dict[str, Any]] = {}
    texts: dict[tuple[str, ...], int] = {}  # tokens are those of the prompt, so most are shared
    for m, (_, entry) in enumerate(gallery.entries.items()):
        for reward, scored in entry.scores.items():
            for key, score in sorted(scored.items()):
                place = f"{m}.{int(key[0])}.{key[1]}"
                if (drawn := overlays.heat(score.details)) is not None:
                    maps.setdefault(reward, {})[place] = pictures.pixels(drawn, overlays.MAP_SIDE)
                for of, unit in ECHOES.items():
                    if (echo := overlays.echo(score.details, of)) is not None:
                        layer = echoes.setdefault(
                            f"{reward}, {of}", {"title": f"{reward}: {unit}", "edges": echo.edges, "of": {}}
                        )
                        layer["of"][place] = [texts.setdefault(echo.tokens, len(texts)), echo.tones]
    return {
        "maps": maps,
        "echoes": list(echoes.values()),
        "texts": list(texts),
    }


def gone(gallery: Gallery, files: Files) -> dict[tuple[str, Key], str]:
    """Why an image that was made cannot be shown."""
    found = {}
    for name, entry in gallery.entries.items():
        for key in entry.made:
            file = files[name].get(key)
            if file is None or file.size is None:
                found[name, key] = "missing" if file is None else "damaged"
    return found


def _addresses(gallery: Gallery, files: Files, pictures: Pictures) -> tuple[dict[tuple[str, Key], str], dict[str, str]]:
    """Addresses of all pictures, and of the first images' difference maps, by "contestant.prompt.image"."""
    addresses: dict[tuple[str, Key], str] = {}
    differences: dict[str, str] = {}
    base = gallery.asked.baseline
    for key in sorted(gallery.keys, key=lambda key: (key[1], key[0])):
        there = {n: files[n][key] for n in gallery.entries if key in files[n] and files[n][key].size is not None}
        for name, file in there.items():
            addresses[name, key] = pictures.file(gallery.entries[name].image(key), file.digest, SIDE)
        if base not in there or len(differences) + len(there) - 1 > DIFFERENCES:
            continue
        for m, name in enumerate(gallery.entries):
            if name in there and name != base and there[name].size == there[base].size:
                of = f"difference {there[name].digest} {there[base].digest} {overlays.BRIGHTEST}"
                draw = partial(_apart, pictures, gallery.entries[name].image(key), gallery.baseline.image(key))
                differences[f"{m}.{int(key[0])}.{key[1]}"] = pictures.later(of, draw, overlays.SIDE)
    return addresses, differences


def _apart(pictures: Pictures, a: Path, b: Path) -> Image.Image:
    return overlays.difference(pictures.opened(a), pictures.opened(b))
