"""List methods, models, presets and prompt sets."""

from __future__ import annotations

import argparse

from diffalign import catalogue


def arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> None:
    for kind, entries in catalogue.everything().items():
        print(f"{kind}:")
        width = max(map(len, entries), default=0)
        for name, summary in entries.items():
            print(f"  {name:{width}}  {summary}".rstrip())
