"""Show what a recipe would do to a model: every site, its shape, mechanism and cost. Changes nothing."""

from __future__ import annotations

import argparse

from .common import add_json, add_model, add_rule, build_model, print_json, rule_arguments

HELP = "show what a recipe would do to a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and RECIPE."""
    add_model(parser)
    add_rule(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    rule = rule_arguments(args)
    from attninject import api

    plan = api.plan(build_model(args), **rule)
    if args.json:
        print_json(plan.to_dict())
    else:
        print(plan)
