"""Recipes: what is read, what is refused and how the report reads, and that hostile text is harmless."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import re
import time
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import FIELDS, recipe_like, values, yaml_like
from torch import nn

import attninject as ai
from attninject.anatomy import places
from attninject.errors import RecipeError
from attninject.recipe.frozen import FrozenDict
from attninject.recipe.loading import load_recipe, parse_recipe, parse_value, recipe_names, rule_from_fields
from attninject.recipe.rules import Every, Recipe, Rule

SHIPPED = ["attention_unet", "bam", "bam_mobilenet", "bam_resnet", "cbam", "cbam_mobilenet", "cbam_resnet"]
SHIPPED += ["nonlocal_resnet_1", "nonlocal_resnet_10", "nonlocal_resnet_5"]
SHIPPED += ["se", "se_identity", "se_mobilenet", "se_post", "se_pre", "se_resnet", "se_vgg"]

FULL = """\
name: full
source: arXiv:1709.01507
rules:
  - block: se
    after: ["layer[1-4].*.bn*", "re:stem\\\\..*"]
    type: BatchNorm2d
    exclude: "layer4.**"
    pick: {every: 2, offset: 1}
    per: owner
    call: last
    stages: [2, -1]
    min_channels: 64
    args: {reduction: 8, bias: no}
    init: paper
    name: attn
    layout: NHWC
    output: 0
    optional: true
  - {block: se, before: "layer*.*::add", input: 1, pick: [0, -1], type: [Conv2d, Linear], call: 2}
  - {block: se, place: stage_end, pick: last, stages: 3, output: out}
"""


def report(text, file="r.yaml"):
    """The fault lines of a text that must not load."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, file)
    return str(caught.value).split("\n")


def rule_report(fields):
    """The fault lines of one rule written as a YAML flow mapping; its brace stands at 2:5."""
    return report(f"rules:\n  - {{{fields}}}\n")


# --- what is read ------------------------------------------------------------------------------


def test_every_field_is_read():
    """A file with every field gives these frozen rules."""
    recipe = parse_recipe(FULL)
    assert (recipe.name, recipe.source) == ("full", "arXiv:1709.01507")
    assert recipe.rules == (
        Rule(
            block="se",
            after=("layer[1-4].*.bn*", "re:stem\\..*"),
            type=("BatchNorm2d",),
            exclude=("layer4.**",),
            pick=Every(2, 1),
            per="owner",
            call="last",
            stages=(2, -1),
            min_channels=64,
            args=FrozenDict(reduction_and_bias := {"reduction": 8, "bias": False}),
            init="paper",
            name="attn",
            layout="NHWC",
            output=0,
            optional=True,
        ),
        Rule(block="se", before=("layer*.*::add",), input=1, pick=(0, -1), type=("Conv2d", "Linear"), call=2),
        Rule(block="se", place="stage_end", pick="last", stages=(3,), output="out"),
    )
    assert dict(recipe.rules[0].args) == reduction_and_bias


def test_recipes_are_frozen_values():
    """Recipes hash, compare, pickle and copy, and cannot be changed."""
    recipe = parse_recipe(FULL)
    assert {recipe: 1}[parse_recipe(FULL)] == 1
    assert pickle.loads(pickle.dumps(recipe)) == recipe == copy.deepcopy(recipe)
    with pytest.raises(FrozenInstanceError):
        recipe.rules[0].block = "cbam"
    with pytest.raises(TypeError):
        recipe.rules[0].args["reduction"] = 4


