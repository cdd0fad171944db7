"""Golden numbers of whole sets and of rankings; the paired ones of stats.json are in test_golden_rewards.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden_data import load

from diffalign.eval import ranking, set_metrics

STATS, SETS = load("rewards", "stats"), load("rewards", "set_level")
RANKED, VENDI, FID = STATS["bradley_terry"], SETS["vendi"], SETS["fid"]
TOLERANCE = 1e-6


def test_nothing_is_left_unread() -> None:
    assert set(STATS) == {"about", "bradley_terry", "paired"}
    assert set(SETS) == {"about", "vendi", "fid"}
    assert RANKED and VENDI and FID and STATS["paired"]


@pytest.mark.parametrize("case", RANKED)
def test_bradley_terry(case: dict[str, Any]) -> None:
    assert set(case) == {"wins", "bt_logstrength"}
    found = ranking.bradley_terry(np.array(case["wins"]), pseudo=0.0)
    assert found == pytest.approx(case["bt_logstrength"], abs=1e-4)


@pytest.mark.parametrize("case", VENDI)
def test_vendi(case: dict[str, Any]) -> None:
    assert set(case) == {"X", "q", "score_X_normalized", "score_dual"}
    x = np.array(case["X"])
    for order, expected in case["q"].items():
        tolerance = 1e-4 if float(order) < 1 else TOLERANCE  # the official one sums roots of rounding errors
        assert set_metrics.vendi(x, float(order)) == pytest.approx(expected, abs=tolerance)
    assert set_metrics.vendi(x) == pytest.approx(case["score_X_normalized"], abs=TOLERANCE)
    # repeating every row keeps the spectrum and, with more rows than columns, goes by X^T X
    repeated = np.tile(x, (x.shape[1] // len(x) + 1, 1))
    assert len(repeated) > x.shape[1]
    assert set_metrics.vendi(repeated) == pytest.approx(case["score_dual"], abs=TOLERANCE)


@pytest.mark.parametrize("case", FID)
def test_fid(case: dict[str, Any]) -> None:
    assert set(case) == {"A", "B", "fid"}
    assert set_metrics.fid(np.array(case["A"]), np.array(case["B"])) == pytest.approx(case["fid"], abs=TOLERANCE)
