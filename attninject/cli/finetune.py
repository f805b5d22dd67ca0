"""Fine-tune a model with or without attention blocks: from an experiment file, from flags, or from both.

On several devices: accelerate launch -m attninject finetune FILE, or torchrun -m attninject finetune FILE; each
process holds the model (DDP), or a piece of it (--sharding fsdp2, or Accelerate's config).

The flags are made from `training/finetune_settings.py`: a new setting is a row there.
"""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import add_output, path, print_json, say, scalar
from .rule_flags import add_fields, add_settings, flag, refuse_incomplete, rule_fields
from .usage import Parser, with_default

if TYPE_CHECKING:
    from attninject.training.experiment import Experiment

METAVARS = {
    "model": "MODEL",
    "weights": "WEIGHTS",
    "recipe": "RECIPE",
    "out": "FOLDER",
    "data.root": "FOLDER",
    "data.kind": "FOLDER|KIND",
    "data.name": "NAME",
    "train.freeze": "WHAT",
    "train.unfreeze": "STEPS",
    "train.class_weights": "balanced|FILE",
    "train.track": "NAMES",
    "data.labels": "FILE|FOLDER",
}
SHORT = {"--data-size": ("--size",)}
"""Flag → what hands write in its place."""
_BY_TYPE = {"int": "INT", "float": "FLOAT", "str": "WORD"}  # the first type of a setting's annotation
_DEST = "experiment."  # in front of a setting's key in the namespace


def add_arguments(parser: Parser) -> None:
    """FILE, and every key of it as a flag."""
    from attninject.training.experiment import DATA, TOP, TRAIN, Data, Experiment, Training

    parser.add_argument("file", metavar="FILE", nargs="?", type=path, help="an experiment file (YAML)")
    run = parser.add_argument_group("the run")
    for key, row in TOP.items():
        _add_setting(run, f"--{key}", key, row, Experiment)
    run.add_argument("--resume", action="store_true", help="go on with the run in the folder `out`")
    run.add_argument("--dry-run", action="store_true",
        help="train nothing: show the plan, what learns, and an estimate of time and memory")  # fmt: skip
    run.add_argument("--find-lr", action="store_true",
        help="train nothing: try learning rates on a copy of the model and suggest one")  # fmt: skip
    train = parser.add_argument_group("train")
    for key, row in TRAIN.items():
        _add_setting(train, f"--{key.replace('_', '-')}", f"train.{key}", row, Training)
    data = parser.add_argument_group("data")
    for key, row in DATA.items():
        name = "--data" if key == "kind" else f"--data-{key.replace('_', '-')}"
        _add_setting(data, name, f"data.{key}", row, Data)
    rule = parser.add_argument_group("one rule in place of --recipe")
    add_fields(rule)
    add_settings(rule, "an argument of the block, as reduction=8; may be repeated")
    add_output(parser)


def _add_setting(
    group: argparse._ArgumentGroup, name: str, key: str, row: tuple[Any, str], holder: type
) -> None:
    """A flag of one key: its value is read as in the file; what is true or false is --key or --no-key.

    `holder` is the dataclass that has the key's type and default.
    """
    field = next(field for field in fields(holder) if field.name == key.rpartition(".")[2])
    text = row[1]
    how: dict[str, Any]
    if field.type == "bool":
        how = {"action": argparse.BooleanOptionalAction}
    else:
        kind = str(field.type).partition(" ")[0]
        how = {"type": scalar, "metavar": METAVARS.get(key, _BY_TYPE.get(kind, "VALUE"))}
    shown = with_default(text.replace("%", "%%"), None if field.default is MISSING else field.default)
    group.add_argument(
        name, *SHORT.get(name, ()), dest=_DEST + key, default=argparse.SUPPRESS, help=shown, **how
    )


def run(args: argparse.Namespace) -> None:
    """Train, or try; with --json only the figures go to standard output."""
    if sum((args.resume, args.dry_run, args.find_lr)) > 1:
        args.parser.error("--resume, --dry-run and --find-lr: give one of them")
    overrides = _overrides(args)
    if args.dry_run:
        overrides.setdefault("out", "none")  # nothing is written
    file = args.file
    if file is None and args.resume and "out" in overrides:
        from attninject.errors import RunError
        from attninject.training.runs import SETTINGS

        file = Path(str(overrides["out"])) / SETTINGS
        if not file.is_file():
            raise RunError(f"{overrides['out']} holds no run to go on with ({SETTINGS} is missing)")
    if file is None and "model" not in overrides:
        args.parser.error("give an experiment FILE, or --model and --out")
    from attninject.errors import ExperimentError
    from attninject.training.experiment import read_experiment

    try:
        experiment = read_experiment(file, overrides)
    except ExperimentError as error:
        if all(
            fault.message.startswith("flags, ") for fault in error.faults
        ):  # a flag's value: a usage error
            args.parser.error("; ".join(map(str, error.faults)))
        raise
    if args.dry_run:
        from attninject.training.engine import dry_run_of

        _show(dry_run_of(experiment), args.json)
    elif args.find_lr:
        _find_lr(experiment, args.json)
    else:
        _train(experiment, args)


def _train(experiment: Experiment, args: argparse.Namespace) -> None:
    from attninject.training.callbacks import printed
    from attninject.training.devices import leave_processes
    from attninject.training.engine import run_experiment
    from attninject.training.monitors import monitor_of

    with printed(quiet=args.json):
        result = run_experiment(experiment, resume=args.resume)
    leave_processes()
    if not result.main:
        return
    if args.json:
        print_json({"experiment": experiment.to_dict(), "history": result.history, "best": result.best,
                    "warnings": result.warnings})  # fmt: skip
        return
    best = monitor_of(experiment.train.monitor, experiment.data.kind == "multilabel").words(result.best)
    say(f"best: epoch {result.best['epoch']}, {best}; see {experiment.out}")


def _find_lr(experiment: Experiment, as_json: bool) -> None:
    """The figures as CSV in the run's folder, a picture beside it where matplotlib is installed."""
    from attninject.training.engine import find_lr_of

    folder = Path(experiment.out)
    table, picture = folder / "find_lr.csv", folder / "find_lr.png"
    found = find_lr_of(experiment)
    folder.mkdir(parents=True, exist_ok=True)
    table.write_text(found.csv(), encoding="utf-8")
    written = [str(table)]
    try:
        found.draw(picture)
        written.append(str(picture))
    except ImportError:
        note = 'no picture: it needs matplotlib, pip install "attninject[pictures]"'
    else:
        note = ""
    _show(found, as_json)
    if not as_json:
        say("; ".join(filter(None, (f"wrote {', '.join(written)}", note))))


def _show(found: Any, as_json: bool) -> None:
    print_json(found.to_dict()) if as_json else say(found)


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags, in the form of an experiment file."""
    found: dict[str, Any] = {}
    for dest, value in vars(args).items():
        if dest.startswith(_DEST):
            part, _, key = dest.removeprefix(_DEST).rpartition(".")
            (found.setdefault(part, {}) if part else found)[key] = value
    rule = rule_fields(args)
    if rule:
        if "recipe" in found:
            args.parser.error(f"--recipe and {flag(next(iter(rule)))} together: give one of the two")
        refuse_incomplete(args, rule, "--recipe")
        found["recipe"] = {**rule, **({"args": dict(args.settings)} if args.settings else {})}
    elif args.settings:
        args.parser.error("--set goes with --block; a recipe file has `args` of its own")
    return found
