"""One run of a model, recorded: every module call, every operation, and the shapes between them.

The run uses stand-ins for all tensors of the model (on the meta device; else fake tensors; else clones),
so the model's own tensors are never read or written; the model is left as it was.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import ProbeError, UnsupportedModelError
from .record import Call, Op, Record, Ref, Value, map_tensors, written_tensors
from .shapes import execute, meta_like, short_recurrences
from .snapshot import PATCHING, rng_kept, stand_ins, undoing

# --- recording ---------------------------------------------------------------------------------


def _exotic(tree: Any) -> str:
    """Name of the first class in a nested result that a graph would not rebuild as it was."""
    if not isinstance(tree, (Mapping, tuple, list)):
        return ""
    items = list(tree.values()) if isinstance(tree, Mapping) else list(tree)
    if type(tree) not in (tuple, list, dict) and not hasattr(tree, "_fields"):
        return type(tree).__name__
    return next((found for item in items if (found := _exotic(item))), "")


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
        ins: list[int] = []
        map_tensors((args, kwargs), lambda t: ins.append(self.value_of(t)))
        given = self.kept(args, kwargs)
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
            func=func,
            given=given,
        )
        self.stack[-1].events.append(op)
        return out

    def kept(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments of an operation as they are, save in a real run, whose tensors must not live on."""
        if self.record.mode != "real":
            return args, kwargs
        return map_tensors((args, kwargs), lambda t: Ref(self.current[id(t)]))

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


class _Husk:
    """Keeps a real tensor's identity unique without its memory: forgets the id once the tensor dies."""

    def __init__(self, key: int, raw: int, recorder: _Recorder) -> None:
        self.key, self.raw, self.recorder = key, raw, recorder

    @staticmethod
    def of(tensor: Tensor, recorder: _Recorder) -> Any:
        husk = _Husk(id(tensor), storage_of(tensor), recorder)
        storage_ref = torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage())
        # the weak storage reference keeps the address from being used again
        return weakref.finalize(tensor, husk.forget), storage_ref

    def forget(self) -> None:
        self.recorder.current.pop(self.key, None)
        self.recorder.twins.pop(self.key, None)


@contextlib.contextmanager
def calls_through(handler: Callable[[Callable, nn.Module, tuple, dict], Any]) -> Iterator[None]:
    """Send every module call of this process through `handler` (torch.fx's tracer works the same way)."""
    with PATCHING:
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
    count, names = _required_arguments(model)
    shapes = itertools.chain(_declared_shapes(model), _guessed_shapes(model))
    for shape in dict.fromkeys(shapes):
        x = torch.empty((batch, *shape), dtype=dtype, device="meta")
        yield Inputs((x,) * count, dict.fromkeys(names, x))


