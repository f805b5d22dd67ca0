"""The page of the blocks: its table of options is generated, its example is a block.

`python tests/blocks/test_block_catalogue.py` writes the table anew. (The table of blocks: test_readme.py.)
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from block_cases import NAMES, noise

import attninject as ai
from attninject import blocks
from attninject.blocks import registry
from attninject.blocks.options import Anything, Check, Maybe, OneOf
from attninject.errors import BlockError

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "attninject" / "blocks" / "README.md"
(EXAMPLE,) = re.findall(r"(?s)```python\n(.*?)```", PAGE.read_text(encoding="utf-8"))


def option_table() -> str:
    """A row for each built-in block: its options with their defaults and, where they are few, choices."""
    rows = ["| block | options |", "|---|---|"]
    for name in NAMES:
        cls = registry.get(name).cls
        defaults = {p.name: p.default for p in inspect.signature(cls).parameters.values()}
        options = [f"`{o}={defaults[o]!r}`{choices(check)}" for o, check in cls.options.items()]
        rows.append(f"| `{name}` | {', '.join(options)} |")
    return "\n".join(rows)


def choices(check: Check) -> str:
    """` (avg, max or both)`; nothing for a range."""
    if not isinstance(check, OneOf):
        return ""
    *others, last = map(str, check.values)
    return f" ({', '.join(others)} or {last})"


def parted(page: str) -> tuple[str, str, str]:
    """What stands before, between and behind the markers of the table."""
    before, rest = page.split("<!-- options -->\n")
    table, behind = rest.split("<!-- end options -->")
    return f"{before}<!-- options -->\n", table.strip(), f"\n<!-- end options -->{behind}"


def test_options_of_the_page_are_those_of_the_blocks():
    """The page shows every option with its default."""
    assert parted(PAGE.read_text(encoding="utf-8"))[1] == option_table()


def test_one_class_in_one_file_is_a_block(tmp_path, monkeypatch):
    """The page's example, put into a file of the folder and nowhere else, is found under its name."""
    (tmp_path / "block_of_the_readme.py").write_text(EXAMPLE, encoding="utf-8")
    monkeypatch.setattr(blocks, "__path__", [*blocks.__path__, str(tmp_path)])
    found = {cls.facts.name: cls for cls in registry._own_classes()}
    monkeypatch.delitem(sys.modules, "attninject.blocks.block_of_the_readme")
    monkeypatch.delattr(blocks, "block_of_the_readme")
    assert set(found) == {*NAMES, "deviation"}
    monkeypatch.setitem(registry._BUILT_IN, "deviation", registry.BlockSpec.of(found["deviation"]))
    assert registry.get("deviation").dims == (1, 2, 3)
    block, x = ai.create_block("deviation", 16, gate="tanh", reduction=0.5), noise(2, 16, 5, 4)
    assert torch.equal(block(x), x)
    assert set(block.attention(x)) == {"gate"}
    assert "16, reduction=0.5, gate='tanh'" in repr(block)
    with pytest.raises(BlockError, match="block 'deviation': divisor: expected a whole number >= 1, found 0"):
        ai.create_block("deviation", 16, divisor=0)


@pytest.mark.parametrize("name", NAMES)
def test_no_option_accepts_just_anything(name):
    """Every option of a built-in block declares its range."""
    checks = [c.check if isinstance(c, Maybe) else c for c in registry.get(name).cls.options.values()]
    assert Anything() not in checks


if __name__ == "__main__":
    before, _, behind = parted(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(before + option_table() + behind, encoding="utf-8")
