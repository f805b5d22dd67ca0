"""Inject a recipe into a model and write a file that `ai.load(base_model, FILE)` reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import add_json, add_model, add_rule, build_model, print_json, rule_arguments

HELP = "inject a recipe into a model and write a file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, RECIPE and the file."""
    add_model(parser)
    add_rule(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--verify", action="store_true", help="run the model before and after, and compare")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random weights (default 0)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Build, plan, inject, save."""
    rule = rule_arguments(args)
    import torch

    from attninject import api, delta

    torch.manual_seed(args.seed)
    model = build_model(args)
    plan = api.plan(model, **rule)
    api.inject(model, plan, verify=args.verify)
    delta.save(model, args.output, base=args.model)
    size = args.output.stat().st_size
    if args.json:
        print_json({"model": args.model, "file": str(args.output), "bytes": size, "plan": plan.to_dict()})
        return
    print(plan)
    print(f"\nwrote {args.output} ({size / 2**20:.1f} MiB); read it with")
    print(f'  model = ai.load(base_model, "{args.output}")')
