"""The fields of a rule: one table, `FIELDS`, of how each is checked and shown; all faults of a recipe in one report.

A new field has a row here, its default in `rules.Rule` and its type in `rules.RuleFields` (a test holds the three
together); what it does to the sites is in `planning`: `picking` for a filter, `by_pattern` for what a pattern finds.
A recipe may come from a stranger: nothing in it is imported, evaluated or fetched.
"""

from __future__ import annotations

import functools
import keyword
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Literal, NamedTuple, cast, get_args

from attninject.anatomy.places import PLACES
from attninject.errors import PatternError, UnknownBlockError
from attninject.layout import RANK, VECTOR
from attninject.wording import did_you_mean, nearest, quoted

from .block_args import check_block_args, plain_args
from .checks import Checker, boolean, checked_fields, choice, distinct, integer, some, words
from .frozen import FrozenDict
from .patterns import compile_pattern
from .report import BAD, Node, Report
from .rules import CallWord, Every, Init, Per, PickWord, Recipe, Rule, Share, With, tree_of, written
from .targets import Target, target

# --- the checks of a field: node in, value or BAD out ----------------------------------------


def _pattern(node: Node, report: Report) -> Any:
    if not isinstance(node.value, str):
        found = target(node.value)
        return report.expected(node, "a pattern") if found is None else found
    try:
        return compile_pattern(node.value).text
    except PatternError as error:
        return report.add(node, str(error))


def _type_name(node: Node, report: Report) -> Any:
    if isinstance(node.value, type):
        return node.value.__name__
    if not isinstance(node.value, str):
        return report.expected(node, "the name of a class, such as BatchNorm2d")
    if not node.value.isidentifier():
        last = node.value.rpartition(".")[2]
        hint = f"; write {last}" if last.isidentifier() and last != node.value else ""
        return report.expected(node, "the bare name of a class, such as BatchNorm2d", hint)
    return node.value


def _operand(what: str, minimum: int | None) -> Checker:
    number = integer(what, minimum)

    def check(node: Node, report: Report) -> Any:
        return node.value if isinstance(node.value, str) and node.value else number(node, report)

    return check


def _stage(node: Node, report: Report) -> Any:
    if node.value == 0 and isinstance(node.value, int) and not isinstance(node.value, bool):
        return report.add(node, "there is no stage 0; stages count from 1, or from -1 at the end")
    return integer("the number of a stage, from 1, or negative from the end")(node, report)


_PICK_WORDS = get_args(PickWord)
_pick_numbers = distinct(
    some(integer("a number in call order, from 0, or negative from the end"), "a number")
)


def _pick(node: Node, report: Report) -> Any:
    if isinstance(node.value, dict):
        return _pick_every(node, report)
    if isinstance(node.value, list | int) and not isinstance(node.value, bool):
        return _pick_numbers(node, report)
    if isinstance(node.value, str) and node.value in _PICK_WORDS:
        return node.value
    hint = did_you_mean(node.value, _PICK_WORDS) if isinstance(node.value, str) else ""
    return report.expected(node, "first, last, all, a list such as [0, -1], or {every: 2, offset: 1}", hint)


def _pick_every(node: Node, report: Report) -> Any:
    checkers = {"every": integer("a number from 1", 1), "offset": integer("a number from 0", 0)}
    before = len(report.faults)
    values = checked_fields(node, checkers, "key", report)
    if len(report.faults) > before:
        return BAD
    if "every" not in values:
        return report.add(node, "`every` is missing, as in {every: 2, offset: 1}")
    return BAD if BAD in values.values() else Every(**values)


def _call(node: Node, report: Report) -> Any:
    if isinstance(node.value, int) and not isinstance(node.value, bool):
        return integer("a call's number, from 1, or last, or all", 1)(node, report)
    return choice("a call's number, from 1, or one of", get_args(CallWord))(node, report)


