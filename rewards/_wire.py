"""What a `remote` reward and its server say to each other: JSON with PNGs, so that any language can be either side.

    GET /health -> {"reward": name, "largest": bytes that a body may have}
    POST /score {"images": [base64 of a PNG, ...], "prompts": [text, ...], "metadata": [object, ...]}
        -> {"scores": [number or null, ...], "valid": [bool, ...], "error": [text or null, ...]}

All lists have one entry an image. A score of null that is valid means that the reward does not apply. Requests are
application/json; anything but 200 carries {"error": sentence}. Images are 8-bit RGB, of one size in a request.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffalign.types import RewardOutput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_PIXELS = 1 << 26  # of one image: a small file may hold a picture that fills the memory


class Refused(ValueError):
    """A message that is not of the form above; one sentence."""


def question(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> bytes:
    """images [B, 3, H, W] in [0, 1], rounded to 8 bits. Raises Refused for metadata that JSON cannot hold."""
    body = {"images": [_png(image) for image in images], "prompts": list(prompts), "metadata": list(metadata)}
    try:
        return json.dumps(body).encode()
    except (TypeError, ValueError) as error:
        raise Refused("the metadata of the prompts must be JSON to be sent") from error


def read_question(body: bytes) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """(images [B, 3, H, W] in [0, 1], prompts, metadata). Raises Refused."""
    import torch

    try:
        given = json.loads(body)
        images, prompts, metadata = (given[key] for key in ("images", "prompts", "metadata"))
        if not (all(isinstance(p, str) for p in prompts) and all(isinstance(m, dict) for m in metadata)):
            raise Refused("prompts must be texts and metadata objects")
        if not 0 < len(images) == len(prompts) == len(metadata):
            raise Refused("images, prompts and metadata must have one entry an image, and there must be an image")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise (
            error
            if isinstance(error, Refused)
            else Refused("the body must be a JSON object of images, prompts and metadata")
        ) from error
    pixels = [_pixels(image, i) for i, image in enumerate(images)]
    if len({p.shape for p in pixels}) > 1:
        raise Refused("the images of one request must have one size")
    return torch.stack(pixels), prompts, metadata


def answer(output: RewardOutput) -> dict[str, list[Any]]:
    scores = output.scores.tolist()
    valid = [True] * len(scores) if output.valid is None else output.valid.tolist()
    errors = output.extra.get("error", [None] * len(scores))
    return {
        "scores": [None if math.isnan(s) else s for s in scores],
        "valid": valid,
        "error": [None if e is None else str(e) for e in errors],
    }


def read_answer(given: Any, count: int) -> tuple[list[float], list[bool], list[str | None]]:
    """(scores, valid, error), each of `count` entries; NaN for null. Raises Refused."""
    try:
        scores = [math.nan if s is None else float(s) for s in given["scores"]]
        valid, errors = list(given["valid"]), list(given["error"])
    except (KeyError, TypeError, ValueError) as error:
        raise Refused("the answer holds no scores, valid and error") from error
    if not len(scores) == len(valid) == len(errors) == count:
        raise Refused(f"the answer has another number of scores than the {count} images asked about")
    if any(map(math.isinf, scores)) or not all(isinstance(v, bool) for v in valid):
        raise Refused("the answer holds an infinite score, or a valid that is not true or false")
    return scores, valid, [None if e is None else line(e) for e in errors]


def line(said: Any, length: int = 300) -> str:
    """What the other side says, as one printable line."""
    return "".join(c if c.isprintable() else " " for c in str(said))[:length].strip()


def _png(image: Tensor) -> str:
    import torch
    from PIL import Image

    pixels = (image.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8).permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _pixels(text: Any, index: int) -> torch.Tensor:
    import numpy as np
    import torch
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Refused(f"image {index} has more than {MAX_PIXELS} pixels")
            pixels = np.array(image.convert("RGB"))
    except (TypeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise error if isinstance(error, Refused) else Refused(f"image {index} is no base64 of a PNG") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
