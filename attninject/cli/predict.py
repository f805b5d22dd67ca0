"""Say what a trained run takes image files for."""

from __future__ import annotations

import argparse

from .common import add_output, path, positive, print_json, refuse_unwritable, say, whole
from .usage import Parser


def add_arguments(parser: Parser) -> None:
    """RUN and IMAGE …"""
    parser.add_argument("source", metavar="RUN", help="the folder of a run of finetune, or hf-hub:user/name")
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=path, help="files, and folders of images")
    how = parser.add_argument_group("how")
    how.add_argument("--topk", type=positive, default=5, metavar="K", help="classes of each image")
    how.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images per forward")
    how.add_argument("--workers", type=whole, default=0, metavar="N", help="processes that read files")
    how.add_argument("--skip", action="store_true", help="leave unreadable files out, and count them")
    how.add_argument("--csv", type=path, metavar="FILE", help="write a row per image there")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Print a line per image; write the CSV."""
    if args.csv is not None:
        refuse_unwritable(args.csv)
    from attninject.training.predicting import predict

    words = {"topk": args.topk, "batch_size": args.batch_size, "workers": args.workers, "skip": args.skip}
    found = predict(args.source, args.images, **words)
    if args.csv is not None:
        args.csv.write_text(found.csv(), encoding="utf-8")
    if args.json:
        print_json(found.to_dict())
        return
    say(found)
    if args.csv is not None:
        say(f"wrote {args.csv}")
