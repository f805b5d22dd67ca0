"""List what can be named: blocks, recipes, places, models."""

from __future__ import annotations

import argparse

from .common import add_json, print_json, word

HELP = "list blocks, recipes, places or models"
KINDS = ("blocks", "recipes", "places", "models")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """KIND and, for models, a pattern."""
    parser.add_argument("kind", nargs="?", type=word(KINDS, "kind"), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument(
        "pattern", nargs="?", metavar="PATTERN", help="only names that match, as '*resnet50*'"
    )
    parser.add_argument("--markdown", action="store_true", help="blocks as the table of their page")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Print the names of one kind a line each (blocks as a table), or a short overview of all kinds."""
    kinds = [args.kind] if args.kind else list(KINDS)
    found = {kind: _names(kind, args.pattern) for kind in kinds}
    if args.json:
        print_json(found)
    elif args.kind == "blocks":
        print("\n".join((_markdown if args.markdown else _block_lines)(found["blocks"])))
    elif args.kind:
        print("\n".join(found[args.kind]))
    else:
        for kind in KINDS[:-1]:
            print(f"{kind}: {', '.join(found[kind])}")
        print(f"models: {len(found['models'])}; `attninject list models '*resnet50*'` shows some")


def _names(kind: str, pattern: str | None) -> list[str]:
    from fnmatch import fnmatchcase

    from attninject import api, models

    if kind == "models":
        return models.names(pattern)
    every = {"blocks": api.list_blocks, "recipes": api.list_recipes, "places": api.list_places}[kind]()
    return [name for name in every if pattern is None or fnmatchcase(name, pattern)]


def _block_rows(names: list[str]) -> list[tuple[str, ...]]:
    """The table of the named blocks: a row of headings, then one each."""
    from attninject.blocks.registry import block_table

    rows: list[tuple[str, ...]] = [("name", "family", "dims", "works on", "paper", "equation", "summary")]
    for spec in block_table():
        if spec.name in names:
            dims, what = ",".join(map(str, spec.dims)), "maps" if spec.spatial else "maps, tokens"
            paper, equation = spec.paper.removeprefix("arXiv:") or "-", spec.equation or "-"
            rows.append((spec.name, spec.family, dims, what, paper, equation, spec.summary or "-"))
    return rows


def _markdown(names: list[str]) -> list[str]:
    head, *rows = _block_rows(names)
    lines = ["| " + " | ".join((f"`{name}`", *rest)) + " |" for name, *rest in rows]
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines]


def _block_lines(names: list[str]) -> list[str]:
    rows = _block_rows(names)
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    cells = ([text.ljust(width) for text, width in zip(row, widths, strict=False)] for row in rows)
    return ["  ".join([*line, row[-1]]).rstrip() for line, row in zip(cells, rows, strict=True)]
