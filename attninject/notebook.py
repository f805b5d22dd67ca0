"""Tables for notebooks, in HTML that takes font and colours from the page around it, light or dark.

Joined texts, each through `html.escape`: one element needs no jinja2, and rich's and tabulate's have styles of their own.
"""

from __future__ import annotations

import html
from collections.abc import Container, Iterable, Sequence

_BOX = "max-width:100%;overflow-x:auto"  # a wide table scrolls within itself, not with the page
_TABLE = "border-collapse:collapse;color:inherit;background:none;font:inherit;margin:0.4em 0"
_CELL = "padding:0.15em 0.8em 0.15em 0;white-space:nowrap;color:inherit;background:none;border:0"
_RULE = "border-bottom:1px solid currentColor"


def html_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Container[int] = (),
    above: Iterable[str] = (),
    below: Iterable[str] = (),
) -> str:
    """A table as one HTML element, everything escaped: a title and lines, the rows, more lines.

    Args:
        head: names of the columns.
        rows: a text per column each.
        right: indices of the columns that are numbers, flush right.
        above: lines in front, the first of them the title.
        below: lines behind.
    """
    first, *lines = [html.escape(line) for line in above] or [""]
    title = f"<strong>{first}</strong>" if first else ""
    body = "".join(_row("td", cells, right) for cells in rows)
    table = f'<table style="{_TABLE}"><thead>{_row("th", head, right)}</thead><tbody>{body}</tbody></table>'
    parts = [title, *lines, f'<div style="{_BOX}">{table}</div>', *map(html.escape, below)]
    return "<div>" + "".join(f"<div>{part}</div>" for part in parts if part) + "</div>"


def _row(tag: str, cells: Sequence[str], right: Container[int]) -> str:
    return "<tr>" + "".join(_cell(tag, text, i in right) for i, text in enumerate(cells)) + "</tr>"


def _cell(tag: str, text: str, is_number: bool) -> str:
    aligned = "text-align:right;font-variant-numeric:tabular-nums" if is_number else "text-align:left"
    style = ";".join((_CELL, aligned, _RULE) if tag == "th" else (_CELL, aligned))
    return f'<{tag} style="{style}">{html.escape(text)}</{tag}>'
