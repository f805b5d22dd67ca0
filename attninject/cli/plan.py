"""Show what a recipe would do to a model: every site, its shape, mechanism and cost. Changes nothing."""

from __future__ import annotations

import argparse

from .common import add_model, add_output, build_model, print_json
from .rule_flags import add_recipe, plan_arguments
from .usage import Parser


def add_arguments(parser: Parser) -> None:
    """MODEL and RECIPE."""
    parser.add_argument("model", metavar="MODEL", help="torchvision/resnet50, timm/convnext_tiny, …")
    add_recipe(parser)
    add_model(parser)
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    given = plan_arguments(args)
    from attninject import api

    plan = api.plan(build_model(args), **given)
    if args.json:
        print_json(plan.to_dict())
    else:
        print(plan)
