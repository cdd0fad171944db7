"""What several commands share."""

from __future__ import annotations

import argparse
import os


def configuration(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs=nargs, help="YAML file, or a preset's name (see list)")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="such as trainer.lr=3e-4 or rewards.0.weight=2"
    )


def quiet() -> None:
    """Loading bars and notices of the libraries below would bury what this program says."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
