"""Inject CBAM into a small pretrained resnet, show that nothing changed, and fine-tune it: offline."""

from __future__ import annotations

import argparse

from attninject.cli.common import add_json, print_json

HELP = "inject attention into a small pretrained net and fine-tune it, offline, in a minute or two"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long and from which seed."""
    parser.add_argument(
        "--epochs", type=_positive, default=4, metavar="N", help="fine-tuning epochs (default 4)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed (default 0)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run it; with --json only the figures go to standard output."""
    from attninject.experiments import demo

    result = demo.run(epochs=args.epochs, seed=args.seed, say=_silent if args.json else _say)
    if args.json:
        print_json(result)


def _say(text: object) -> None:
    print(text, flush=True)  # before the progress bar, which goes to standard error


def _silent(_: object) -> None:
    """Say nothing."""


def _positive(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of epochs, such as 4")
