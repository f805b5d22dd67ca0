"""Rank the sites of a recipe by how much a block there would help on your images, before any training."""

from __future__ import annotations

import argparse

from attninject.errors import AttnInjectError

from .common import add_model, add_output, build_model, path, positive, print_json, refuse_unwritable, whole
from .rule_flags import add_recipe, plan_arguments
from .usage import Parser


def add_arguments(parser: Parser) -> None:
    """MODEL, RECIPE and `--data`."""
    parser.add_argument("model", metavar="MODEL", help="torchvision/resnet50, timm/convnext_tiny, …")
    data = parser.add_argument_group("the images")
    data.add_argument("--data", required=True, metavar="FOLDER|NAME",
        help="a folder with a folder per class; or digits, digits_on_photos, letters, stamps, corruptions, "
        "rotations, numerals, typefaces, counts, channels")  # fmt: skip
    data.add_argument("--size", type=positive, metavar="N", help="height and width; default: the model's own")
    data.add_argument("--images", type=positive, default=512, metavar="N", help="how many are looked at")
    data.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images per batch")
    short = parser.add_argument_group("the short list")
    short.add_argument("--top", type=positive, metavar="K", help="how many sites the recipe of -o names (5)")
    short.add_argument("-o", "--out", type=path, metavar="FILE", help="write the best sites as a recipe here")
    how = parser.add_argument_group("how")
    how.add_argument("--method", default="auto", metavar="WORD",
        help="score, or a method to compare it with, as gradient_norm, depth, random")  # fmt: skip
    how.add_argument("--head", default="auto", metavar="WORD", help="keep, fit, or auto")
    how.add_argument("--seed", type=whole, default=0, metavar="N", help="of everything drawn")
    add_recipe(parser)
    add_model(parser)
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Print the ranking; with `-o`, write the recipe of the best."""
    given = plan_arguments(args)
    if args.top is not None and args.out is None:
        args.parser.error("--top goes with -o FILE, where the recipe is written")
    if args.out is not None:
        refuse_unwritable(args.out)
    from attninject.evidence.rank import rank_sites
    from attninject.evidence.sources import open_source

    model = build_model(args)
    data = open_source(model, args.data, args.size, args.seed)
    words = {"images": args.images, "method": args.method, "head": args.head, "batch_size": args.batch_size}
    try:
        ranking = rank_sites(model, data=data, seed=args.seed, **words, **given)
    except ValueError as error:
        if isinstance(error, AttnInjectError):
            raise
        args.parser.error(str(error))
    if args.out is not None:
        best = ranking.top(args.top or min(5, len(ranking.sites)))
        args.out.write_text(best.to_yaml(), encoding="utf-8")
    if args.json:
        print_json(ranking.to_dict())
    else:
        print(ranking)
