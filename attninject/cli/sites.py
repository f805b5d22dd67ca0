"""Show what can be targeted in a model: path, call, shape, layout and type of every site."""

from __future__ import annotations

import argparse

from .common import add_json, add_model, build_model, example_inputs, print_json

HELP = "show what can be targeted in a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and PATTERN."""
    add_model(parser)
    parser.add_argument(
        "pattern", metavar="PATTERN", nargs="?", default="**", help="only paths that match, as 'layer1.*'"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    from attninject.planning import sites

    given = None if args.input_size is None else example_inputs(args.input_size)
    rows = sites.sites(build_model(args), args.pattern, example_inputs=given)
    if args.json:
        print_json([row.to_dict() for row in rows])
    else:
        print(rows)
