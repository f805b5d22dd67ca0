"""One run of a model, recorded: every module call, every operation, and the shapes between them.

The run uses stand-ins for all tensors of the model (on the meta device; else fake tensors; else clones),
so the model's own tensors are never read or written. Everything else that a forward can change in a
module (plain attributes, caches in lists and dicts, modes) is put back afterwards, also when it raises.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import ProbeError

# --- what a run leaves behind ------------------------------------------------------------------


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor in the recorded arguments or results of a call: an index into `Record.values`."""

    value: int


@dataclass(eq=False)
class Value:
    """One version of one tensor. An in-place operation makes a new version on the same storage."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    twin: Tensor  # on the meta device, of the same shape and strides


@dataclass(eq=False)
class Op:
    """One ATen operation in a module's own forward, outside its children."""

    time: int
    name: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    writes: frozenset[int]  # storages
    reads: frozenset[int]
    call: Call


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
    exotic: str = ""  # class of a nested result that is no plain tuple, list or dict
    end: int = -1
    events: list[Op | Call] = field(default_factory=list)
    runs: dict[int, int] = field(default_factory=dict)  # id of a child -> its calls in this run

    @functools.cached_property
    def ins(self) -> tuple[int, ...]:
        """Values among the arguments, in order."""
        return tuple(r.value for r in refs((self.args, self.kwargs)))

    @functools.cached_property
    def outs(self) -> tuple[int, ...]:
        """Values among the results, in order."""
        return tuple(r.value for r in refs(self.out))

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

    def __init__(self, model: nn.Module, mode: str) -> None:
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
        self.iterating: set[int] = set()  # ids of modules that go over their own children in their forward
        self.complete = False

    def calls_of(self, module: nn.Module) -> list[Call]:
        """The calls of one module, in order."""
        return self.by_module.get(id(module), [])

    def shape(self, value: int) -> tuple[int, ...]:
        """Shape of a value."""
        return self.values[value].shape


def map_tensors(tree: Any, fn: Callable[[Tensor], Any]) -> Any:
    """Apply `fn` to every tensor in nested tuples, lists and dicts; other things stay as they are."""
    return _map(tree, Tensor, fn)


def map_refs(tree: Any, fn: Callable[[Ref], Any]) -> Any:
    """Apply `fn` to every `Ref` in nested tuples, lists and dicts."""
    return _map(tree, Ref, fn)


