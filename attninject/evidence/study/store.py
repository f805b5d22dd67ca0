"""Results as CSV files that only grow: a row per training, per scored site, per permutation.

A row is written whole, in one call, when what it says is known. A line that was cut off is not read, and cut away
before the next is added.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent / "results"

GROUP = ("task", "net", "block", "regime")
NUMBERED = ("group", *GROUP)
"""Columns of `groups.csv`."""
SCORES = (
    "score", "gradient_norm", "squared_gradients", "natural_gradient", "gradient_rank", "halves", "drop",
)  # fmt: skip
"""Methods that look at images, before any training; `drop` is the ranking's column."""

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "runs": (
        *GROUP, "seed", "sites", "lr", "val_loss", "val_acc", "moved", "seconds", "test_loss", "test_acc",
    ),
    "scores": (*GROUP, "seed", "site", *SCORES, "order", "p", "seconds"),
    "trained": (*GROUP, "seed", "site", "warmup", "ablation", "seconds"),
    "kept": (*GROUP, "seed", "site", *SCORES, "order", "p", "seconds"),
    "rungs": (*GROUP, "seed", "site", "epochs", "rung", "seconds"),
    "curvature": (*GROUP, "seed", "site", "curvature", "seconds"),
    "sites": ("net", "block", "site", "path", "parameters", "macs", "numbers", "usual"),
    "null": (*GROUP, "seed", "ps"),
    "before": (*GROUP, "seed", "site", "score", "order"),
    "null_before": (*GROUP, "seed", "ps"),
}  # fmt: skip
"""File → its columns. The last two are what the score test said before its correction, and are written no more.
Columns of test images are at the end of theirs, and are read where `test=True` is said alone."""

TEST = ("test_loss", "test_acc")


class Store:
    """The files of one folder. A row's group stands in it as a number, and what the number means in `groups.csv`."""

    def __init__(self, folder: Path = HERE) -> None:
        self.folder = folder

    def read(self, name: str, test: bool = False) -> list[dict[str, str]]:
        """Rows as they stand in the file, whole lines alone; without the columns of test images unless `test`."""
        columns, groups = _stored(name), self._groups()
        rows = [
            dict(zip(columns, row, strict=True))
            for row in self._rows(name, columns)
            if len(row) == len(columns)
        ]
        hidden = () if test else TEST
        shown = [{k: v for k, v in row.items() if k not in hidden} for row in rows]
        return [{**groups[row.pop("group")], **row} if "group" in row else row for row in shown]

    def add(self, name: str, rows: Iterable[Mapping[str, object]]) -> None:
        """Append rows; a line that was cut off goes first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        columns = _stored(name)
        found = []
        for row in rows:
            own = {**row, "group": self._number(row)} if "group" in columns else row
            found.append([_cell(c, own[c]) for c in columns])
        self._append(name, columns, found)

    def _groups(self) -> dict[str, dict[str, str]]:
        """Number → task, net, block, regime."""
        return {
            number: dict(zip(GROUP, rest, strict=True)) for number, *rest in self._rows("groups", NUMBERED)
        }

    def _number(self, row: Mapping[str, object]) -> str:
        """The number of a row's group; a new one is written down."""
        own = {c: str(row[c]) for c in GROUP}
        known = self._groups()
        for number, group in known.items():
            if group == own:
                return number
        self._append("groups", NUMBERED, [[str(len(known)), *own.values()]])
        return str(len(known))

    def _rows(self, name: str, columns: Sequence[str]) -> list[list[str]]:
        """Rows under the header, which has to be the columns: rows of another form would pass for none."""
        file = self.folder / f"{name}.csv"
        text = file.read_text().rpartition("\n")[0] if file.is_file() else ""
        header, *rows = _records(text) or [list(columns)]
        if header != list(columns):
            raise ValueError(
                f"{file} has columns {header}, where {list(columns)} are due; name another folder"
            )
        return rows

    def _append(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        file = self.folder / f"{name}.csv"
        text = _lines([columns])
        if file.is_file():
            text = file.read_text()
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                file.write_text(whole)
            text = "" if whole else _lines([columns])
        with file.open("a") as out:
            out.write(text + _lines(rows))


def _stored(name: str) -> tuple[str, ...]:
    """The columns that stand in a file."""
    columns = COLUMNS[name]
    return ("group", *columns[len(GROUP) :]) if columns[: len(GROUP)] == GROUP else columns


def _records(text: str) -> list[list[str]]:
    """The header and the rows under it."""
    return list(csv.reader(io.StringIO(text)))


def _lines(rows: Sequence[Sequence[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


DIGITS: Mapping[str, int] = {"seconds": 2, "moved": 3, "val_loss": 5, "test_loss": 5, "rung": 5}
"""Column → significant digits, else 4."""


def _cell(column: str, value: object) -> str:
    return f"{value:.{DIGITS.get(column, 4)}g}" if isinstance(value, float) else str(value)


def sites_text(sites: Sequence[int], every: int) -> str:
    """A set of sites in one cell: `none`, `all`, or numbers with points between.

    >>> sites_text((), 3), sites_text((0, 2), 3), sites_text((0, 1, 2), 3)
    ('none', '0.2', 'all')
    """
    if len(sites) == every:
        return "all"
    return ".".join(map(str, sites)) or "none"


def sites_of(text: str, every: int) -> tuple[int, ...]:
    """The set that a cell means.

    >>> sites_of("0.2", 3), sites_of("all", 2), sites_of("none", 2)
    ((0, 2), (0, 1), ())
    """
    if text in ("none", "all"):
        return tuple(range(every)) if text == "all" else ()
    return tuple(map(int, text.split(".")))
