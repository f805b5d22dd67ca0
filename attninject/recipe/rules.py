"""What a recipe becomes: frozen, hashable rules."""

from __future__ import annotations

import inspect
import keyword
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, TypedDict, TypeVar

import yaml

from attninject.blocks.options import Init as Init
from attninject.errors import Fault, RecipeError
from attninject.recipe import yaml_text
from attninject.wording import name_of

from .block_args import check_block_args, plain_args
from .frozen import FrozenDict
from .report import BAD, Node, Report
from .targets import Target, TargetLike, targets_of

# --- what goes in -----------------------------------------------------------------------------

Per = Literal["model", "owner", "stage"]
Share = Literal["owner", "stage", "model"]
PickWord = Literal["all", "first", "last"]
CallWord = Literal["last", "all"]

_Patterns = TargetLike | Sequence[TargetLike]
_Class = type[Any]


class RuleFields(TypedDict, total=False):
    """The fields of one rule, as keywords of `inject` and `plan` or as keys in a dict; None is "not given".

    Attributes:
        block: a block's name, as "cbam", or a class, function or partial: cls(channels, **args); an instance is copied.
        after: pattern of modules or operations whose result is replaced: "layer[1-4].*.bn3". In Python patterns may
            also be classes, compiled regular expressions for the whole name, and functions (name, module) → bool.
        before: pattern of modules or operations whose input is replaced, for that one call.
        place: a family of sites with the same meaning on every model: "residual_branch".
        replace: pattern of modules whose place the block takes; what they compute stays until training begins.
        with_: of a block of two inputs: what gives the second, a pattern, or {"before": …, "input": 1}; in a file `with`.
        input: with `before`: which operand, by position (from 0) or by name.
        output: with `after`: index or key of the tensor in a tuple, list or dict.
        layout: what the tensor's axes mean, as "NHWC", where it is not what was measured.
        type: class name of the matched module, its own or that of a base.
        exclude: pattern of what is left out.
        pick: of what is left, in call order: "first", "last", "all", [0, -1], {"every": 2, "offset": 1}.
        per: `pick` for each "owner", each "stage" or once for the "model" (default).
        call: of a module called several times: a number from 1, "last" or "all".
        stages: numbers from 1, or negative from the end.
        min_channels: sites with fewer channels are left out.
        args: the block's own arguments, as {"reduction": 16}.
        init: "identity" (default; nothing changes until training), "paper" or "blend".
        name: of the new module in its owner; by default the block's name.
        share: one block for all sites of one width in each "owner", each "stage", or the "model".
        optional: True: may match nothing.
    """

    block: str | Callable[..., Any] | None
    after: _Patterns | None
    before: _Patterns | None
    place: str | None
    replace: _Patterns | None
    with_: _Patterns | Mapping[str, Any] | None
    input: int | str | None
    output: int | str | None
    layout: str | None
    type: str | _Class | Sequence[str | _Class] | None
    exclude: _Patterns | None
    pick: PickWord | int | Sequence[int] | Mapping[str, int] | Every | None
    per: Per | None
    call: int | CallWord | None
    stages: int | Sequence[int] | None
    min_channels: int | None
    args: Mapping[str, Any] | None
    init: Init | None
    name: str | None
    share: Share | None
    optional: bool | None


class RecipeFields(TypedDict, total=False):
    """A recipe as a dict: what stands in a YAML file."""

    name: str
    source: str | None
    rules: Sequence[RuleFields]


_Verb = TypeVar("_Verb", bound=Callable[..., Any])


def explains_fields(verb: _Verb) -> _Verb:
    """Add what each field of a rule means to the `**rule` of a verb's docstring, for `help`."""
    text, lines = inspect.getdoc(verb), (inspect.getdoc(RuleFields) or "").partition("Attributes:\n")[2]
    if text:
        head, rule, tail = text.partition("    **rule: ")
        first, _, rest = tail.partition("\n")
        verb.__doc__ = f"{head}{rule}{first}\n{textwrap.indent(lines, '    ')}\n{rest}"
    return verb


def written(field: str) -> str:
    """What a field is called in a recipe: `with`, which in Python is a word of the language, is `with_` there."""
    return "with" if field == "with_" else field


