"""Local graphs: one module's own forward as a torch.fx graph, all its children leaves. Reads only.

A plain trace freezes what Python decides on the way: `self.training`, optional arguments, attributes,
the kind of a value. So a trace here records every attribute it reads, takes the optional arguments as the
probe saw them, is made once for train and once for eval where that matters, and is accepted only when its
operations, replayed on the probe's values, are those of the module's own forward.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn

from .errors import TraceRefused
from .probe import Mode
from .record import Call, Op, Record, Ref, map_refs, map_tensors, written_tensors
from .shapes import execute
from .snapshot import PATCHING, Snapshot, generators, rng_kept, undoing

# The values of an attribute that is not there, and of a child, whichever it is.
MISSING = type("Missing", (), {"__repr__": lambda self: "MISSING"})()
PRESENT = type("Present", (), {"__repr__": lambda self: "PRESENT"})()

_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
_ITERATION = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})
_CHECKPOINT_FLAGS = frozenset({"grad_checkpointing", "use_checkpoint", "with_cp", "memory_efficient"})


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
    def of(forward: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Arguments:
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
class Read:
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

    forward: Callable
    arguments: Arguments
    eval: fx.Graph
    train: fx.Graph
    reads: tuple[Read, ...]
    effects: Mapping[fx.Node, Effect] = field(default_factory=dict)  # of eval
    train_effects: Mapping[fx.Node, Effect] = field(default_factory=dict)  # of train, if another graph

    def fits(self, owner: nn.Module, forward: Callable, arguments: Arguments) -> bool:
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


# --- tracing -----------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """Keeps `x += y` in place: a plain Proxy turns it into `x = x + y`."""

    __hash__ = fx.Proxy.__hash__


def _in_place(name: str) -> Callable:
    fn = getattr(operator, name)

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", fn, (self, other), {})

    return method


for _name in sorted(IN_PLACE):
    setattr(_Proxy, f"__i{_name}__", _in_place(f"i{_name}"))


class _TensorProxy(_Proxy):
    """Stands for an argument that the probe saw to be a tensor: `isinstance(x, Tensor)` is true."""

    _is_param = False  # asked by isinstance(x, nn.Parameter)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return Tensor


def _frozen(value: Any) -> Any:
    """A copy of nested plain containers, so that a later change in place shows; what they hold stays the same.

    Raises:
        TraceRefused: a tensor in it, which has no equality to test.
    """
    if isinstance(value, Tensor):
        raise TraceRefused("its forward reads a container of tensors")
    if type(value) in (list, tuple):
        return type(value)(_frozen(v) for v in value)
    if type(value) is dict:
        return {k: _frozen(v) for k, v in value.items()}
    return value.copy() if isinstance(value, (list, dict)) else value


class _Reads:
    """Collects the attributes that modules are asked for; filled slots read as None."""

    def __init__(self, owner: nn.Module, hidden: frozenset[str]) -> None:
        self.owner, self.hidden, self.thread = owner, hidden, threading.get_ident()
        self.on = False
        self.found: dict[tuple[int, str], tuple[nn.Module, Any]] = {}
        self.iterates = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While torch.fx itself looks a tensor's name up."""
        was_on, self.on = self.on, False
        try:
            yield
        finally:
            self.on = was_on

    def get(self, module: nn.Module, name: str) -> Any:
        on = self.on and threading.get_ident() == self.thread
        if not on or name in _INTERNAL or name.startswith("__"):
            if on and module is self.owner and name in _ITERATION:
                self.iterates = True
            return object.__getattribute__(module, name)
        if module is self.owner:
            if name in self.hidden:
                return None
            self.iterates |= name in _ITERATION
        try:
            value = object.__getattribute__(module, name)
        except AttributeError:
            registered = {**module.__dict__["_parameters"], **module.__dict__["_buffers"]}
            registered.update(module.__dict__["_modules"])
            if registered.get(name, MISSING) is None:
                self.note(module, name, None)
            elif name not in registered:
                if not hasattr(type(module), name):
                    self.note(module, name, MISSING)
            elif isinstance(registered[name], nn.Module):
                self.note(module, name, PRESENT)
            raise
        if name in module.__dict__ or isinstance(value, (bool, int, float, str, tuple, type(None))):
            self.note(module, name, value)
        return value

    def note(self, module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, (Tensor, nn.Module)):
            return
        self.found.setdefault((id(module), name), (module, _frozen(value)))


