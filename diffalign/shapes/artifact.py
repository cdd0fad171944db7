"""`python -m diffalign.shapes.artifact`: tiny-artifact, the head that tells broken shapes from whole ones.

Draws a folder of whole pictures, renders and samples that the detector finds nothing malformed in, and one of the same
pictures with faults and of samples that the detector rejects. Trains `artifact_head` on them as
`diffalign train-artifact` does, and measures it on other scenes, with faults of other seeds, and on samples for
held-out prompts. Needs `tiny-dino`, which also saw faults, drawn from seeds of its own, and `tiny-sd3`. Minutes on two
CPU cores; the pictures stay in the work folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import artifact_training, image_lists
from diffalign.images import save_png
from diffalign.rewards import _artifact
from diffalign.rewards._dino import Backbone
from diffalign.shapes import card, prompts, samples
from diffalign.shapes.corruptions import corrupt_all
from diffalign.shapes.detector import detect
from diffalign.shapes.pretrain import draw_scenes
from diffalign.shapes.publish import add_log, replacing

SEED = 20261201  # of no picture that tiny-dino saw
RENDERS, SAMPLES = 2400, 2000  # whole pictures of each kind, and at most as many rejected samples
HELD_OUT = 1000  # renders to measure with, and at most as many samples
PLAN = artifact_training.Plan(steps=2000)


def is_whole(image: Tensor) -> bool:
    """Whether the detector finds every object of uint8 [3, 64, 64] well formed and of one colour."""
    found = detect(image.permute(1, 2, 0).contiguous().numpy())
    return all(d.shape and d.color for d in found)


def folders(whole: Tensor, rejected: Tensor, seed: int, root: Path) -> tuple[Path, Path]:
    """uint8 [N, 3, 64, 64] -> (folder of `whole`, folder of them with faults under the same names, and `rejected`)."""
    broken = torch.cat([corrupt_all(whole.float() / 255, seed), rejected.float() / 255])
    for name, images in (("clean", whole.float() / 255), ("artifact", broken)):
        with replacing(root / name) as folder:
            for i, image in enumerate(images):
                save_png(image, folder / f"{i:05d}.png")
    return root / "clean", root / "artifact"


def measure(
    backbone: Backbone, weights: _artifact.Weights, renders: Tensor, drawn: Tensor, seed: int
) -> dict[str, Any]:
    """Of uint8 pictures [N, 3, 64, 64] that nothing was trained on.

    renders: whole scenes against the same with faults; samples: whole samples against the same with faults; malformed:
    whole samples against those that the detector rejects. Each: AUROC, balanced accuracy, numbers of pictures.
    """
    good = torch.tensor([is_whole(image) for image in drawn])
    result = {}
    for name, whole, bad in (
        ("renders", renders, _broken(renders, seed)),
        ("samples", drawn[good], _broken(drawn[good], seed + 1)),
        ("malformed", drawn[good], drawn[~good]),
    ):
        label = torch.arange(len(whole) + len(bad)) >= len(whole)
        result[name] = artifact_training.measured(_logits(backbone, weights, torch.cat([whole, bad])), label)
    return result


def _broken(images: Tensor, seed: int) -> Tensor:
    return (corrupt_all(images.float() / 255, seed) * 255).round().to(torch.uint8)


@torch.no_grad()
def _logits(backbone: Backbone, weights: _artifact.Weights, images: Tensor) -> Tensor:
    tokens = torch.cat([backbone.tokens(part.float() / 255)[:, 0] for part in images.split(64)])
    return artifact_training.applied(weights, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="samples and pictures")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights", help="gets tiny-artifact")
    arguments = parser.parse_args()
    work, output = arguments.work, arguments.output / "tiny-artifact"
    work.mkdir(parents=True, exist_ok=True)

    drawn = samples.draw(samples.prompted(), work / "samples-train.pt", 1).flatten(0, 1)
    good = torch.tensor([is_whole(image) for image in drawn])
    pictures = torch.cat([draw_scenes(RENDERS, SEED).images, drawn[good][:SAMPLES]])
    made = folders(pictures, drawn[~good][:SAMPLES], SEED, work / "artifact")
    clean, artifact = (image_lists.find(str(f)) for f in made)
    features = _artifact.Features("tiny-dino")
    backbone = features.load("fp32", "cpu", local_files_only=True)
    weights, report = artifact_training.train(backbone, clean, artifact, PLAN, 64, "cpu")
    test = samples.draw(prompts.test_prompts(), work / "samples-test.pt", 2).flatten(0, 1)
    found = measure(backbone, weights, draw_scenes(HELD_OUT, SEED + 1).images, test[:HELD_OUT], SEED + 2)
    with replacing(output) as folder:
        _artifact.save(_artifact.Trained(features, weights, {**report, "unseen": found}), folder)
    add_log("artifact", None, arguments.output, found)
    card.write(arguments.output)
    print(artifact_training.sentence(report))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
