"""The fields of a rule as an editor, a type checker and `help` show them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

import attninject as ai
from attninject.recipe import fields as checks
from attninject.recipe.loading import rule_from_fields
from attninject.recipe.rules import Init, Per, Rule, RuleFields


def test_a_field_is_the_same_everywhere() -> None:
    """What the verbs take, what a rule holds and what a recipe is checked for are the same names in one order."""
    names = list(RuleFields.__annotations__)
    assert names == [field.name for field in fields(Rule)]
    assert names == list(checks.FIELDS)


def test_every_field_is_resolved_by_the_typing_module() -> None:
    """Tools that read annotations at run time get types, not names that nobody can resolve."""
    hints = get_type_hints(RuleFields)
    assert hints["init"] == Init | None
    assert hints["per"] == Per | None
    assert get_args(Init) == ("identity", "paper", "blend")


@pytest.mark.parametrize("verb", [ai.inject, ai.plan, rule_from_fields])
def test_help_explains_each_field_in_one_line(verb) -> None:
    """`help(ai.inject)` has a line per field, below `**rule`, and the rest of the text behind it."""
    text = inspect.getdoc(verb)
    below = text[text.index("**rule: ") :]
    begins = [f"        {name}: " for name in RuleFields.__annotations__]
    lines = [line for line in below.splitlines() if line.startswith(tuple(begins))]
    assert [line.strip().partition(":")[0] for line in lines] == list(RuleFields.__annotations__)
    assert all(len(line.partition(": ")[2]) > 10 for line in lines)
    assert "\n\nRaises:\n    " in below


def test_the_signature_names_the_fields() -> None:
    """The keywords of `inject` are those of a rule, none of them twice."""
    parameters = inspect.signature(ai.inject).parameters
    assert parameters["rule"].annotation == "Unpack[RuleFields]"
    assert not set(parameters) & set(RuleFields.__annotations__)


SCRIPT = """
import attninject as ai
from torch import nn

net = nn.Sequential()
ai.inject(net, block="se", after="layer[1-4].*.bn3", args={"reduction": 8}, per="owner", pick="last")
ai.inject(net, block=nn.Identity, place="stage_end", init="blend", stages=[2, -1], pick={"every": 2})
ai.inject(net, ai.plan(net, {"block": "se", "after": "x"}), verify=True)
ai.inject(net, ai.load_recipe({"rules": [{"block": "se", "after": "x"}]}), args={"reduction": 8})
ai.plan(net, dict(block="se", after="x"), root="backbone"); ai.plan(net, block=nn.Identity(), after="x")
ai.inject(net, block="se", aftr="x")
ai.plan(net, block="se", after="x", init="identiy")
ai.plan(net, block=3, after="x")
ai.inject(net, block="se", after="x", min_channels="64")
"""


@pytest.mark.slow
def test_a_type_checker_finds_a_misspelt_field(tmp_path) -> None:
    """In a user's script mypy accepts every right call and refuses each wrong one, at its line."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--strict", "--follow-imports=silent", "--no-pretty",
         f"--cache-dir={tmp_path}", str(script)],
        capture_output=True,
        text=True,
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    wrong = (("11", '"aftr"'), ("12", '"init"'), ("13", '"block"'), ("14", '"min_channels"'))
    assert len(errors) == len(wrong), done.stdout + done.stderr
    for line, (number, name) in zip(errors, wrong, strict=True):
        assert f"script.py:{number}:" in line
        assert name in line
