"""`python -m attninject.evidence.study run|report`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import report
from .running import OutOfTime, Study
from .store import HERE, Store


def main() -> None:
    """Train what is missing, or write the report of what there is."""
    parser = argparse.ArgumentParser(prog="attninject.evidence.study", description="The study of rank_sites.")
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--minutes", type=float, default=80, help="after which no training begins any more")
    parser.add_argument("--vit", type=Path, help="the small ViT's weights, which source_net writes")
    parser.add_argument("--results", type=Path, default=HERE, help="the folder of the CSV files")
    args = parser.parse_args()
    store = Store(args.results)
    if args.what == "report":
        if not any(args.results.glob("*.csv")):
            parser.error(f"there are no results in {args.results}; a checkout has them, a wheel does not")
        report.FILE.write_text(report.written(store))
        print(report.FILE)
        return
    torch.set_num_threads(1)  # the last bits of sums depend on it
    try:
        Study(store, args.minutes, args.vit).go()
    except OutOfTime:
        print(f"{args.minutes:g} minutes are over; the same command goes on")


if __name__ == "__main__":
    main()
