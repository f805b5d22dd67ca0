"""The parser of a command: help with placeholders and defaults, and usage errors of one line that name the nearest."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from attninject.wording import nearest

_NUMBER = re.compile(r"-\d+|-\d*\.\d+")  # what argparse takes for a value, not for a flag


class Parser(argparse.ArgumentParser):
    """Flags are written in full, and what is not understood is said in one line; exit code 2.

    Flags stand in groups, the most used first; `add_help` makes the last group, with `--help` in it.
    """

    def __init__(self, prog: str, description: str | None, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=_Formatter,
            allow_abbrev=False,
            add_help=False,
        )

    def add_help_to(self, group: argparse._ArgumentGroup) -> None:
        """`-h` and `--help`."""
        group.add_argument("-h", "--help", action="help", help="show this and leave")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments; flags may stand between positionals. Exits with 2 where one is not understood."""
        self.usage = self._usage_line()  # now: argparse hides the positionals while it reads the flags
        self._refuse_unknown_flags(argv)
        args, extra = self.parse_known_intermixed_args(argv)
        if extra:
            self.error(f"unexpected argument {extra[0]!r}")
        return args

    def error(self, message: str) -> NoReturn:
        """One line on standard error, exit code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")

    def _usage_line(self) -> str:
        """What must be given, and the positionals that may be; sixty flags would hide them."""
        must = [
            f"{a.option_strings[0]} {a.metavar}" for a in self._actions if a.option_strings and a.required
        ]
        positionals = [_in_usage(action) for action in self._actions if not action.option_strings]
        return " ".join([self.prog, *positionals, *must, "[flags]"]).replace("%", "%%")

    def _refuse_unknown_flags(self, argv: Sequence[str]) -> None:
        """Before argparse looks, which would first ask for what else is missing."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in argv:
            if word == "--":
                return
            if word in known or not word.startswith("-") or word == "-" or " " in word:
                continue
            name = word.partition("=")[0]
            attached = not word.startswith("--") and word[:2] in known  # -oFILE
            if name not in known and not attached and not _NUMBER.fullmatch(word):
                self.error(f"unknown flag {name}{did_you_mean(name, known)}")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Each flag's default stands after its help, in parentheses."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _get_help_string(self, action: argparse.Action) -> str:
        return with_default(action.help or "", action.default if action.option_strings else None)


def with_default(text: str, default: Any) -> str:
    """A line of help and its default, where that says something: `epochs (10)`."""
    if default is None or default is argparse.SUPPRESS or isinstance(default, bool) or default in ([], ()):
        return text
    shown = ",".join(map(_short, default if isinstance(default, list | tuple) else [default]))
    return f"{text} ({shown.replace('%', '%%')})"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean --stages?`, or nothing where nothing is near; dashes in front do not count."""
    bare = {choice.lstrip("-"): choice for choice in choices}
    close = nearest(word.lstrip("-"), bare, 1)
    return f"; did you mean {bare[close[0]]}?" if close else ""


def _in_usage(action: argparse.Action) -> str:
    """How a positional stands in the usage line."""
    name = str(action.metavar)
    return {"?": f"[{name}]", "*": f"[{name} …]"}.get(str(action.nargs), name)
