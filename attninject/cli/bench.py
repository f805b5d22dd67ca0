"""Measure attninject's own cost on this machine, as ratios taken side by side in one process."""

from __future__ import annotations

import argparse

from attninject.cli.common import add_json, print_json, word

HELP = "measure injection against its peers, in one process, as ratios"
WHAT = ("inject",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure and how often."""
    parser.add_argument(
        "what", type=word(WHAT, "benchmark"), metavar="WHAT", help=f"one of: {', '.join(WHAT)}"
    )
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds per figure (default 9)")
    parser.add_argument(
        "--sites", type=_numbers, default=[100, 1000, 10000], metavar="N,…", help="sizes of the deep chain"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Print Markdown tables, or JSON."""
    from attninject.experiments import bench

    result = bench.inject(rounds=args.rounds, chain=args.sites)
    if args.json:
        print_json(result)
    else:
        print(bench.to_markdown(result))


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, such as 100,1000") from None
