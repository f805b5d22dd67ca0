"""What one measurement on a card is, and the file that its figures go to, a line each, as soon as they are there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attninject.errors import DataError

FILE = "figures.jsonl"
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all tasks share.

    Attributes:
        device: `cuda`, or `cpu` in a rehearsal.
        rehearse: tiny sizes, so that every part runs without a card.
        memory: bytes that a task may take; larger maps and batches are halved until they fit.
        bf16: whether the card computes it.
        folder: for what tasks write beside their figures.
    """

    device: str
    rehearse: bool
    memory: int
    bf16: bool
    folder: Path

    @property
    def rounds(self) -> int:
        """Rounds per figure; in a rehearsal, where no figure counts, one."""
        return 1 if self.rehearse else 5

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Bfloat16 first, where there is any."""
        return ("bfloat16", "float32") if self.bf16 else ("float32",)


@dataclass(frozen=True)
class Task:
    """One figure or a few that come together.

    Attributes:
        part: which part it belongs to.
        name: unique within the part.
        rank: the lower, the earlier; ties in the order of the parts.
        seconds: how long it takes on an H100, by estimate; a task that no longer fits is left out.
        work: gives the figures; told how many seconds it may take.
    """

    part: str
    name: str
    rank: int
    seconds: float
    work: Callable[[float], Figures | Iterable[tuple[str, Figures]]]


class Sheet:
    """`figures.jsonl` in a folder: appended to, flushed to the disk line by line."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        cut = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        self._file = self.path.open("a", encoding="utf-8")
        if cut:  # a process was killed while it wrote
            self._file.write("\n")

    def __enter__(self) -> Sheet:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, part: str, name: str, figures: Figures) -> None:
        """One line; it is on the disk when this returns."""
        self._file.write(json.dumps({"part": part, "name": name, **figures}, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a sheet; a last line that was cut off is left out.

    Raises:
        DataError: there is no sheet in the folder.
    """
    path = folder / FILE
    if not path.is_file():
        raise DataError(f"{folder} has no {FILE}: `attninject bench gpu --out {folder}` makes it")
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the process was killed while it wrote
            continue
    return rows
