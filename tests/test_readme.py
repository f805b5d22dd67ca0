"""What the README shows is what the commands print."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GENERATED = re.findall(
    r"<!-- (\w+): (attninject (?:list|plan) .*?) -->\n(.*?)\n<!-- end \1 -->", README, re.S
)


def test_readme_has_its_generated_parts() -> None:
    """The plan of the one-liner and the table of blocks are there."""
    assert [name for name, _, _ in GENERATED] == ["plan", "blocks"]


@pytest.mark.parametrize(("command", "shown"), [g[1:] for g in GENERATED], ids=[g[0] for g in GENERATED])
def test_readme_shows_what_the_command_prints(command: str, shown: str) -> None:
    """The part between the markers is the command's own output, to the letter."""
    arguments = [
        sys.executable,
        "-m",
        *shlex.split(command),
    ]  # a fresh process: no block but the built-in ones
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.strip()
    assert shown.removeprefix("```\n").removesuffix("\n```").strip() == printed


def test_recipe_fields_in_the_readme_are_those_of_a_rule() -> None:
    """Every field of a rule is in the recipe reference, and no other."""
    from dataclasses import fields

    from attninject.recipe.rules import Rule

    table = README.split("| field | meaning | default |")[1].split("\n\n")[0]
    named = set(
        re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    )
    assert named == {f.name for f in fields(Rule)}


def test_places_in_the_readme_are_those_of_the_library() -> None:
    """Every place is explained, and no other."""
    import attninject as ai

    table = README.split("| place | where |")[1].split("\n\n")[0]
    named = set(
        re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    )
    assert named == set(ai.list_places())
