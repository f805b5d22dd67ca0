"""What a run of a model leaves behind: its values, operations and module calls, in order.

Tensors in recorded arguments and results are replaced by a `Ref`; what walks such trees is here too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attninject.terms import ProbeMode


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor in the recorded arguments or results of a call: an index into `Record.values`."""

    value: int


@dataclass(eq=False, slots=True)
class Value:
    """One version of one tensor. An in-place operation makes a new version on the same storage."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    twin: Tensor  # on the meta device, of the same shape and strides
    device: torch.device


@dataclass(eq=False, slots=True)
class Op:
    """One ATen operation in a module's own forward, outside its children."""

    time: int
    name: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    writes: frozenset[int]  # storages
    reads: frozenset[int]
    call: Call
    func: Any = None
    given: tuple[Any, dict[str, Any]] = ((), {})  # its arguments; a tensor or a `Ref` for each of `ins`

    @property
    def start(self) -> int:
        """Its time, under the name that a call's beginning has."""
        return self.time


@dataclass(eq=False)
class Call:
    """One call of a module."""

    module: nn.Module
    parent: Call | None
    number: int  # counts this module's calls within one run of the parent, from 1
    start: int
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    out: Any = None
    ins: tuple[int, ...] = ()  # values among the arguments, in order
    outs: tuple[int, ...] = ()  # values among the results, in order
    exotic: str = ""  # class of a nested result that is no plain tuple, list or dict
    end: int = -1
    events: list[Op | Call] = field(default_factory=list)
    runs: dict[int, int] = field(default_factory=dict)  # id of a child -> its calls in this run
    direct: bool = False  # by `module.forward(…)`, past `__call__` and its hooks
    hooked: bool = False  # whether forward hooks saw the result: what they did is among the events

    def ops(self) -> Iterator[Op]:
        """Every operation of the call, those inside its children too."""
        for event in self.events:
            if isinstance(event, Op):
                yield event
            else:
                yield from event.ops()

    @functools.cached_property
    def writes(self) -> frozenset[int]:
        """Storages that the call wrote to."""
        return frozenset().union(*(op.writes for op in self.ops()))


class Record:
    """What one run showed. Calls are listed in the order in which they began."""

    def __init__(self, model: nn.Module, mode: ProbeMode) -> None:
        self.model = model
        self.mode = mode
        self.values: list[Value] = []
        self.calls: list[Call] = []
        self.by_module: dict[int, list[Call]] = {}
        self.stand_ins: dict[int, Tensor] = {}  # id of a tensor of the model -> its stand-in in the run
        self.constants: set[int] = set()  # values that are tensors of the model
        self.constant_of: dict[int, int] = {}  # id of a tensor of the model -> its value
        self.born: dict[int, int] = {}  # storage -> time at which it was first seen
        self.input_values: tuple[int, ...] = ()
        self.numbers: dict[int, dict[str, Any]] = {}  # id of a module's `__dict__` -> what the run set there
        self.iterating: set[int] = set()  # ids of modules that go over their own children in their forward
        self.complete = False
        self.hooks = False  # whether the hooks of the model's owner ran

    def calls_of(self, module: nn.Module) -> list[Call]:
        """The calls of one module, in order."""
        return self.by_module.get(id(module), [])

    @property
    def layers_ahead(self) -> bool:
        """Whether the forward in which the run stopped had not called all of its module's layers with parameters."""
        stopped = next((c for c in reversed(self.calls) if c.end < 0), None)
        layers = stopped.module.modules() if stopped else ()
        return any(not self.calls_of(m) and any(True for _ in m.parameters(recurse=False)) for m in layers)

    def forget(self) -> None:
        """Let go of the calls, which refer to one another: they are freed at once, and no garbage to be looked for."""
        for call in self.calls:
            call.parent = None
            call.events.clear()

    def shape(self, value: int) -> tuple[int, ...]:
        """Shape of a value."""
        return self.values[value].shape

    @functools.cached_property
    def convolved(self) -> frozenset[tuple[int, ...]]:
        """Shapes that convolutions gave in this run: channels behind the batch, then positions."""
        made = (op for op in self.calls[0].ops() if op.name.split(".")[1] in ("convolution", "_convolution"))
        return frozenset(self.shape(o) for op in made for o in op.outs)

    @functools.cached_property
    def projected(self) -> frozenset[tuple[int, ...]]:
        """Shapes (batch, positions, channels) that linear layers and layer norms gave, whose input is one such."""
        if not self.input_values or len(self.shape(self.input_values[0])) != 3:
            return frozenset()
        made = (c for c in self.calls if isinstance(c.module, (nn.Linear, nn.LayerNorm)))
        return frozenset(s for c in made for o in c.outs if len(s := self.shape(o)) == 3)

    def channels(self, shape: tuple[int, ...]) -> int | None:
        """Channels of a value of a shape that a convolution gave, or a layer on sequences; None: of none such."""
        if shape in self.convolved:
            return shape[1]
        return shape[-1] if shape in self.projected else None


def map_tensors(tree: Any, fn: Callable[[Tensor], Any]) -> Any:
    """Apply `fn` to every tensor in nested tuples, lists and dicts; other things stay as they are."""
    return _map(tree, Tensor, fn)


def map_refs(tree: Any, fn: Callable[[Ref], Any]) -> Any:
    """Apply `fn` to every `Ref` in nested tuples, lists and dicts."""
    return _map(tree, Ref, fn)


def map_values(tree: Any, fn: Callable[[Any], Any]) -> Any:
    """Apply `fn` to every tensor and every `Ref`, in order: the arguments that an `Op` was `given`."""
    return _map(tree, (Tensor, Ref), fn)


_LEAVES = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, slice})
_TENSORS = frozenset({Tensor, nn.Parameter})


def tensors_in(*trees: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    _gather(trees, found)
    return found


def _gather(items: Iterable[Any], found: list[Tensor]) -> None:
    for item in items:
        kind = type(item)
        if kind in _LEAVES:
            continue
        if kind in _TENSORS or isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            _gather(item, found)
        elif isinstance(item, Mapping):
            _gather(item.values(), found)


def _map(tree: Any, kind: type | tuple[type, ...], fn: Callable[[Any], Any]) -> Any:
    if isinstance(tree, (tuple, list)):
        items = [t if type(t) in _LEAVES else _map(t, kind, fn) for t in tree]  # the many leaves, quickly
        if isinstance(tree, list):
            return items
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, kind):
        return fn(tree)
    if isinstance(tree, Mapping):
        return {k: _map(v, kind, fn) for k, v in tree.items()}
    return tree


def refs(tree: Any) -> list[Ref]:
    """All `Ref`s of a tree, in order."""
    found: list[Ref] = []
    map_refs(tree, found.append)
    return found


@functools.cache
def written_arguments(op: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an ATen operation writes to."""
    return tuple(
        (i, a.name) for i, a in enumerate(op._schema.arguments) if a.alias_info and a.alias_info.is_write
    )


name_of = functools.cache(str)  # of an ATen operation, as `Op.name` has it


def written_tensors(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that this call of an ATen operation writes to."""
    written = written_arguments(op)
    if not written:
        return []
    return tensors_in([args[at] if at < len(args) else kwargs.get(name) for at, name in written])
