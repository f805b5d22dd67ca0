"""Draw what the blocks of a model do to an image: gates, attention rows, maps before and after, as PNG and a page.

MODEL takes the recipe of --recipe or the flags; a RUN of `attninject finetune` has its blocks, and its start is drawn
beside them.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from attninject import hub

from .common import add_model, add_output, build_model, file_or_run, path, positive, print_json, seed
from .rule_flags import add_fields, add_settings, plan_arguments, rule_fields
from .usage import Parser

if TYPE_CHECKING:
    from torch import nn


def add_arguments(parser: Parser) -> None:
    """MODEL or RUN, images, and the folder."""
    parser.add_argument(
        "model",
        metavar="MODEL|RUN",
        type=file_or_run,
        help="torchvision/resnet50, …; or a run's folder or hf-hub:user/name",
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=path, help="image files of any size")
    pictures = parser.add_argument_group("the pictures")
    pictures.add_argument(
        "-o", "--out", type=path, required=True, metavar="FOLDER", help="the folder to write"
    )
    pictures.add_argument("--at", type=_position, metavar="X,Y",
        help="the pixel whose attention rows are drawn; default: the centre")  # fmt: skip
    pictures.add_argument("--size", type=positive, metavar="N",
        help="side of the images that the model is given; default: the run's, or the model's")  # fmt: skip
    pictures.add_argument("--cam", action=argparse.BooleanOptionalAction,
        help="Grad-CAM by the package grad-cam; default: where it is installed")  # fmt: skip
    rule = parser.add_argument_group("the blocks of MODEL")
    rule.add_argument("--recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    add_fields(rule)
    add_settings(rule, "an argument of the block, as reduction=8; may be repeated; overrides every rule's")
    rule.add_argument("--root", metavar="PATH", help="inject under this submodule only")
    model = add_model(parser)
    model.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of random weights")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Build or load, draw, say where."""
    model = _run_folder(args) if hub.names_folder(args.model) else _injected(args)
    from attninject.evidence.pictures import visualize

    files = visualize(model, args.images, args.out, at=args.at, size=args.size, cam=args.cam)
    if args.json:
        print_json({"model": args.model, "files": [str(file) for file in files]})
        return
    count = len(files) - 1
    print(f"wrote {files[0]} and {count} picture{'s' if count != 1 else ''} in {args.out}")


def _run_folder(args: argparse.Namespace) -> str:
    if args.recipe or args.settings or args.root or rule_fields(args):
        args.parser.error(f"{args.model} is a run, which has its blocks: leave the recipe and its flags out")
    return str(args.model)


def _injected(args: argparse.Namespace) -> nn.Module:
    if args.recipe is None and "/" not in args.model and not rule_fields(args):
        args.parser.error(
            f"{args.model} is no run's folder, and no model, such as torchvision/resnet50 with a recipe"
        )
    given = plan_arguments(args)
    import torch

    from attninject import api

    torch.manual_seed(args.seed)
    return api.inject(build_model(args), **given)


def _position(text: str) -> tuple[int, int]:
    parts = text.split(",")
    try:
        x, y = (int(part) for part in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no position; write it as 120,80") from None
    return x, y
