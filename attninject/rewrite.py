"""The only file that changes a model's structure: `apply` puts blocks in, `revert` takes them out.

A holder (the module that a block becomes a child of) gets a generated subclass of its own class whose
forward runs the block: within the holder's own graph (`graph`), or around its forward (`module`). Object,
children, keys and methods stay. Generated classes hold no module and no tensor, so copies are independent;
they are cached, and rebuilt on unpickling from the original class and the recorded edit.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import inspect
import itertools
import linecache
import operator
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from .edits import (
    CONTAINERS,
    Change,
    Contents,
    Injected,
    Insertion,
    as_original,
    base_class,
    extended_since,
    injected_in,
    insertions,
)
from .errors import CannotRewriteError, TraceRefused
from .layout import EXTENT, Extent, Layout, note_extent, run_block
from .probe import Inputs, run
from .snapshot import undoing
from .trace import IN_PLACE, MISSING, PRESENT, Arguments, LocalGraph, Read, check, find, trace

# --- apply and revert --------------------------------------------------------------------------


@contextlib.contextmanager
def apply(changes: Sequence[Change]) -> Iterator[None]:
    """Put blocks in, for good unless something raises, here or in the body: then every holder is as it was.

    All classes are generated before the first holder is touched.
    """
    sources = {id(s): s for change in changes for s in change.sources if s is not None}
    prepared: list[tuple[nn.Module, type]] = []
    for change in changes:
        known = injected_in(change.holder)
        edit = (known.edit if known else ()) + tuple(i for i, _ in change.blocks)
        local = change.local or (known.local if known else None)
        watched = id(change.holder) in sources or (known is not None and known.watched)
        prepared.append((change.holder, generate(base_class(change.holder), edit, local, watched)))
    holders = {id(change.holder) for change in changes}
    for source in (s for key, s in sources.items() if key not in holders):
        known = injected_in(source) or Injected(type(source), (), None)
        prepared.append((source, generate(known.base, known.edit, known.local, True)))
    with _all_or_nothing([module for module, _ in prepared]):
        for change in changes:
            for (insertion, block), made_by in zip(change.blocks, change.sources, strict=True):
                _attach(change.holder, insertion, block)
                if made_by is not None:
                    block.__dict__[EXTENT] = made_by.__dict__.setdefault(EXTENT, Extent())
        for module, cls in prepared:
            _set_class(module, cls)
        yield


def revert(model: nn.Module, names: Sequence[str]) -> None:
    """Take blocks out by qualified name; holders without any left get their original class back."""
    wanted = set(names)
    gone: dict[int, list[Insertion]] = {}
    in_use: set[int] = set()  # extents that blocks which stay look at
    for name, holder, insertion in insertions(model):
        if name in wanted:
            gone.setdefault(id(holder), []).append(insertion)
        else:
            in_use.add(id(getattr(holder, insertion.name).__dict__.get(EXTENT)))
    prepared = []
    for module in model.modules():
        known = injected_in(module)
        if known is None:
            continue
        left = tuple(i for i in known.edit if i not in gone.get(id(module), ()))
        watched = known.watched and id(module.__dict__.get(EXTENT)) in in_use
        if len(left) < len(known.edit) or watched is not known.watched:
            local = known.local if any(i.target for i in left) else None
            cls = generate(known.base, left, local, watched) if left or watched else known.base
            prepared.append((module, gone.get(id(module), []), cls, watched))
    with _all_or_nothing([module for module, *_ in prepared]):
        for module, blocks, cls, watched in prepared:
            for insertion in blocks:
                _detach(module, insertion)
            if not watched:
                module.__dict__.pop(EXTENT, None)
            _set_class(module, cls)


@contextlib.contextmanager
def _all_or_nothing(holders: list[nn.Module]) -> Iterator[None]:
    """Put classes, attributes and children of some modules back when the body raises."""
    saved = [Contents(holder) for holder in holders]

    def put_back() -> None:
        for contents in saved:
            contents.restore()

    try:
        yield
    except BaseException:
        with undoing(put_back):
            raise


def _attach(holder: nn.Module, insertion: Insertion, block: nn.Module) -> None:
    if insertion.slot == "attribute":
        del holder.__dict__[insertion.name]
    nn.Module.add_module(holder, insertion.name, block)


def _detach(holder: nn.Module, insertion: Insertion) -> None:
    if insertion.slot == "module":
        holder._modules[insertion.name] = None
        return
    del holder._modules[insertion.name]
    if insertion.slot == "attribute":
        holder.__dict__[insertion.name] = None


def _set_class(holder: nn.Module, cls: type) -> None:
    holder.__class__ = cls  # type: ignore[assignment]


# --- generating a class ------------------------------------------------------------------------

_classes: dict[Any, type] = {}
_serial = itertools.count()


def generate(
    base: type[nn.Module], edit: tuple[Insertion, ...], local: LocalGraph | None, watched: bool = False
) -> type:
    """The subclass of `base` whose forward runs the blocks of `edit`; cached.

    Args:
        base: the holder's original class.
        edit: all its insertions, in the order in which they apply.
        local: the graph of base's own forward; needed when an insertion has a target.
        watched: whether it writes the size of its result down, for blocks on tokens.

    Raises:
        CannotRewriteError: a target is not in the graph.
    """
    local = local if any(i.target for i in edit) else None
    key = (base, edit, None if local is None else _local_key(local), watched)
    if key in _classes:
        return _classes[key]
    writer = _Writer(base, edit, local, watched)
    source, names = writer.source(), writer.names
    filename = f"<attninject {base.__module__}.{base.__qualname__} {next(_serial)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(source, filename, "exec"), names)  # the text is ours, made from the graph
    attributes = {
        "_attninject": Injected(base, edit, writer.local, watched),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": names["forward"],
        "__reduce_ex__": _reduce,
        "__copy__": lambda self: _copy(self, lambda state: state),
    }
    if not hasattr(base, "__deepcopy__"):
        attributes["__deepcopy__"] = lambda self, memo: _copy(self, lambda s: copy.deepcopy(s, memo), memo)
    hidden = frozenset(i.name for i in edit if i.target is None)
    if hidden and issubclass(base, CONTAINERS):
        attributes.update(_hiding(base, hidden))
    cls = _classes[key] = _subclass(base, attributes)
    return cls


def _subclass(base: type[nn.Module], attributes: dict[str, Any]) -> type:
    return types.new_class(base.__name__, (base,), {}, lambda body: body.update(attributes))


def _local_key(local: LocalGraph) -> Any:
    """Equal for graphs of the same text, globals and conditions."""
    reads = tuple(sorted((r.path, r.name, _value_key(r.value)) for r in local.reads))
    return local.arguments, reads, *(_graph_key(g) for g in local.graphs)


_graph_keys: weakref.WeakKeyDictionary[fx.Graph, Any] = weakref.WeakKeyDictionary()


def _graph_key(graph: fx.Graph) -> Any:
    if graph not in _graph_keys:
        code = graph.python_code("self")
        _graph_keys[graph] = (code.src, tuple(sorted((k, id(v)) for k, v in code.globals.items())))
    return _graph_keys[graph]


def _value_key(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str, tuple, list, dict)):
        return f"{type(value).__name__} {value!r}"
    return f"id {id(value)}"


class _Writer:
    """Writes the source of a generated forward, and the names that the source needs."""

    def __init__(
        self, base: type[nn.Module], edit: tuple[Insertion, ...], local: LocalGraph | None, watched: bool
    ) -> None:
        self.base, self.edit, self.local, self.watched = base, edit, local, watched
        self.around_result = watched or any(i.target is None and i.position == "after" for i in edit)
        self.names: dict[str, Any] = {
            "_base": base.forward,
            "_remake": remake,
            "run_block": run_block,
            "with_item": with_item,
            "note_extent": note_extent,
        }
        self.parameters = _parameters(base.forward)

    def source(self) -> str:
        lines = [f"def forward({self.header()}):"]
        if self.local:
            lines += self.guards(self.local)
        around = [i for i in self.edit if i.target is None]
        for insertion in around:
            if insertion.position == "before":
                name = self.parameter(insertion.operand)
                lines.append(f"    {name} = {_call(insertion, name)}")
        text, calls = self.inner()
        lines += [c.replace("return ", "_out = ", 1) for c in calls] if self.around_result else calls
        if self.watched:
            lines.append("    note_extent(self, _out)")
        lines += ["    " + _after(i) for i in around if i.position == "after"]
        if self.around_result:
            lines.append("    return _out")
        return text + "\n".join(lines) + "\n"

    def header(self) -> str:
        parts, star = ["self"], False
        for p in self.parameters:
            text = p.name
            if p.kind is p.VAR_POSITIONAL:
                text, star = "*" + text, True
            elif p.kind is p.VAR_KEYWORD:
                text = "**" + text
            elif p.kind is p.KEYWORD_ONLY and not star:
                parts.append("*")
                star = True
            if p.default is not p.empty:
                self.names[f"_default_{p.name}"] = p.default
                text += f"=_default_{p.name}"
            parts.append(text)
        return ", ".join(parts)

    def arguments(self) -> str:
        parts = ["self"]
        for p in self.parameters:
            if p.kind is p.KEYWORD_ONLY:
                parts.append(f"{p.name}={p.name}")
            else:
                star = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(p.kind.name, "")
                parts.append(star + p.name)
        return ", ".join(parts)

    def parameter(self, operand: int | str) -> str:
        if isinstance(operand, str):
            return operand
        return self.parameters[operand].name

    def guards(self, local: LocalGraph) -> list[str]:
        """Lines that make the graph anew when something it depends on is not as it was."""
        tests = []
        for a in local.arguments.constants:
            if isinstance(a.value, tuple):
                tests.append(a.name)  # *args or **kwargs: empty then
            else:
                tests.append(f"{a.name} {'!=' if isinstance(a.value, str) else 'is not'} {a.value!r}")
        slots = self.slots()
        guarded = [r for r in local.reads if (r.path, r.name) not in slots and r.value is not PRESENT]
        for n, read in enumerate(guarded):
            tests.append(self.read_test(n, read))
        if not tests:
            return []
        return [f"    if {' or '.join(tests)}:", f"        return _remake({self.arguments()})"]

    def slots(self) -> set[tuple[str, str]]:
        return {("", i.name) for i in self.edit if i.slot != "free"}

    def read_test(self, n: int, read: Read) -> str:
        holder = _dotted(read.path)
        if read.value is MISSING:
            return f"hasattr({holder}, {read.name!r})"
        if read.value is None or isinstance(read.value, bool):
            return f"{holder}.{read.name} is not {read.value!r}"
        self.names[f"_read_{n}"] = read.value
        plain = isinstance(read.value, (int, float, str, tuple, list, dict))
        return f"{holder}.{read.name} {'!=' if plain else 'is not'} _read_{n}"

    def inner(self) -> tuple[str, list[str]]:
        """Text of the inner functions, and the lines that call them."""
        if self.local is None:
            return "", [f"    return _base({self.arguments()})"]
        given = ", ".join(["self", *(a.name for a in self.local.arguments.inputs)])
        text = self.graph_source("_run_eval", self.local.eval)
        lines = []
        if self.local.train is not self.local.eval:
            text += self.graph_source("_run_train", self.local.train)
            if self.around_result:
                return text, [f"    return (_run_train if self.training else _run_eval)({given})"]
            lines = ["    if self.training:", f"        return _run_train({given})"]
        return text, [*lines, f"    return _run_eval({given})"]

    def graph_source(self, name: str, graph: fx.Graph) -> str:
        edited = edit_graph(graph, tuple(i for i in self.edit if i.target), self.base)
        code = edited.python_code("self")
        self.names.update((k, v) for k, v in code.globals.items() if k not in self.names)
        return code.src.strip().replace("def forward(", f"def {name}(", 1) + "\n\n"


def _parameters(forward: Callable) -> list[inspect.Parameter]:
    return list(inspect.signature(forward).parameters.values())[1:]


def _dotted(path: str) -> str:
    text = "self"
    for part in path.split(".") if path else ():
        text = f"{text}.{part}" if part.isidentifier() else f"getattr({text}, {part!r})"
    return text


def _call(insertion: Insertion, value: str) -> str:
    tail = "".join(f", {a!r}" for a in _layout_arguments(insertion.layout))
    given = f"{value}.clone()" if insertion.copy_given else value
    return f"run_block(self.{insertion.name}, {given}{tail}){'.clone()' if insertion.copy_result else ''}"


def _after(insertion: Insertion) -> str:
    if insertion.output is None:
        return f"_out = {_call(insertion, '_out')}"
    item = f"_out[{insertion.output!r}]"
    return f"_out = with_item(_out, {insertion.output!r}, {_call(insertion, item)})"


def _layout_arguments(layout: Layout) -> tuple[Any, ...]:
    """Arguments of `run_block` behind the value, the defaults left out."""
    if layout.kind == "NLC" or layout.grid:
        return (layout.kind, layout.prefix, layout.grid)
    return () if layout.kind == "NCHW" else (layout.kind,)


def with_item(tree: Any, key: int | str, value: Any) -> Any:
    """A copy of a tuple, list or dict with one item replaced."""
    if isinstance(tree, tuple):
        index = key if int(key) >= 0 else len(tree) + int(key)
        items = [value if i == index else item for i, item in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    plain = type(tree) in (list, dict, OrderedDict)  # `copy.copy` would break a compiled graph
    new = tree.copy() if plain else copy.copy(tree)
    new[key] = value
    return new


# --- editing a graph ---------------------------------------------------------------------------


def edit_graph(graph: fx.Graph, edit: Sequence[Insertion], base: type[nn.Module]) -> fx.Graph:
    """A copy of a local graph with the blocks' calls in it.

    `after`: every later use of the value sees the block's result. `before`: the one call does. Several
    insertions at one node run in their order. An in-place operation on a block's result becomes
    out-of-place, since the block may have kept that result for its backward.
    """
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    new.output(new.graph_copy(graph, copies))
    found = []
    for insertion in edit:
        assert insertion.target is not None
        node = find(graph, insertion.target)
        if node is None:
            raise CannotRewriteError(
                f"the forward of {base.__qualname__} no longer has {insertion.target.name} "
                f"(call {insertion.target.number}), where the block {insertion.name!r} belongs"
            )
        found.append((insertion, copies[node]))
    newest: dict[tuple[fx.Node, Any], fx.Node] = {}
    results = []
    for insertion, node in found:
        if insertion.position == "before":
            results.append(_insert_before(new, node, insertion))
            continue
        key = (node, insertion.output)
        value = newest.get(key) or _value_after(new, node, insertion.output)
        result = newest[key] = _insert_after(new, value, insertion)
        results.append(result)
    for result in results:
        if result.target is run_block:  # else it is a copy already
            _protect(new, result)
    return new


def _block_node(graph: fx.Graph, insertion: Insertion, value: Any) -> fx.Node:
    block = graph.create_node("get_attr", insertion.name)
    given = graph.call_method("clone", (value,)) if insertion.copy_given else value
    result = graph.call_function(run_block, (block, given, *_layout_arguments(insertion.layout)))
    return graph.call_method("clone", (result,)) if insertion.copy_result else result


def _insert_before(graph: fx.Graph, node: fx.Node, insertion: Insertion) -> fx.Node:
    operand = insertion.operand
    with graph.inserting_before(node):
        if isinstance(operand, str):
            result = _block_node(graph, insertion, node.kwargs[operand])
            node.update_kwarg(operand, result)
        else:
            result = _block_node(graph, insertion, node.args[operand])
            node.update_arg(operand, result)
    return result


def _insert_after(graph: fx.Graph, value: fx.Node, insertion: Insertion) -> fx.Node:
    users = list(value.users)
    with graph.inserting_before(value.next):
        result = _block_node(graph, insertion, value)
    for user in users:
        user.replace_input_with(value, result)
    return result


def _value_after(graph: fx.Graph, node: fx.Node, output: int | str | None) -> fx.Node:
    """The node that holds the value: the node itself, or one item of its result, the only one used."""
    if output is None:
        return node
    items = [
        u
        for u in node.users
        if u.op == "call_function" and u.target is operator.getitem and u.args[1] == output
    ]
    others = [u for u in node.users if u not in items]
    with graph.inserting_after(node):
        item = graph.call_function(operator.getitem, (node, output))
    for duplicate in items:
        duplicate.replace_all_uses_with(item)
        graph.erase_node(duplicate)
    unknown = [u for u in others if not (u.op == "call_function" and u.target is operator.getitem)]
    if unknown:
        with graph.inserting_after(item):
            whole = graph.call_function(with_item, (node, output, item))
        for user in unknown:
            user.replace_input_with(node, whole)
    return item


_OUT_OF_PLACE = {
    getattr(operator, f"i{n}"): getattr(operator, n if n not in ("and", "or") else f"{n}_") for n in IN_PLACE
}


def _protect(graph: fx.Graph, result: fx.Node) -> None:
    """Make in-place operations on a block's result out-of-place; later readers see their result."""
    for user in list(result.users):
        if not user.args or user.args[0] is not result:
            continue
        if user.op == "call_function" and user.target in _OUT_OF_PLACE:
            user.target = _OUT_OF_PLACE[user.target]
        elif user.op == "call_function" and user.kwargs.get("inplace"):
            user.update_kwarg("inplace", False)
        elif (
            user.op == "call_method"
            and str(user.target).endswith("_")
            and not str(user.target).endswith("__")
        ):
            user.target = str(user.target)[:-1]
        else:
            continue
        order = {node: i for i, node in enumerate(graph.nodes)}
        later = [u for u in result.users if order[u] > order[user]]
        for other in later:
            other.replace_input_with(result, user)


