"""Targets that are no text: classes, compiled regular expressions, functions; and patterns that are an ending."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Net, Unit
from torch import nn

import attninject as ai
from attninject import errors

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NORMS = ["units.0.norm", "units.1.norm"]


def is_norm(name: str, module: nn.Module) -> bool:
    """A function in a pattern's place."""
    return isinstance(module, nn.BatchNorm2d) and name.startswith("units.")


def planned(**rule: Any) -> ai.Plan:
    return ai.plan(Net(), block="se", args={"reduction": 4}, example_inputs=X, **rule)


@pytest.mark.parametrize(
    ("rule", "paths"),
    [
        ({"after": nn.BatchNorm2d}, NORMS),
        ({"after": [nn.BatchNorm2d, "stem"]}, ["stem", *NORMS]),
        ({"after": [nn.BatchNorm2d, Unit], "pick": "last"}, ["units.1"]),
        ({"before": nn.BatchNorm2d, "type": "Module"}, NORMS),
        ({"after": re.compile(r"units\.\d\.norm")}, NORMS),
        ({"after": re.compile(r"UNITS\.\d\.norm", re.IGNORECASE)}, NORMS),
        ({"after": re.compile(r"units\.(?!0).*\.norm")}, NORMS[1:]),
        ({"after": is_norm}, NORMS),
        ({"after": lambda name, module: name == "stem"}, ["stem"]),
        ({"after": "**", "type": nn.BatchNorm2d, "exclude": lambda n, m: "0" in n}, NORMS[1:]),
        ({"after": "**.norm", "exclude": [nn.Linear, lambda n, m: False]}, NORMS),
        ({"after": [is_norm, lambda n, m: False]}, NORMS),
    ],
)
def test_a_target_chooses_its_modules(rule: dict[str, Any], paths: list[str]) -> None:
    """Whatever stands for a pattern, the plan has the sites of what it chooses, in call order."""
    assert [site.path for site in planned(**rule).sites] == paths


@pytest.mark.parametrize("after", [nn.BatchNorm2d, [nn.BatchNorm2d], re.compile(r"units\..*norm")])
def test_what_a_file_can_say_is_written(after: Any) -> None:
    """Classes alone and plain regular expressions are YAML, and the same sites when read."""
    recipe = ai.load_recipe({"block": "se", "args": {"reduction": 4}, "after": after})
    read = ai.parse_recipe(recipe.to_yaml())
    assert read.rules == recipe.rules
    assert [s.path for s in ai.plan(Net(), read, example_inputs=X).sites] == NORMS


@pytest.mark.parametrize(
    ("after", "name"),
    [(is_norm, "function is_norm"), ([nn.Linear, "a"], "class Linear"), (re.compile("(?i)x"), "re.compile")],
)
def test_what_no_file_can_say_is_refused_with_the_way_out(after: Any, name: str) -> None:
    """`to_yaml` names the rule, the field and the target; the plan's recipe has names in its place."""
    recipe = ai.load_recipe({"block": "se", "after": after})
    with pytest.raises(errors.RecipeError, match=rf"rule 1: no file can hold the {name}.* of `after`.*plan"):
        recipe.to_yaml()


def test_a_plan_and_a_delta_have_names(tmp_path: Path) -> None:
    """The plan's recipe is plain text with the same sites, and a delta of a function's sites loads."""
    plan = planned(after=is_norm)
    assert ai.parse_recipe(plan.recipe.to_yaml()).rules[0].after == tuple(NORMS)
    assert plan.to_dict()["recipe"]["rules"][0]["after"] == NORMS
    model = Net().eval()
    twin = Net().eval()
    twin.load_state_dict(model.state_dict())
    ai.inject(model, block="se", args={"reduction": 4}, after=is_norm, example_inputs=X)
    ai.save(model, tmp_path / "run.safetensors")
    loaded = ai.load(twin, tmp_path / "run.safetensors", example_inputs=X)
    assert list(ai.injected(loaded)) == list(ai.injected(model))


def test_a_target_that_chooses_nothing_says_what_there_is() -> None:
    """The error names the target and classes of the model; an optional rule is a note, and the plan prints."""
    with pytest.raises(
        errors.NoMatchError, match="the function <lambda> chooses no module; there are BatchNorm2d"
    ):
        planned(after=lambda name, module: False)
    plan = planned(after=[lambda name, module: False], optional=True)
    assert "chooses no module" in str(plan)
    assert plan.to_dict()["recipe"]["rules"][0]["after"] == "function <lambda>"
    with pytest.raises(errors.PlanError, match="leave none of them"):
        planned(after=nn.Conv3d)


@pytest.mark.parametrize("field", ["after", "exclude"])
def test_what_is_no_target_is_a_fault(field: str) -> None:
    """A number or bytes choose nothing."""
    for value in (3, re.compile(b"x"), [None]):
        with pytest.raises(errors.RecipeError, match=f"{field}.* expected a pattern"):
            planned(**{"after": "stem", field: value})


def test_an_ending_is_named() -> None:
    """A pattern that matches no whole name but the end of some is given with the stars in front, in every verb."""
    hint = r"'\*\*\.norm' matches units.0.norm, units.1.norm"
    with pytest.raises(errors.NoMatchError, match=rf"no module matches 'norm'; {hint}"):
        planned(after="norm")
    with pytest.raises(errors.NoMatchError, match=hint):
        ai.sites(Net(), "norm", example_inputs=X)
    model = ai.inject(Net(), block="se", after="**.norm", args={"reduction": 4}, example_inputs=X)
    with pytest.raises(errors.NoMatchError, match=r"'\*\*\.se' matches units.0.se, units.1.se"):
        ai.eject(model, "se")
