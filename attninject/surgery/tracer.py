"""Local graphs: one module's own forward as a torch.fx graph, all its children leaves. Reads only.

A plain trace freezes what Python decides on the way: `self.training`, optional arguments, attributes,
the kind of a value. So a trace here records every attribute it reads, takes the optional arguments as the
probe saw them, is made once for train and once for eval where that matters, and is accepted only when its
operations, replayed on the probe's values, are those of the module's own forward (see `faithfulness`).
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from attninject.errors import TraceRefused
from attninject.observe.snapshot import PATCHING, Snapshot, generators, rng_kept, undoing

from .alignment import align
from .attribute_guard import AUTOCAST, GRAD, AttributeReads, NoWrites, depends_on, guarded
from .injected_state import base_class
from .local_graph import (
    IN_PLACE,
    Arguments,
    AttributeRead,
    Decision,
    LocalGraph,
    called_forwards,
    expression_of,
    is_number,
    run_part,
    signature_of,
)
from .traced_sizes import with_traced_sizes

_CHECKPOINT_FLAGS = frozenset({"grad_checkpointing", "use_checkpoint", "with_cp", "memory_efficient"})


class _Proxy(fx.Proxy):
    """Keeps `x += y` in place: a plain Proxy turns it into `x = x + y`."""

    __hash__ = fx.Proxy.__hash__


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    """Of a number, `n += 1` makes another; as generated code it would give the old one's name to it."""
    fn, of_number = (
        getattr(operator, f"i{name}"),
        getattr(operator, f"{name}_" if name in ("and", "or") else name),
    )

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        tracer: Any = self.tracer
        made = of_number if is_number(self.node, tracer.plain_inputs) else fn
        return tracer.create_proxy("call_function", made, (self, other), {})  # type: ignore[no-any-return]

    return method


for _name in sorted(IN_PLACE):
    setattr(_Proxy, f"__i{_name}__", _in_place(_name))


