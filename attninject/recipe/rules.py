"""What a recipe becomes: frozen, hashable rules."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from attninject.recipe import yaml_text

from .block_args import check_block_args, plain_args
from .frozen import FrozenDict
from .report import BAD, Node, Report

# --- what comes out ---------------------------------------------------------------------------


def thawed(value: Any) -> Any:
    """The JSON-ready form of a field's value."""
    if isinstance(value, Mapping):
        return {key: thawed(item) for key, item in value.items()}
    if isinstance(value, Every):
        return {"every": value.every, "offset": value.offset}
    return [thawed(item) for item in value] if isinstance(value, tuple) else value


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
            result[spec.name] = value[0] if single else thawed(value)
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
        node = tree_of(args, report)
        rules = []
        for number, rule in enumerate(self.rules, 1):
            within = report.within(f"rule {number}, args")
            given = plain_args(node, within)
            if given is not BAD:
                merged = FrozenDict({**rule.args, **given})
                check_block_args(Node(rule.block), Node({}), merged, within)
                rules.append(replace(rule, args=merged))
        report.raise_if_any()
        return replace(self, rules=tuple(rules))


def tree_of(value: Any, report: Report) -> Node:
    """The tree of a dict, or of keyword arguments; an `Every` may stand for its mapping."""
    return yaml_text.from_python(value, report, lambda v: thawed(v) if isinstance(v, Every) else v)
