"""Measure a run's model again: accuracy, per class, calibration; with its blocks and with them switched off.

On the run's own validation images, or on a folder with a folder of images per class.
"""

from __future__ import annotations

import argparse

from .common import add_output, path, positive, print_json, refuse_unwritable, say, word
from .usage import Parser


def add_arguments(parser: Parser) -> None:
    """RUN, the images, and what is measured."""
    parser.add_argument("run_folder", metavar="RUN", type=path, help="the folder of a run of finetune")
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--data",
        type=path,
        metavar="FOLDER",
        help="other images: a folder per class, or such under its val split",
    )
    what.add_argument(
        "--file", type=word(("best", "last"), "file"), default="best", metavar="FILE",
        help="the best epoch's model, by the run's monitor (the default), or the last",
    )  # fmt: skip
    what.add_argument(
        "--without-blocks",
        action="store_true",
        help="once more with the blocks switched off, and the difference",
    )
    what.add_argument(
        "--batch-size", type=positive, metavar="N", help="images per forward; default: the run's"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--csv", type=path, metavar="FILE", help="write a row per class")
    files.add_argument(
        "--confusion", type=path, metavar="FILE", help="write which class is taken for which, as CSV"
    )
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Measure, write, print."""
    for file in (args.csv, args.confusion):
        if file is not None:
            refuse_unwritable(file)
    from attninject.training.evaluation import evaluate_run

    found = evaluate_run(
        args.run_folder, args.data, file=args.file, without_blocks=args.without_blocks,
        confusion=args.confusion is not None, batch_size=args.batch_size,
    )  # fmt: skip
    if args.csv is not None:
        args.csv.write_text(found.csv(), encoding="utf-8")
    if args.confusion is not None:
        args.confusion.write_text(found.confusion_csv(), encoding="utf-8")
    if args.json:
        print_json(found.to_dict())
        return
    say(found)
    written = [str(file) for file in (args.csv, args.confusion) if file is not None]
    if written:
        say(f"wrote {', '.join(written)}")
