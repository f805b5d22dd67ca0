"""List what can be named: blocks, recipes, places, models."""

from __future__ import annotations

import argparse

from .common import add_output, print_json, word
from .usage import Parser

KINDS = ("blocks", "recipes", "places", "models")


def add_arguments(parser: Parser) -> None:
    """KIND and, for models, a pattern."""
    parser.add_argument(
        "kind",
        nargs="?",
        type=word(KINDS, "kind"),
        metavar="KIND",
        help=f"{', '.join(KINDS)}; default: an overview of all",
    )
    parser.add_argument(
        "pattern", nargs="?", metavar="PATTERN", help="only names that match, as '*resnet50*'"
    )
    form = parser.add_argument_group("form")
    form.add_argument("--markdown", action="store_true", help="blocks as the table of their page")
    add_output(parser)


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

    if kind == "models":
        from attninject import models

        return models.names(pattern)
    every = {"blocks": _blocks, "recipes": _recipes, "places": _places}[kind]()
    return [name for name in every if pattern is None or fnmatchcase(name, pattern)]


def _blocks() -> list[str]:
    from attninject.blocks import registry

    return registry.list_blocks()


def _recipes() -> list[str]:
    from attninject.recipe.loading import recipe_names

    return recipe_names()


def _places() -> list[str]:
    from attninject.anatomy.places import PLACES

    return sorted(PLACES)


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
