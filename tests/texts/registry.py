"""The table of cases, and the file of their texts.

A case is a function of an empty folder. What it returns is its text; where it raises, the error's class and
message are. Cases use public names and the command line alone, so that they outlive any change inside.
"""

from __future__ import annotations

import functools
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attninject as ai

Case = Callable[[Path], Any]

CASES: dict[str, Case] = {}
REFERENCE = Path(__file__).parents[1] / "reference" / "texts.txt"
MARK = "## "


def case(name: str) -> Callable[[Case], Case]:
    """Register a case under its name, as in `recipe: a tag`."""

    def register(function: Case) -> Case:
        assert name not in CASES, name
        CASES[name] = function
        return function

    return register


def cases(room: str, table: Iterable[tuple[str, Case]]) -> None:
    """Register the rows of a table, (name, case), under `room: name`."""
    for name, function in table:
        case(f"{room}: {name}")(function)


def before(mark: str, function: Case) -> Case:
    """A case whose text ends where another library's words begin."""

    def cut(folder: Path) -> str:
        try:
            return str(function(folder))
        except Exception as error:
            return f"{type(error).__name__}: {str(error).partition(mark)[0]}{mark}…"

    return cut


def text_of(name: str) -> str:
    """The text of one case, without what differs between machines and runs."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about quantization and TorchScript
        here = Path(folder).resolve()
        try:
            text = str(CASES[name](here))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
    return _anywhere(text, here)


def _anywhere(text: str, folder: Path) -> str:
    """Without the folder's name, addresses, our version, what another timm brings, and trailing blanks."""
    text = text.replace(str(folder), "FOLDER").replace(f"attninject {ai.__version__}", "attninject VERSION")
    text = re.sub(r"there are: [^;)]*", lambda found: re.sub(r"timm/\w+, ", "", found[0]), text)
    text = re.sub(r"0x[0-9a-f]{6,}", "0x…", text)
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


@functools.cache
def read(file: Path = REFERENCE) -> dict[str, str]:
    """A file of texts, case by case."""
    parts = re.split(rf"^{MARK}(.*)\n", file.read_text(encoding="utf-8"), flags=re.M)[1:]
    return {name: text.strip("\n") for name, text in zip(parts[::2], parts[1::2], strict=True)}


def write(file: Path = REFERENCE) -> None:
    """Write the text of every case."""
    parts = (f"{MARK}{name}\n{text_of(name)}\n" for name in sorted(CASES))
    file.write_text("\n".join(parts), encoding="utf-8")
