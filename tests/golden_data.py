"""Where golden vectors are read from: `$DIFFALIGN_GOLDEN/<area>`, by default the copies beside this file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(os.environ.get("DIFFALIGN_GOLDEN", Path(__file__).parent / "golden"))


def load(area: str, name: str) -> Any:
    return json.loads((ROOT / area / f"{name}.json").read_text())


def cases(area: str, name: str) -> list[dict[str, Any]]:
    found = load(area, name)["cases"]
    assert found, f"{area}/{name}.json has no cases"
    return found
