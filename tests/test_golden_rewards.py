"""Reward formulas against numbers made with the official code."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL
import pytest
import torch
from golden_data import ROOT, cases, load
from PIL import Image

from diffalign.eval import geneval_logic, statistics
from diffalign.rewards.jpeg import Jpeg, jpeg_bytes


def covered(case: dict[str, Any], *fields: str) -> None:
    """Fail when the golden file holds a field that the test does not read."""
    assert set(case) <= set(fields), set(case) - set(fields)


@pytest.mark.parametrize("case", cases("rewards", "geneval_logic"))
def test_geneval_decisions(case: dict[str, Any]) -> None:
    covered(case, "metadata", "objects", "colors", "correct", "strict_correct", "score")
    seen = case["objects"], case["colors"], case["metadata"]
    assert geneval_logic.geneval_correct(*seen) is case["correct"]
    assert geneval_logic.geneval_exact(*seen) is case["strict_correct"]
    assert geneval_logic.geneval_flow_grpo(*seen) == case["score"]


@pytest.mark.parametrize("case", load("rewards", "geneval_logic")["relations"])
def test_geneval_relations(case: dict[str, Any]) -> None:
    covered(case, "a", "b", "relations", "iou")
    assert sorted(geneval_logic.relations(case["a"], case["b"])) == sorted(case["relations"])
    assert geneval_logic.iou(case["a"], case["b"]) == case["iou"]


@pytest.mark.parametrize("case", cases("rewards", "jpeg"))
def test_jpeg(case: dict[str, Any]) -> None:
    covered(case, "file", "incompressibility_kB", "flow_grpo_compressibility", "bytes_q95", "bytes_q75")
    pixels = np.asarray(Image.open(ROOT / "rewards" / case["file"]).convert("RGB"))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    # The encoder's output is fixed by its build; another Pillow may differ by some bytes.
    same = load("rewards", "jpeg")["versions"]["pillow"] == PIL.__version__
    tolerance = 1e-12 if same else 0.02

    def scored(**options: Any) -> float:
        return Jpeg(name="jpeg", **options)(image[None], [""], [{}]).scores.double().item()

    assert jpeg_bytes(image, 95) == pytest.approx(case["bytes_q95"], rel=tolerance)
    assert jpeg_bytes(image, 75) == pytest.approx(case["bytes_q75"], rel=tolerance)
    fp32 = max(tolerance, 1e-6)
    assert scored(mode="incompress") == pytest.approx(case["incompressibility_kB"], rel=fp32)
    assert scored(mode="compress") == pytest.approx(-case["incompressibility_kB"], rel=fp32)
    flow_grpo = scored(mode="compress", scale="flow_grpo")
    assert flow_grpo == pytest.approx(case["flow_grpo_compressibility"], rel=fp32)


@pytest.mark.parametrize("case", load("rewards", "stats")["paired"])
def test_paired_statistics(case: dict[str, Any]) -> None:
    covered(
        case, "a", "b", "mean_diff", "se_diff", "win", "tie", "loss", "win_rate_half_ties", "t_ci95", "bca95",
        "percentile95", "sign_test_p", "wilson95",
    )  # fmt: skip
    for method in ("percentile", "BCa"):
        found = statistics.paired(case["a"], case["b"], method=method)  # type: ignore[arg-type]
        assert found.mean == pytest.approx(case["mean_diff"], abs=1e-9)
        assert found.standard_error == pytest.approx(case["se_diff"], abs=1e-9)
        assert (found.wins, found.ties, found.losses) == (case["win"], case["tie"], case["loss"])
        assert found.win_rate == pytest.approx(case["win_rate_half_ties"], abs=1e-9)
        assert found.sign_test_p == pytest.approx(case["sign_test_p"], abs=1e-9)
        low, high = case[{"percentile": "percentile95", "BCa": "bca95"}[method]]
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    assert found.t_interval == pytest.approx(case["t_ci95"], abs=1e-9)
    assert statistics.wilson(case["win"], case["win"] + case["loss"]) == pytest.approx(case["wilson95"], abs=1e-9)
