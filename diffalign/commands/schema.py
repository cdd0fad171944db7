"""Print the JSON schema of configuration files, for editors."""

from __future__ import annotations

import argparse
import json

from diffalign import config_help


def arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> None:
    print(json.dumps(config_help.schema(), indent=2))