def _block(node: Node, report: Report) -> Any:
    if isinstance(node.value, type):
        from torch import nn

        good = issubclass(node.value, nn.Module)
        return node.value if good else report.expected(node, "a subclass of torch.nn.Module")
    if not isinstance(node.value, str):
        from attninject.blocks import sources

        good = sources.is_source(node.value)
        return node.value if good else report.expected(node, "the name of a block")
    from attninject.blocks import registry

    try:
        registry.get(node.value)
    except UnknownBlockError as error:
        if registry.refused(node.value):
            return report.add(node, str(error))
        hint = did_you_mean(node.value, registry.list_blocks())
        return report.add(node, f"unknown block {quoted(node.value)}{hint}")
    return node.value


@cache
def _module_attributes() -> frozenset[str]:
    from torch import nn

    return frozenset(dir(nn.Module()))


def _name_fault(name: str) -> str | None:
    """Why a module cannot bear this name, or None."""
    if "." in name:
        return f"{quoted(name)} is dotted; a name is one word, {quoted(name.rpartition('.')[2])} for example"
    if not name.isascii() or not name.isidentifier():
        return f"{quoted(name)} is no name for a module; use letters, digits and _"
    if keyword.iskeyword(name) or name.startswith("__"):
        return f"{name!r} is reserved by Python; take for example attn_{name.strip('_') or 'block'}"
    if name in _module_attributes():
        return f"{name!r} is reserved, every torch.nn.Module has it; take for example attn_{name.strip('_')}"
    return None


def _child_name(node: Node, report: Report) -> Any:
    if not isinstance(node.value, str):
        return report.expected(node, "a name")
    fault = _name_fault(node.value)
    return report.add(node, fault) if fault else node.value


_patterns = some(_pattern, "a pattern")


def _module_pattern(node: Node, report: Report) -> Any:
    """A pattern of modules; an operation is no module, whose place could be taken."""
    text = _pattern(node, report)
    if isinstance(text, str) and compile_pattern(text).operation is not None:
        return report.add(node, f"`replace` names modules, and {quoted(text)} is an operation; use `after`")
    return text


def _text(node: Node, report: Report) -> Any:
    """A pattern whose wildcards can be aligned with another's."""
    found = _pattern(node, report)
    return report.expected(node, "a pattern") if isinstance(found, Target) else found


_texts = some(_text, "a pattern")


def _with(node: Node, report: Report) -> Any:
    """A second site: a pattern of what gives the value, or a mapping of the fields that a rule has for a site."""
    if not isinstance(node.value, dict):
        patterns = _texts(node, report)
        return BAD if patterns is BAD else With(after=patterns)
    before = len(report.faults)
    checkers = {f.name: FIELDS[f.name].check for f in fields(With)}
    checkers |= {"after": _texts, "before": _texts, "layout": choice("a layout", [*RANK, VECTOR])}
    values = checked_fields(node, checkers, "key", report)
    if len([key for key in ("after", "before") if key in values]) != 1:
        report.add(node, "`with` has either `after` or `before`, as in {before: up.*, input: 1}")
    for key, where in (("input", "before"), ("output", "after")):
        if key in values and where not in values:
            report.add(node.value[key][0], f"`{key}` goes with `{where}`")
    return BAD if len(report.faults) > before or BAD in values.values() else With(**values)


class Field(NamedTuple):
    """One field of a rule.

    Attributes:
        check: node in, value or `BAD` out.
        metavar: what stands for the value where the field is a flag.
        text: what it means, one line; the default stands in `Rule`.
        flag: how a flag's value is read. `yaml`: as in a recipe. `text`: as it stands, since a pattern may begin
            with * or [. `texts`: the same, and a repeated flag makes a list. `switch`: no value, given is true.
    """

    check: Checker
    metavar: str
    text: str
    flag: Literal["yaml", "text", "texts", "switch"] = "yaml"


