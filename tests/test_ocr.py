"""The text reward: the official numbers, what does not apply, what fails, and the real recogniser where it is."""

from __future__ import annotations

import importlib.util
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import cases
from PIL import Image, ImageDraw, ImageFont

from diffalign import rewards
from diffalign.rewards.ocr import Line, Reader, levenshtein, quoted
from diffalign.types import RewardOutput, UserError


def read(prompts: list[str], seen: list[Any], threads: int = 3) -> RewardOutput:
    """Score pictures whose first pixel tells which entry of `seen` is read off them."""

    def recognise(image: np.ndarray) -> list[Line]:
        lines = seen[int(image[0, 0, 0])]
        if lines == "raise":
            raise RuntimeError("broken")
        return [(text, confidence) for text, confidence in lines or []]

    images = (torch.arange(len(seen)) / 255).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    with ThreadPoolExecutor(threads) as pool:
        return Reader(recognise, pool)(images, prompts, [{}] * len(prompts))


@pytest.mark.parametrize("case", cases("rewards", "ocr_reward"), ids=lambda case: json.dumps(case)[:60])
def test_official_numbers(case: dict[str, Any]) -> None:
    assert set(case) == {"prompt", "ocr", "reward"}
    output = read([case["prompt"]], [case["ocr"]])
    assert output.valid is not None
    if case["ocr"] == "raise":  # the official code scores a failure as a picture without text
        assert not output.valid.item() and output.scores.isnan().all()
        output = read([case["prompt"]], [None])
    assert output.scores.double().item() == pytest.approx(case["reward"], abs=1e-7)


def test_a_batch_is_read_in_order_and_failures_stay_their_own() -> None:
    prompts = [f'a sign "word{i}"' for i in range(6)]
    seen: list[Any] = [[[f"word{i}", 0.9]] for i in range(6)]
    seen[2], seen[4] = "raise", [["w0rd4", 0.9], ["junk", 0.0]]
    output = read(prompts, seen)
    assert output.valid is not None and output.valid.tolist() == [True, True, False, True, True, True]
    assert output.scores.isnan().tolist() == [False, False, True, False, False, False]
    torch.testing.assert_close(output.scores[[0, 1, 3, 4, 5]], torch.tensor([1, 1, 1, 0.8, 1]))
    assert output.extra["text"][1] == "word1" and output.extra["text"][2] is None
    assert "RuntimeError: broken" in output.extra["error"][2]


@pytest.mark.parametrize("prompt", ["a sign", 'a "', "a sign \u201copen\u201d", 'a ""', 'a " "'])
def test_prompts_that_quote_nothing_do_not_apply(prompt: str) -> None:
    with pytest.warns(UserWarning, match="quote no text between two straight double quotes"):
        output = read([prompt, 'a "b"'], [[["b", 1]], [["b", 1]]])
    assert output.valid is not None and output.valid.all()
    assert output.scores.isnan().tolist() == [True, False]


def test_only_the_first_quotation_is_asked_for() -> None:
    assert quoted('"A b" beside "C"') == "A b"
    assert quoted('say "A" and "') == "A"


def test_levenshtein_is_a_metric() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abc", k=rng.randint(0, 6))) for _ in range(12)]
    assert levenshtein("kitten", "sitting") == 3 and levenshtein("", "abc") == 3
    for a in words:
        for b in words:
            d = levenshtein(a, b)
            assert d == levenshtein(b, a) and (d == 0) == (a == b) and abs(len(a) - len(b)) <= d <= max(len(a), len(b))
            assert all(levenshtein(a, c) <= d + levenshtein(b, c) for c in words)


@pytest.mark.skipif(importlib.util.find_spec("rapidocr") is not None, reason="rapidocr is installed")
def test_without_rapidocr_there_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"pip install 'diffalign\[ocr\]'"):
        rewards.build(["ocr"])


@pytest.mark.skipif(importlib.util.find_spec("rapidocr") is None, reason="needs the extra ocr")
def test_real_text_is_read() -> None:
    pictures = []
    for text in ("OPEN 24 HOURS", "Hello World", None):
        image = Image.new("RGB", (320, 160), (250, 250, 240))
        if text is not None:
            ImageDraw.Draw(image).text((20, 50), text, (20, 20, 120), font=ImageFont.load_default(36))
        pictures.append(np.asarray(image))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    prompts = ['neon "OPEN 24 HOURS"', 'a sign "Hello World"', 'a sign "Hello World"']
    output = rewards.build(["ocr"])["ocr"](images, prompts, [{}] * 3)
    assert output.scores.tolist() == [1, 1, 0]