def _required_arguments(model: nn.Module) -> tuple[int, list[str]]:
    """How many arguments a forward needs by position (one at least, if it takes any), and the names of the others."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1, []
    needed = [p for p in parameters if p.default is p.empty]
    names = [p.name for p in needed if p.kind is p.KEYWORD_ONLY]
    count = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed)
    return count if names else max(1, count), names


def _declared_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    channels, nd = _first_conv(model) or (3, 2)
    holders = (model, getattr(model, "patch_embed", None))  # perhaps built for another size than declared
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


def run(model: nn.Module, inputs: Inputs, mode: str, training: bool = False, hooks: bool = False) -> Record:
    """Record one forward of `model`; the model is left exactly as it was.

    Args:
        model: any module; the run sees the module's forward with all its children.
        inputs: arguments; only shapes, dtypes and non-tensors matter.
        mode: `meta`, `fake` or `real`, what the stand-ins are made of.
        training: all modules in training mode, else all in eval mode.
        hooks: whether the hooks of the model's owner run too.

    Raises:
        Exception: whatever the forward raised; its attribute `attninject_record` has what was seen so far.
    """
    record = Record(model, mode)
    record.hooks = hooks
    make, context = _maker(mode)
    with rng_kept(), torch.no_grad(), context, stand_ins(model, make, hooks) as memo:
        for module in model.modules():
            module.__dict__["training"] = training
        record.stand_ins = memo
        device = next((t.device for t in memo.values()), torch.device("cpu"))
        given = map_tensors((inputs.args, inputs.kwargs), functools.partial(_input, mode=mode, device=device))
        recorder = _Recorder(record)
        with calls_through(recorder.call), _iterations(recorder), short_recurrences(mode), recorder:
            try:
                model(*given[0], **given[1])
            except Exception as error:
                record.input_values = _image_first(record)
                error.attninject_record = record  # type: ignore[attr-defined]
                raise
        record.complete = True
        record.input_values = _image_first(record)
    return record


def _image_first(record: Record) -> tuple[int, ...]:
    """The tensors that the model is called with, the image before masks, sizes and what else goes with it.

    A detector takes a list of images without a batch axis: there it is the first batch that a module takes.
    """
    given = record.calls[0].ins if record.calls else ()
    batched = [v for call in record.calls for v in call.ins if len(record.shape(v)) > 3]
    if given and batched and record.calls[0].args and isinstance(record.calls[0].args[0], list):
        return (batched[0], *given)
    return tuple(sorted(given, key=lambda v: -len(record.shape(v))))


def _data_dependent(error: Exception) -> bool:
    words = ("nonzero", "meta tensor", "item()", "Meta", "device meta")
    return hasattr(error, "attninject_record") and any(word in str(error) for word in words)


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
        at = device if tensor.is_meta else tensor.device
        return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=at)
    if not tensor.is_meta:
        return tensor.detach().clone()
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
        UnsupportedModelError: it has no forward.
        ProbeError: the model's forward fails on all of them.
    """
    _check_forward(model)
    tries = list(candidates(model)) if example_inputs is None else [Inputs.of(example_inputs)]
    for hooks in (False, True) if hooked(model) else (False,):  # one may be what makes the shapes fit
        for mode in _modes(model):
            for inputs in tries:
                try:
                    return run(model, inputs, mode, hooks=hooks), inputs
                except Exception as error:
                    last = error
                    if mode == "meta" and _data_dependent(error):
                        if partial:
                            return error.attninject_record, inputs  # type: ignore[attr-defined]
                        with contextlib.suppress(Exception):  # values are asked for: these inputs, for real
                            return run(model, inputs, "real", hooks=hooks), inputs
    raise ProbeError(_why_failed(model, example_inputs, tries, last)) from last


def _modes(model: nn.Module) -> tuple[str, ...]:
    """What to make stand-ins of, in order; only fake and real tensors know on which of several devices they lie."""
    several = len({p.device for p in model.parameters()}) > 1
    return ("fake", "real", "meta") if several else ("meta", "fake", "real")


def hooked(model: nn.Module) -> list[str]:
    """Names of the modules with hooks around their forward, those of torch.nn.utils (weight norm, pruning) aside."""

    def foreign(hook: Any) -> bool:
        return not type(hook).__module__.startswith("torch.nn.utils")

    return [
        name
        for name, m in model.named_modules()
        if any(foreign(h) for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    ]


def _check_forward(model: nn.Module) -> None:
    if type(model).forward is nn.Module.forward and "forward" not in model.__dict__:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no forward, so there is no dataflow to put a block into; "
            "pass the model that calls it"
        )


def _why_failed(model: nn.Module, example: Any, tries: list[Inputs], last: Exception) -> str:
    tensors: list[Tensor] = []
    map_tensors([(i.args, i.kwargs) for i in tries], tensors.append)
    shapes = ", ".join(dict.fromkeys(str(tuple(t.shape)) for t in tensors)) or "given"
    advice = ""
    if example is None:
        with contextlib.suppress(TypeError, ValueError):
            advice = f"; it takes {inspect.signature(model.forward)}"
        advice += "; give example_inputs= that the model accepts"
    reason = str(last).splitlines()[0] if str(last) else ""
    return (
        f"{type(model).__name__} fails its own forward on inputs of shape {shapes}: "
        f"{type(last).__name__}: {reason}{advice}"
    )
