"""Inject CBAM into a small pretrained resnet, show that nothing changed, and fine-tune it: offline."""

from __future__ import annotations

import argparse

from .common import add_json, positive, print_json, say, silent

HELP = "inject attention into a small pretrained net and fine-tune it, offline, in a minute or two"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long and from which seed."""
    parser.add_argument(
        "--epochs", type=positive, default=4, metavar="N", help="fine-tuning epochs (default 4)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed (default 0)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run it; with --json only the figures go to standard output."""
    from attninject.bench import demo

    result = demo.run(epochs=args.epochs, seed=args.seed, say=silent if args.json else say)
    if args.json:
        print_json(result)
