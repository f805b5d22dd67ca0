"""Fine-tune a model with or without attention blocks: from an experiment file, from flags, or from both.

On several devices: accelerate launch -m attninject finetune FILE, or torchrun -m attninject finetune FILE; each
process holds the model (DDP), or a piece of it (--sharding fsdp2, or Accelerate's config).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import add_json, print_json, say, scalar, setting, silent

HELP = "fine-tune a model, with blocks or plain, and keep a small file"
RULE = ("block", "after", "before", "place")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, and every key of it as a flag."""
    from attninject.training.experiment import DATA, TOP, TRAIN

    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, help="an experiment file (YAML)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder `out`")
    add_json(parser)
    run = parser.add_argument_group("the run")
    for key, row in TOP.items():
        _flag(run, f"--{key}", f"top.{key}", row)
    rule = parser.add_argument_group("one rule in place of --recipe")
    for key in RULE:
        rule.add_argument(f"--{key}", metavar="X", help="as in `attninject plan`")
    rule.add_argument(
        "--set", dest="settings", action="append", default=[], type=setting, metavar="KEY=VALUE",
        help="an argument of the block; may be repeated",
    )  # fmt: skip
    data = parser.add_argument_group("data")
    for key, row in DATA.items():
        _flag(data, "--data" if key == "kind" else f"--data-{key.replace('_', '-')}", f"data.{key}", row)
    train = parser.add_argument_group("train")
    for key, row in TRAIN.items():
        _flag(train, f"--{key.replace('_', '-')}", f"train.{key}", row)


def _flag(group: Any, flag: str, dest: str, row: tuple[Any, str]) -> None:
    """A flag of one key: its value is read as in the file; what is true or false is --key or --no-key."""
    from attninject.recipe.checks import boolean

    check, text = row
    shared = {"dest": dest, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if check is boolean:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
    else:
        group.add_argument(flag, type=scalar, metavar="V", **shared)


def run(args: argparse.Namespace) -> None:
    """Train; with --json only the figures go to standard output."""
    overrides = _overrides(args)
    file = args.file
    if file is None and args.resume and "out" in overrides:
        from attninject.errors import RunError
        from attninject.training.runs import SETTINGS

        file = Path(str(overrides["out"])) / SETTINGS
        if not file.is_file():
            raise RunError(f"{overrides['out']} holds no run to go on with ({SETTINGS} is missing)")
    if file is None and "model" not in overrides:
        args.parser.error("give an experiment FILE, or --model and --out")
    from attninject.training.devices import leave_processes
    from attninject.training.engine import run_experiment
    from attninject.training.experiment import read_experiment

    experiment = read_experiment(file, overrides)
    result = run_experiment(experiment, resume=args.resume, say=silent if args.json else say)
    leave_processes()
    if not result.main:
        return
    if args.json:
        print_json({"experiment": experiment.to_dict(), "history": result.history, "best": result.best,
                    "warnings": result.warnings})  # fmt: skip
        return
    say(f"best: epoch {result.best['epoch']}, top-1 {result.best['top1']:.2%}; see {experiment.out}")


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dest, value in vars(args).items():
        part, dot, key = dest.partition(".")
        if dot:
            place = found if part == "top" else found.setdefault(part, {})
            place[key] = value
    rule = {key: getattr(args, key) for key in RULE if getattr(args, key) is not None}
    if rule:
        if "recipe" in found:
            args.parser.error(f"--recipe and --{next(iter(rule))} together: give one of the two")
        if "block" not in rule or len(rule) == 1:
            args.parser.error("--block goes with one of --after, --before and --place")
        found["recipe"] = {**rule, **({"args": dict(args.settings)} if args.settings else {})}
    elif args.settings:
        args.parser.error("--set goes with --block; a recipe file has `args` of its own")
    return found