def test_to_dict_goes_there_and_back():
    """`to_dict` is JSON-ready, leaves out what is default, and loads to the same recipe."""
    recipe = parse_recipe(FULL)
    assert load_recipe(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert parse_recipe(yaml.safe_dump(recipe.to_dict())) == recipe
    assert recipe.to_dict()["rules"][2] == {
        **{"block": "se", "place": "stage_end", "pick": "last"},
        **{"stages": [3], "output": "out"},
    }
    plain = Recipe("x", (rule_from_fields(block="se", after="a", input=None),))
    assert plain.to_dict() == {"name": "x", "rules": [{"block": "se", "after": "a"}]}


def test_shipped_recipes_load_by_name():
    """Every shipped recipe loads by its name, bears it, cites its source, and says how it is run."""
    assert recipe_names() == SHIPPED
    for name in SHIPPED:
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.source
        assert load_recipe(recipe) is recipe
        header = (Path(__file__).parents[2] / "recipes" / f"{name}.yaml").read_text().split("\nname:")[0]
        assert all(line.startswith("#") for line in header.splitlines())
        assert all(
            word in header for word in ("Run:", f"attninject inject torchvision/resnet50 {name} "[:18], name)
        )
        assert "Needs:" in header
        assert "From:" in header


def test_sources_of_a_recipe(tmp_path):
    """A path, as text or object, a dict of a recipe, a dict of one rule, and a rule all load."""
    path = tmp_path / "mine.yaml"
    path.write_text("\ufeffrules: [{block: se, after: a}]\n", encoding="utf-8")
    rule = Rule("se", after=("a",))
    for source in (str(path), path, {"rules": [{"block": "se", "after": ["a"]}], "name": "mine"}):
        assert load_recipe(source) == Recipe("mine", (rule,))
    assert (
        load_recipe({"block": "se", "after": "a", "name": None}) == load_recipe(rule) == Recipe("se", (rule,))
    )


def test_anchors_share_values():
    """Anchors and aliases work as long as they stay small."""
    recipe = parse_recipe(
        "rules:\n- {block: se, after: a, args: &r {reduction: 8}}\n- {block: se, after: b, args: *r}"
    )
    assert recipe.rules[0].args == recipe.rules[1].args == {"reduction": 8}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", 8),
        ("-3", -3),
        ("0.5", 0.5),
        ("1e-5", 1e-5),
        ("1.e+3", 1000.0),
        ("true", True),
        ("no", False),
        ("null", None),
        ("hard", "hard"),
        ("'8'", "8"),
        ("[1, [2, a]]", (1, (2, "a"))),
        ("{a: [1]}", FrozenDict({"a": (1,)})),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
    ],
)
def test_values_are_read_as_written(text, expected):
    """Numbers with an exponent are numbers; octals, sexagesimals and dates are no surprise."""
    value = parse_value(text)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("block", "name", "expected"),
    [("se", None, "se"), ("se", "attn", "attn"), ("nonlocal", None, "nonlocal_"), ("timm/eca", None, "eca")],
)
def test_child_names(block, name, expected):
    """A child is called by the rule's name, else the block's; a keyword, which fx cannot print, gets a _."""
    assert Rule(block, after=("a",), name=name).child_name == expected


def test_a_place_that_somebody_adds_can_be_named():
    """A place registered by a user is taken by a rule, and an unknown one is told of it."""
    places.register_place("second_block")(lambda net: [])
    try:
        assert rule_from_fields(block="se", place="second_block").place == "second_block"
        with pytest.raises(
            RecipeError, match=r"second_block\), found 'second_blok'; did you mean second_block"
        ):
            rule_from_fields(block="se", place="second_blok")
        assert "second_block" in ai.list_places()
    finally:
        del places.PLACES["second_block"]


# --- classes and keyword arguments ---------------------------------------------------------------


class MyBlock(nn.Module):
    def __init__(self, channels, k, *, gate="sigmoid"):
        super().__init__()


class Forward(nn.Module):
    pass


def test_a_class_serves_as_block():
    """A class is a block in Python; its child bears its name in lower case, its dict its name."""
    rule = rule_from_fields(block=MyBlock, after="**.bn3", args={"k": [3, 5]}, init="blend")
    assert rule.block is MyBlock
    assert rule.child_name == "myblock"
    assert rule.to_dict() == {"block": "MyBlock", "after": "**.bn3", "args": {"k": [3, 5]}, "init": "blend"}
    assert hash(rule) == hash(
        rule_from_fields(block=MyBlock, after="**.bn3", args={"k": (3, 5)}, init="blend")
    )


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        (
            {"block": "se"},
            ["one of `after`, `before`, `place` and `replace` is missing: where does the block go?"],
        ),
        ({"block": "se", "afterr": "x"}, ["unknown field 'afterr'; did you mean after?"]),
        (
            {},
            ["nothing to inject: give a recipe, or block= with one of after=, before=, place= and replace="],
        ),
        ({"block": MyBlock, "after": "x"}, ["needs the argument 'k'"]),
        ({"block": MyBlock, "after": "x", "args": {"k": 1, "gats": 2}}, ["'gats'; did you mean 'gate'?"]),
        (
            {"block": int, "after": "x"},
            ["block: expected a subclass of torch.nn.Module, found the class int"],
        ),
        ({"block": nn.ReLU(), "after": "x", "args": {"k": 1}}, ["built already and takes no argument 'k'"]),
        ({"block": Forward, "after": "x"}, ["'forward' is reserved", "set `name`"]),
        (
            {"block": "se", "after": "x", "args": {"bias": object()}},
            ["args: expected a number, a text, true"],
        ),
        ({"block": "se", "after": "x", "args": {3: 1}}, ["expected a word as key, found the number 3"]),
    ],
)
def test_keyword_faults(fields, messages):
    """Keyword arguments are checked like a file, without positions."""
    with pytest.raises(RecipeError) as caught:
        rule_from_fields(**fields)
    for message in messages:
        assert message in str(caught.value)
    assert all(fault.line is None for fault in caught.value.faults)


