"""The rows of a zoo's sweep on disk: a line of JSON in FOLDER/rows.jsonl per model, written as the model finishes.

So a sweep that is killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

ROWS = "rows.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder, as they were written; a line cut short, or of something else, is no row."""
    path = folder / ROWS
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and {"model", "family", "status"} <= found.keys():
                rows.append(found)
    return rows


def append(folder: Path, found: dict[str, Any]) -> None:
    """Write one row; a line that an earlier sweep left unfinished is closed first."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(found, ensure_ascii=False) + "\n"
    with (folder / ROWS).open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())