class _TensorProxy(_Proxy):
    """Stands for an argument that the probe saw to be a tensor: `isinstance(x, Tensor)` is true."""

    _is_param = False  # asked by isinstance(x, nn.Parameter)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return Tensor


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else `self.count.add_(1)` would really count during the trace

    def __init__(
        self, forward: Callable[..., Any], arguments: Arguments, reads: AttributeReads, decide: bool
    ) -> None:
        super().__init__()
        self.decide = decide
        self.forward, self.arguments, self.reads = forward, arguments, reads
        self.tensor_inputs = frozenset(a.name for a in arguments.inputs if a.tensor)
        self.plain_inputs = frozenset(
            a.name for a in arguments.inputs if isinstance(a.example, (int, float, tuple))
        )
        self.decisions: dict[str, bool] = {}
        self.asked: list[fx.Node] = []
        if decide:
            called = called_forwards(base_class(reads.owner))
            reads.parts = {name: functools.partial(self.part, name) for name in called}
        self.known = {id(t) for t in (*reads.owner.parameters(), *reads.owner.buffers())}

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls of other threads, which torch.fx sends here too, run as they are."""
        if threading.get_ident() != self.reads.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if node.op == "placeholder" and node.target in self.tensor_inputs:
            return _TensorProxy(node, self)
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide by plain arguments and the sizes of tensors, and note it; by nothing else."""
        if not self.decide:
            return bool(super().to_bool(obj))
        try:
            expression = expression_of(obj.node, self.tensor_inputs)
            outcome = self.decisions[expression] = self.arguments.value_of(expression)
        except TraceRefused:
            return bool(super().to_bool(obj))
        self.asked.append(obj.node)
        return outcome

    def part(self, name: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        """A method that is a part of the forward: one step of the graph, as a child's call is."""
        method = self.create_proxy("get_attr", name, (), {})
        return self.create_proxy("call_function", run_part, (method, *args), kwargs)

    def tidy(self) -> None:
        """Take out what only served decisions."""
        while self.asked:
            node = self.asked.pop()
            if not node.users and node.op != "placeholder" and node in self.graph.nodes:
                self.asked += node.all_input_nodes
                self.graph.erase_node(node)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """One placeholder per input; constants are passed as they are."""
        positional, keyword = [], {}
        parameters = signature_of(self.forward).parameters
        for argument in self.arguments.items:
            parameter = parameters.get(argument.name)
            if parameter and parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            value = argument.value
            if not argument.constant:
                value = self.create_proxy("placeholder", argument.name, (), {})
            if parameter is None or parameter.kind is parameter.KEYWORD_ONLY:
                keyword[argument.option or argument.name] = value
            else:
                positional.append(value)

        forward = with_traced_sizes(self.forward) if self.decide else self.forward

        def call(root: nn.Module) -> Any:
            self.reads.on = True
            try:
                return forward(root, *positional, **keyword)
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
        if threading.get_ident() != self.reads.thread:
            return attr_val
        with self.reads.paused():
            return super().getattr(attr, attr_val, parameter_proxy_cache)


def trace(
    owner: nn.Module,
    forward: Callable[..., Any],
    arguments: Arguments,
    hidden: frozenset[str] = frozenset(),
    decide: bool = True,
) -> LocalGraph:
    """Trace `forward` (the owner's, before any injection) with all children as leaves.

    Args:
        owner: the module; it is left as it was.
        forward: the function of the owner's original class.
        arguments: which arguments vary, which are constants.
        hidden: slots filled by injection, which read as None.
        decide: let the forward decide by plain arguments and by sizes, and make tensors of such sizes.

    Raises:
        TraceRefused: no graph, or one that would freeze or miss something.
    """
    was_training = owner.training
    with undoing(lambda: owner.__dict__.update(training=was_training)):
        first, reads, decisions, checkpoints = _trace_in_mode(owner, forward, arguments, hidden, decide)
        second = first
        if any(r.path == "" and r.name == "training" for r in reads):
            owner.__dict__["training"] = not was_training
            second, more, others, too = _trace_in_mode(owner, forward, arguments, hidden, decide)
            reads, decisions = tuple(dict.fromkeys((*reads, *more))), (*decisions, *others)
            checkpoints |= too
            if _text(second) == _text(first):
                second = first
    reads = tuple(r for r in reads if (r.path, r.name) != ("", "training"))
    train, eval_ = (first, second) if was_training else (second, first)
    if train is not eval_:
        align(train, eval_)
    return LocalGraph(forward, arguments.decided(decisions), eval_, train, reads, checkpointed=checkpoints)


def _text(graph: fx.Graph) -> str:
    return graph.python_code("self").src


_Traced = tuple[fx.Graph, tuple[AttributeRead, ...], tuple[Decision, ...], bool]
"""A graph, the attributes read, what was decided, and whether parts of it were checkpointed."""


def _trace_in_mode(
    owner: nn.Module,
    forward: Callable[..., Any],
    arguments: Arguments,
    hidden: frozenset[str],
    decide: bool,
) -> _Traced:
    """One graph for the mode that the owner is in, with and without gradients and autocast.

    A forward may ask, as a checkpointing wrapper does, and then do the same; where it does not, there is no graph.
    """
    answers = {GRAD: torch.is_grad_enabled(), AUTOCAST: False}
    tried, traced = [answers], list[_Traced]()
    for answers in tried:
        reads = AttributeReads(owner, hidden, answers)
        traced.append(_trace_once(owner, forward, arguments, reads, decide))
        if _text(traced[-1][0]) != _text(traced[0][0]):
            changed = next(state for state in answers if answers[state] != tried[0][state])
            raise TraceRefused(depends_on(changed))
        flipped = ({**answers, state: not answers[state]} for state in sorted(reads.asked))
        tried += [other for other in flipped if other not in tried]
    graphs, found, decisions, checkpoints = zip(*traced, strict=True)
    reads_of_all = tuple(dict.fromkeys(read for each in found for read in each))
    return graphs[0], reads_of_all, tuple(d for each in decisions for d in each), any(checkpoints)


def _trace_once(
    owner: nn.Module,
    forward: Callable[..., Any],
    arguments: Arguments,
    reads: AttributeReads,
    decide: bool,
) -> _Traced:
    tracer = _Tracer(forward, arguments, reads, decide)
    before, drawn = Snapshot(owner), generators()
    try:
        with rng_kept(), undoing(before.restore):
            with PATCHING, guarded(reads, decide), NoWrites():
                graph = tracer.trace(owner)
                tracer.tidy()
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
        if name in _CHECKPOINT_FLAGS and not decide:
            raise TraceRefused("it can checkpoint its children")
        if key not in paths:
            raise TraceRefused("it reads attributes of a module outside itself")
        found.append(AttributeRead(paths[key], name, value))
    if not all(r.holds(owner) for r in found):
        raise TraceRefused("it reads an attribute that is another at every look")
    return graph, tuple(found), tuple(Decision(*d) for d in tracer.decisions.items()), reads.checkpoints