def test_a_misspelt_field_is_not_missing_besides():
    """`blok` and `aftr` are two faults, not four."""
    with pytest.raises(RecipeError) as caught:
        rule_from_fields(blok="se", aftr="x")
    assert [fault.message for fault in caught.value.faults] == [
        "unknown field 'blok'; did you mean block?",
        "unknown field 'aftr'; did you mean after?",
    ]


def test_a_dict_that_holds_itself_is_refused():
    """Cyclic and overgrown Python data end in a report, not in a recursion."""
    cycle: list = []
    cycle += [cycle, cycle]
    with pytest.raises(RecipeError, match="nested more than 20 deep"):
        load_recipe({"rules": cycle})
    with pytest.raises(RecipeError, match="more than 10000 values"):
        load_recipe({"rules": [[0] * 200] * 200})


def test_with_args_sets_every_rule():
    """`with_args` overrides one argument in every rule and keeps the others."""
    recipe = parse_recipe("rules: [{block: se, after: a, args: {bias: false}}, {block: se, after: b}]")
    changed = recipe.with_args({"reduction": 8})
    assert [dict(rule.args) for rule in changed.rules] == [{"bias": False, "reduction": 8}, {"reduction": 8}]
    assert recipe.rules[1].args == {}
    assert recipe.with_args({}) == recipe


def test_with_args_names_the_rules_that_do_not_know_the_argument():
    """An argument that a rule's block does not know, or a bad value, is a fault of that rule."""
    recipe = parse_recipe("rules: [{block: se, after: a}, {block: se, after: b}]")
    with pytest.raises(RecipeError) as caught:
        recipe.with_args({"reductoin": 8})
    first, second = str(caught.value).split("\n")
    assert first.startswith("rule 1, args: ")
    assert second.startswith("rule 2, args: ")
    assert "did you mean 'reduction'?" in first
    with pytest.raises(
        RecipeError, match="rule 1, args: block 'se': bias: expected true or false, found 'x'"
    ):
        recipe.with_args({"bias": "x"})


# --- what is refused -----------------------------------------------------------------------------