class _NoWrites(Mode):
    """Refuses a trace that would write into a real tensor (a counter, a cache), since the trace alone would count."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if written_tensors(func, args, kwargs or {}):
            raise TraceRefused("its forward writes into a tensor that it did not make")
        return func(*args, **(kwargs or {}))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else `self.count.add_(1)` would really count during the trace

    def __init__(self, forward: Callable, arguments: Arguments, reads: _Reads) -> None:
        super().__init__()
        self.forward, self.arguments, self.reads = forward, arguments, reads
        self.tensor_inputs = {a.name for a in arguments.inputs if a.tensor}
        self.known = {id(t) for t in (*reads.owner.parameters(), *reads.owner.buffers())}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if node.op == "placeholder" and node.target in self.tensor_inputs:
            return _TensorProxy(node, self)
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """One placeholder per input; constants are passed as they are."""
        positional, keyword = [], {}
        parameters = inspect.signature(self.forward).parameters
        for argument in self.arguments.items:
            kind = parameters[argument.name].kind
            if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                continue
            value = argument.value
            if not argument.constant:
                value = self.create_proxy("placeholder", argument.name, (), {})
            if kind is inspect.Parameter.KEYWORD_ONLY:
                keyword[argument.name] = value
            else:
                positional.append(value)

        def call(root: nn.Module) -> Any:
            self.reads.on = True
            try:
                return self.forward(root, *positional, **keyword)
            finally:
                self.reads.on = False

        return call, [self.root]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and id(a) not in self.known:
            raise TraceRefused("its forward uses a tensor that is no parameter or buffer")
        with self.reads.paused():
            return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        with self.reads.paused():
            return super().getattr(attr, attr_val, parameter_proxy_cache)


@contextlib.contextmanager
def _guarded(reads: _Reads) -> Iterator[None]:
    """Record attribute reads; refuse what a graph would silently lose: writes, checkpoints, contexts.

    Other threads may go on making modules; calling one, torch.fx's own patch would be in their way.
    """

    def refuse(why: str, original: Callable) -> Callable:
        def refused(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == reads.thread:
                raise TraceRefused(why)
            return original(*args, **kwargs)

        return refused

    children, grad = "it checkpoints its children", "its forward depends on the grad mode"
    refusals: list[tuple[Any, str, str]] = [
        (torch.utils.checkpoint, "CheckpointFunction", children),
        (torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", children),
        (torch._C, "_set_grad_enabled", grad),
        (torch, "is_grad_enabled", grad),
        (torch.amp.autocast_mode.autocast, "__enter__", "its forward sets autocast"),
        (nn.Module, "__setattr__", "its forward writes an attribute"),
        (nn.Module, "__delattr__", "its forward writes an attribute"),
    ]
    saved = [(holder, name, getattr(holder, name)) for holder, name, _ in refusals]

    def put_back() -> None:
        with contextlib.suppress(AttributeError):
            del nn.Module.__getattribute__
        for holder, name, value in saved:
            setattr(holder, name, value)

    with undoing(put_back):
        for (holder, name, why), (_, _, original) in zip(refusals, saved, strict=True):
            setattr(holder, name, refuse(why, original))
        nn.Module.__getattribute__ = lambda self, name: reads.get(self, name)  # type: ignore[method-assign, arg-type]
        yield


def trace(
    owner: nn.Module, forward: Callable, arguments: Arguments, hidden: frozenset[str] = frozenset()
) -> LocalGraph:
    """Trace `forward` (the owner's, before any injection) with all children as leaves.

    Args:
        owner: the module; it is left as it was.
        forward: the function of the owner's original class.
        arguments: which arguments vary, which are constants.
        hidden: slots filled by injection, which read as None.

    Raises:
        TraceRefused: no graph, or one that would freeze or miss something.
    """
    was_training = owner.training
    with undoing(lambda: owner.__dict__.update(training=was_training)):
        first, reads = _trace_once(owner, forward, arguments, hidden)
        second = first
        if any(r.path == "" and r.name == "training" for r in reads):
            owner.__dict__["training"] = not was_training
            second, more = _trace_once(owner, forward, arguments, hidden)
            reads = tuple(dict.fromkeys((*reads, *more)))
            if _text(second) == _text(first):
                second = first
    reads = tuple(r for r in reads if (r.path, r.name) != ("", "training"))
    train, eval_ = (first, second) if was_training else (second, first)
    return LocalGraph(forward, arguments, eval_, train, reads)


def _text(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def _trace_once(
    owner: nn.Module, forward: Callable, arguments: Arguments, hidden: frozenset[str]
) -> tuple[fx.Graph, tuple[Read, ...]]:
    reads = _Reads(owner, hidden)
    tracer = _Tracer(forward, arguments, reads)
    before, drawn = Snapshot(owner), generators()
    try:
        with rng_kept(), undoing(before.restore):
            with PATCHING, _guarded(reads), _NoWrites():
                graph = tracer.trace(owner)
            dirty, random_drawn = before.changed(), drawn != generators()
    except TraceRefused:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()
        raise TraceRefused(
            f"torch.fx cannot trace it ({text[0] if text else type(error).__name__})"
        ) from error
    if dirty:
        raise TraceRefused("its forward changes a cache of its own")
    if random_drawn:
        raise TraceRefused("its forward draws random numbers in Python")
    if reads.iterates:
        raise TraceRefused("it iterates over its own children")
    paths = {id(m): name for name, m in owner.named_modules()} if reads.found else {}
    found = []
    for (key, name), (_, value) in reads.found.items():
        if name in _CHECKPOINT_FLAGS:
            raise TraceRefused("it can checkpoint its children")
        if key not in paths:
            raise TraceRefused("it reads attributes of a module outside itself")
        found.append(Read(paths[key], name, value))
    if not all(r.holds(owner) for r in found):
        raise TraceRefused("it reads an attribute that is another at every look")
    return graph, tuple(found)


# --- faithfulness ------------------------------------------------------------------------------


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
    effects = _Replay(graph, owner, call, record).run(local)
    if training and local.train is not local.eval:
        return dataclasses.replace(local, train_effects=effects)
    return dataclasses.replace(local, effects=effects)


class _Replay(Mode):
    def __init__(self, graph: fx.Graph, owner: nn.Module, call: Call, record: Record) -> None:
        super().__init__()
        self.graph, self.owner, self.call, self.record = graph, owner, call, record
        self.events = iter(call.events)
        self.current: dict[int, int] = {}
        self.keep: list[Any] = []
        self.seen: list[Op] = []
        self.modules = dict(owner.named_modules(remove_duplicate=False))

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
        op = self.expect(Op, str(func))
        ins: list[Tensor] = []
        map_tensors((args, kwargs), ins.append)
        if op.name != str(func) or any(
            self.current.get(id(t), i) != i for t, i in zip(ins, op.ins, strict=False)
        ):
            raise TraceRefused(f"its graph does {func} where its forward does {op.name}")
        out = execute(func, args, kwargs)
        outs: list[Tensor] = []
        map_tensors(out, outs.append)
        outs += [t for t in written_tensors(func, args, kwargs) if not any(t is o for o in outs)]
        for tensor, value in zip(outs, op.outs, strict=False):
            if tuple(tensor.shape) != self.record.shape(value):
                raise TraceRefused(f"its graph gives other shapes than its forward at {func}")
            self.keep.append(tensor)
            self.current[id(tensor)] = value
        self.seen.append(op)
        return out

    def run(self, local: LocalGraph) -> dict[fx.Node, Effect]:
        env: dict[fx.Node, Any] = {}
        effects: dict[fx.Node, Effect] = {}
        signature = inspect.signature(local.forward)
        bound = signature.bind(None, *self.call.args, **self.call.kwargs)
        bound.apply_defaults()
        with torch.no_grad():
            for node in self.graph.nodes:
                self.seen = []
                args = fx.node.map_arg(node.args, env.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
                if node.op == "placeholder":
                    env[node] = map_refs(bound.arguments[str(node.target)], self.twin)
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
        tree = map_tensors(out, lambda t: Ref(self.current[id(t)]) if id(t) in self.current else None)
        storages: set[int] = set()
        map_refs(tree, lambda r: storages.add(values[r.value].storage))
        writes = frozenset().union(*(e.writes for e in self.seen))
        return Effect(frozenset(storages), writes, tree)

    def attribute(self, path: str) -> Any:
        value = operator.attrgetter(path)(self.owner)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.record.stand_ins:
            raise TraceRefused(f"its graph reads {path}, which is no tensor of the model")
        known = self.record.constant_of.get(id(value))
        if known is not None:
            return self.twin(Ref(known))
        tensor = torch.empty_like(value, device="meta")
        self.keep.append(tensor)
        return tensor

    def child(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        event = self.expect(Call, str(node.target))
        if event.module is not self.modules.get(str(node.target)):
            raise TraceRefused(f"its graph calls {node.target} where its forward calls another module")
        given: list[int | None] = []
        map_tensors((args, kwargs), lambda t: given.append(self.current.get(id(t))))
        if tuple(given) != event.ins:
            raise TraceRefused(f"its graph gives {node.target} other inputs than its forward does")
        self.seen = list(event.ops())
        written = (o for op in self.seen if op.writes for o in op.outs)
        for value in written:  # has a new version
            twin = id(self.record.values[value].twin)
            if twin in self.current:
                self.current[twin] = value
        return map_refs(event.out, self.twin)

    def operation(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        try:
            with self:
                if node.op == "call_function":
                    return node.target(*args, **kwargs)  # type: ignore[operator]
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        except TraceRefused:
            raise
        except Exception as error:
            raise TraceRefused(f"its graph fails on the probe's values ({error})") from error

    def finish(self, out: Any) -> None:
        if next(self.events, None) is not None:
            raise TraceRefused("its forward does more than its graph")
        given: list[int | None] = []
        map_tensors(out, lambda t: given.append(self.current.get(id(t))))
        if tuple(given) != self.call.outs:
            raise TraceRefused("its graph returns other values than its forward")
        if self.call.exotic:
            raise TraceRefused(f"its forward returns a {self.call.exotic}, which a graph would not")


_forwards: dict[type, tuple[str, ...]] = {}


def public_forwards(cls: type) -> tuple[str, ...]:
    """Names of the forward methods beside `forward` that a class offers (`forward_features`, …)."""
    if cls not in _forwards:
        names = (n for n in dir(cls) if n.startswith("forward_"))
        _forwards[cls] = tuple(n for n in names if callable(getattr(cls, n, None)))
    return _forwards[cls]
