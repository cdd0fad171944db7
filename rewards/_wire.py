"""What a `remote` reward and its server say to each other: JSON with PNGs, so that any language can be either side.

    GET /health -> {"reward": name, "largest": bytes that a body may have}
    POST /score {"images": [base64 of a PNG, ...], "prompts": [text, ...], "metadata": [object, ...]}
        -> {"scores": [number or null, ...], "valid": [bool, ...], "error": [text or null, ...]}

All lists have one entry an image. A score of null that is valid means that the reward does not apply. Requests are
application/json; anything but 200 carries {"error": sentence}. Images are 8-bit RGB, of one size in a request, at most
IMAGES of them with PIXELS pixels in all.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffalign.types import RewardOutput

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

IMAGES = 1024
PIXELS = 1 << 26  # a small file may hold a picture that fills the memory
VALUES = 1_000_000  # of the JSON, which take more memory than they have bytes
GREATEST = 3.4028234e38  # of fp32
ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)|\x1b[ -/]*[0-~]"
)


class Refused(ValueError):
    """A message that is not of the form above; one sentence."""


def question(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> bytes:
    """images [B, 3, H, W] in [0, 1], rounded to 8 bits. Raises Refused for metadata that JSON cannot hold."""
    body = {"images": [png(image) for image in images], "prompts": list(prompts), "metadata": list(metadata)}
    try:
        return json.dumps(body).encode()
    except (TypeError, ValueError) as error:
        raise Refused("the metadata of the prompts must be JSON to be sent") from error


def read_question(body: bytes | bytearray) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """(images [B, 3, H, W] uint8, prompts, metadata). Raises Refused."""
    import numpy as np
    import torch

    images, prompts, metadata = _lists(body)
    sizes = [_size(image, i) for i, image in enumerate(images)]
    if len(set(sizes)) > 1:
        raise Refused("the images of one request must have one size")
    width, height = sizes[0]
    if len(images) > IMAGES or width * height * len(images) > PIXELS:
        raise Refused(
            f"{len(images)} images of {width} x {height} are too much for one request, which may have {IMAGES} images "
            f"and {PIXELS} pixels in all; lower `batch`"
        )
    pixels = np.empty((len(images), height, width, 3), np.uint8)
    for i, image in enumerate(images):
        pixels[i] = _pixels(image, i, sizes[0])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), prompts, metadata


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
    """(scores, valid, error), each of `count` entries; NaN for null, and for null alone. Raises Refused."""
    try:
        scores, valid, errors = (list(given[key]) for key in ("scores", "valid", "error"))
    except (KeyError, TypeError) as error:
        raise Refused("the answer holds no scores, valid and error") from error
    if not len(scores) == len(valid) == len(errors) == count:
        raise Refused(f"the answer has another number of scores than the {count} images asked about")
    if not all(s is None or (type(s) in (int, float) and abs(s) <= GREATEST) for s in scores):
        raise Refused("the answer holds a score that is neither a finite number nor null")
    if not all(isinstance(v, bool) for v in valid):
        raise Refused("the answer holds a valid that is neither true nor false")
    return (
        [math.nan if s is None else float(s) for s in scores],
        valid,
        [None if e is None else line(e) for e in errors],
    )


def line(said: Any, length: int = 300) -> str:
    """What the other side says, as one printable line; a terminal's escape sequences are dropped."""
    return "".join(c if c.isprintable() else " " for c in ESCAPE.sub("", str(said)))[:length].strip()


def _lists(body: bytes | bytearray) -> tuple[list[Any], list[str], list[dict[str, Any]]]:
    if sum(map(body.count, (b",", b"[", b"{"))) > VALUES:
        raise Refused(f"the body has more than {VALUES} values")
    try:
        given = json.loads(body)
        images, prompts, metadata = lists = [given[key] for key in ("images", "prompts", "metadata")]
        text = json.dumps([prompts, metadata], ensure_ascii=False)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused("the body must be a JSON object of images, prompts and metadata") from error
    if not all(isinstance(values, list) for values in lists):
        raise Refused("images, prompts and metadata must be lists")
    if not (all(isinstance(p, str) for p in prompts) and all(isinstance(m, dict) for m in metadata)):
        raise Refused("prompts must be texts and metadata objects")
    if not 0 < len(images) == len(prompts) == len(metadata):
        raise Refused("images, prompts and metadata must have one entry an image, and there must be an image")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused("prompts and metadata must be Unicode text, without lone surrogates") from error
    return images, prompts, metadata


def png(image: Tensor) -> str:
    """[3, H, W] in [0, 1] -> base64"""
    import torch
    from PIL import Image

    pixels = (image.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8).permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _size(text: Any, index: int) -> tuple[int, int]:
    """(width, height), which the first 24 bytes tell."""
    try:
        head = base64.b64decode(text[:32], validate=True)
        magic, width, height = struct.unpack("!8s8xII", head)
    except (TypeError, ValueError, KeyError, struct.error):
        magic, width, height = b"", 0, 0
    if magic != b"\x89PNG\r\n\x1a\n" or not width * height:
        raise Refused(f"image {index} is no base64 of a PNG")
    return width, height


def _pixels(text: str, index: int, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if image.size != size:  # a second header
                raise Refused(f"image {index} has two sizes")
            return np.asarray(image.convert("RGB"))
    except Refused:
        raise
    except Exception as error:  # Pillow has many words for a broken file
        raise Refused(f"image {index} is no base64 of a PNG") from error
