"""Recipes: YAML, a dict or keyword arguments become frozen rules, or one report of all faults.

Three stages. A text becomes a tree of nodes that know their line and column (`yamlio`); a dict or keyword
arguments become the same tree without positions. One table, `_FIELDS`, says how each field of a rule is
checked. What passes is a frozen, hashable `Recipe`; otherwise a `RecipeError` lists every fault. A recipe may
come from a stranger: nothing in it is imported, evaluated or fetched.
"""

from __future__ import annotations

import keyword
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from . import yamlio
from .errors import Fault, PatternError, RecipeError, UnknownBlockError
from .patterns import compile_pattern, nearest
from .yamlio import (
    BAD,
    Checker,
    FrozenDict,
    Node,
    Report,
    boolean,
    checked_fields,
    choice,
    did_you_mean,
    distinct,
    integer,
    plain_value,
    quoted,
    read_file,
    read_yaml,
    some,
    words,
)

PLACES = (
    "before_downsample",
    "block_end",
    "block_start",
    "head_input",
    "residual_branch",
    "shortcut",
    "stage_end",
    "stem_end",
)
LAYOUTS = ("NCHW", "NHWC", "NLC", "NCL", "NCDHW", "NDHWC")


# --- what comes out ---------------------------------------------------------------------------


def _thawed(value: Any) -> Any:
    """The JSON-ready form of a field's value."""
    if isinstance(value, Mapping):
        return {key: _thawed(item) for key, item in value.items()}
    if isinstance(value, Every):
        return {"every": value.every, "offset": value.offset}
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Every:
    """`pick: {every: 2, offset: 1}`: of the sites in call order, numbers 1, 3, 5, … counted from 0."""

    every: int
    offset: int = 0


@dataclass(frozen=True)
class Rule:
    """A block, its arguments, and where it goes; made and checked by `load_recipe` and `rule_from_fields`."""

    block: str | type
    after: tuple[str, ...] | None = None
    before: tuple[str, ...] | None = None
    place: str | None = None
    input: int | str | None = None
    output: int | str | None = None
    layout: str | None = None
    type: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    pick: str | tuple[int, ...] | Every = "all"
    per: str = "model"
    call: int | str | None = None
    stages: tuple[int, ...] = ()
    min_channels: int = 0
    args: FrozenDict = field(default_factory=FrozenDict)
    init: str = "identity"
    name: str | None = None
    optional: bool = False

    @property
    def block_name(self) -> str:
        """The block's registered name, or the name of its class."""
        return self.block if isinstance(self.block, str) else self.block.__name__

    @property
    def child_name(self) -> str:
        """The name that the new module gets in its owner: `name`, else the block's own.

        A keyword gets an underscore, `nonlocal_`: fx and torch.export write a child as `self.name` into code.
        """
        if self.name is not None:
            return self.name
        own = self.block.rpartition("/")[2] if isinstance(self.block, str) else self.block_name.lower()
        return f"{own}_" if keyword.iskeyword(own) else own

    def to_dict(self) -> dict[str, Any]:
        """The rule as in a YAML file, JSON-ready, without what is default; a class appears by its name."""
        result: dict[str, Any] = {"block": self.block_name}
        for spec in fields(self)[1:]:
            value = getattr(self, spec.name)
            default = spec.default if spec.default is not MISSING else FrozenDict()
            if value == default:
                continue
            single = spec.name in ("after", "before", "type", "exclude") and len(value) == 1
            result[spec.name] = value[0] if single else _thawed(value)
        return result


