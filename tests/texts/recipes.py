"""What is said about recipes, patterns, blocks and their arguments."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import nn

import attninject as ai

from .registry import Case, case, cases

MANY = """\
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
  - block: !se x
    after: [a, 3]
    pick: {evry: 2}
    per: ownr
    call: 0
    stages: [1, 0]
    min_channels: 64.0
    init: zero
    layout: nhwc
    optional: 1
    input: 1
"""

FIELDS = {
    "no place": "block: se",
    "no block": "after: a",
    "a number as block": "block: 3, after: a",
    "a path as block": "block: os.system, after: a",
    "a near block": "block: cbma, after: a",
    "no pattern": "block: se, after: []",
    "null": "block: se, after: ",
    "a dotted type": "block: se, after: a, type: nn.Conv2d",
    "a near pick": "block: se, after: a, pick: frist",
    "pick twice": "block: se, after: a, pick: [1, 1]",
    "pick every 0": "block: se, after: a, pick: {every: 0}",
    "a near call": "block: se, after: a, call: frist",
    "a list of arguments": "block: se, after: a, args: [1]",
    "NaN": "block: se, after: a, args: {reduction: .nan}",
    "merge keys": "block: se, after: a, args: {<<: {a: 1}}",
    "input beside after": "block: se, after: a, input: 1",
    "output beside before": "block: se, before: a, output: 1",
    "a negative operand": "block: se, before: a, input: -1",
    "call beside place": "block: se, place: stage_end, call: 1",
    "no as name": "block: se, after: a, name: no",
    "a keyword as name": "block: se, after: a, name: lambda",
    "a number in front": "block: se, after: a, name: 3d",
    "on as key": "block: se, after: a, on: 1",
    "an argument beside args": "block: se, after: a, reduction: 4",
    "a second value for one": "block: se, after: a, with: b",
    "a second value in a place": "block: cross_attention, replace: a, with: b",
    "a second value twice": "block: cross_attention, after: a, with: {after: b, before: c}",
    "a near second value": "block: cross_attention, after: a, with: {aftr: b}",
    "an input of a result": "block: cross_attention, after: a, with: {after: b, input: 1}",
    "a near share": "block: se, after: a, share: stages",
}

FILES = {
    "empty": "",
    "a list": "- block: se",
    "no rules": "block: se",
    "empty rules": "rules: []",
    "a mapping of rules": "rules: {block: se}",
    "a number as rule": "rules: [3]",
    "a tab": "rules:\n\t- 1",
    "a star without quotes": "rules:\n- {block: se, after: **.bn}",
    "an alias without anchor": "rules:\n- {block: se, after: *bn}",
    "recursion": "rules: &x [*x]",
    "two documents": "--- {rules: 1}\n--- 2",
    "nested": "rules: " + "[" * 30,
    "many values": "[1,\n" * 2 + "1, " * 20_000,
    "a NUL": "a: 1\nb: \0",
    "overgrown": "#" * (1 << 20) + "\n",
}

PATTERNS = (
    "", "a..b", "a**", "a.***", "x[ab", "x[4-1]", "x[a.b]", "x[^a]", "{a,b", "a}", "{}", "layer(1|2)", "layer\\d",
    "{" * 21, "a" * 1001, "layer1::", "re:(", "re:(?=a)a", "re:(?(1)b|c)", "re:(a)\\1", "re:(?>a)", "re:a++",
    "re:(?i)a", "re:(a{1000}){1000}", "re:" + "a" * 201,
)  # fmt: skip

ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "near": ("se", {"redution": 4}),
    "far": ("se", {"xyz": 4}),
    "zero": ("se", {"reduction": 0}),
    "a text": ("se", {"reduction": "16"}),
    "a near word": ("se", {"gate": "sigmod"}),
    "a field of the rule": ("se", {"init": "papers"}),
    "an even kernel": ("cbam", {"kernel_size": 4}),
    "several": ("cbam", {"kernel_size": 4, "reduction": -1, "ordr": 3}),
    "dimensions": ("se", {"dims": 4}),
}


def _report(text: str, folder: Path) -> Any:
    return ai.parse_recipe(text, "r.yaml")


def _pattern(text: Any, folder: Path) -> Any:
    return ai.eject(nn.Identity(), text)


def _block(name: str, channels: int, given: dict[str, Any], folder: Path) -> Any:
    return ai.create_block(name, channels, **given)


def _texts(function: Any, table: dict[str, Any]) -> list[tuple[str, Case]]:
    return [(name, functools.partial(function, given)) for name, given in table.items()]


case("recipe: many faults")(functools.partial(_report, MANY))
cases("rule", _texts(_report, {k: "rules:\n  - {" + v + "}" for k, v in FIELDS.items()}))
cases("recipe file", _texts(_report, FILES))
cases("pattern", _texts(_pattern, {p if len(p) < 30 else f"{p[:4]} × {len(p)}": p for p in PATTERNS if p}))
case("pattern: none at all")(functools.partial(_pattern, ""))
case("pattern: no text")(functools.partial(_pattern, 3))
cases("block", [(k, functools.partial(_block, n, 16, a)) for k, (n, a) in ARGUMENTS.items()])


@case("recipe: not UTF-8")
def _(folder: Path) -> Any:
    (folder / "r.yaml").write_bytes(b"a: \xff")
    return ai.load_recipe(folder / "r.yaml")


class Wide(nn.Module):
    """A block of a user's own that needs an argument."""

    def __init__(self, channels: int, power: int) -> None:
        super().__init__()

    def forward(self, x: Any) -> Any:
        return x