FIELDS: dict[str, Field] = {
    "block": Field(_block, "NAME", "a block's name (attninject list blocks)", "text"),
    "after": Field(_patterns, "PATTERN", "the block goes on the result of what matches", "texts"),
    "before": Field(_patterns, "PATTERN", "the block goes on the input of what matches", "texts"),
    "place": Field(choice("a place", PLACES), "PLACE",
        "the block goes to a named place (attninject list places)", "text"),
    "replace": Field(some(_module_pattern, "a pattern"), "PATTERN", "the block takes the place of what matches", "texts"),
    "with_": Field(_with, "PATTERN", "of a block of two inputs: what gives the second value", "texts"),
    "input": Field(_operand("an operand, by position from 0 or by name", 0), "WHICH",
        "with before: which operand, by position from 0 or by name"),
    "output": Field(_operand("an index or a key of the output", None), "WHICH",
        "with after: index or key of the tensor in a tuple, list or dict"),
    "layout": Field(choice("a layout", RANK), "LAYOUT", f"{', '.join(RANK)}: in place of what was measured", "text"),
    "type": Field(some(_type_name, "a class name"), "CLASS", "only modules of this class or a subclass", "texts"),
    "exclude": Field(_patterns, "PATTERN", "leave out what matches", "texts"),
    "pick": Field(_pick, "WHICH", "of what is left, in call order: first, last, all, [0, -1], {every: 2, offset: 1}"),
    "per": Field(choice("one of", get_args(Per)), "WHAT", "pick per model, owner or stage", "text"),
    "call": Field(_call, "N", "of a module called several times: a call's number from 1, last, all"),
    "stages": Field(distinct(some(_stage, "a stage")), "N", "only stage N or [N, …], from 1, or negative from the end"),
    "min_channels": Field(integer("a number from 1", 1), "N", "only sites of at least N channels"),
    "args": Field(plain_args, "ARGS", "the block's arguments, as {reduction: 8}"),
    "init": Field(choice("one of", get_args(Init)), "INIT",
        "how the block starts: identity, paper (the published gate), blend (a learned mix, 0 at first)", "text"),
    "name": Field(_child_name, "NAME", "name of the new module; default: the block's", "text"),
    "share": Field(choice("one of", get_args(Share)), "WHERE",
        "one block for all sites of one width in each owner, each stage, or the model", "text"),
    "optional": Field(boolean, "", "finding nothing is no error", "switch"),
}  # fmt: skip
WHERE = ("after", "before", "place", "replace")
"""The fields that say where a block goes: a rule has exactly one of them."""
_CHECKERS = {written(name): field.check for name, field in FIELDS.items()}


# --- rules and recipes ------------------------------------------------------------------------


def recipe_from(node: Node, report: Report, default_name: str) -> Recipe | None:
    """The recipe of a tree, or None when a fault was reported."""
    if not isinstance(node.value, dict):
        hint = "; put `rules:` above the list" if isinstance(node.value, list) else ""
        return cast(None, report.expected(node, "a mapping with `rules:`", hint))
    checkers: dict[str, Checker] = {"name": words, "source": words, "rules": _rules}
    before = len(report.faults)
    values = checked_fields(node, checkers, "key", report)
    if "rules" not in values:
        hint = "; put `rules:` above, and - in front of `block`" if "block" in node.value else ""
        report.add(node, f"`rules` is missing{hint}")
    if len(report.faults) > before or BAD in values.values():
        return None
    return Recipe(values.get("name", default_name), values["rules"], values.get("source"))


def _rules(node: Node, report: Report) -> Any:
    if not isinstance(node.value, list) or not node.value:
        hint = "; put - in front of each rule" if isinstance(node.value, dict) else ""
        return report.expected(node, "a list of rules", hint)
    top = Report(report.file, "", report.faults)
    rules = [rule_from(item, top.within(f"rule {number}")) for number, item in enumerate(node.value, 1)]
    return BAD if None in rules else tuple(rules)