@dataclass(frozen=True)
class Recipe:
    """A named list of rules, applied in order."""

    name: str
    rules: tuple[Rule, ...]
    source: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The recipe as in a YAML file, JSON-ready; `load_recipe` takes it back."""
        source = {} if self.source is None else {"source": self.source}
        return {"name": self.name, **source, "rules": [rule.to_dict() for rule in self.rules]}

    def with_args(self, args: Mapping[str, Any]) -> Recipe:
        """The same recipe with these block arguments set in every rule; each block must know them."""
        report = Report()
        node = _from_python(args, report)
        rules = []
        for number, rule in enumerate(self.rules, 1):
            within = report.within(f"rule {number}, args")
            given = _args(node, within)
            if given is not BAD:
                merged = FrozenDict({**rule.args, **given})
                _check_block_args(Node(rule.block), Node({}), merged, within)
                rules.append(replace(rule, args=merged))
        report.raise_if_any()
        return replace(self, rules=tuple(rules))


def _from_python(value: Any, report: Report) -> Node:
    """The tree of a dict, or of keyword arguments; an `Every` may stand for its mapping."""
    return yamlio.from_python(value, report, lambda v: _thawed(v) if isinstance(v, Every) else v)


# --- the way in -------------------------------------------------------------------------------


def load_recipe(source: Recipe | Rule | str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """A recipe from a shipped name, a path, a dict (a whole recipe or a single rule), or itself.

    A string is a path if it ends in .yaml or .yml, holds a separator, or names an existing file.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Rule):
        return Recipe(source.child_name, (source,))
    if isinstance(source, Mapping):
        return _recipe_from_mapping(source)
    if isinstance(source, str) and "\n" in source:
        raise RecipeError([Fault("a text of several lines is no path; read it with parse_recipe(text)")])
    if isinstance(source, str) and not _looks_like_path(source):
        return _shipped(source)
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if isinstance(path, str):
            return parse_recipe(read_file(path, recipe_names()), path)
    found = type(source).__name__
    raise RecipeError([Fault(f"expected a recipe's name, a path, a dict or a Recipe, found {found}")])


def parse_recipe(text: str | bytes, file: str = "<string>") -> Recipe:
    """A recipe from YAML text; `file` is what the faults call it."""
    report = Report(file)
    root = read_yaml(text, report)
    recipe = None if root is None else _recipe(root, report, default_name=Path(file).stem.strip("<>"))
    report.raise_if_any()
    assert recipe is not None
    return recipe


def rule_from_fields(**given: Any) -> Rule:
    """A rule from keyword arguments: `rule_from_fields(block="se", after="layer[1-4].*.bn3")`.

    None means "not given"; `block` may be a class.
    """
    if all(value is None for value in given.values()):
        text = "nothing to inject: give a recipe, or block= with one of after=, before= and place="
        raise RecipeError([Fault(text)])
    report = Report()
    rule = _rule(_from_python(given, report), report)
    report.raise_if_any()
    assert rule is not None
    return rule


def parse_value(text: str) -> Any:
    """One block argument from a command line, read as in a recipe: `8`, `true`, `[1, 2]`, `1e-5`."""
    report = Report("<value>")
    node = read_yaml(text, report)
    value = BAD if node is None else plain_value(node, report)
    report.raise_if_any()
    return value


def recipe_names() -> list[str]:
    """The sorted names of the recipes shipped with the package."""
    folder = _shipped_folder()
    return sorted(path.stem for path in folder.glob("*.yaml")) if folder else []


def _shipped_folder() -> Path | None:
    """`_recipes` in an installed wheel, `recipes` beside the package in a checkout."""
    package = Path(__file__).parent
    if (package / "_recipes").is_dir():
        return package / "_recipes"
    checkout = package.parent
    beside = (checkout / "recipes").is_dir() and (checkout / "pyproject.toml").is_file()
    return checkout / "recipes" if beside else None


def _shipped(name: str) -> Recipe:
    names, folder = recipe_names(), _shipped_folder()
    if folder is None or name not in names:
        hint = did_you_mean(name, names) or f"; the shipped recipes are {', '.join(names)}"
        raise RecipeError([Fault(f"no shipped recipe {quoted(name)}{hint}")])
    path = str(folder / f"{name}.yaml")
    return parse_recipe(read_file(path), path)


def _looks_like_path(text: str) -> bool:
    separators = os.sep + (os.altsep or "") + "/"
    return (
        text.endswith((".yaml", ".yml")) or any(char in text for char in separators) or os.path.isfile(text)
    )


def _recipe_from_mapping(source: Mapping[str, Any]) -> Recipe:
    if "rules" not in source and "block" in source:
        return load_recipe(rule_from_fields(**{str(key): value for key, value in source.items()}))
    report = Report()
    recipe = _recipe(_from_python(source, report), report, default_name="recipe")
    report.raise_if_any()
    assert recipe is not None
    return recipe


# --- the checks of a field: node in, value or BAD out ----------------------------------------


def _pattern(node: Node, report: Report) -> Any:
    if not isinstance(node.value, str):
        return report.expected(node, "a pattern")
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


_PICK_WORDS = ("all", "first", "last")
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
    return choice("a call's number, from 1, or one of", ("last", "all"))(node, report)


