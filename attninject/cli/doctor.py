"""Say what is installed, which extras are complete, which devices there are, and what to do about what is missing."""

from __future__ import annotations

import argparse

from .common import add_output, print_json
from .usage import Parser


def add_arguments(parser: Parser) -> None:
    """Nothing but `--json`."""
    add_output(parser, plugin=False)


def run(args: argparse.Namespace) -> None:
    """Print the findings; exit code 1 where something is wrong."""
    from attninject.doctor import examine

    found = examine()
    if args.json:
        print_json(found.to_dict())
    else:
        print(found)
    if found.faults:
        raise SystemExit(1)
