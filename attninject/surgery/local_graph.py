"""A module's own forward as a graph, as data: how it was called, what it read, how its nodes are named."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from attninject.errors import TraceRefused
from attninject.observe.record import Ref

# The values of an attribute that is not there, and of a child, whichever it is.
MISSING = type("Missing", (), {"__repr__": lambda self: "MISSING"})()
PRESENT = type("Present", (), {"__repr__": lambda self: "PRESENT"})()


# --- arguments ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Argument:
    """One parameter of a forward: an input of the graph, or a constant that the graph depends on."""

    name: str
    constant: bool = False
    value: Any = None
    tensor: bool = False


@dataclass(frozen=True)
class Arguments:
    """How a forward is called, as far as a graph depends on it."""

    items: tuple[Argument, ...]

    @property
    def inputs(self) -> tuple[Argument, ...]:
        """Those that vary from call to call."""
        return tuple(a for a in self.items if not a.constant)

    @property
    def constants(self) -> tuple[Argument, ...]:
        """None, booleans and strings: a different value needs a graph of its own."""
        return tuple(a for a in self.items if a.constant)

    @staticmethod
    def of(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """From one call's arguments (tensors, or the probe's `Ref`s).

        Raises:
            TraceRefused: the forward takes variable arguments and was given some.
        """
        signature = inspect.signature(forward)
        bound = signature.bind(None, *args, **kwargs)
        bound.apply_defaults()
        items = []
        for name, parameter in list(signature.parameters.items())[1:]:
            value = bound.arguments[name]
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                if value:
                    raise TraceRefused("its forward takes variable arguments")
                items.append(Argument(name, True, ()))
            elif value is None or isinstance(value, (bool, str)):
                items.append(Argument(name, True, value))
            else:
                items.append(Argument(name, tensor=isinstance(value, (Tensor, Ref))))
        return Arguments(tuple(items))


# --- the graph ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttributeRead:
    """An attribute that a trace read: of the owner (`path` "") or of a module below it."""

    path: str
    name: str
    value: Any = field(compare=False)

    def holds(self, owner: nn.Module) -> bool:
        """Whether the attribute still has this value."""
        try:
            module = owner.get_submodule(self.path)
        except AttributeError:
            return False
        now = getattr(module, self.name, MISSING)
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

    kind: str  # "call" or "op"
    name: str  # path of the child below the owner, or the operation's name, e.g. add_1
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

    def fits(self, owner: nn.Module, forward: Callable[..., Any], arguments: Arguments) -> bool:
        """Whether a trace of `owner` would give this very graph: same code, arguments and attributes."""
        return (
            forward is self.forward
            and arguments == self.arguments
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
    """The name of every call and operation of a local graph, which nobody changes once it is made."""
    known = graph.__dict__.get("_attninject_targets")
    if known is None:
        known = graph.__dict__["_attninject_targets"] = _named(graph)
    found: dict[fx.Node, Target] = known
    return found


def _named(graph: fx.Graph) -> dict[fx.Node, Target]:
    seen: dict[str, int] = {}
    names = {}
    for node in graph.nodes:
        if node.op == "call_module":
            n = seen[str(node.target)] = seen.get(str(node.target), 0) + 1
            names[node] = Target("call", str(node.target), n)
        elif kind := operation_name(node):
            n = seen[f"::{kind}"] = seen.get(f"::{kind}", 0) + 1
            names[node] = Target("op", kind if n == 1 else f"{kind}_{n - 1}")
    return names


def find(graph: fx.Graph, target: Target) -> fx.Node | None:
    """The node that a target names, or None."""
    known = graph.__dict__.get("_attninject_nodes")
    if known is None:
        known = graph.__dict__["_attninject_nodes"] = {name: node for node, name in targets(graph).items()}
    node: fx.Node | None = known.get(target)
    return node


_forwards: dict[type, tuple[str, ...]] = {}


def public_forwards(cls: type) -> tuple[str, ...]:
    """Names of the forward methods beside `forward` that a class offers (`forward_features`, …)."""
    if cls not in _forwards:
        names = (n for n in dir(cls) if n.startswith("forward_"))
        _forwards[cls] = tuple(n for n in names if callable(getattr(cls, n, None)))
    return _forwards[cls]