# --- what comes out ---------------------------------------------------------------------------


def thawed(value: Any) -> Any:
    """The JSON-ready form of a field's value."""
    if isinstance(value, Mapping):
        return {key: thawed(item) for key, item in value.items()}
    if isinstance(value, Every):
        return {"every": value.every, "offset": value.offset}
    if isinstance(value, Target):
        return str(value)
    if isinstance(value, With):
        return value.to_plain()
    return [thawed(item) for item in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Every:
    """`pick: {every: 2, offset: 1}`: of the sites in call order, numbers 1, 3, 5, … counted from 0."""

    every: int
    offset: int = 0


@dataclass(frozen=True)
class With:
    """What gives the second value of a block of two inputs, in the words that name a site: `after` or `before`.

    `call`, `input`, `output` and `layout` mean what they mean in a rule.
    """

    after: tuple[str, ...] | None = None
    before: tuple[str, ...] | None = None
    call: int | CallWord | None = None
    input: int | str | None = None
    output: int | str | None = None
    layout: str | None = None

    def to_plain(self) -> Any:
        """As in a YAML file: a pattern where that says it all, else a mapping."""
        given = {f.name: thawed(value) for f in fields(self) if (value := getattr(self, f.name)) is not None}
        given = {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in given.items()}
        return given["after"] if list(given) == ["after"] else given

    def __str__(self) -> str:
        patterns = ", ".join(self.after or self.before or ())
        return f"{'after' if self.after else 'before'} {patterns}"


@dataclass(frozen=True)
class Rule:
    """A block, its arguments, and where it goes; made and checked by `load_recipe` and `rule_from_fields`."""

    block: str | Callable[..., Any]
    after: tuple[str | Target, ...] | None = None
    before: tuple[str | Target, ...] | None = None
    place: str | None = None
    replace: tuple[str | Target, ...] | None = None
    with_: With | None = None
    input: int | str | None = None
    output: int | str | None = None
    layout: str | None = None
    type: tuple[str, ...] = ()
    exclude: tuple[str | Target, ...] = ()
    pick: PickWord | tuple[int, ...] | Every = "all"
    per: Per = "model"
    call: int | CallWord | None = None
    stages: tuple[int, ...] = ()
    min_channels: int = 0
    args: FrozenDict = field(default_factory=FrozenDict)
    init: Init = "identity"
    name: str | None = None
    share: Share | None = None
    optional: bool = False

    @property
    def block_name(self) -> str:
        """The block's registered name, or the name of its class or of the function that makes it."""
        return name_of(self.block)

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
        """The rule as in a YAML file, JSON-ready, without what is default; classes and functions appear by name."""
        result: dict[str, Any] = {"block": self.block_name}
        for spec in fields(self)[1:]:
            value = getattr(self, spec.name)
            default = spec.default if spec.default is not MISSING else FrozenDict()
            if value == default:
                continue
            single = spec.name in ("after", "before", "replace", "type", "exclude") and len(value) == 1
            result[written(spec.name)] = thawed(value[0] if single else value)
        return result


@dataclass(frozen=True)
class Recipe:
    """A named list of rules, applied in order."""

    name: str
    rules: tuple[Rule, ...]
    source: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The recipe as in a YAML file, JSON-ready; `load_recipe` takes it back, a function or the like apart."""
        source = {} if self.source is None else {"source": self.source}
        return {"name": self.name, **source, "rules": [rule.to_dict() for rule in self.rules]}

    def to_yaml(self) -> str:
        """The recipe as the text of a YAML file; `load_recipe` takes it back.

        Raises:
            RecipeError: a rule's target is a function or the like, which no file can hold.
        """
        faults = [
            Fault(f"rule {number}: no file can hold the {target} of `{field}`; a plan has the names that it found: "
                  "ai.plan(model, recipe).recipe.to_yaml()")
            for number, rule in enumerate(self.rules, 1) for field, target in targets_of(rule)
        ]  # fmt: skip
        if faults:
            raise RecipeError(faults)
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)
        return text

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
    """The tree of a dict, or of keyword arguments; an `Every` or a `With` may stand for its mapping."""
    return yaml_text.from_python(value, report, lambda v: thawed(v) if isinstance(v, Every | With) else v)
