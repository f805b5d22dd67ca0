"""One rule in flags: a flag for each field of `recipe.fields.FIELDS`, so that a new field is a flag at once."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from attninject.recipe.fields import FIELDS, WHERE
from attninject.recipe.rules import Rule, written

from .common import example_inputs, scalar, setting
from .usage import Parser, with_default

_DEST = "rule."  # in front of a field's name in the namespace: `name` and `out` are words of verbs too


def add_recipe(parser: Parser) -> None:
    """RECIPE, or one rule in flags."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a shipped recipe's name or a YAML file")
    rule = parser.add_argument_group("one rule in place of RECIPE")
    add_fields(rule)
    both = parser.add_argument_group("for a recipe and for one rule")
    add_settings(both, "an argument of the block, as reduction=8; may be repeated; overrides every rule's")
    both.add_argument("--root", metavar="PATH", help="inject under this submodule only")


def add_fields(group: argparse._ArgumentGroup) -> None:
    """Every field of a rule but `args`, for which `--set` stands."""
    where = group.add_mutually_exclusive_group()
    for name in FIELDS:
        if name != "args":
            _add_field(where if name in WHERE else group, name)


def add_settings(group: argparse._ArgumentGroup, text: str) -> None:
    """`--set KEY=VALUE`, as often as there are arguments."""
    group.add_argument(
        "--set", dest="settings", action="append", default=[], type=setting, metavar="KEY=VALUE", help=text
    )


def flag(name: str) -> str:
    """A field's flag: `--min-channels` of `min_channels`."""
    return "--set" if name == "args" else f"--{written(name).replace('_', '-')}"


def rule_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given as flags, named and formed as keyword arguments; `args` is not among them."""
    given = {key.removeprefix(_DEST): value for key, value in vars(args).items() if key.startswith(_DEST)}
    return {key: value[0] if _is_one_text(key, value) else value for key, value in given.items()}


def refuse_incomplete(args: argparse.Namespace, rule: dict[str, Any], instead: str) -> None:
    """A usage error unless the fields say what goes where; `instead` is what else may be given."""
    if "block" not in rule:
        args.parser.error(f"give {instead}, or --block with --after, --before, --place or --replace")
    if not any(name in rule for name in WHERE):
        args.parser.error(f"--block {rule['block']} needs --after, --before, --place or --replace")


def plan_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `plan` that the flags stand for; contradictions are usage errors (exit code 2)."""
    found = rule_fields(args)
    if args.recipe is None:
        refuse_incomplete(args, found, "a RECIPE (attninject list recipes)")
    elif found:
        given = ", ".join(map(flag, found))
        args.parser.error(f"RECIPE {args.recipe!r} and {given} together: give one of the two")
    else:
        found["recipe"] = args.recipe
    if args.settings:
        found["args"] = dict(args.settings)
    if args.root is not None:
        found["root"] = args.root
    if args.input_size is not None:
        found["example_inputs"] = example_inputs(args.input_size)
    return found


def _add_field(group: Any, name: str) -> None:
    """The flag of one field, read as its row says."""
    field = FIELDS[name]
    default = next((spec.default for spec in fields(Rule) if spec.name == name), None)
    shared: dict[str, Any] = {
        "dest": _DEST + name,
        "default": argparse.SUPPRESS,
        "help": with_default(field.text.replace("%", "%%"), default if isinstance(default, str) else None),
    }
    how: dict[str, dict[str, Any]] = {
        "switch": {"action": "store_true"},
        "text": {"metavar": field.metavar},
        "texts": {"metavar": field.metavar, "action": "append"},
        "yaml": {"metavar": field.metavar, "type": scalar},
    }
    group.add_argument(flag(name), **shared, **how[field.flag])


def _is_one_text(name: str, value: Any) -> bool:
    return FIELDS[name].flag == "texts" and len(value) == 1
