"""Show what can be targeted in a model: path, call, shape, layout and type of every site."""

from __future__ import annotations

import argparse

from .common import add_model, add_output, build_model, example_inputs, print_json
from .usage import Parser


def add_arguments(parser: Parser) -> None:
    """MODEL and PATTERN."""
    parser.add_argument("model", metavar="MODEL", help="torchvision/resnet50, timm/convnext_tiny, …")
    parser.add_argument(
        "pattern", metavar="PATTERN", nargs="?", default="**", help="only paths that match, as 'layer1.*'"
    )
    add_model(parser)
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    from attninject.planning import sites

    given = None if args.input_size is None else example_inputs(args.input_size)
    rows = sites.sites(build_model(args), args.pattern, example_inputs=given)
    if args.json:
        print_json([row.to_dict() for row in rows])
    else:
        print(rows)
