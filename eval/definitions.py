"""What the rewards of an evaluation are exactly: formula, checkpoint, settings, licence; the heads tell themselves."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from diffalign.listing import available
from diffalign.methods import lookup
from diffalign.rewards import Reward

PACKAGE = "diffalign.rewards"
LICENCES = {  # of published checkpoints, as their repositories state them
    "openai/": "MIT",
    "yuvalkirstain/PickScore_v1": "MIT (its repository; the model card states none)",
    "laion/": "MIT",
    "xswu/HPSv2": "Apache-2.0",
    "THUDM/ImageReward": "Apache-2.0",
    "facebook/dinov2": "Apache-2.0",
    "facebook/dinov3": "DINOv3 License, gated",
    "timm/": "Apache-2.0",
    "Qwen/Qwen3-VL": "Apache-2.0",
    "tiny-": "Apache-2.0, embedded in diffalign",
}


def definition(key: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keys: key, what (one line), text (formula and preprocessing), settings with defaults, licences by model.

    A reward of the user's own is told by its settings alone, for a report runs no code of others.
    """
    name = str(settings.get("name", key))
    found: dict[str, Any] = {"key": key, "what": name, "text": "", "settings": dict(settings), "licences": {}}
    if name not in available(PACKAGE):
        return {**found, "what": f"{name}, a reward of your own"}
    kind = lookup(PACKAGE, name, Reward)
    found["what"] = str(sys.modules[kind.__module__].__doc__ or name).strip().splitlines()[0]
    found["text"] = inspect.getdoc(kind) or ""
    try:
        every = kind.model_validate({**settings, "name": name}).model_dump(mode="json")
        found["settings"] = {k: v for k, v in every.items() if v is not None and k != "name" and v != {}}
    except (ValidationError, ValueError):  # of another version of diffalign; its settings stand as they were written
        pass
    models = [v for k, v in found["settings"].items() if isinstance(v, str) and (k == "model" or k.endswith("_model"))]
    found["licences"] = {model: licence(model) for model in models}
    return found


def licence(model: str) -> str:
    known = (text for start, text in LICENCES.items() if model.startswith(start))
    return next(known, "see its model card")
