"""A carrier's generated class: made, cached, copied, pickled, and made anew when its graph no longer holds.

A carrier (the module that a block hangs on) gets a generated subclass of its own class whose
forward runs the block: within the carrier's own graph (`graph`), or around its forward (`module`). Object,
children, keys and methods stay. Generated classes hold no module and no tensor, so copies are independent;
they are cached, and rebuilt on unpickling from the original class and the recorded edit.
"""

from __future__ import annotations
import __future__

import contextlib
import copy
import copyreg
import inspect
import itertools
import linecache
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from attninject.errors import CannotRewriteError, TraceRefused
from attninject.observe.example_inputs import Inputs, first_float
from attninject.observe.probe import autocasting, run
from attninject.observe.record import Record, map_tensors
from attninject.observe.snapshot import alone

from . import own_forward, scripting
from .alignment import name_after
from .codegen import ForwardWriter
from .faithfulness import check
from .injected_state import CONTAINERS, OWN, Injected, Insertion, as_original, extended_since, injected_in
from .local_graph import Arguments, LocalGraph, targets
from .tracer import trace


def set_class(carrier: nn.Module, cls: type) -> None:
    """Swap a carrier's class: object, children and keys stay."""
    carrier.__class__ = cls


# --- generating a class ------------------------------------------------------------------------

_classes: dict[Any, type[nn.Module]] = {}
_compiler: Any = torch.compiler  # partly untyped
_serial = itertools.count()


@alone
def generate(known: Injected, own: inspect.Signature | None = None) -> type[nn.Module]:
    """The subclass of `known.base` whose forward runs the blocks of its edit; cached.

    Args:
        known: what the class is to do.
        own: of the forward that was assigned to the carrier, see `own_forward`; None where there is none.

    Raises:
        CannotRewriteError: a target is not in the graph.
    """
    base, edit, watched = known.base, known.edit, known.watched
    local = known.local if known.in_graph else None
    if known.in_graph and local is None:
        return _pending(known)
    key = (base, edit, None if local is None else _local_key(local), watched, own and _own_key(own))
    if key in _classes:
        return _classes[key]
    writer = ForwardWriter(base, edit, local, watched, remake, own)
    source, names = writer.source(), writer.names
    filename = f"<attninject {base.__module__}.{base.__qualname__} {next(_serial)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    flags = __future__.annotations.compiler_flag  # types are for TorchScript, which reads them in the source
    exec(compile(source, filename, "exec", flags=flags), names)  # the text is ours, made from the graph
    attributes = {
        "_attninject": Injected(base, edit, local, watched),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": names["forward"],
        "_attninject_generated": names["forward"],
        scripting.ENTRY: scripting.Scripted(base, edit, local, own is not None),
        scripting.ORIGINAL: scripting.original(base),
        "__reduce_ex__": _reduce,
        "__copy__": lambda self: _copy(self, lambda state: state),
        **own_forward.guards(base, edit, _regenerate),
    }
    own_copy = hasattr(base, "__deepcopy__")
    attributes["__deepcopy__"] = _copy_by_its_class if own_copy else _deep_copy
    hidden = frozenset(i.name for i in edit if i.target is None)
    if hidden and issubclass(base, CONTAINERS):
        attributes.update(_hiding(base, hidden))
    cls = _classes[key] = _subclass(base, attributes)
    return cls


def _subclass(base: type[nn.Module], attributes: dict[str, Any]) -> type[nn.Module]:
    return types.new_class(base.__name__, (base,), {}, lambda body: body.update(attributes))


def _local_key(local: LocalGraph) -> Any:
    """Equal for graphs of the same text, names, globals and conditions."""
    reads = tuple(sorted((r.path, r.name, _value_key(r.value)) for r in local.reads))
    return local.arguments, local.checkpointed, reads, *(_graph_key(g) for g in local.graphs)


_graph_keys: weakref.WeakKeyDictionary[fx.Graph, Any] = weakref.WeakKeyDictionary()