def _block(node: Node, report: Report) -> Any:
    if isinstance(node.value, type):
        from torch import nn

        good = issubclass(node.value, nn.Module)
        return node.value if good else report.expected(node, "a subclass of torch.nn.Module")
    if not isinstance(node.value, str):
        from torch import nn

        hint = "; give the class, not an instance" if isinstance(node.value, nn.Module) else ""
        return report.expected(node, "the name of a block", hint)
    from .blocks import registry

    try:
        registry.get(node.value)
    except UnknownBlockError as error:
        if registry.refused(node.value):
            return report.add(node, str(error))
        hint = did_you_mean(node.value, registry.list_blocks())
        return report.add(node, f"unknown block {quoted(node.value)}{hint}")
    return node.value


def _args(node: Node, report: Report) -> Any:
    good = isinstance(node.value, dict)
    return plain_value(node, report) if good else report.expected(node, "a mapping such as {reduction: 16}")


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

_FIELDS: dict[str, Checker] = {
    "block": _block,
    "after": _patterns,
    "before": _patterns,
    "place": choice("a place", PLACES),
    "input": _operand("an operand, by position from 0 or by name", 0),
    "output": _operand("an index or a key of the output", None),
    "layout": choice("a layout", LAYOUTS),
    "type": some(_type_name, "a class name"),
    "exclude": _patterns,
    "pick": _pick,
    "per": choice("one of", ("model", "owner", "stage")),
    "call": _call,
    "stages": distinct(some(_stage, "a stage")),
    "min_channels": integer("a number from 1", 1),
    "args": _args,
    "init": choice("one of", ("identity", "paper", "blend")),
    "name": _child_name,
    "optional": boolean,
}


# --- rules and recipes ------------------------------------------------------------------------


def _recipe(node: Node, report: Report, default_name: str) -> Recipe | None:
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
    rules = [_rule(item, top.within(f"rule {number}")) for number, item in enumerate(node.value, 1)]
    return BAD if None in rules else tuple(rules)


def _rule(node: Node, report: Report) -> Rule | None:
    if not isinstance(node.value, dict):
        return cast(None, report.expected(node, "a mapping with `block` and `after`, `before` or `place`"))
    before = len(report.faults)
    values = checked_fields(node, _FIELDS, "field", report, "; a block's own options go under `args`")
    _check_together(node, values, report)
    if "block" not in values:
        if not _misspelt(node, ("block",)):
            report.add(node, "`block` is missing")
    elif values["block"] is not BAD and values.get("args") is not BAD:
        block, args = node.value["block"][1], node.value.get("args", (None, Node({})))[1]
        _check_block_args(block, args, values.get("args", FrozenDict()), report.within("args"))
    if len(report.faults) > before or BAD in values.values():
        return None
    return _with_usable_name(Rule(**values), node, report)


def _check_together(node: Node, values: Mapping[str, Any], report: Report) -> None:
    """What fields demand or forbid one another."""
    where = [key for key in ("after", "before", "place") if key in values]
    if not where and not _misspelt(node, ("after", "before", "place")):
        report.add(node, "one of `after`, `before` and `place` is missing: where does the block go?")
    for key in where[1:]:
        report.add(node.value[key][0], f"`{key}` and `{where[0]}` exclude each other; make two rules of them")
    if "input" in values and where and "before" not in where:
        report.add(node.value["input"][0], f"`input` goes with `before`, not with `{where[0]}`")
    if "output" in values and where == ["before"]:
        report.add(node.value["output"][0], "`output` goes with `after`, not with `before`")
    if "call" in values and where == ["place"]:
        report.add(node.value["call"][0], "`call` goes with `after` or `before`, not with `place`")


def _misspelt(node: Node, fields: tuple[str, ...]) -> bool:
    """Whether an unknown field is reported as one of these: it is not missing besides."""
    return any(set(nearest(str(key), _FIELDS, 1)) & set(fields) for key in node.value if key not in _FIELDS)


def _check_block_args(block: Node, args: Node, values: FrozenDict, report: Report) -> None:
    from .blocks import registry

    for name, message in registry.check_args(block.value, values):
        key = args.value.get(name) if name is not None else None
        # An unknown name is wrong at the key, a bad value at the value.
        at = block if key is None else key[0] if "no argument" in message else key[1]
        report.add(at, message)


def _with_usable_name(rule: Rule, node: Node, report: Report) -> Rule | None:
    """The rule, if the name that its block gets by default can be a module's name."""
    fault = _name_fault(rule.child_name)
    if fault is None:
        return rule
    report.add(node, f"the block's own name serves as the module's, but {fault}; set `name`")
    return None