def rule_from(node: Node, report: Report) -> Rule | None:
    """The rule of a tree, or None when a fault was reported."""
    if not isinstance(node.value, dict):
        return cast(
            None, report.expected(node, "a mapping with `block` and `after`, `before`, `place` or `replace`")
        )
    before = len(report.faults)
    values = checked_fields(node, _CHECKERS, "field", report, "; a block's own options go under `args`")
    _check_together(node, values, report)
    if "block" not in values:
        if not _misspelt(node, ("block",)):
            report.add(node, "`block` is missing")
    elif values["block"] is not BAD and values.get("args") is not BAD:
        block, args = node.value["block"][1], node.value.get("args", (None, Node({})))[1]
        check_block_args(block, args, values.get("args", FrozenDict()), report.within("args"))
        _check_second(node, values, report)
    if len(report.faults) > before or BAD in values.values():
        return None
    named = {name: values[written(name)] for name in FIELDS if written(name) in values}
    return _with_usable_name(Rule(**_classes_as_types(_without_partial(named))), node, report)


def _without_partial(values: dict[str, Any]) -> dict[str, Any]:
    """A partial of a class with plain keywords alone is the class with `args`, which can be written and read."""
    block = values["block"]
    if not isinstance(block, functools.partial) or not isinstance(block.func, type) or block.args:
        return values
    silent = Report()
    keywords = plain_args(tree_of(block.keywords, silent), silent)
    if silent.faults:
        return values
    return {**values, "block": block.func, "args": FrozenDict({**keywords, **values.get("args", {})})}


def _classes_as_types(values: dict[str, Any]) -> dict[str, Any]:
    """Classes alone, as in `after=nn.Conv2d`, are every module and its `type`, which can be written and read."""
    for field in set(WHERE) & set(values):
        given = values[field]
        classes = [t.chooser for t in given if isinstance(t, Target) and isinstance(t.chooser, type)]
        if classes and len(classes) == len(given) and "type" not in values:
            return {**values, field: ("**",), "type": tuple(c.__name__ for c in classes)}
    return values


def _check_together(node: Node, values: Mapping[str, Any], report: Report) -> None:
    """What fields demand or forbid one another."""
    where = [key for key in WHERE if key in values]
    if not where and not _misspelt(node, WHERE):
        report.add(
            node, "one of `after`, `before`, `place` and `replace` is missing: where does the block go?"
        )
    for key in where[1:]:
        report.add(node.value[key][0], f"`{key}` and `{where[0]}` exclude each other; make two rules of them")
    if "input" in values and where and "before" not in where:
        report.add(node.value["input"][0], f"`input` goes with `before`, not with `{where[0]}`")
    if "output" in values and where in (["before"], ["replace"]):
        report.add(node.value["output"][0], f"`output` goes with `after`, not with `{where[0]}`")
    for key in ("with", "share"):
        if key in values and where == ["replace"]:
            report.add(
                node.value[key][0], f"`{key}` goes with `after`, `before` or `place`, not with `replace`"
            )
    if "call" in values and where in (["place"], ["replace"]):
        report.add(node.value["call"][0], f"`call` goes with `after` or `before`, not with `{where[0]}`")


def _check_second(node: Node, values: Mapping[str, Any], report: Report) -> None:
    """A second value is for blocks that take one."""
    from attninject.blocks import registry

    if "with" in values and not registry.takes_second(values["block"]):
        able = [s.name for s in registry.block_table() if registry.takes_second(s.name)]
        report.add(
            node.value["with"][0],
            f"{registry.resolve(values['block']).name} takes one value, so `with` has nothing to give; "
            f"of two values are {', '.join(able)}",
        )
    elif "with" not in values and registry.needs_second(values["block"]):
        name = registry.resolve(values["block"]).name
        report.add(node, f"{name} takes a second value: say with `with` what gives it")


def _misspelt(node: Node, names: tuple[str, ...]) -> bool:
    """Whether an unknown field is reported as one of these: it is not missing besides."""
    return any(
        set(nearest(str(key), _CHECKERS, 1)) & set(names) for key in node.value if key not in _CHECKERS
    )


def _with_usable_name(rule: Rule, node: Node, report: Report) -> Rule | None:
    """The rule, if the name that its block gets by default can be a module's name."""
    fault = _name_fault(rule.child_name)
    if fault is None:
        return rule
    report.add(node, f"the block's own name serves as the module's, but {fault}; set `name`")
    return None