def test_one_report_lists_all_faults():
    """Faults of syntax, fields, values and block arguments come together, in the order of the file."""
    lines = report(
        """\
nam: x
rules:
  - block: sse
    after: "a**"
    name: forward
    name: a.b
  - {block: se, after: x, place: stage_ends}
  - block: se
    before: y
    args: {reductoin: 8, bias: 3}
"""
    )
    expected = [
        "r.yaml:1:1: unknown key 'nam'; did you mean name?",
        "r.yaml:3:12: rule 1, block: unknown block 'sse'; did you mean ",
        "r.yaml:4:12: rule 1, after: pattern `a**`: `**` must be a whole segment; write *, or put",
        "r.yaml:5:11: rule 1, name: 'forward' is reserved, every torch.nn.Module has it",
        "r.yaml:6:5: duplicate key 'name', first at line 5",
        "r.yaml:7:27: rule 2: `place` and `after` exclude each other; make two rules of them",
        "r.yaml:7:34: rule 2, place: expected a place (before_downsample, block_end, block_start, decoder_end, "
        "head_input, residual_branch, shortcut, stage_end, stem_end), found 'stage_ends'; did you mean",
        "r.yaml:10:12: rule 3, args: block 'se' has no argument 'reductoin'; did you mean 'reduction'?",
        "r.yaml:10:32: rule 3, args: block 'se': bias: expected true or false, found 3",
    ]
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            "block: se",
            "2:5: rule 1: one of `after`, `before`, `place` and `replace` is missing: where does the block go?",
        ),
        ("after: a", "2:5: rule 1: `block` is missing"),
        ("block: cbma, after: a", "2:13: rule 1, block: unknown block 'cbma'; did you mean cbam"),
        ("block: 3, after: a", "2:13: rule 1, block: expected the name of a block, found the number 3"),
        ("block: se, after: a, before: b", "2:27: rule 1: `before` and `after` exclude each other"),
        (
            "block: se, after: []",
            "2:24: rule 1, after: expected a pattern or a list of them, found an empty list",
        ),
        ("block: se, after: [a, 3]", "2:28: rule 1, after: expected a pattern, found the number 3"),
        ("block: se, after: ", "2:23: rule 1, after: expected a pattern, found nothing (null)"),
        ("block: se, after: a..b", "2:24: rule 1, after: pattern `a..b`: it has an empty segment"),
        (
            "block: se, after: a, type: nn.Conv2d",
            "bare name of a class, such as BatchNorm2d, found 'nn.Conv2d'; write",
        ),
        ("block: se, after: a, pick: frist", "{every: 2, offset: 1}, found 'frist'; did you mean first?"),
        (
            "block: se, after: a, pick: {every: 0}",
            "2:41: rule 1, pick, every: expected a number from 1, found the num",
        ),
        (
            "block: se, after: a, pick: {evry: 2}",
            "2:34: rule 1, pick: unknown key 'evry'; did you mean every?",
        ),
        ("block: se, after: a, pick: [1, 1]", "2:33: rule 1, pick: the same number twice in [1, 1]"),
        (
            "block: se, after: a, per: ownr",
            "expected one of (model, owner, stage), found 'ownr'; did you mean owner?",
        ),
        (
            "block: se, after: a, call: 0",
            "2:33: rule 1, call: expected a call's number, from 1, or last, or all",
        ),
        (
            "block: se, after: a, call: frist",
            "rule 1, call: expected a call's number, from 1, or one of (last, all)",
        ),
        (
            "block: se, after: a, stages: [1, 0]",
            "2:39: rule 1, stages: there is no stage 0; stages count from 1",
        ),
        (
            "block: se, after: a, min_channels: 0",
            "2:41: rule 1, min_channels: expected a number from 1, found the",
        ),
        (
            "block: se, after: a, min_channels: 64.0",
            "min_channels: expected a number from 1, found the number 64.0",
        ),
        (
            "block: se, after: a, min_channels: true",
            "min_channels: expected a number from 1, found the boolean true",
        ),
        (
            "block: se, after: a, args: [1]",
            "2:33: rule 1, args: expected a mapping such as {reduction: 16}, found a ",
        ),
        (
            "block: se, after: a, args: {reduction: .nan}",
            "2:45: rule 1, args: expected a finite number of ordinary",
        ),
        (
            "block: se, after: a, args: {<<: {a: 1}}",
            "2:34: merge keys (<<) are not allowed; write the fields out",
        ),
        (
            "block: se, after: a, init: zero",
            "rule 1, init: expected one of (identity, paper, blend), found 'zero'",
        ),
        (
            "block: se, after: a, optional: 1",
            "2:37: rule 1, optional: expected true or false, found the number 1",
        ),
        (
            "block: se, after: a, layout: nhwc",
            "rule 1, layout: expected a layout (NCHW, NHWC, NLC, NCL, NCDHW, NDHW",
        ),
        ("block: se, after: a, input: 1", "2:27: rule 1: `input` goes with `before`, not with `after`"),
        ("block: se, before: a, output: 1", "2:28: rule 1: `output` goes with `after`, not with `before`"),
        (
            "block: se, before: a, input: -1",
            "2:35: rule 1, input: expected an operand, by position from 0 or by name",
        ),
        ("block: se, place: stage_end, call: 1", "`call` goes with `after` or `before`, not with `place`"),
        (
            "block: se, after: a, name: no",
            "found 'no', which YAML reads as the boolean false (put it in quotes if",
        ),
        (
            "block: se, after: a, name: a.b",
            "2:33: rule 1, name: 'a.b' is dotted; a name is one word, 'b' for example",
        ),
        (
            "block: se, after: a, name: __class__",
            "name: '__class__' is reserved by Python; take for example attn_cla",
        ),
        (
            "block: se, after: a, name: lambda",
            "name: 'lambda' is reserved by Python; take for example attn_lambda",
        ),
        ("block: se, after: a, name: training", "name: 'training' is reserved, every torch.nn.Module has it"),
        ("block: se, after: a, name: 3d", "name: '3d' is no name for a module; use letters, digits and _"),
        ("block: se, after: a, name: sé", "name: 'sé' is no name for a module; use letters, digits and _"),
        (
            "block: se, after: a, on: 1",
            "2:27: expected a word as key, found 'on', which YAML reads as the boolean",
        ),
        (
            "block: !!python/name:os.system x, after: a",
            "2:13: tags are not allowed, found 'tag:yaml.org,2002:python",
        ),
        ("block: !se x, after: a", "2:13: tags are not allowed, found '!se'; write the plain value"),
        ("block: os.system, after: a", "2:13: rule 1, block: unknown block 'os.system'"),
    ],
)
def test_faults_of_one_rule(fields, message):
    """Each wrong field is reported once, at its place, with what was found and what was expected."""
    lines = rule_report(fields)
    assert len(lines) == 1, lines
    assert lines[0].startswith("r.yaml:2:")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml:1:1: empty; expected a mapping with `rules:`"),
        ("# nothing\n", "r.yaml:1:1: empty"),
        (
            "- block: se",
            "r.yaml:1:1: expected a mapping with `rules:`, found a list; put `rules:` above the list",
        ),
        ("block: se", "r.yaml:1:1: `rules` is missing; put `rules:` above, and - in front of `block`"),
        ("rules: []", "r.yaml:1:8: rules: expected a list of rules, found an empty list"),
        (
            "rules: {block: se}",
            "rules: expected a list of rules, found a mapping; put - in front of each rule",
        ),
        ("rules:\n- {block: se, place: stage_end, reduction: 4}", "a block's own options go under `args`"),
        (
            "rules: [3]",
            "r.yaml:1:9: rule 1: expected a mapping with `block` and `after`, `before`, `place` or `replace`, found",
        ),
        ("rules:\n- {block: se", "r.yaml:2:13: no YAML: expected ',' or '}'"),
        (
            "a: 1\n b: 2",
            "r.yaml:2:3: no YAML: mapping values are not allowed here; a text with a colon needs quotes, and the keys",
        ),
        ("rules:\n\t- 1", "r.yaml:2:1: no YAML: a tab stands where a value or key should begin; indent with"),
        ("rules:\n- {block: se, after: **.bn}", 'a pattern that begins with * needs quotes: "**.bn3"'),
        ("rules:\n- {block: se, after: a[1-4].b}", 'a pattern within braces needs quotes: "layer[1-4].*"'),
        ("rules:\n- {block: se, after: a.{0,1}}", 'a pattern within braces needs quotes: "layer1.{0,1}"'),
        ("rules:\n- block: se\n  after:bn\n", "a key needs a colon, and a space behind it"),
        (
            "rules:\n - block: se\n \u00a0 after: bn",
            "r.yaml:3:2: no YAML: a no-break space (U+00A0) stands here",
        ),
        (
            "rules:\n- {block: se, after: *bn}",
            "r.yaml:2:22: *bn names no anchor; a pattern that begins with * needs qu",
        ),
        ("rules: &x [*x]", "r.yaml:1:12: *x stands inside what it names; recursion is not allowed"),
        ("--- {rules: 1}\n--- 2", "r.yaml:2:1: a second YAML document begins here; a file holds one recipe"),
        ("rules: " + "[" * 30, "r.yaml:1:27: nested more than 20 deep"),
        ("[" * 500_000, "r.yaml:1:21: nested more than 20 deep"),
        ("- " * 500_000, "nested more than 20 deep"),
        (
            "a: &a " + "[" * 12 + "]" * 12 + "\nb: " + "[" * 12 + "*a",
            "nested more than 20 deep once *a is expanded",
        ),
        ("[1,\n" * 2 + "1, " * 20_000, "more than 10000 values, aliases expanded"),
        ("? [a]: b\n: c", "expected a word as key, found a list"),
        ("a: 1\nb: \0", "r.yaml:2:4: no YAML: the character U+0000 is not allowed"),
        ("a: \ud800", "r.yaml:1:4: no YAML: the character U+D800 is not allowed"),
        ('"\\UFFFFFFFF"', "no YAML: "),  # an OverflowError before Python 3.13, then a ValueError
        (b"a: \xff", "r.yaml: not UTF-8: invalid start byte at byte 3"),
        ("#" * (1 << 20) + "\n", "r.yaml: larger than 1 MiB (1048576 bytes), the most that is read"),
        ("é" * (1 << 19) + "\n", "r.yaml: larger than 1 MiB"),
    ],
)
def test_faults_of_a_file(text, message):
    """Broken, overgrown or hostile files are reported in the same form, quickly."""
    start = time.perf_counter()
    assert any(message in line for line in report(text)), report(text)
    assert time.perf_counter() - start < 10