def _map(tree: Any, kind: type, fn: Callable[[Any], Any]) -> Any:
    if isinstance(tree, kind):
        return fn(tree)
    if isinstance(tree, tuple):
        items = [_map(t, kind, fn) for t in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [_map(t, kind, fn) for t in tree]
    if isinstance(tree, Mapping):
        return {k: _map(v, kind, fn) for k, v in tree.items()}
    return tree


def _exotic(tree: Any) -> str:
    """Name of the first class in a nested result that a graph would not rebuild as it was."""
    if not isinstance(tree, (Mapping, tuple, list)):
        return ""
    items = list(tree.values()) if isinstance(tree, Mapping) else list(tree)
    if type(tree) not in (tuple, list, dict) and not hasattr(tree, "_fields"):
        return type(tree).__name__
    return next((found for item in items if (found := _exotic(item))), "")


def refs(tree: Any) -> list[Ref]:
    """All `Ref`s of a tree, in order."""
    found: list[Ref] = []
    map_refs(tree, found.append)
    return found


# --- recording ---------------------------------------------------------------------------------


@functools.cache
def written_arguments(op: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an ATen operation writes to."""
    return tuple(
        (i, a.name) for i, a in enumerate(op._schema.arguments) if a.alias_info and a.alias_info.is_write
    )


def written_tensors(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that this call of an ATen operation writes to."""
    found: list[Tensor] = []
    for position, name in written_arguments(op):
        map_tensors(args[position] if position < len(args) else kwargs.get(name), found.append)
    return found


def storage_of(tensor: Tensor) -> int:
    """Identity of a tensor's storage while the tensor lives; its own id where it has no storage."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return id(tensor)


class Mode(TorchDispatchMode):
    """A dispatch mode that torch does not wrap for torch.compile: that would load all of torch._dynamo."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Recorder(Mode):
    """Sees every ATen operation; `call` sees every module call."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self.clock = itertools.count()
        self.current: dict[int, int] = {}  # id of a tensor -> its newest value
        self.twins: dict[int, Tensor] = {}
        self.keep: list[Any] = []  # ids above stay unique while what they name lives
        self.storages: dict[int, int] = {}
        self.stack: list[Call] = []
        self.thread = threading.get_ident()
        self.model_tensor = {id(stand_in): key for key, stand_in in record.stand_ins.items()}

    def value_of(self, tensor: Tensor) -> int:
        found = self.current.get(id(tensor))
        return self.new_value(tensor) if found is None else found

    def new_value(self, tensor: Tensor) -> int:
        key = id(tensor)
        if key not in self.twins:
            self.keep.append(tensor if self.record.mode != "real" else _Husk.of(tensor, self))
            self.twins[key] = tensor if self.record.mode == "meta" else meta_like(tensor)
        raw = storage_of(tensor)
        storage = self.storages.setdefault(raw, len(self.storages))
        self.record.born.setdefault(storage, next(self.clock))
        value = Value(len(self.record.values), tuple(tensor.shape), tensor.dtype, storage, self.twins[key])
        self.record.values.append(value)
        self.current[key] = value.index
        if key in self.model_tensor:
            self.record.constants.add(value.index)
            self.record.constant_of.setdefault(self.model_tensor[key], value.index)
        return value.index

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.stack:
            return func(*args, **kwargs)
        ins: list[int] = []
        map_tensors((args, kwargs), lambda t: ins.append(self.value_of(t)))
        out = execute(func, args, kwargs)
        written = written_tensors(func, args, kwargs)
        for tensor in written:
            self.new_value(tensor)
        outs: list[int] = []
        map_tensors(out, lambda t: outs.append(self.value_of(t)))
        values = self.record.values
        op = Op(
            time=next(self.clock),
            name=str(func),
            ins=tuple(ins),
            outs=tuple(dict.fromkeys(outs + [self.current[id(t)] for t in written])),
            writes=frozenset(values[self.current[id(t)]].storage for t in written),
            reads=frozenset(values[i].storage for i in ins),
            call=self.stack[-1],
        )
        self.stack[-1].events.append(op)
        return out

    def call(self, original: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if threading.get_ident() != self.thread:
            return original(module, *args, **kwargs)
        parent = self.stack[-1] if self.stack else None
        number = 1
        if parent:
            number = parent.runs[id(module)] = parent.runs.get(id(module), 0) + 1
        call = Call(module, parent, number, next(self.clock))
        call.args = map_tensors(args, lambda t: Ref(self.value_of(t)))
        call.kwargs = map_tensors(kwargs, lambda t: Ref(self.value_of(t)))
        if parent:
            parent.events.append(call)
        self.record.calls.append(call)
        self.record.by_module.setdefault(id(module), []).append(call)
        self.stack.append(call)
        try:
            out = original(module, *args, **kwargs)
        finally:
            self.stack.pop()
        call.out = map_tensors(out, lambda t: Ref(self.value_of(t)))
        call.exotic = _exotic(out)
        call.end = next(self.clock)
        return out


def execute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an ATen operation as recordings do."""
    return _norm_on_meta(args) if func in _NORMS and _is_eval_norm(args) else func(*args, **kwargs)


_NORMS = (torch.ops.aten.native_batch_norm.default, torch.ops.aten.cudnn_batch_norm.default)


def _is_eval_norm(args: tuple) -> bool:
    return len(args) > 5 and args[5] is False and args[0].is_meta and type(args[0]) is Tensor


def _norm_on_meta(args: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """What a batch norm in eval mode gives on the meta device; torch's own answer takes half of a probe's time."""
    x = args[0]
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


class _Husk:
    """Keeps a real tensor's identity unique without its memory: forgets the id once the tensor dies."""

    def __init__(self, key: int, raw: int, recorder: _Recorder) -> None:
        self.key, self.raw, self.recorder = key, raw, recorder

    @staticmethod
    def of(tensor: Tensor, recorder: _Recorder) -> Any:
        import weakref

        husk = _Husk(id(tensor), storage_of(tensor), recorder)
        storage_ref = torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage())
        # the weak storage reference keeps the address from being used again
        return weakref.finalize(tensor, husk.forget), storage_ref

    def forget(self) -> None:
        self.recorder.current.pop(self.key, None)
        self.recorder.twins.pop(self.key, None)


def meta_like(tensor: Tensor) -> Tensor:
    """An empty tensor on the meta device with the same shape, strides and dtype."""
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")


@contextlib.contextmanager
def calls_through(handler: Callable[[Callable, nn.Module, tuple, dict], Any]) -> Iterator[None]:
    """Send every module call of this process through `handler` (torch.fx's tracer works the same way)."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return handler(original, module, args, kwargs)

    with undoing(lambda: setattr(nn.Module, "__call__", original)):
        nn.Module.__call__ = call  # type: ignore[method-assign]
        yield


@contextlib.contextmanager
def _iterations(recorder: _Recorder) -> Iterator[None]:
    """Note which modules go over their own children while they run."""
    original = nn.Module.named_children

    def named_children(self: nn.Module) -> Any:
        if recorder.stack and recorder.stack[-1].module is self:
            recorder.record.iterating.add(id(self))
        return original(self)

    with undoing(lambda: setattr(nn.Module, "named_children", original)):
        nn.Module.named_children = named_children  # type: ignore[method-assign]
        yield


# --- leaving no trace --------------------------------------------------------------------------


@contextlib.contextmanager
def undoing(undo: Callable[[], Any]) -> Iterator[None]:
    """Run `undo` on the way out, whatever happens; a Ctrl-C that cuts it short makes it start anew.

    Without that, an interrupt at the wrong moment would leave a model on the meta device for good.
    """
    try:
        yield
    finally:
        try:
            undo()
        except BaseException:
            undo()
            raise


@contextlib.contextmanager
def rng_kept() -> Iterator[None]:
    """Put every random generator's state back: torch's (all devices in use), Python's, NumPy's."""
    cpu, python = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None

    def put_back() -> None:
        torch.set_rng_state(cpu)
        random.setstate(python)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if numpy and numpy_state is not None:
            numpy.random.set_state(numpy_state)

    with undoing(put_back):
        yield


def generators() -> Any:
    """The states of the generators that Python code can draw from, to compare."""
    numpy = sys.modules.get("numpy")
    name, keys, *rest = numpy.random.get_state() if numpy else ("", None)
    return random.getstate(), torch.get_rng_state().tolist(), name, keys is not None and keys.tolist(), rest


class Snapshot:
    """The `__dict__` of every module under a root, with the contents of plain containers in it."""

    def __init__(self, root: nn.Module) -> None:
        self.attributes = [(m, m.__dict__, dict(m.__dict__)) for m in root.modules()]
        self.containers: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        for _, _, saved in self.attributes:
            for value in saved.values():
                self._save(value, seen)

    def _save(self, value: Any, seen: set[int]) -> None:
        if not isinstance(value, (dict, list, set)) or id(value) in seen:
            return
        seen.add(id(value))
        self.containers.append((value, value.copy()))
        for item in value.values() if isinstance(value, dict) else value:
            self._save(item, seen)

    def changed(self) -> bool:
        """Whether anything differs from what was saved (by identity)."""
        return any(not _same(now, saved) for _, now, saved in self.attributes) or any(
            not _same(now, saved) for now, saved in self.containers
        )

    def restore(self) -> None:
        """Put back what differs, in the saved order."""
        for now, saved in self.containers:
            if not _same(now, saved):
                now.clear()
                now.extend(saved) if isinstance(now, list) else now.update(saved)
        for _, now, saved in self.attributes:
            if not _same(now, saved):
                now.clear()
                now.update(saved)


def _same(now: Any, saved: Any) -> bool:
    if len(now) != len(saved):
        return False
    if isinstance(now, dict):
        return all(k in now and now[k] is v for k, v in saved.items())
    if isinstance(now, list):
        return all(a is b for a, b in zip(now, saved, strict=True))
    return now == saved


@contextlib.contextmanager
def stand_ins(root: nn.Module, make: Callable[[Tensor], Tensor]) -> Iterator[dict[int, Tensor]]:
    """Replace every tensor held by the modules under `root` for the time of a run.

    `make` gives the stand-in of one tensor; a tensor held under two names has one stand-in. Also replaced
    are tensors in plain attributes and containers (an LSTM's flat weights, caches), and user hooks are
    silenced. On the way out everything is put back.
    """
    memo: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            with torch.no_grad():
                made = make(tensor)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = made
        return memo[id(tensor)]

    snapshot = Snapshot(root)
    with undoing(snapshot.restore):
        for _, attributes, _ in snapshot.attributes:
            for key, value in attributes.items():
                if isinstance(value, Tensor):
                    attributes[key] = stand_in(value)
            attributes["_forward_hooks"] = type(attributes["_forward_hooks"])()
            attributes["_forward_pre_hooks"] = type(attributes["_forward_pre_hooks"])()
        for container, _ in snapshot.containers:
            if isinstance(container, set) or not container:
                continue
            items = container.items() if isinstance(container, dict) else enumerate(container)
            for at, value in list(items):
                if isinstance(value, Tensor):
                    container[at] = stand_in(value)
        yield memo


# --- inputs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What the model's forward is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(example: Any) -> Inputs:
        """From what a user gives: a tensor, a tuple of positional or a dict of keyword arguments."""
        if isinstance(example, Mapping):
            return Inputs((), dict(example))
        if isinstance(example, tuple):
            return Inputs(example)
        return Inputs((example,))


def candidates(model: nn.Module, batch: int = 2) -> Iterator[Inputs]:
    """Inputs to try on a model that nobody gave an example for, the likeliest first.

    timm's models say their input size; others get an image, clip, signal or vector that fits the first
    layer with weights, at usual sizes.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    count = max(1, len(_required_arguments(model)))
    shapes = itertools.chain(_declared_shapes(model), _guessed_shapes(model))
    for shape in dict.fromkeys(shapes):
        x = torch.empty((batch, *shape), dtype=dtype, device="meta")
        yield Inputs((x,) * count)


def _required_arguments(model: nn.Module) -> list[str]:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]


def _declared_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    channels, nd = _first_conv(model) or (3, 2)
    holders = (
        model,
        getattr(model, "patch_embed", None),
    )  # timm's transformers were perhaps built for another size
    for size in (getattr(h, name, None) for h in holders for name in ("img_size", "image_size")):
        if isinstance(size, int) and not isinstance(size, bool):
            yield (channels, *(size,) * nd)
        elif isinstance(size, (tuple, list)) and len(size) == nd:
            yield (channels, *size)
    if isinstance(config, Mapping) and isinstance(config.get("input_size"), (tuple, list)):
        yield (channels, *config["input_size"][1:])  # built with in_chans, it may take others than declared
        yield tuple(config["input_size"])


def _first_conv(model: nn.Module) -> tuple[int, int] | None:
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            return module.in_channels, len(module.kernel_size)
    return None


def _guessed_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    conv = _first_conv(model)
    if conv is None:
        first = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
        if first is not None:
            yield (first.in_features,)
            yield (16, first.in_features)
        conv = (3, 2)
    channels, nd = conv
    if nd == 1:
        yield from ((channels, n) for n in (256, 64, 1024))
    elif nd == 3:
        yield from ((channels, 16, 112, 112), (channels, 16, 224, 224), (channels, 32, 32, 32))
    else:
        yield from ((channels, s, s) for s in (224, 256, 64, 32, 299, 384, 512, 28))


# --- running -----------------------------------------------------------------------------------


def run(model: nn.Module, inputs: Inputs, mode: str, training: bool = False) -> Record:
    """Record one forward of `model`; the model is left exactly as it was.

    Args:
        model: any module; the run sees the module's forward with all its children.
        inputs: arguments; only shapes, dtypes and non-tensors matter.
        mode: `meta`, `fake` or `real`, what the stand-ins are made of.
        training: all modules in training mode, else all in eval mode.

    Raises:
        Exception: whatever the forward raised; its attribute `attninject_record` has what was seen so far.
    """
    record = Record(model, mode)
    make, context = _maker(mode)
    with rng_kept(), torch.no_grad(), context, stand_ins(model, make) as memo:
        for module in model.modules():
            module.__dict__["training"] = training
        record.stand_ins = memo
        device = next((t.device for t in memo.values()), torch.device("cpu"))
        given = map_tensors((inputs.args, inputs.kwargs), functools.partial(_input, mode=mode, device=device))
        recorder = _Recorder(record)
        with calls_through(recorder.call), _iterations(recorder), recorder:
            try:
                model(*given[0], **given[1])
            except Exception as error:
                error.attninject_record = record  # type: ignore[attr-defined]
                raise
        record.complete = True
        record.input_values = record.calls[0].ins
    return record


def _data_dependent(error: Exception) -> bool:
    text = str(error)
    return hasattr(error, "attninject_record") and (
        "nonzero" in text or "meta tensor" in text or "item()" in text or "Meta" in text
    )


def _maker(mode: str) -> tuple[Callable[[Tensor], Tensor], contextlib.AbstractContextManager]:
    if mode == "meta":
        return lambda t: torch.empty_like(t.detach(), device="meta"), contextlib.nullcontext()
    if mode == "fake":
        from torch._subclasses.fake_tensor import FakeTensorMode

        fake = FakeTensorMode(allow_non_fake_inputs=True)

        def make(t: Tensor) -> Tensor:  # not fake.from_tensor(t), whose writes would count in t._version
            with fake:
                return torch.empty_strided(tuple(t.shape), t.stride(), dtype=t.dtype, device=t.device)

        return make, _quietly(fake)
    return lambda t: t.detach().clone(), contextlib.nullcontext()


@contextlib.contextmanager
def _quietly(mode: contextlib.AbstractContextManager) -> Iterator[None]:
    """Fake tensors log every failure with its traceback; here a failure only means: try the next way."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled = logger.disabled
    with undoing(lambda: setattr(logger, "disabled", was_disabled)), mode:
        logger.disabled = True
        yield


def _input(tensor: Tensor, mode: str, device: torch.device) -> Tensor:
    if mode == "meta":
        return meta_like(tensor)
    if mode == "fake":
        return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=device)
    if not tensor.is_meta:
        return tensor.detach().clone().to(device)
    if tensor.is_floating_point():
        return torch.rand(tuple(tensor.shape), device=device).to(tensor.dtype)
    return torch.zeros(tuple(tensor.shape), dtype=tensor.dtype, device=device)


def probe(model: nn.Module, example_inputs: Any = None, *, partial: bool = False) -> tuple[Record, Inputs]:
    """Record a forward of `model` in eval mode, on meta tensors where that works.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple or a dict of keyword arguments; None: inputs are found.
        partial: settle for a run on meta tensors that stops where the data decide (a detector's
            proposals); such a record is not `complete`.

    Returns:
        The record, and the inputs that worked.

    Raises:
        ProbeError: the model's forward fails on all of them.
    """
    tries = list(candidates(model)) if example_inputs is None else [Inputs.of(example_inputs)]
    for mode in ("meta", "fake", "real"):
        for inputs in tries:
            try:
                return run(model, inputs, mode), inputs
            except Exception as error:
                last = error
                if mode == "meta" and _data_dependent(error):
                    if partial:
                        return error.attninject_record, inputs  # type: ignore[attr-defined]
                    with contextlib.suppress(Exception):  # values are asked for: these inputs, for real
                        return run(model, inputs, "real"), inputs
    shapes = ", ".join(str(tuple(a.shape)) for i in tries for a in i.args if isinstance(a, Tensor))
    advice = "" if example_inputs is not None else "; give example_inputs= that the model accepts"
    raise ProbeError(
        f"{type(model).__name__} fails its own forward on inputs of shape {shapes or 'given'}: "
        f"{type(last).__name__}: {str(last).splitlines()[0] if str(last) else ''}{advice}"
    ) from last
