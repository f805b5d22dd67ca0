"""Options that several verbs share, and what they mean."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

RULE_FIELDS = ("block", "after", "before", "place", "type", "exclude", "pick", "per", "call", "init", "name")


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print machine-readable output")


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL and how to build it."""
    parser.add_argument("model", metavar="MODEL", help="torchvision/resnet50, timm/convnext_tiny, …")
    parser.add_argument(
        "--weights",
        default="none",
        metavar="W",
        help="none (random; the default), default, a tag as IMAGENET1K_V2, or a local .pth/.safetensors file",
    )
    parser.add_argument(
        "--num-classes", type=int, metavar="N", help="size of the head, if not the model's default"
    )
    parser.add_argument(
        "--input-size",
        type=_size,
        metavar="C,H,W",
        help="probe the model with an input of this size, as 3,224,224 (default: the model's own)",
    )


def add_rule(parser: argparse.ArgumentParser) -> None:
    """RECIPE, or one rule in options."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a shipped recipe's name or a YAML file")
    rule = parser.add_argument_group("one rule in place of RECIPE")
    rule.add_argument("--block", help="a block's name (attninject list blocks)")
    where = rule.add_mutually_exclusive_group()
    where.add_argument(
        "--after", metavar="PATTERN", help="after the call of the modules or operations matched"
    )
    where.add_argument("--before", metavar="PATTERN", help="before that call")
    where.add_argument("--place", help="a named place (attninject list places)")
    rule.add_argument("--type", metavar="CLASS", help="only modules of this class")
    rule.add_argument("--exclude", metavar="PATTERN", help="but not these")
    rule.add_argument(
        "--pick", type=scalar, metavar="P", help="first, last, all, [0, -1], {every: 2, offset: 1}"
    )
    rule.add_argument("--per", choices=("owner", "stage", "model"), help="pick per owner, stage or model")
    rule.add_argument("--call", type=scalar, metavar="N", help="which call: a number from 1, last, all")
    rule.add_argument("--name", help="name of the new module")
    rule.add_argument("--init", choices=("identity", "paper", "blend"), help="how the block starts")
    both = parser.add_argument_group("for a recipe and for one rule")
    both.add_argument("--root", metavar="PATH", help="inject under this submodule only")
    both.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        type=setting,
        metavar="KEY=VALUE",
        help="an argument of the block, as reduction=8; may be repeated; overrides every rule's",
    )


def word(choices: Iterable[str], what: str) -> Callable[[str], str]:
    """An argparse type: one of `choices`, or a usage error with the nearest."""
    known = tuple(choices)

    def parse(text: str) -> str:
        if text in known:
            return text
        raise argparse.ArgumentTypeError(
            f"unknown {what} {text!r}{nearest(text, known)}; one of {', '.join(known)}"
        )

    return parse


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'plan'?`, or nothing where nothing is near."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def scalar(text: str) -> Any:
    """A value as a recipe reads it: `8`, `0.5`, `true`, `null`, `max`, `[1, 2]`."""
    from attninject.errors import RecipeError
    from attninject.recipe.loading import parse_value

    try:
        return parse_value(text)
    except RecipeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no value ({error.faults[0].message})") from None


def build_model(args: argparse.Namespace) -> nn.Module:
    """MODEL with its weights, in eval mode."""
    from attninject import models

    more = {} if args.num_classes is None else {"num_classes": args.num_classes}
    return models.build(args.model, args.weights, **more).eval()


def rule_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `plan` that the options stand for; contradictions are usage errors (exit code 2)."""
    fields = {field: getattr(args, field) for field in RULE_FIELDS if getattr(args, field) is not None}
    if args.recipe is not None:
        if fields:
            given = ", ".join(f"--{field}" for field in fields)
            args.parser.error(f"RECIPE {args.recipe!r} and {given} together: give one of the two")
        fields["recipe"] = args.recipe
    elif args.block is None:
        args.parser.error(
            "give a RECIPE (attninject list recipes), or --block with --after, --before or --place"
        )
    elif not any(getattr(args, field) for field in ("after", "before", "place")):
        args.parser.error(f"--block {args.block} needs --after, --before or --place")
    if args.settings:
        fields["args"] = dict(args.settings)
    if args.root is not None:
        fields["root"] = args.root
    if args.input_size is not None:
        fields["example_inputs"] = example_inputs(args.input_size)
    return fields


def example_inputs(size: tuple[int, ...]) -> torch.Tensor:
    """Two random images of that size, the same in every run."""
    import torch

    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


def print_json(value: Any) -> None:
    """Indented JSON with the characters as they are."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def say(text: object) -> None:
    """A line at once, before what a progress bar writes to standard error."""
    print(text, flush=True)


def silent(_: object) -> None:
    """Say nothing."""


def _size(text: str) -> tuple[int, ...]:
    try:
        size = tuple(int(part) for part in text.split(","))
    except ValueError:
        size = ()
    if len(size) < 2 or min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no input size; write it as 3,224,224")
    return size


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")


def setting(text: str) -> tuple[str, Any]:
    """An argparse type: KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is no KEY=VALUE, such as reduction=8")
    return key, scalar(value)
