"""Flags that several verbs share, and what they mean."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attninject.errors import ProbeError, RecipeError

from .usage import Parser, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import nn


def add_output(parser: Parser, plugin: bool = True) -> None:
    """The last groups: `--plugin`, unless the verb has no use for it, `--json` and `--help`."""
    if plugin:
        own = parser.add_argument_group("blocks of your own")
        own.add_argument("--plugin", dest="plugins", action="append", default=[], type=path, metavar="FILE",
            help="a Python file that registers them; may be repeated")  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print machine-readable output")
    parser.add_help_to(group)


def add_model(parser: Parser) -> argparse._ArgumentGroup:
    """How MODEL is built; returns the group."""
    group = parser.add_argument_group("the model")
    group.add_argument("--weights", default="none", metavar="WEIGHTS",
        help="none (random), default, package (those of an installed package), a tag, or a local file")  # fmt: skip
    group.add_argument(
        "--num-classes", type=whole, metavar="N", help="size of the head, if not the model's default"
    )
    group.add_argument("--input-size", type=_size, metavar="C,H,W",
        help="probe the model with an input of this size, as 3,224,224; default: the model's own")  # fmt: skip
    return group


def word(choices: Iterable[str], what: str) -> Callable[[str], str]:
    """An argparse type: one of `choices`, or a usage error with the nearest."""
    known = tuple(choices)

    def parse(text: str) -> str:
        if text in known:
            return text
        raise argparse.ArgumentTypeError(
            f"unknown {what} {text!r}{did_you_mean(text, known)}; one of {', '.join(known)}"
        )

    return parse


def scalar(text: str) -> Any:
    """A value as a recipe reads it: `8`, `0.5`, `true`, `null`, `max`, `[1, 2]`."""
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


def example_inputs(size: tuple[int, ...]) -> torch.Tensor:
    """Two random images of that size, the same in every run."""
    import torch

    try:
        return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    except (RuntimeError, TypeError) as error:
        shown, reason = ",".join(map(str, size)), str(error).partition("\n")[0]
        raise ProbeError(f"no inputs of size {shown} can be made here: {reason}") from None


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


def path(text: str) -> Path:
    """An argparse type: what can be a file's name."""
    if text and "\0" not in text:
        return Path(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no file name")


def file_or_run(text: str) -> str:
    """An argparse type: a file, a folder or a repository, as it was written."""
    path(text)
    return text


def refuse_unwritable(file: Path) -> None:
    """Before the work is done: a folder in the file's place, or no folder around it, is an OSError."""
    if file.is_dir():
        raise IsADirectoryError(f"{file} cannot be written: it is a folder")
    if not file.parent.is_dir():
        raise NotADirectoryError(f"{file} cannot be written: there is no folder {file.parent}")


def whole(text: str) -> int:
    """An argparse type: a whole number from 0."""
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")


def above_zero(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isfinite(number) and number > 0:
        return number
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")


def seed(text: str) -> int:
    """An argparse type: a whole number that torch takes as a seed."""
    try:
        number = int(text)
    except ValueError:
        number = 1 << 63
    if abs(number) < 1 << 63:
        return number
    raise argparse.ArgumentTypeError(f"{text!r} is no seed, a whole number below 2**63")


def setting(text: str) -> tuple[str, Any]:
    """An argparse type: KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is no KEY=VALUE, such as reduction=8")
    return key, scalar(value)
