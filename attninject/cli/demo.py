"""Inject CBAM into a small pretrained resnet, show that nothing changed, and fine-tune it: offline."""

from __future__ import annotations

import argparse

from .common import add_output, positive, print_json, say, seed, silent
from .usage import Parser


def add_arguments(parser: Parser) -> None:
    """How long and from which seed."""
    run = parser.add_argument_group("the run")
    run.add_argument("--epochs", type=positive, default=4, metavar="N", help="epochs of fine-tuning")
    run.add_argument("--pretrained", action="store_true",
        help="with EfficientNet-Lite0's ImageNet weights, out of a package, on digits on photographs")  # fmt: skip
    run.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of weights and order")
    add_output(parser, plugin=False)


def run(args: argparse.Namespace) -> None:
    """Run it; with --json only the figures go to standard output."""
    from attninject.bench import demo

    tell = silent if args.json else say
    result = demo.run(epochs=args.epochs, seed=args.seed, say=tell, pretrained=args.pretrained)
    if args.json:
        print_json(result)