# --- life of a generated class -----------------------------------------------------------------


def remake(holder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`_remake`, kept out of compiled graphs; disabling only here spares everybody else torch._dynamo's import."""
    return torch.compiler.disable(_remake)(holder, *args, **kwargs)


def _remake(holder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Trace the holder's forward anew, since something the graph depends on has changed, and run it.

    Raises:
        CannotRewriteError: there is no faithful graph any more, or the site is not in it.
    """
    known = injected_in(holder)
    assert known is not None
    if extended_since(holder):
        raise CannotRewriteError(
            f"{known.base.__qualname__} changed since blocks were injected into its forward, and its class was "
            f"extended ({type(holder).__name__}), so the forward cannot be made anew; make the change before that"
        )
    try:
        arguments = Arguments.of(known.base.forward, args, kwargs)
        local = trace(holder, known.base.forward, arguments, known.slots)
        with as_original(holder):
            record = run(holder, Inputs(args, kwargs), "meta", holder.training)
            check(local, holder, record.calls[0], record, holder.training)
    except TraceRefused as refused:
        raise CannotRewriteError(
            f"{known.base.__qualname__} changed since blocks were injected into its forward, and {refused}; "
            "eject the blocks, make the change, and inject again"
        ) from refused
    _set_class(holder, generate(known.base, known.edit, local, known.watched))
    return holder.forward(*args, **kwargs)


def _copy(holder: nn.Module, copy_state: Callable, memo: dict[int, Any] | None = None) -> nn.Module:
    new = type(holder).__new__(type(holder))
    if memo is not None:
        memo[id(holder)] = new
    new.__setstate__(copy_state(holder.__getstate__()))
    return new


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Pickle as the original class plus the edit: generated code is never written to a file."""
    known = injected_in(self)
    assert known is not None
    reduced: Any = known.base.__reduce_ex__(self, protocol)  # type: ignore[call-arg, arg-type]
    if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        raise TypeError(f"{known.base.__qualname__} has its own __reduce__; eject the blocks to pickle it")
    arguments = known.local.arguments if known.local else None
    return (_rebuild, (known.base, known.edit, arguments, known.watched), *reduced[2:])


def _rebuild(
    base: type[nn.Module], edit: tuple[Insertion, ...], arguments: Arguments | None, watched: bool
) -> nn.Module:
    settled = arguments is None
    cls: Any = generate(base, edit, None, watched) if settled else _pending(base, edit, arguments, watched)  # type: ignore[arg-type]
    return cls.__new__(cls)


def _pending(base: type[nn.Module], edit: tuple[Insertion, ...], arguments: Arguments, watched: bool) -> type:
    """A class for the moment between a holder's making and its state: settles once the children are there."""
    key = (base, edit, arguments, watched, "pending")
    if key in _classes:
        return _classes[key]

    def settle(self: nn.Module) -> None:
        slots = frozenset(i.name for i in edit if i.slot != "free")
        local = trace(self, base.forward, arguments, slots)
        _set_class(self, generate(base, edit, local, watched))

    def setstate(self: nn.Module, state: Any) -> None:
        base.__setstate__(self, state)  # type: ignore[attr-defined]
        settle(self)

    known = Injected(base, edit, None, watched)
    attributes = {"_attninject": known, "__setstate__": setstate, "__module__": base.__module__}
    cls = _classes[key] = _subclass(base, attributes)
    return cls


def _hiding(base: type[nn.Module], hidden: frozenset[str]) -> dict[str, Any]:
    """Container methods that leave the blocks out: length, iteration, slices."""

    def shown(self: Any) -> OrderedDict:
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
        if not isinstance(index, slice):
            return base.__getitem__(self, index)  # type: ignore[attr-defined, index]
        chosen = OrderedDict(list(shown(self).items())[index])
        make: Any = base
        return make(chosen) if issubclass(base, nn.Sequential) else make(list(chosen.values()))

    methods["__iter__"] = lambda self: iter(shown(self).values())
    methods["__getitem__"] = getitem
    return methods
