"""The recorder: every module call and every operation of one running forward, as they happen."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .meta_kernels import execute, meta_like
from .record import Call, Op, Record, Ref, Value, map_tensors, name_of, tensors_in, written_tensors
from .snapshot import PATCHING, undoing


def _exotic(tree: Any) -> str:
    """Name of the first class in a nested result that a graph would not rebuild as it was."""
    if isinstance(tree, Tensor) or not isinstance(tree, (Mapping, tuple, list)):
        return ""
    items = list(tree.values()) if isinstance(tree, Mapping) else list(tree)
    if type(tree) not in (tuple, list, dict) and not hasattr(tree, "_fields"):
        return type(tree).__name__
    return next((found for item in items if (found := _exotic(item))), "")


def storage_of(tensor: Tensor) -> int:
    """Identity of a tensor's storage while the tensor lives; its own id where it has no storage."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return id(tensor)


class Mode(TorchDispatchMode):
    """A dispatch mode that torch does not wrap for torch.compile: that would load all of torch._dynamo."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Recorder(Mode):
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
        """The number of the value that a tensor holds now; a new one for a tensor not met before."""
        found = self.current.get(id(tensor))
        return self.new_value(tensor) if found is None else found

    def new_value(self, tensor: Tensor) -> int:
        """Number what a tensor holds from now on."""
        key = id(tensor)
        if key not in self.twins:
            self.keep.append(tensor if self.record.mode != "real" else _Husk.of(tensor, self))
            self.twins[key] = tensor if self.record.mode == "meta" else meta_like(tensor)
        raw = storage_of(tensor)
        storage = self.storages.setdefault(raw, len(self.storages))
        self.record.born.setdefault(storage, next(self.clock))
        shape, twin = tuple(tensor.shape), self.twins[key]
        value = Value(len(self.record.values), shape, tensor.dtype, storage, twin, tensor.device)
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
        ins = [self.value_of(t) for t in tensors_in(args, kwargs)]
        given = self._kept(args, kwargs)
        out = execute(func, args, kwargs)
        written = written_tensors(func, args, kwargs)
        for tensor in written:
            self.new_value(tensor)
        outs = [self.value_of(t) for t in tensors_in(out)]
        values = self.record.values
        op = Op(
            time=next(self.clock),
            name=name_of(func),
            ins=tuple(ins),
            outs=tuple(dict.fromkeys(outs + [self.current[id(t)] for t in written])),
            writes=frozenset([values[self.current[id(t)]].storage for t in written]),
            reads=frozenset([values[i].storage for i in ins]),
            call=self.stack[-1],
            func=func,
            given=given,
        )
        self.stack[-1].events.append(op)
        return out

    def _kept(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments of an operation as they are, save in a real run, whose tensors must not live on."""
        if self.record.mode != "real":
            return args, kwargs
        kept = map_tensors((args, kwargs), lambda t: Ref(self.current[id(t)]))
        return cast(tuple[Any, dict[str, Any]], kept)

    def _referred(self, tree: Any) -> tuple[Any, tuple[int, ...]]:
        """Arguments or results with a `Ref` for each tensor, and the values of these."""
        values: list[int] = []

        def refer(tensor: Tensor) -> Ref:
            values.append(self.value_of(tensor))
            return Ref(values[-1])

        return map_tensors(tree, refer), tuple(values)

    def call(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        direct: bool = False,
    ) -> Any:
        """Run one module call and note it, its inputs and its results."""
        parent = self.stack[-1] if self.stack else None
        number = 1
        if parent:
            number = parent.runs[id(module)] = parent.runs.get(id(module), 0) + 1
        call = Call(module, parent, number, next(self.clock), direct=direct)
        call.args, given = self._referred(args)
        call.kwargs, named = self._referred(kwargs) if kwargs else ({}, ())
        call.ins = (*given, *named)
        if parent:
            parent.events.append(call)
        self.record.calls.append(call)
        self.record.by_module.setdefault(id(module), []).append(call)
        self.stack.append(call)
        try:
            out = original(module, *args, **kwargs)
        finally:
            self.stack.pop()
        call.out, call.outs = self._referred(out)
        call.exotic = _exotic(out)
        call.hooked = bool(module._forward_hooks)
        call.end = next(self.clock)
        return out


class _Husk:
    """Keeps a real tensor's identity unique without its memory: forgets the id once the tensor dies."""

    def __init__(self, key: int, recorder: Recorder) -> None:
        self.key, self.recorder = key, recorder

    @staticmethod
    def of(tensor: Tensor, recorder: Recorder) -> Any:
        husk = _Husk(id(tensor), recorder)
        storage_ref = cast(Any, torch.multiprocessing.reductions).StorageWeakRef(tensor.untyped_storage())
        # the weak storage reference keeps the address from being used again
        return weakref.finalize(tensor, husk.forget), storage_ref

    def forget(self) -> None:
        self.recorder.current.pop(self.key, None)
        self.recorder.twins.pop(self.key, None)


Handler = Callable[[Callable[..., Any], nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""What sees a call: the original `__call__`, the module, and the arguments by position and by name."""


@contextlib.contextmanager
def calls_through(handler: Handler) -> Iterator[None]:
    """Send every module call of this thread through `handler` (torch.fx's tracer works the same way)."""
    here = threading.get_ident()
    with PATCHING:
        original = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != here:
                return original(module, *args, **kwargs)
            return handler(original, module, args, kwargs)

        with undoing(lambda: setattr(nn.Module, "__call__", original)):
            nn.Module.__call__ = call  # type: ignore[method-assign]
            yield


@contextlib.contextmanager
def direct_forwards(recorder: Recorder, model: nn.Module) -> Iterator[None]:
    """Record `module.forward(…)` too, which passes by `__call__`: the classes of the model's modules see it."""
    kept: dict[type, Any] = {}

    def put_back() -> None:
        for cls, forward in kept.items():
            cls.forward = forward  # type: ignore[attr-defined]

    with PATCHING, undoing(put_back):
        for cls in {base for m in model.modules() for base in type(m).__mro__}:
            if isinstance(forward := cls.__dict__.get("forward"), FunctionType):
                kept[cls] = forward
                cls.forward = _seen(forward, recorder)  # type: ignore[attr-defined]
        yield


def _seen(forward: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    """A forward that notes when another module than the one that runs is asked for it."""

    @functools.wraps(forward)
    def seen(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        here = recorder.stack and threading.get_ident() == recorder.thread
        if not here or recorder.stack[-1].module is self:
            return forward(self, *args, **kwargs)
        return recorder.call(forward, self, args, kwargs, direct=True)

    return seen


@contextlib.contextmanager
def iterations(recorder: Recorder) -> Iterator[None]:
    """Note which modules go over their own children while they run."""
    original = nn.Module.named_children

    def named_children(self: nn.Module) -> Any:
        if recorder.stack and recorder.stack[-1].module is self:
            recorder.record.iterating.add(id(self))
        return original(self)

    with undoing(lambda: setattr(nn.Module, "named_children", original)):
        nn.Module.named_children = named_children  # type: ignore[method-assign]
        yield
