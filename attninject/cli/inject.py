"""Inject a recipe into a model and write a file that `ai.load(base_model, FILE)` reads."""

from __future__ import annotations

import argparse

from .common import add_model, add_output, build_model, path, print_json, refuse_unwritable, seed
from .rule_flags import add_recipe, plan_arguments
from .usage import Parser


def add_arguments(parser: Parser) -> None:
    """MODEL, RECIPE and the file."""
    parser.add_argument("model", metavar="MODEL", help="torchvision/resnet50, timm/convnext_tiny, …")
    file = parser.add_argument_group("the file")
    file.add_argument("-o", "--out", type=path, required=True, metavar="FILE", help="the file to write")
    file.add_argument("--verify", action="store_true", help="run the model before and after, and compare")
    add_recipe(parser)
    model = add_model(parser)
    model.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of random weights")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Build, plan, inject, save."""
    given = plan_arguments(args)
    refuse_unwritable(args.out)
    import torch

    from attninject import api, delta

    torch.manual_seed(args.seed)
    model = build_model(args)
    plan = api.plan(model, **given)
    api.inject(model, plan, verify=args.verify)
    delta.save(model, args.out, base=args.model)
    size = args.out.stat().st_size
    if args.json:
        print_json({"model": args.model, "file": str(args.out), "bytes": size, "plan": plan.to_dict()})
        return
    print(plan)
    print(f"\nwrote {args.out} ({size / 2**20:.1f} MiB); read it with")
    print(f'  model = ai.load(base_model, "{args.out}")')
