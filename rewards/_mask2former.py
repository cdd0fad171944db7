"""Objects of photographs and their colours, as GenEval (arXiv 2310.11513) finds them: Mask2Former, then CLIP.

GenEval's own detector runs in mmdet, which no current environment installs. This one has the same network and the
published weights in transformers' format, and GenEval's thresholds and decisions. What is left are the details of two
implementations, so the scores are called GenEval-compatible and are no substitute for the official ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from diffalign.rewards import _clip, _loading
from diffalign.rewards._hub import Checkpoint
from diffalign.rewards._preprocess import cropped, normalise, resize, unit
from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffalign.rewards._clip import Clip

DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
THRESHOLD, COUNTING = 0.3, 0.9  # confidence above which an object is there, and is counted
MOST = 16  # objects of one class
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = 0x99 / 255  # what an object is cut out onto
SHORT, LONG, MULTIPLE = 800, 1333, 32  # mmdet's test size: at most this long, padded to a multiple
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# GenEval says of some classes what kind of mouse is meant, COCO does not
ALIASES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}

Box = tuple[float, ...]  # x0, y0, x1, y1, confidence; the corner x1, y1 lies outside
Seen = tuple[dict[str, list[Box]], dict[str, list[str]]]  # GenEval's objects and colors, by class


@dataclass(frozen=True)
class Found:
    """One object: its class, its box, and its mask, bool [H, W]."""

    name: str
    box: Box
    mask: Tensor


@dataclass(frozen=True)
class Mask2Former:
    model: Any
    clip: Clip
    names: Sequence[str]  # of the classes, as GenEval calls them, by index
    size: tuple[int, int] = (SHORT, LONG)

    colors: Sequence[str] = COLORS

    def find(self, images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> list[Seen]:
        """images [B, 3, H, W] in [0, 1] -> (objects, colors) of each; colours of classes whose clause asks for one."""
        import torch

        with torch.no_grad():
            images = unit(images)
            results = []
            for image, wanted, found in zip(images, metadata, self.detect(images), strict=True):
                kept = select(found, COUNTING if wanted.get("tag") == "counting" else THRESHOLD)
                coloured = {c["class"] for c in wanted.get("include", []) if "color" in c} & kept.keys()
                results.append(
                    (
                        {name: [f.box for f in same] for name, same in kept.items()},
                        {name: self._colours(image, kept[name]) for name in sorted(coloured)},
                    )
                )
            return results

    def detect(self, images: Tensor) -> list[list[Found]]:
        """Every object of confidence above 0.3."""
        import torch.nn.functional as F

        height, width = images.shape[2:]
        scale = min(self.size[0] / min(height, width), self.size[1] / max(height, width))
        inner = (round(height * scale), round(width * scale))
        pad = [-n % MULTIPLE for n in inner]
        pixels = F.pad(normalise(resize(images, inner, "bilinear"), MEAN, STD), (0, pad[1], 0, pad[0]))
        output = self.model(pixel_values=pixels.to(self.model.dtype))
        found: list[list[Found]] = []
        for classes, masks in zip(
            output.class_queries_logits.float(), output.masks_queries_logits.float(), strict=True
        ):
            probability = classes.softmax(-1)[:, :-1]  # the last class is: nothing
            query, label = (probability > THRESHOLD).nonzero(as_tuple=True)
            if not len(query):
                found.append([])
                continue
            wide = F.interpolate(masks[query][None], pixels.shape[2:], mode="bilinear", align_corners=False)
            wide = wide[..., : inner[0], : inner[1]]
            logits = F.interpolate(wide, (height, width), mode="bilinear", align_corners=False)[0]
            inside = logits > 0
            sure = (logits.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
            score = probability[query, label] * sure
            found.append(
                [
                    Found(self.names[k], (*box_of(mask), s), mask)
                    for k, s, mask in zip(label.tolist(), score.tolist(), inside, strict=True)
                    if mask.any() and s > THRESHOLD
                ]
            )
        return found

    def _colours(self, image: Tensor, objects: Sequence[Found]) -> list[str]:
        """The colour of each object, by CLIP zero-shot on its pixels alone."""
        import torch
        import torch.nn.functional as F

        name = objects[0].name
        texts = [t.format(color=color, name=name) for color in COLORS for t in TEMPLATES]
        known = self.clip.texts(texts).unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1)
        crops = []
        for found in objects:
            x0, y0, x1, y1 = map(int, found.box[:4])
            crops.append(torch.where(found.mask, image, GREY)[:, y0:y1, x0:x1])
        seen = torch.cat([self.clip.images(crop[None]) for crop in crops])
        return [COLORS[i] for i in (seen @ F.normalize(known, dim=-1).T).argmax(1).tolist()]


def select(found: Sequence[Found], threshold: float) -> dict[str, list[Found]]:
    """Class -> its objects above the threshold, the most confident first, at most 16."""
    kept: dict[str, list[Found]] = {}
    for one in sorted((f for f in found if f.box[4] > threshold), key=lambda f: -f.box[4]):
        kept.setdefault(one.name, []).append(one)
    return {name: same[:MOST] for name, same in kept.items()}


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 around the true pixels of [H, W]; the corner x1, y1 lies outside."""
    rows, columns = (mask.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def load(detector: Checkpoint, clip: Checkpoint, device: torch.device | str, local_files_only: bool) -> Mask2Former:
    """Raises UserError when either cannot be had or is another kind of model."""
    from transformers import Mask2FormerForUniversalSegmentation

    source = detector.folder(local_files_only)
    model = _loading.pretrained(Mask2FormerForUniversalSegmentation, detector.model, source).to(device)
    called = {coco: geneval for geneval, coco in ALIASES.items()}
    labels = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    if "person" not in labels:
        raise UserError(
            f"'{detector.model}' knows {', '.join(labels[:3])} and so on; give a detector of COCO's classes"
        )
    look = _clip.load(clip, clip, partial(cropped, crop="torchvision"), "fp32", device, local_files_only)
    return Mask2Former(model, look, [called.get(name, name) for name in labels])
