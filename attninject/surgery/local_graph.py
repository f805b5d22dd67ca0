"""A module's own forward as a graph, as data: how it was called, what it read, how its nodes are named."""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn

from attninject.errors import TraceRefused

# The values of an attribute that is not there, and of a child, whichever it is.
MISSING = type("Missing", (), {"__repr__": lambda self: "MISSING", "__reduce__": lambda self: "MISSING"})()
PRESENT = type("Present", (), {"__repr__": lambda self: "PRESENT"})()


DECISION_NAMES: Mapping[str, Any] = {"_operator": operator, "_Tensor": Tensor}  # what expressions may name
_KINDS = {"_Tensor": Tensor, "tuple": tuple, "int": int, "float": float}

signature_of = functools.lru_cache(maxsize=1024)(inspect.signature)  # of a forward, which many owners share

# --- arguments ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Argument:
    """One parameter of a forward: an input of the graph, or a constant that the graph depends on.

    `example`: of an input, what this call gives; a tensor on the meta device for a tensor, MISSING if not known.
    `option`: its key, if it is one of `**options`; of those themselves, a constant, `value` has the keys in order.
    """

    name: str
    constant: bool = False
    value: Any = None
    tensor: bool = False
    example: Any = field(default=MISSING, compare=False)
    option: str = ""