def test_alias_bomb():
    """Nine levels of tenfold aliases are refused before they are expanded."""
    levels = ["l0: &l0 [x,x,x,x,x,x,x,x,x,x]"]
    levels += [f"l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert any("more than 10000 values, aliases expanded" in line for line in report("\n".join(levels)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet_cbam", "no shipped recipe 'resnet_cbam'; did you mean cbam_resnet"),
        (
            "zzz",
            "no shipped recipe 'zzz'; the shipped recipes are attention_unet, bam, bam_mobilenet, bam_resnet, cbam",
        ),
        ("cbam_resnt.yaml", "cbam_resnt.yaml: no such file; did you mean cbam_resnet"),
        ("no/such/file", "no/such/file: no such file"),
        ("a\0.yaml", "cannot be read: embedded null byte"),
        ("rules:\n- 1", "a text of several lines is no path; read it with parse_recipe(text)"),
        (5, "expected a recipe's name, a path, a dict or a Recipe, found int"),
        ({"rules": [{"block": "se"}]}, "rule 1: one of `after`, `before`, `place` and `replace` is missing"),
        ({"block": "se", "afer": "x"}, "unknown field 'afer'; did you mean after?"),
    ],
)
def test_sources_that_are_none(source, message):
    """A source that cannot be found or read is a RecipeError with the nearest name."""
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(source)


