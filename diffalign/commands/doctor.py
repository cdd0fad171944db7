"""Say which checkpoints of reward heads are here, and whether the heads score as they did."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign import reward_entries
from diffalign.commands import _common
from diffalign.listing import available
from diffalign.types import UserError
from diffalign.writing import put, try_out

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.rewards import Reward
    from diffalign.rewards._hub import Checkpoint

PROMPTS = ("a red disc on a coloured gradient", "a photograph of a cat on a sofa")
METADATA = ({"include": [{"class": "frisbee", "count": 1}]}, {"include": [{"class": "cat", "count": 1}]})
SIZES = ((301, 420), (512, 512))
TOLERANCE = 1e-3  # of the score, or absolute for small ones: ten times what devices differ by in fp32


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["rewards"], help="what to look at")
    parser.add_argument(
        "--reward", action="append", metavar="NAME[:OPTION=VALUE,...]", help="this head only; by default every head"
    )
    parser.add_argument(
        "--compare-official",
        action="store_true",
        help="score fixed pictures with each head, downloading what it lacks; the first run records the scores, later "
        "ones compare with them",
    )
    parser.add_argument("--reference", metavar="FILE", help="where scores are recorded; by default in the user's cache")
    parser.add_argument("--device", help="such as cpu or cuda:1; by default the GPU when there is one")


def run(args: argparse.Namespace) -> None:
    from diffalign.rewards._hub import Hosted

    wanted = reward_entries.parse(args.reward) if args.reward else _every()
    hosted: list[Reward] = []
    for reward in wanted:
        if isinstance(reward, Hosted) and (checkpoints := reward.checkpoints()):
            hosted.append(reward)
            _print_checkpoints(reward.key, [*checkpoints, *_behind(checkpoints)])
        elif args.reward:
            print(f"{reward.key}: loads no checkpoint")
    if args.compare_official:
        path = Path(args.reference) if args.reference else _cache() / "reward_scores.json"
        _compare(hosted, path, args.device)


def _every() -> list[Reward]:
    """Every head that can be had without options."""
    found = []
    for name in available("diffalign.rewards"):
        try:
            found += reward_entries.parse([name])
        except UserError as error:
            print(f"{name}: left out: {error}")
    return found


def _behind(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The backbones of artifact heads, which are named in the heads that are here."""
    from diffalign.rewards import _artifact
    from diffalign.rewards._hub import Checkpoint

    heads = [(c.cached(), c.model) for c in checkpoints if _artifact.NOTE in c.only]
    features = [_artifact.load(str(where), model).features for where, model in heads if where is not None]
    return [Checkpoint(f.model, f.revision) for f in features]


def _print_checkpoints(name: str, checkpoints: Sequence[Checkpoint]) -> None:
    for checkpoint in dict.fromkeys(checkpoints):
        where = checkpoint.cached()
        absent = f"not here; `{checkpoint.command}` fetches it" if checkpoint.on_hub else "not here"
        print(f"{name}: {checkpoint.model}: {f'in {where}' if where else absent}")


def _compare(hosted: list[Reward], path: Path, device: str | None) -> None:
    _common.quiet()
    from diffalign.devices import choose

    chosen = choose(device)
    recorded = _recorded(path)
    wrong, done = [], 0
    for reward in hosted:
        try:
            scores = fixed_scores(reward, chosen)
        except UserError as error:
            print(f"{reward.key}: left out: {error}")
            continue
        done += 1
        entry = json.dumps(reward.model_dump(exclude_defaults=True, mode="json"), sort_keys=True)
        if entry not in recorded:
            recorded[entry] = {"scores": scores, "versions": _versions()}
            print(f"{reward.key}: recorded {_shown(scores)}")
        elif far := apart(scores, recorded[entry]["scores"]):
            wrong.append(reward.key)
            print(f"{reward.key}: {_shown(scores)} differs from {_shown(recorded[entry]['scores'])} by up to {far:.3g}")
        else:
            print(f"{reward.key}: as recorded, {_shown(scores)}")
    _write(path, recorded)
    if wrong:
        raise UserError(
            f"{', '.join(wrong)} score otherwise than recorded in '{path}'; compare the versions noted there"
        )
    if not done:
        raise UserError("no head could be scored; fetch a checkpoint, or name a head that has one with --reward")


def fixed_scores(reward: Reward, device: Any) -> list[float]:
    """Scores of each fixed picture with each fixed prompt."""
    import torch

    from diffalign.rewards import build

    (scorer,) = build([reward], device).values()
    with torch.no_grad():
        outputs = [scorer(x.expand(len(PROMPTS), -1, -1, -1), PROMPTS, METADATA) for x in pictures()]
    return [score for output in outputs for score in output.scores.tolist()]


def pictures() -> list[Tensor]:
    """Two that photographs' models were made for, and one of the kind that the embedded models know."""
    import torch

    from diffalign.shapes.world import Object, render

    drawn = torch.from_numpy(render([Object("circle", "red", 30, 30, 14)]).copy()).permute(2, 0, 1)[None] / 255
    return [*(picture(*size) for size in SIZES), drawn]


def picture(height: int, width: int) -> Tensor:
    """[1, 3, H, W]: a red disc on a gradient with fine stripes, in 8-bit levels."""
    import torch

    y = (torch.arange(height, dtype=torch.float64)[:, None] / height).expand(height, width)
    x = (torch.arange(width, dtype=torch.float64)[None] / width).expand(height, width)
    stripes = 0.1 * torch.sin(120 * x + 40 * y)
    ground = torch.stack([0.2 + 0.5 * y + stripes, 0.8 - 0.5 * x + stripes, 0.3 + 0.4 * x * y - stripes])
    disc = (x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.06
    red = torch.tensor([0.85, 0.1, 0.1], dtype=torch.float64).view(3, 1, 1)
    return ((torch.where(disc, red, ground).clamp(0, 1) * 255).round() / 255).float()[None]


def apart(scores: list[float], recorded: list[float]) -> float:
    """The largest difference if any exceeds the tolerance, else 0."""
    pairs = [(a, b) for a, b in zip(scores, recorded, strict=True) if not (math.isnan(a) and math.isnan(b))]
    gaps = [(abs(a - b), TOLERANCE * max(1.0, abs(b))) for a, b in pairs]
    return max((gap for gap, limit in gaps if not gap <= limit), default=0.0)  # not <=: NaN exceeds every limit


def _shown(scores: list[float]) -> str:
    return " ".join(f"{s:.4f}" for s in scores)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffalign"


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _recorded(path: Path) -> dict[str, Any]:
    """Scores by head, none where there is no file yet. Raises UserError for another file, or no place for one."""
    try:
        try_out(path)
        recorded = json.loads(path.read_text("utf-8")) if path.exists() else {}
        n = len(PROMPTS) * (len(SIZES) + 1)
        lists = [entry["scores"] for entry in recorded.values()]
        if not all(len(scores) == n and all(isinstance(s, float) for s in scores) for scores in lists):
            raise ValueError("it is of other pictures")
    except OSError as error:
        raise UserError(f"could not write '{path}': {error.strerror}; give another --reference") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"'{path}' holds no scores of these pictures; remove it, or give another --reference"
        ) from error
    return recorded


def _write(path: Path, recorded: Mapping[str, Any]) -> None:
    try:
        put(path, json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(f"could not write '{path}': {error.strerror}; give another --reference") from error