cases(
    "recipe source",
    [
        ("a near name", lambda folder: ai.load_recipe("resnet_cbam")),
        ("no name", lambda folder: ai.load_recipe("zzz")),
        ("no file", lambda folder: ai.load_recipe(folder / "cbam_resnt.yaml")),
        ("a folder", lambda folder: ai.load_recipe(folder)),
        ("lines", lambda folder: ai.load_recipe("rules:\n- 1")),
        ("a number", lambda folder: ai.load_recipe(5)),  # type: ignore[arg-type]
        ("a dict", lambda folder: ai.load_recipe({"rules": [{"block": "se"}, {"after": "a", "blok": "se"}]})),
        ("a rule as a dict", lambda folder: ai.load_recipe({"block": "se", "afer": "x"})),
        ("keywords", lambda folder: ai.plan(nn.Identity(), blok="se", aftr="x")),
        ("nothing", lambda folder: ai.plan(nn.Identity())),
        ("both", lambda folder: ai.plan(nn.Identity(), "se", block="se", after="x")),
        ("arguments over a recipe", lambda folder: ai.plan(nn.Identity(), "cbam", args={"reductoin": 8})),
        ("with_args", lambda folder: ai.load_recipe("se").with_args({"bias": "x"})),
    ],
)
cases(
    "block name",
    [
        ("near", lambda folder: ai.create_block("cbma", 16)),
        ("a path", lambda folder: ai.create_block("torch.nn.Conv2d", 16)),
        ("of timm, none", lambda folder: ai.create_block("timm/nothing", 16)),
        ("a function", lambda folder: ai.create_block(len, 16)),  # type: ignore[arg-type]
        ("init", lambda folder: ai.create_block("se", 16, init="papers")),
        ("no channels", lambda folder: ai.create_block("se", 0)),
        ("few channels", lambda folder: ai.create_block("mhsa", 6, num_heads=4)),
        ("missing argument", lambda folder: ai.create_block(Wide, 4)),
        ("near argument", lambda folder: ai.create_block(Wide, 4, power=1, pwer=2)),
        ("register a built-in name", lambda folder: ai.register_block("se")),
        ("register a name of timm's", lambda folder: ai.register_block("timm/mine")),
        ("register two words", lambda folder: ai.register_block("a.b")),
        ("register a module's attribute", lambda folder: ai.register_block("forward")),
        ("register a function", lambda folder: ai.register_block("fine")(len)),
    ],
)
