"""Whether the picture shows the text that the prompt quotes (Flow-GRPO, arXiv 2505.05470), as rapidocr reads it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from diffalign.rewards import Head, Reward
from diffalign.types import RewardOutput, UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

Line = tuple[str, float]  # text, confidence
Recogniser = Callable[["np.ndarray"], Sequence[Line]]  # uint8 RGB [H, W, 3] -> lines in reading order


class Ocr(Reward):
    """1 - d / L for a quoted text of L characters; d is 0 where the lines read contain it, else min(Levenshtein, L).

    The text is what stands between the first two straight double quotes; a prompt without one does not apply. Lines
    are joined without a separator, and spaces and case do not count. So longer text is free ("OPENING SOON" is a full
    "OPEN"), the order of lines and punctuation matter, and further quotes are not read. A picture that the recogniser
    fails on is not valid, where the published code gives 0. Its scores come from PaddleOCR and differ. No gradient.
    """

    threads: int = Field(2, ge=1)
    """Pictures read at once, each on one CPU core or so: about a second a picture of 512 x 512."""

    remote: ClassVar[bool] = True  # not elsewhere, but not on the GPU: it may run while sampling goes on

    def setup(self, device: torch.device | str) -> Head:
        return Reader(rapidocr(), ThreadPoolExecutor(self.threads))


@dataclass(frozen=True)
class Reader:
    recognise: Recogniser
    pool: ThreadPoolExecutor

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        import torch

        pixels = (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1)
        targets = [quoted(prompt) for prompt in prompts]
        if None in targets:
            warnings.warn(
                "reward 'ocr' leaves out prompts that quote no text between two straight double quotes (\"), not curly",
                stacklevel=2,
            )
        found = list(self.pool.map(self._read, pixels.numpy(), targets))
        scores = [
            float("nan") if target is None or lines is None else similarity(lines, target)
            for (lines, _), target in zip(found, targets, strict=True)
        ]
        errors = [error for _, error in found]
        texts = [None if lines is None else " ".join(text for text, _ in lines) for lines, _ in found]
        valid = torch.tensor([e is None for e in errors])
        return RewardOutput(torch.tensor(scores), {"text": texts, "error": errors}, valid)

    def _read(self, image: np.ndarray, target: str | None) -> tuple[Sequence[Line] | None, str | None]:
        """(lines, error)"""
        if target is None:
            return None, None
        try:
            return self.recognise(image), None
        except Exception as error:  # native code of several libraries
            return None, f"the text could not be read: {type(error).__name__}: {error}"


def quoted(prompt: str) -> str | None:
    """The text between the first two straight double quotes, None when it is missing or blank."""
    parts = prompt.split('"')
    return parts[1] if len(parts) > 2 and parts[1].strip() else None


def similarity(lines: Sequence[Line], target: str) -> float:
    """In [0, 1]; lines without confidence are not read."""
    seen, wanted = (
        t.replace(" ", "").lower() for t in ("".join(t for t, confidence in lines if confidence > 0), target)
    )
    distance = 0 if wanted in seen else min(levenshtein(seen, wanted), len(wanted))
    return 1 - distance / len(wanted)


def levenshtein(a: str, b: str) -> int:
    """The fewest characters to insert, delete or replace that make a of b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above = row
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def rapidocr() -> Recogniser:
    """PP-OCR by rapidocr, which drops lines of confidence below 0.5; one engine a thread, since they keep state."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError("reward 'ocr' needs rapidocr: pip install 'diffalign[ocr]'") from error
    engines = threading.local()

    def recognise(image: np.ndarray) -> list[Line]:
        if not hasattr(engines, "one"):
            engines.one = RapidOCR(params={"Global.log_level": "error"})
        read = engines.one(image[..., ::-1].copy())  # arrays are taken for BGR
        return [] if read.txts is None else list(zip(read.txts, map(float, read.scores), strict=True))

    return recognise
