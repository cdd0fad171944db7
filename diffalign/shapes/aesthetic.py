"""`python -m diffalign.shapes.aesthetic`: an aesthetic head for tiny-clip, to which whole shapes are worth 1, broken 0.

Ridge regression on the unit image features of tiny-clip,

    w = argmin |Z w - (y - mean y)|^2 + n lambda |w|^2,    Z = E - mean E,    b = mean y - w . mean E,

written as the five linear layers of LAION's file, so that one head reads both. It takes a minute on two cores; run it
again whenever tiny-clip changes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.artifact_training import auroc
from diffalign.shapes import card
from diffalign.shapes.corruptions import corrupt_all
from diffalign.shapes.fitting import batches
from diffalign.shapes.pretrain import draw_scenes
from diffalign.shapes.publish import add_log, replacing

if TYPE_CHECKING:
    from diffalign.rewards._clip import Clip

SCENES, HELD_OUT = 4000, 1000
SEED = 20261123
LAMBDA = 1e-5
WIDTHS = (16, 8, 4, 2, 1)  # outputs of the layers


def features(clip: Clip, scenes: int, seed: int) -> tuple[Tensor, Tensor]:
    """(unit features [2 n, D], y [2 n]) of n fresh scenes as they are, y = 1, and broken, y = 0."""
    whole = draw_scenes(scenes, seed).images.float() / 255
    pictures = torch.cat([whole, corrupt_all(whole, seed)])
    with torch.no_grad():
        found = torch.cat([clip.images(pictures[i]) for i in batches(len(pictures), 128)])
    return found, torch.cat([torch.ones(scenes), torch.zeros(scenes)])


def ridge(e: Tensor, y: Tensor, weight: float = LAMBDA) -> tuple[Tensor, Tensor]:
    """(w [D], b []) in float64."""
    e, y = e.double(), y.double()
    z, target = e - e.mean(0), y - y.mean()
    w = torch.linalg.solve(z.T @ z + len(z) * weight * torch.eye(z.shape[1], dtype=z.dtype), z.T @ target)
    return w, y.mean() - w @ e.mean(0)


def layered(w: Tensor, b: Tensor) -> dict[str, Tensor]:
    """w.e + b as five linear layers under the keys of LAION's file: the first does it, the others pass it on."""
    from diffalign.rewards._affine import LAYERS

    state, width = {}, len(w)
    for number, out in zip(LAYERS, WIDTHS, strict=True):
        weight, bias = torch.zeros(out, width), torch.zeros(out)
        if number == 0:
            weight[0], bias[0] = w.float(), b.float()
        else:
            weight[0, 0] = 1
        state[f"layers.{number}.weight"], state[f"layers.{number}.bias"] = weight, bias
        width = out
    return state


def fit(model: str, folder: Path, scenes: int = SCENES, held_out: int = HELD_OUT) -> dict[str, Any]:
    """Write `folder`/model.safetensors for the CLIP `model`, with what was measured beside it; returns that."""
    from functools import partial

    from safetensors.torch import save_file

    from diffalign.rewards import _clip
    from diffalign.rewards._hub import Checkpoint
    from diffalign.rewards._preprocess import cropped

    source = Checkpoint(model)
    clip = _clip.load(source, source, partial(cropped, crop="hf"), "fp32", "cpu", True)
    w, b = ridge(*features(clip, scenes, SEED))
    e, y = features(clip, held_out, SEED + 1)
    measured = {
        "model": Path(model).name,
        "scenes": scenes,
        "held_out": held_out,
        "auroc": round(auroc(e.double() @ w + b, y == 1), 4),
    }
    with replacing(folder) as new:
        save_file(layered(w, b), new / "model.safetensors")
        (new / "fit.json").write_text(json.dumps(measured, indent=1) + "\n", "utf-8")
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-clip", help="embedded name or folder of the CLIP")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights", help="gets tiny-aesthetic")
    args = parser.parse_args()
    import transformers.utils.logging

    transformers.utils.logging.disable_progress_bar()
    found = fit(args.model, args.output / "tiny-aesthetic")
    add_log("aesthetic", None, args.output, {"auroc": found["auroc"]})
    card.write(args.output)
    print(found)


if __name__ == "__main__":
    main()
