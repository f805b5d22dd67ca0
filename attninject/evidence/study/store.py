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
    """The files of one folder."""

    def __init__(self, folder: Path = HERE) -> None:
        self.folder = folder

    def read(self, name: str, test: bool = False) -> list[dict[str, str]]:
        """Rows as they stand in the file, whole lines alone; without the columns of test images unless `test`."""
        file = self.folder / f"{name}.csv"
        columns = COLUMNS[name]
        if not file.is_file():
            return []
        whole = file.read_text().rpartition("\n")[0]
        rows = [dict(zip(columns, row, strict=True)) for row in _records(whole) if len(row) == len(columns)]
        hidden = () if test else TEST
        return [{k: v for k, v in row.items() if k not in hidden} for row in rows]

    def add(self, name: str, rows: Iterable[Mapping[str, object]]) -> None:
        """Append rows; a line that was cut off goes first."""
        file = self.folder / f"{name}.csv"
        self.folder.mkdir(parents=True, exist_ok=True)
        text = _lines([COLUMNS[name]])
        if file.is_file():
            text = file.read_text()
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                file.write_text(whole)
            text = "" if whole else _lines([COLUMNS[name]])
        with file.open("a") as out:
            out.write(text + _lines([[_cell(row[c]) for c in COLUMNS[name]] for row in rows]))


def _records(text: str) -> list[list[str]]:
    """Rows under the header."""
    return list(csv.reader(io.StringIO(text)))[1:]


def _lines(rows: Sequence[Sequence[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _cell(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


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
