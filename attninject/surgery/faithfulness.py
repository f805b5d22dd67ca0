"""Is a graph what its module does? Replayed on the probe's values, operation by operation."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn

from attninject.errors import TraceRefused
from attninject.observe.meta_kernels import execute, meta_like
from attninject.observe.record import (
    Call,
    Op,
    Record,
    Ref,
    map_refs,
    map_tensors,
    name_of,
    tensors_in,
    written_tensors,
)
from attninject.observe.recorder import Mode, calls_through
from attninject.observe.snapshot import stand_ins

from .local_graph import Effect, LocalGraph, bound, run_part


def check(local: LocalGraph, owner: nn.Module, call: Call, record: Record, training: bool) -> LocalGraph:
    """Compare a graph with what the probe saw the owner's own forward do.

    The graph is run on the probe's values, with the recorded results in place of the children. It must
    make the same sequence of ATen operations and child calls, on the same values.

    Returns:
        The same graph with `effects` or `train_effects` filled in.

    Raises:
        TraceRefused: they differ.
    """
    graph = local.train if training else local.eval
    try:
        effects = _Replay(graph, owner, call, call.events, record, training).run(local)
    except TraceRefused:
        events = _without_glances(call)
        if len(events) == len(call.events):
            raise
        effects = _Replay(graph, owner, call, events, record, training).run(local)
    if training and local.train is not local.eval:
        return dataclasses.replace(local, train_effects=effects)
    return dataclasses.replace(local, effects=effects)


def _without_glances(call: Call) -> list[Op | Call]:
    """The events of a call without an `x.data` that nothing reads: `isinstance(x.data, …)` makes no node of a graph."""
    read = {value for event in call.events for value in event.ins}.union(call.outs)
    return [
        e for e in call.events if isinstance(e, Call) or e.name != "aten.detach.default" or read & {*e.outs}
    ]


class _Replay(Mode):
    def __init__(
        self,
        graph: fx.Graph,
        owner: nn.Module,
        call: Call,
        events: list[Op | Call],
        record: Record,
        training: bool,
    ) -> None:
        super().__init__()
        self.training = training
        self.graph, self.owner, self.call, self.record = graph, owner, call, record
        self.events = iter(events)
        self.current: dict[int, int] = {}
        self.keep: list[Any] = []
        self.seen: list[Op] = []

    def twin(self, ref: Ref) -> Tensor:
        tensor = self.record.values[ref.value].twin
        self.current[id(tensor)] = ref.value
        return tensor

    def expect(self, kind: type, what: str) -> Any:
        event = next(self.events, None)
        if not isinstance(event, kind):
            raise TraceRefused(f"its graph does something else than its forward (at {what})")
        return event

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = self.expect(Op, name_of(func))
        ins = tensors_in(args, kwargs)
        if op.name != name_of(func) or any(
            self.current.get(id(t), i) != i for t, i in zip(ins, op.ins, strict=False)
        ):
            raise TraceRefused(f"its graph does {func} where its forward does {op.name}")
        try:
            out = execute(func, args, kwargs)
        except RuntimeError:  # what the forward makes by itself lies on its own device
            args, kwargs = map_tensors((args, kwargs), meta_like)
            out = execute(func, args, kwargs)
        outs = tensors_in(out)
        outs += [t for t in written_tensors(func, args, kwargs) if not any(t is o for o in outs)]
        for tensor, value in zip(outs, op.outs, strict=False):
            if tuple(tensor.shape) != self.record.shape(value):
                raise TraceRefused(f"its graph gives other shapes than its forward at {func}")
            # a factory detaches its result where somebody else has it, too, as recordings do but for real ones
            if ins or self.record.mode != "real":
                self.keep.append(tensor)
            self.current[id(tensor)] = value
        self.seen.append(op)
        return out

    def run(self, local: LocalGraph) -> dict[fx.Node, Effect]:
        env: dict[fx.Node, Any] = {}
        effects: dict[fx.Node, Effect] = {}
        given = bound(local.forward, self.call.args, self.call.kwargs)
        with torch.no_grad():
            for node in self.graph.nodes:
                self.seen = []
                args = fx.node.map_arg(node.args, env.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
                if node.op == "placeholder":
                    env[node] = map_refs(given[str(node.target)][0], self.twin)
                elif node.op == "get_attr":
                    env[node] = self.attribute(str(node.target))
                elif node.op == "call_module":
                    env[node] = self.child(node, args, kwargs)
                elif node.op == "output":
                    self.finish(args[0])
                else:
                    env[node] = self.operation(node, args, kwargs)
                if node.op != "output":
                    effects[node] = self.effect(env[node])
        return effects

    def effect(self, out: Any) -> Effect:
        values = self.record.values
        storages: set[int] = set()

        def refer(tensor: Tensor) -> Ref | None:
            value = self.current.get(id(tensor))
            if value is None:
                return None
            storages.add(values[value].storage)
            return Ref(value)

        tree = map_tensors(out, refer)
        writes = frozenset().union(*(e.writes for e in self.seen if e.writes))
        return Effect(frozenset(storages), writes, tree)

    def attribute(self, path: str) -> Any:
        value = operator.attrgetter(path)(self.owner)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.record.stand_ins:
            raise TraceRefused(f"its graph reads {path}, which is no tensor of the model")
        return self.held(value)

    def held(self, tensor: Tensor) -> Tensor:
        """What stands for a tensor of the owner."""
        known = self.record.constant_of.get(id(tensor))
        if known is not None:
            return self.twin(Ref(known))
        self.keep.append(made := torch.empty_like(tensor, device="meta"))
        return made

    def child(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        return self.called(_submodule(self.owner, str(node.target)), args, kwargs, str(node.target))

    def called(self, module: nn.Module | None, args: Any, kwargs: Any, name: str) -> Any:
        """The recorded result of a child's call."""
        event = self.expect(Call, name)
        if event.module is not module:
            raise TraceRefused(f"its graph calls {name} where its forward calls another module")
        given = map_tensors((args, kwargs), lambda t: Ref(self.current.get(id(t), -1)))
        if _nested(given) != _nested((event.args, event.kwargs)):
            raise TraceRefused(f"its graph gives {name} other inputs than its forward does")
        self.seen += event.ops()
        written = (o for op in self.seen if op.writes for o in op.outs)
        for value in written:  # has a new version, whichever tensor stands for it here
            values = self.record.values
            for tensor, held in self.current.items():
                if values[held].twin is values[value].twin:
                    self.current[tensor] = value
        return map_refs(event.out, self.twin)

    def operation(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        try:
            if node.target is run_part:
                return self.part(args, kwargs)
            with self:
                if node.op == "call_function":
                    return node.target(*args, **kwargs)  # type: ignore[operator]
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        except TraceRefused:
            raise
        except Exception as error:
            raise TraceRefused(f"its graph fails on the probe's values ({error})") from error

    def part(self, args: Any, kwargs: Any) -> Any:
        """Run a method of the owner, with the recorded results in place of the children here too."""

        def child(_: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
            return self.called(module, args, kwargs, type(module).__name__)

        with stand_ins(self.owner, self.held), calls_through(child):
            self.owner.__dict__["training"] = self.training
            with self:
                return run_part(*args, **kwargs)

    def finish(self, out: Any) -> None:
        for event in self.events:  # a hook may look at the result
            if not self.call.hooked or isinstance(event, Call) or event.writes:
                raise TraceRefused("its forward does more than its graph")
        if tuple(self.current.get(id(t)) for t in tensors_in(out)) != self.call.outs:
            raise TraceRefused("its graph returns other values than its forward")
        if self.call.exotic:
            raise TraceRefused(f"its forward returns a {self.call.exotic}, which a graph would not")


def _submodule(owner: nn.Module, path: str) -> nn.Module | None:
    try:
        return owner.get_submodule(path)
    except AttributeError:
        return None


def _nested(tree: Any) -> Any:
    """The values in recorded arguments, each as deep in lists as it is there: a list of one is not its item."""
    if isinstance(tree, Ref):
        return tree.value
    if not isinstance(tree, (tuple, list)):
        tree = tree.values() if isinstance(tree, Mapping) else ()
    return [found for item in tree if (found := _nested(item)) != []]