def test_a_file_s_faults_name_the_file(tmp_path):
    """Faults of a file bear its path; a folder is no file."""
    path = tmp_path / "mine.yaml"
    path.write_text("rules: [{block: se}]")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    (fault,) = caught.value.faults
    assert (fault.file, fault.line, fault.column) == (str(path), 1, 9)
    with pytest.raises(RecipeError, match="no regular file"):
        load_recipe(tmp_path)


# --- anything at all ------------------------------------------------------------------------------


def loads_or_reports(load, source):
    """Whatever comes in, a recipe or a RecipeError comes out; a recipe survives its own dict."""
    try:
        recipe = load(source)
    except RecipeError:
        return
    assert hash(recipe) == hash(load_recipe(recipe.to_dict()))


@given(yaml_like | st.text())
@example("&a [&a x, *a]")
@example("rules: [{block: se, after: a, args: {? : 1}}]")
@example("%YAML " + "9" * 5000 + ".1\n---\n")
@settings(max_examples=300, deadline=None)
def test_any_text_is_harmless(text):
    """Random YAML fragments and random text load or are reported, nothing else."""
    loads_or_reports(parse_recipe, text)


@given(st.binary())
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_harmless(data):
    """Random bytes load or are reported."""
    loads_or_reports(parse_recipe, data)


@given(recipe_like | values)
@settings(max_examples=300, deadline=None)
def test_any_values_are_harmless(value):
    """Random values in all fields load or are reported, from YAML and from Python alike."""
    loads_or_reports(load_recipe, value if isinstance(value, dict) else {"rules": value})
    loads_or_reports(parse_recipe, yaml.safe_dump(value, allow_unicode=True))


@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_keywords_are_harmless(fields):
    """Random keyword arguments make a rule or a report."""
    with contextlib.suppress(RecipeError):
        hash(rule_from_fields(**fields))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_as_text_reads_as_itself(name):
    """`to_yaml` writes what `parse_recipe` takes back, for every shipped recipe."""
    recipe = load_recipe(name)
    assert parse_recipe(recipe.to_yaml()) == recipe
