"""The page of words from elsewhere: what it says is ours must be there."""

from __future__ import annotations

import inspect
import re
from functools import cache

import pages
import pytest

import attninject as ai
from attninject.cli import VERBS, parser_of
from attninject.recipe.fields import FIELDS
from attninject.recipe.loading import parse_value, rule_from_fields

PAGE = "attninject/integrations/WORDS.md"
ROWS = re.findall(r"^\| (?!in |---)(.+) \| (.+) \|$", pages.text_of(PAGE), re.M)
OURS = [code for _, ours in ROWS for code in re.findall(r"`([^`]+)`", ours)]


@cache
def flags() -> set[str]:
    """Every flag of every verb."""
    return {
        option for name in VERBS for action in parser_of(name)._actions for option in action.option_strings
    }


def check_call(code: str) -> None:
    """`ai.freeze(model, bn="eval")`: the name is public and takes these keywords."""
    name, keywords = re.findall(r"ai\.(\w+)", code)[0], re.findall(r"(\w+)=", code)
    parameters = inspect.signature(getattr(ai, name)).parameters
    assert name in ai.__all__
    assert set(keywords) <= {*parameters, *(FIELDS if "rule" in parameters else ())}


def check_field(code: str) -> None:
    """`stages: [2, 3]`: a field of a rule with a value that it takes."""
    key, _, value = code.partition(": ")
    fields = {"block": "se", key: parse_value(value)}
    if not {"after", "before", "place"} & set(fields):
        fields["after"] = "x"
    rule_from_fields(**fields)


@pytest.mark.parametrize("code", OURS)
def test_our_word_is_there(code: str) -> None:
    """Calls are public and take their keywords, fields are a rule's, flags and verbs the command line's."""
    if "ai." in code:
        check_call(code)
    elif code.startswith("--"):
        assert code.split()[0] in flags()
    elif code.startswith("attninject "):
        assert code.split()[1] in VERBS
    elif re.match(r"\w+: ", code):
        check_field(code)
    else:
        plain = {"bn2", "re.compile(...)", "after=nn.Linear", "se_resnet", "model"}
        assert code in {*plain, "trainer=", "trainer_for(yolo)"}


def test_the_page_has_all_four() -> None:
    """Each library has a table, and each row two cells."""
    heads = re.findall(r"^\| in (\w+) \| here \|$", pages.text_of(PAGE), re.M)
    assert heads == ["PEFT", "timm", "mmdetection", "Ultralytics"]
    assert len(ROWS) == sum(line.startswith("| ") for line in pages.text_of(PAGE).splitlines()) - 4