def _graph_key(graph: fx.Graph) -> Any:
    if graph not in _graph_keys:
        code, names = graph.python_code("self"), tuple((n.name, t) for n, t in targets(graph).items())
        _graph_keys[graph] = (code.src, tuple(sorted((k, id(v)) for k, v in code.globals.items())), names)
    return _graph_keys[graph]


def _own_key(own: inspect.Signature) -> Any:
    """Equal for forwards that are called alike, with the very same defaults."""
    return tuple((p.name, p.kind, _value_key(p.default)) for p in own.parameters.values())


def _value_key(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str, tuple, list, dict)):
        return f"{type(value).__name__} {value!r}"
    return f"id {id(value)}"


# --- life of a generated class -----------------------------------------------------------------


def _regenerate(carrier: nn.Module) -> None:
    """Swap a carrier's class for the one that suits the forward that it has now."""
    known = injected_in(carrier)
    assert known is not None
    set_class(carrier, generate(known, own_forward.own_signature(carrier)))


def remake(carrier: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`_remake`, kept out of compiled graphs; disabling only here spares everybody else torch._dynamo's import."""
    return _compiler.disable(_remake)(carrier, *args, **kwargs)


def _remake(carrier: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Trace the carrier's forward anew, since something the graph depends on has changed, and run it.

    A checkpoint that began in the class before comes here again when it recomputes, and finds the graph made.
    What wrapped the forward around this call (the class itself may, as it is made) does so once.

    Raises:
        CannotRewriteError: there is no faithful graph any more, or the site is not in it.
    """
    known = injected_in(carrier)
    assert known is not None
    if extended_since(carrier):
        raise CannotRewriteError(
            f"{known.base.__qualname__} changed since blocks were injected into its forward, and its class was "
            f"extended ({type(carrier).__name__}), so the forward cannot be made anew; make the change before that"
        )
    try:
        local = _graph_of_call(carrier, known, args, kwargs)
    except TraceRefused as refused:
        raise CannotRewriteError(
            f"{known.base.__qualname__} changed since blocks were injected into its forward, and {refused}; "
            "eject the blocks, make the change, and inject again"
        ) from refused
    made: Any = generate(replace(known, local=local))
    set_class(carrier, made)
    return made._attninject_generated(carrier, *args, **kwargs)


@alone
def _graph_of_call(carrier: nn.Module, known: Injected, args: Any, kwargs: Any) -> LocalGraph:
    """The graph of the carrier's original forward, called so: the one that it has, if that still holds, or a new one.

    Raises:
        TraceRefused: there is none, or it is not faithful.
    """
    forward = known.base.forward
    arguments = Arguments.of(forward, args, kwargs)
    if known.local is not None and known.local.fits(carrier, forward, arguments):
        return known.local
    local = trace(carrier, forward, arguments, known.slots)
    if known.local is not None:  # the insertions' names are those of the graph that they were planned in
        name_after(local, known.local)
    elif known.arguments is not None:
        name_after(local, trace(carrier, forward, known.arguments, known.slots))
    with as_original(carrier):
        record = _run_of_call(carrier, Inputs(args, kwargs))
        check(local, carrier, record.calls[0], record, carrier.training)
    return local


def _run_of_call(carrier: nn.Module, inputs: Inputs) -> Record:
    """One recorded run; for real where what the forward makes on a device of its own does not go with meta tensors.

    What autocast has made narrower by then is given in the carrier's own dtype, since the run is without autocast.
    """
    if autocasting():
        dtype = first_float(carrier, torch.empty(0)).dtype
        given = map_tensors(
            (inputs.args, inputs.kwargs), lambda t: t.to(dtype) if t.is_floating_point() else t
        )
        inputs = Inputs(*given)
    try:
        return run(carrier, inputs, "meta", carrier.training)
    except RuntimeError:
        return run(carrier, inputs, "real", carrier.training)


def _copy(
    carrier: nn.Module, copy_state: Callable[[Any], Any], memo: dict[int, Any] | None = None
) -> nn.Module:
    original: Any = carrier
    new: Any = type(carrier).__new__(type(carrier))
    if memo is not None:
        memo[id(carrier)] = new
    new.__setstate__(copy_state(original.__getstate__()))
    made: nn.Module = new
    return made


def _deep_copy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    return _copy(self, lambda state: copy.deepcopy(state, memo), memo)


def _copy_by_its_class(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy as the original class makes it; with the blocks, where that left them out (a `GraphModule` has its own)."""
    known = injected_in(self)
    assert known is not None
    base: Any = known.base
    new: nn.Module = base.__deepcopy__(self, memo)
    if injected_in(new) is None:
        for insertion in known.edit:
            nn.Module.add_module(new, insertion.name, copy.deepcopy(getattr(self, insertion.name), memo))
        set_class(new, generate(replace(known, base=type(new))))
    return new


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Pickle as the original class plus the edit: generated code is never written to a file."""
    known = injected_in(self)
    assert known is not None
    reduced: Any = known.base.__reduce_ex__(self, max(protocol, 2))  # the older ones have no `__newobj__`
    if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        raise TypeError(f"{known.base.__qualname__} has its own __reduce__; eject the blocks to pickle it")
    own = (True,) if OWN in self.__dict__ else ()
    return (_rebuild, (known.base, known.edit, known.names_from, known.watched, *own), *reduced[2:])


def _rebuild(
    base: type[nn.Module],
    edit: tuple[Insertion, ...],
    arguments: Arguments | None,
    watched: bool,
    own: bool = False,
) -> nn.Module:
    known = Injected(base, edit, None, watched, arguments)
    cls = _pending(known) if own else generate(known)
    return cls.__new__(cls)


def _pending(known: Injected) -> type[nn.Module]:
    """A class without its graph: settles once the children are there, as in unpickling, or at the first call."""
    base, edit, watched, arguments = known.base, known.edit, known.watched, known.arguments
    key = (base, edit, arguments, watched, "pending")
    if key in _classes:
        return _classes[key]

    def setstate(self: nn.Module, state: Any) -> None:
        original: Any = base
        original.__setstate__(self, state)
        with contextlib.suppress(
            TraceRefused
        ):  # it reads what only a run sets, and is made anew at its first call
            set_class(self, settled(self, known))

    def reduce(self: nn.Module, protocol: Any) -> Any:
        state: Any = base.__reduce_ex__(self, protocol)
        return (_rebuild, (base, edit, arguments, watched), *state[2:])

    attributes = {
        "_attninject": known,
        "__setstate__": setstate,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "forward": remake,
    }
    cls = _classes[key] = _subclass(base, attributes)
    return cls


@alone
def settled(carrier: nn.Module, known: Injected) -> type[nn.Module]:
    """The class of a carrier that is all there again: with the graph that is known, or with one of such a call.

    Raises:
        TraceRefused: there is no graph of such a call while the model is at rest.
    """
    if known.in_graph and known.local is None and known.arguments is not None:
        known = replace(known, local=trace(carrier, known.base.forward, known.arguments, known.slots))
    return generate(known, own_forward.own_signature(carrier))


def _hiding(base: type[nn.Module], hidden: frozenset[str]) -> dict[str, Any]:
    """Container methods that leave the blocks out: length, iteration, slices."""

    def shown(self: Any) -> OrderedDict[str, nn.Module]:
        return OrderedDict((k, v) for k, v in self._modules.items() if k not in hidden)

    methods: dict[str, Any] = {"__len__": lambda self: len(self._modules) - len(hidden)}
    if issubclass(base, nn.ModuleDict):
        methods["__iter__"] = lambda self: iter(shown(self))
        methods["keys"] = lambda self: shown(self).keys()
        methods["values"] = lambda self: shown(self).values()
        methods["items"] = lambda self: shown(self).items()
        methods["__contains__"] = lambda self, key: key in shown(self)
        return methods

    def getitem(self: Any, index: Any) -> Any:
        make: Any = base
        if not isinstance(index, slice):
            return make.__getitem__(self, index)
        chosen = OrderedDict(list(shown(self).items())[index])
        return make(chosen) if issubclass(base, nn.Sequential) else make(list(chosen.values()))

    methods["__iter__"] = lambda self: iter(shown(self).values())
    methods["__getitem__"] = getitem
    return methods