@dataclass(frozen=True)
class Arguments:
    """How a forward is called, as far as a graph depends on it."""

    items: tuple[Argument, ...]
    decisions: tuple[Decision, ...] = ()  # of a graph: what its forward decided by the inputs

    @property
    def inputs(self) -> tuple[Argument, ...]:
        """Those that vary from call to call."""
        return tuple(a for a in self.items if not a.constant)

    @property
    def constants(self) -> tuple[Argument, ...]:
        """None, booleans and strings: a different value needs a graph of its own."""
        return tuple(a for a in self.items if a.constant)

    def decided(self, decisions: Iterable[Decision]) -> Arguments:
        """Those of a graph with these decisions; first, each input that they ask about is of the kind that it is here."""
        asked = tuple(dict.fromkeys(decisions))
        kinds = []
        for a in self.inputs:
            if any(re.search(rf"(?<![\w.]){a.name}\b", d.expression) for d in asked):
                kind = next(k for k in _KINDS if isinstance(a.example, _KINDS[k]))
                kinds.append(Decision(f"isinstance({a.name}, {kind})", True))
        return Arguments(self.items, tuple(dict.fromkeys((*kinds, *asked))))

    def value_of(self, expression: str) -> bool:
        """What a decision's expression is in this call.

        Raises:
            TraceRefused: it cannot be told without the tensors' values.
        """
        known = {d.expression: d.outcome for d in self.decisions}
        if expression in known:
            return known[expression]
        try:
            names = {a.name: a.example for a in self.inputs if a.example is not MISSING}
            return bool(
                eval(expression, dict(DECISION_NAMES), names)
            )  # the text is ours, made from the graph
        except Exception as error:
            raise TraceRefused(f"it decides by its arguments ({expression})") from error

    def fits(self, decided: Arguments) -> bool:
        """Whether a graph made for `decided` serves a call like this one."""
        try:
            return self.items == decided.items and all(
                self.value_of(d.expression) is d.outcome for d in decided.decisions
            )
        except TraceRefused:
            return False

    @staticmethod
    def of(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """From one call's arguments.

        Raises:
            TraceRefused: the forward takes variable arguments and was given some.
        """
        items = []
        for name, (value, parameter) in bound(forward, args, kwargs).items():
            option = name.removeprefix(_OPTION) if name != parameter.name else ""
            if option and not option.isidentifier():
                raise TraceRefused(f"its forward is given an option {option!r}")
            if option or parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                items.append(_argument(name, value, option))
            elif parameter.kind is parameter.VAR_POSITIONAL and value:
                raise TraceRefused("its forward takes variable arguments")
            else:
                items.append(Argument(name, True, tuple(value)))
        return Arguments(tuple(items))


_OPTION = "_option_"


def bound(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, tuple[Any, inspect.Parameter]]:
    """What each parameter of a forward after `self` gets, by name; each of `**options` comes after them, by itself."""
    signature = signature_of(forward)
    given = signature.bind(None, *args, **kwargs)
    given.apply_defaults()
    found: dict[str, tuple[Any, inspect.Parameter]] = {}
    for name, parameter in list(signature.parameters.items())[1:]:
        found[name] = (given.arguments[name], parameter)
        if parameter.kind is parameter.VAR_KEYWORD:
            found.update({_OPTION + key: (value, parameter) for key, value in given.arguments[name].items()})
    return found


def _argument(name: str, value: Any, option: str) -> Argument:
    if value is None or isinstance(value, (bool, str)):
        return Argument(name, True, value, option=option)
    return Argument(name, tensor=isinstance(value, Tensor), example=_example(value), option=option)


def _example(value: Any) -> Any:
    """What a forward may decide by: a plain value, or the sizes of a tensor."""
    if isinstance(value, Tensor):
        return torch.empty(tuple(value.shape), device="meta")
    if isinstance(value, tuple):
        return value if all(_plain(v) for v in value) else MISSING
    return value if isinstance(value, (int, float)) else MISSING


def _plain(value: Any) -> bool:
    inner = isinstance(value, tuple) and all(map(_plain, value))
    return inner or value is None or isinstance(value, (bool, int, float, str))


@dataclass(frozen=True)
class Decision:
    """A question that a forward asked about its inputs, and the answer: `if x.shape[2] % 2`.

    `expression`: Python, of the inputs' names and `DECISION_NAMES`.
    """

    expression: str
    outcome: bool


SIZES = frozenset({"shape", "ndim", "size", "dim", "ndimension", "numel"})


def expression_of(node: Any, tensors: frozenset[str]) -> str:
    """The text of a decision: how a node of a graph follows from the inputs alone.

    Args:
        node: of the graph, or an argument of one.
        tensors: names of the inputs that are tensors, of which only the sizes may be looked at.

    Raises:
        TraceRefused: it follows from more than that.
    """
    if isinstance(node, (tuple, list)):
        return f"({''.join(expression_of(item, tensors) + ', ' for item in node)})"
    if not isinstance(node, fx.Node):
        if node is None or isinstance(node, (bool, int, float, str)):
            return repr(node)
    elif node.op == "placeholder" and node.target not in tensors:
        return str(node.target)
    elif node.op == "call_method" and node.target in SIZES and not node.kwargs:
        of, *given = node.args
        return f"{_sized(of, tensors)}.{node.target}({', '.join(expression_of(g, tensors) for g in given)})"
    elif node.target is getattr and node.args[1] in SIZES:
        return f"{_sized(node.args[0], tensors)}.{node.args[1]}"
    elif _is_arithmetic(node) and not node.kwargs:
        name = "int" if node.target is int else f"_operator.{node.target.__name__}"  # type: ignore[union-attr]
        return f"{name}({', '.join(expression_of(a, tensors) for a in node.args)})"
    raise TraceRefused("it decides by values that are no arguments of it")


def is_number(node: Any, plain: frozenset[str]) -> bool:
    """Whether a node of a graph is a number or a tuple of them: one of the `plain` inputs, a size, or made of those."""
    if not isinstance(node, fx.Node):
        return _plain(node)
    if node.op == "placeholder":
        return node.target in plain
    if node.target in SIZES or (node.target is getattr and node.args[1] in SIZES):
        return True
    return _is_arithmetic(node) and all(is_number(a, plain) for a in node.args)


def _is_arithmetic(node: fx.Node) -> bool:
    """Whether a node is one of Python's own operations, on whatever it is."""
    return node.target is int or getattr(node.target, "__module__", "") == "_operator"


def _sized(node: Any, tensors: frozenset[str]) -> str:
    if isinstance(node, fx.Node) and node.op == "placeholder" and node.target in tensors:
        return str(node.target)
    raise TraceRefused("it decides by sizes that are not those of its arguments")


# --- the graph ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttributeRead:
    """An attribute that a trace read: of the owner (`path` "") or of a module below it, or of settings that it holds.

    `set_by_run`: whoever calls the owner sets it first, so a model at rest may have another.
    """

    path: str
    name: str
    value: Any = field(compare=False)
    set_by_run: bool = field(default=False, compare=False)

    def holds(self, owner: nn.Module) -> bool:
        """Whether the attribute still has this value."""
        try:
            module = owner.get_submodule(self.path)
        except AttributeError:
            return False
        try:
            now = operator.attrgetter(self.name)(module)
        except AttributeError:
            now = MISSING
        if self.value is PRESENT:
            return isinstance(now, nn.Module)
        if self.value is MISSING or now is MISSING:
            return now is self.value
        return unchanged(now, self.value)


def unchanged(now: Any, then: Any) -> bool:
    """Equality for plain values (of the same type), identity for everything else."""
    if isinstance(then, (bool, type(None))) or not isinstance(then, (int, float, str, tuple, list, dict)):
        return now is then
    return type(now) is type(then) and now == then


@dataclass(frozen=True)
class Target:
    """Names a node of a local graph: the n-th call of a child (by path), or an operation (by its name).

    The same words find the node again in the graph for the other mode, or in a later trace.
    """

    kind: str  # "call", "op" or "input"
    name: str  # path of the child below the owner, the operation's name, e.g. add_1, or the parameter's
    number: int = 1


@dataclass(eq=False)
class LocalGraph:
    """A module's own forward. `eval` and `train` are the same object unless the mode matters."""

    forward: Callable[..., Any]
    arguments: Arguments
    eval: fx.Graph
    train: fx.Graph
    reads: tuple[AttributeRead, ...]
    effects: Mapping[fx.Node, Effect] = field(default_factory=dict)  # of eval
    train_effects: Mapping[fx.Node, Effect] = field(default_factory=dict)  # of train, if another graph
    checkpointed: bool = (
        False  # it checkpoints parts of itself; a generated forward is checkpointed as a whole
    )
    named_by: Arguments | None = None  # those of the trace that its names come from, if that was another

    @property
    def names_from(self) -> Arguments:
        """The arguments whose trace names the nodes as this graph does."""
        return self.named_by or self.arguments

    def fits(self, owner: nn.Module, forward: Callable[..., Any], arguments: Arguments) -> bool:
        """Whether a trace of `owner` would give this very graph: same code, arguments and attributes."""
        return (
            forward is self.forward
            and arguments.fits(self.arguments)
            and all(r.holds(owner) for r in self.reads)
        )

    @property
    def graphs(self) -> tuple[fx.Graph, ...]:
        """The distinct graphs."""
        return (self.eval,) if self.train is self.eval else (self.eval, self.train)


@dataclass(frozen=True)
class Effect:
    """What the probe saw at a node: storages of its result, storages it wrote, values of its result."""

    storages: frozenset[int]
    writes: frozenset[int]
    out: Any


def operation_name(node: fx.Node) -> str:
    """The kind of an operation: `add` for `+`, `+=`, `torch.add`, `x.add_()`; "" for other nodes."""
    if node.op == "call_method":
        return str(node.target).strip("_")
    if node.op != "call_function":
        return ""
    name = getattr(node.target, "__name__", str(node.target)).strip("_")
    if (
        getattr(node.target, "__module__", "") == "_operator"
        and name.startswith("i")
        and name[1:] in IN_PLACE
    ):
        name = name[1:]
    return name


# Python's in-place operators, without the i in front.
IN_PLACE = frozenset({"add", "sub", "mul", "truediv", "floordiv", "matmul", "pow", "and", "or", "xor", "mod"})


def targets(graph: fx.Graph) -> dict[fx.Node, Target]:
    """The name of every call, operation and input of a local graph, which nobody changes once it is made."""
    known = graph.__dict__.get("_attninject_targets")
    if known is None:
        known = graph.__dict__["_attninject_targets"] = _named(graph)
    found: dict[fx.Node, Target] = known
    return found


def rename(graph: fx.Graph, names: dict[fx.Node, Target]) -> None:
    """Have `targets` and `find` of a graph go by these names."""
    graph.__dict__["_attninject_targets"] = names
    graph.__dict__.pop("_attninject_nodes", None)


def _named(graph: fx.Graph) -> dict[fx.Node, Target]:
    seen: dict[str, int] = {}
    names = {}
    for node in graph.nodes:
        if node.op == "call_module":
            n = seen[str(node.target)] = seen.get(str(node.target), 0) + 1
            names[node] = Target("call", str(node.target), n)
        elif node.op == "placeholder":
            names[node] = Target("input", str(node.target))
        elif kind := operation_name(node):
            n = seen[f"::{kind}"] = seen.get(f"::{kind}", 0) + 1
            names[node] = Target("op", kind if n == 1 else f"{kind}_{n - 1}")
    return names


def operands(node: fx.Node) -> dict[int | str, Any]:
    """What a node is given, by position or name; of an operation on a list of tensors (cat, stack) its items."""
    given = list(node.args)
    if node.op != "call_module" and given and isinstance(given[0], (list, tuple)):
        given = list(given[0])
    return dict(enumerate(given)) | dict(node.kwargs)


def set_operand(node: fx.Node, operand: int | str, value: fx.Node) -> None:
    """Exchange one of `operands`."""
    if isinstance(operand, str):
        node.update_kwarg(operand, value)
    elif node.op != "call_module" and isinstance(items := node.args[0], (list, tuple)):
        node.update_arg(0, [value if i == operand else item for i, item in enumerate(items)])
    else:
        node.update_arg(operand, value)


def find(graph: fx.Graph, target: Target) -> fx.Node | None:
    """The node that a target names, or None."""
    known = graph.__dict__.get("_attninject_nodes")
    if known is None:
        known = graph.__dict__["_attninject_nodes"] = {name: node for node, name in targets(graph).items()}
    node: fx.Node | None = known.get(target)
    return node


def walks_modules(cls: type) -> bool:
    """Whether a class's forward reads `self._modules`, where a block would be one more child to call."""
    code = getattr(getattr(cls, "forward", None), "__code__", None)
    todo = [code] if code is not None else []
    while todo:
        part = todo.pop()
        if "_modules" in part.co_names:
            return True
        todo += [c for c in part.co_consts if isinstance(c, CodeType)]
    return False


_forwards: dict[type, tuple[str, ...]] = {}


def public_forwards(cls: type) -> tuple[str, ...]:
    """Names of the forward methods beside `forward` that a class offers (`forward_features`, …)."""
    if cls not in _forwards:
        names = (n for n in dir(cls) if n.startswith("forward_"))
        _forwards[cls] = tuple(n for n in names if callable(getattr(cls, n, None)))
    return _forwards[cls]


def uncalled_forwards(cls: type) -> tuple[str, ...]:
    """Those of them that `forward` does not call, itself or through others: who does would pass a rewritten one by."""
    called = called_forwards(cls)
    return tuple(n for n in public_forwards(cls) if n not in called)


def called_forwards(cls: type) -> frozenset[str]:
    """Those of them that are parts of `forward`."""
    found: set[str] = set()
    waiting = ["forward"]
    while waiting:
        method = inspect.unwrap(getattr(cls, waiting.pop()))
        names = getattr(getattr(method, "__code__", None), "co_names", ())
        new = [n for n in public_forwards(cls) if n in names and n not in found]
        found.update(new)
        waiting += new
    return frozenset(found)


def run_part(part: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In a graph: a forward that is a part of the owner's, called by it."""
    return part(*args, **kwargs)
