"""Where golden vectors are read from: `$DIFFALIGN_GOLDEN/<area>`, by default the copies beside this file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.samplers import step
from diffalign.schedules import RectifiedFlow
from diffalign.types import Step

ROOT = Path(os.environ.get("DIFFALIGN_GOLDEN", Path(__file__).parent / "golden"))


FLOW = RectifiedFlow()
TIGHT = 1e-9
GRID = 2e-6  # the official grids are fp32
# The official functions round log sqrt(2 pi) to fp32; adding this to our exact log-probs leaves 1e-9 to compare at.
ROUNDING = 0.5 * math.log(2 * math.pi) - float(torch.tensor(0.5 * math.log(2 * math.pi), dtype=torch.float32))


def load(area: str, name: str) -> Any:
    return json.loads((ROOT / area / f"{name}.json").read_text())


def cases(area: str, name: str) -> list[dict[str, Any]]:
    found = load(area, name)["cases"]
    assert found, f"{area}/{name}.json has no cases"
    return found


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Any, expected: Any, atol: float = TIGHT, rtol: float = 0.0) -> None:
    actual = torch.as_tensor(actual, dtype=torch.float64).detach()
    torch.testing.assert_close(actual, f64(expected), atol=atol, rtol=rtol)


def score(v: Tensor, x: Tensor, s: Any, s_next: Any, kind: str, eta: float, next: Tensor | None) -> Step:
    return step(FLOW, *FLOW.to_x0_eps(v, x, s), x, s, s_next, kind, eta, next)


def std_of(taken: Step) -> Tensor:
    return taken.std.flatten()
