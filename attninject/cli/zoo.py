"""Inject into every architecture and check every guarantee: a row per model, a table by family.

A model whose row is in FOLDER is not examined again, so a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from .common import above_zero, add_output, path, positive, print_json, word
from .usage import Parser


def add_arguments(parser: Parser) -> None:
    """Which models, where, how thoroughly, and where the rows go."""
    parser.add_argument("names", metavar="NAME", nargs="*", help="models, or globs such as 'timm/resnet*'")
    _add_models(parser.add_argument_group("which models, in place of NAMEs"))
    _add_checks(parser.add_argument_group("what is injected and checked"))
    _add_rows(parser.add_argument_group("rows and tables"))
    _add_limits(parser.add_argument_group("limits"))
    add_output(parser)


def _add_models(group: argparse._ArgumentGroup) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--sample", action="store_true", help="one small model per file of timm and family of torchvision"
    )
    which.add_argument("--all", action="store_true", help="every model")
    which.add_argument(
        "--table", type=path, nargs="+", metavar="FOLDER", help="make no rows: print the table of FOLDER's"
    )


def _add_checks(group: argparse._ArgumentGroup) -> None:
    from attninject.anatomy.places import PLACES

    group.add_argument("--block", default="cbam", metavar="NAME", help="the block injected")
    group.add_argument(
        "--place",
        dest="places",
        action="append",
        type=word(PLACES, "place"),
        metavar="PLACE",
        help="may be repeated; default: every place",
    )
    group.add_argument(
        "--level",
        type=word(("plan", "cheap", "full"), "level"),
        default="full",
        metavar="LEVEL",
        help="plan: structure only; cheap: all but export and compile; full: everything",
    )
    group.add_argument(
        "--meta", action="store_true", help="without memory for tensors: what can be checked so"
    )


def _add_rows(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", type=path, metavar="FOLDER", help="where rows.jsonl goes, or goes on")
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave out models whose rows FOLDER has (the default), or examine them again",
    )
    group.add_argument("--retry", action="store_true", help="examine again what was not green")
    form = group.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the table as Markdown (the default)")
    form.add_argument("--csv", action="store_true", help="print a line per model and place")


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--jobs", type=positive, default=1, metavar="N", help="models at a time")
    group.add_argument("--timeout", type=above_zero, default=900, metavar="SECONDS", help="per model")
    group.add_argument(
        "--limit-memory",
        type=above_zero,
        metavar="GIB",
        help="per model; one that needs more is examined without values; default: 60 %% of the machine's",
    )


def run(args: argparse.Namespace) -> None:
    """Make rows, then print the table."""
    from attninject.zoo import row_file, tables

    if args.table is not None:
        if args.names:
            args.parser.error("--table makes no rows: leave the names out")
        rows = tables.strongest(row for folder in args.table for row in row_file.read(folder))
        if not rows:
            args.parser.error(f"there are no rows in {args.table[0] / row_file.ROWS}")
    else:
        rows = _sweep(args)
    _print(args, rows)


def _sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    from attninject.zoo import coverage, row_file, sweeping, tables

    names = _names(args)
    _check_block(args)
    asked = coverage.Asked(tuple(args.places or coverage.DEFAULT_PLACES), args.block, args.level, args.meta)
    limits = sweeping.Limits(args.timeout, _bytes(args))
    todo = names
    if args.out is not None and args.resume:
        todo = sweeping.to_do(names, asked, args.out, args.retry)
    made = sweeping.sweep(todo, asked, folder=args.out, jobs=args.jobs, limits=limits)
    fresh = list(_shown(made))
    if args.out is None:
        return fresh
    wanted = set(names)
    return tables.strongest(r for r in row_file.read(args.out) if r["model"] in wanted)


def _check_block(args: argparse.Namespace) -> None:
    """A block that nobody knows is a usage error here: no model could show anything else."""
    from attninject.blocks import registry
    from attninject.errors import UnknownBlockError

    try:
        registry.get(args.block)
    except UnknownBlockError as error:
        args.parser.error(str(error))


def _names(args: argparse.Namespace) -> list[str]:
    from attninject import models
    from attninject.errors import UnknownModelError
    from attninject.zoo import subjects

    if args.names and (args.sample or args.all):
        args.parser.error("--sample and --all name the models: leave the NAMEs out")
    if args.sample:
        return subjects.sample()
    if args.all:
        return models.names()
    if not args.names:
        args.parser.error("give NAMEs, --sample, --all or --table FOLDER")
    found: dict[str, None] = {}
    for pattern in args.names:
        matching = models.names(pattern)
        if not matching:
            if "*" not in pattern:
                models.build(pattern)  # says which names are near
            raise UnknownModelError(f"no model matches {pattern!r}; `attninject list models` shows all")
        found.update(dict.fromkeys(matching))
    return list(found)


def _bytes(args: argparse.Namespace) -> int:
    import os

    if args.limit_memory is not None:
        return int(float(args.limit_memory) * 2**30)
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 2**63
    return int(whole * 0.6 / max(1, args.jobs))


def _shown(made: Iterable[tuple[int, int, dict[str, Any]]]) -> Iterable[dict[str, Any]]:
    """The rows, with a bar where a person watches and a line per row where a file does."""
    import sys

    from attninject.zoo import tables

    bar = None
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm

            bar = tqdm(unit="model")
        except ImportError:
            bar = None
    try:
        for number, total, found in made:
            line = tables.one_line(found)
            if bar is None:
                print(f"[{number:>4}/{total}] {line}", file=sys.stderr, flush=True)
            else:
                bar.total = total
                bar.update(1)
                if found["status"] not in ("green", "refused"):
                    bar.write(line, file=sys.stderr)
            yield found
    finally:
        if bar is not None:
            bar.close()


def _print(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from attninject.zoo import tables

    if args.json:
        print_json({"summary": tables.summary(rows), "rows": rows})
    elif args.csv:
        print(tables.to_csv(rows), end="")
    else:
        print(tables.to_markdown(rows))
