"""Names of the log's columns that hold the rates of parameter groups: neither spaces nor commas nor signs in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RATE = "lr."
"""In front of a group's name: `lr.blocks`, `lr.blocks.no_decay`, `lr.backbone.x0.5`."""

_OLD = "lr "


def rate_column(group: str) -> str:
    """The column of a group's rate.

    >>> rate_column("backbone ×0.5, no decay")
    'lr.backbone.x0.5.no_decay'
    """
    return RATE + group.replace(" ×", ".x").replace(", no decay", ".no_decay")


def scalar_name(column: str) -> str:
    """What TensorBoard calls a column; rates stand together there: `lr/blocks_no_decay`."""
    if not column.startswith(RATE):
        return column
    return "lr/" + column.removeprefix(RATE).replace(".no_decay", "_no_decay")


def renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a log with the columns of today: runs begun earlier had `lr blocks, no decay` and the like."""
    return {rate_column(key.removeprefix(_OLD)) if key.startswith(_OLD) else key: v for key, v in row.items()}
