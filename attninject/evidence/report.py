"""The report on sweeps and runs: report.html, report.md and report.csv in one folder, and the sentence."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attninject.errors import RunError
from attninject.files import replacing

from .report_classes import CLASS_HEADER, class_rows
from .report_data import collect
from .report_figures import Figures, figures
from .report_html import page
from .report_tables import RUN_HEADER, Table, apart, run_rows, tables


@dataclass(frozen=True)
class Report:
    """What some folders show; a study for each budget."""

    studies: tuple[Figures, ...]

    @property
    def sentence(self) -> str:
        """Gain, loss, or nothing that these seeds can show; a line for each study."""
        return "\n".join(of.sentence for of in self.studies)

    def html(self) -> str:
        """One self-contained page."""
        return page(self.studies)

    def markdown(self) -> str:
        """The same without charts."""
        reason = apart([of.study for of in self.studies])
        parts = ["# Does attention help?", *([reason] if reason else [])]
        for number, of in enumerate(self.studies, 1):
            parts += [f"## Study {number}"] if reason else []
            parts += [
                f"**{of.sentence}**",
                *_items(f"{len(of.study.left_out())} runs are left out", of.study.left_out()),
            ]
            parts += [_markdown(table) for table in tables(of)]
            parts += _items("Notes", of.study.notes)
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """A row per run, every number in full."""
        return _csv(RUN_HEADER, run_rows([of.study for of in self.studies]))

    def classes_csv(self) -> str:
        """A row per run and class; only the header where no run says."""
        return _csv(CLASS_HEADER, class_rows([of.study for of in self.studies]))

    def write(self, folder: Path) -> list[Path]:
        """The three files, and report_classes.csv where runs say what became of each class."""
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"report.html": self.html(), "report.md": self.markdown(), "report.csv": self.csv()}
        if class_rows([of.study for of in self.studies]):
            texts["report_classes.csv"] = self.classes_csv()
        for name, text in texts.items():
            with replacing(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return [folder / name for name in texts]


def report(folders: Iterable[str | Path]) -> Report:
    """What the sweeps and runs in some folders show.

    Runs of different budgets, data or models are shown apart, with the reason.

    Raises:
        RunError: a folder holds none, or two sweeps have different arms of one name.
        MissingPackageError: scipy is not installed.
    """
    studies = collect(folders)
    if not studies:
        raise RunError("there is nothing to report: give the folder of a sweep, or of runs")
    return Report(tuple(figures(study) for study in studies))


def _csv(header: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _items(title: str, lines: Sequence[str]) -> list[str]:
    return [f"### {title}", "\n".join(f"- {line}" for line in lines)] if lines else []


def _markdown(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "---|" * len(table.header)
    note = [table.note, ""] if table.note else []
    return "\n".join([f"### {table.title}", "", *note, row(table.header), rule, *map(row, table.rows)])
