"""Say what sweeps and runs show: gain, loss, or nothing that their seeds can show, and how many would be needed.

Writes report.html (one file, nothing fetched), report.md, report.csv (a row per run) and report_classes.csv (a row per
run and class). Runs of different budgets are shown apart.
"""

from __future__ import annotations

import argparse

from .common import add_output, path, print_json, say
from .usage import Parser


def add_arguments(parser: Parser) -> None:
    """FOLDER …, and where the report goes."""
    parser.add_argument(
        "folders", metavar="FOLDER", nargs="+", type=path, help="of a sweep, or of runs of finetune"
    )
    where = parser.add_argument_group("the report")
    where.add_argument(
        "-o", "--out", type=path, metavar="FOLDER", help="where it goes; default: the first FOLDER"
    )
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Write the files; print the sentence and the tables."""
    from attninject.evidence.report import report
    from attninject.evidence.report_tables import run_rows

    found = report(args.folders)
    files = found.write(args.out or args.folders[0])
    if args.json:
        studies = [of.study for of in found.studies]
        print_json({"sentence": found.sentence, "files": list(map(str, files)), "runs": run_rows(studies)})
        return
    say(found.sentence)
    say(f"wrote {', '.join(map(str, files))}")
