"""diffalign: align text-to-image diffusion and flow models by training, distillation and steering on one core."""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# Run from a checkout that is not installed: rewards/, pipelines/, eval/ and configs/ lie beside this folder.
if not (Path(__file__).parent / "rewards").is_dir():
    __path__.append(str(Path(__file__).parent.parent))


def __getattr__(name: str) -> Any:
    """`diffalign.Steer`, without which nothing here imports torch."""
    if name == "Steer":
        from diffalign.steer import Steer

        return Steer
    raise AttributeError(f"module 'diffalign' has no attribute '{name}'")
