"""Share the folder of a run: its best weights, settings and a card, on the Hugging Face hub or in a folder."""

from __future__ import annotations

import argparse

from .common import add_output, path, print_json, say
from .usage import Parser


def add_arguments(parser: Parser) -> None:
    """RUN and where it goes."""
    parser.add_argument("folder", metavar="RUN", type=path, help="the folder of a run of finetune")
    parser.add_argument("name", metavar="NAME", help="user/name on the hub, or local-dir:FOLDER")
    how = parser.add_argument_group("the repository")
    how.add_argument("--private", action="store_true", help="a new repository that only you see")
    how.add_argument("--revision", metavar="BRANCH", help="a branch; made if it is not there")
    how.add_argument("--license", metavar="ID", help="of the weights, as apache-2.0")
    how.add_argument(
        "--description", default="", metavar="TEXT", help="for the card: what it was trained for"
    )
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Make the card, send the files, print the address."""
    from attninject.sharing import push_run

    address = push_run(
        args.folder,
        args.name,
        description=args.description,
        license=args.license,
        private=args.private or None,
        revision=args.revision,
    )
    if args.json:
        print_json({"address": address})
        return
    say(f"{args.folder} is at {address}")
