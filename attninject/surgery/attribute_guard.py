"""What a trace would freeze without a word: attribute reads are recorded, writes and contexts refused."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn

from attninject.errors import TraceRefused
from attninject.observe.record import written_tensors
from attninject.observe.recorder import Mode
from attninject.observe.snapshot import undoing

from .local_graph import MISSING, PRESENT

# What torch.utils.checkpoint calls, whichever way it is imported; the last since torch 2.14.
_CHECKPOINTS = (
    "CheckpointFunction",
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)
_FACTORIES = ("rand", "randn", "zeros", "ones", "empty", "full", "arange")
GRAD, AUTOCAST = "the grad mode", "autocast"  # of the process, which a forward may ask for
_QUESTIONS = {"is_grad_enabled": GRAD, "is_autocast_enabled": AUTOCAST, "is_autocast_cpu_enabled": AUTOCAST}
_AUTOCAST_DTYPES = ("get_autocast_dtype", "get_autocast_gpu_dtype", "get_autocast_cpu_dtype")
_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
_TENSORS = frozenset({"parameters", "named_parameters", "buffers", "named_buffers", "state_dict"})
_ITERATION = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})
_PLAIN = (bool, int, float, str, tuple, type(None))
_HEAP_TYPE, _IMMUTABLE = (
    1 << 9,
    1 << 8,
)  # flags of a class: Python code made it; its methods cannot be exchanged


def depends_on(state: str) -> str:
    """Why there is no graph of a forward that asks for a state of the process and acts by it."""
    return f"its forward depends on {state}"


def _is_settings(value: Any) -> bool:
    """Whether a value is an object of somebody's class that holds attributes, as a config does."""
    cls = type(value)
    is_open = cls.__flags__ & (_HEAP_TYPE | _IMMUTABLE) == _HEAP_TYPE
    return is_open and hasattr(value, "__dict__") and not callable(value)


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


class AttributeReads:
    """Collects the attributes that modules are asked for; filled slots read as None.

    Who asks whether gradients, or autocast, are enabled gets what `answers` has, and `asked` says which somebody did.
    """

    def __init__(self, owner: nn.Module, hidden: frozenset[str], answers: Mapping[str, bool]) -> None:
        self.owner, self.hidden, self.thread = owner, hidden, threading.get_ident()
        self.answers, self.asked = answers, set[str]()
        self.parts: dict[str, Callable[..., Any]] = {}  # methods of the owner that are one step of its graph
        self.checkpoints = False  # whether it ran a checkpoint, where `guarded` lets it
        self.on = False
        self.found: dict[tuple[int, str], tuple[nn.Module, Any]] = {}
        self.settings: dict[int, tuple[nn.Module, str]] = {}  # id of an object -> whose attribute it is
        self.watched: dict[type, Any] = {}  # class of such objects -> its own `__getattribute__`, if any
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
        """An attribute of a module, noted while a trace is on."""
        on = self.on and threading.get_ident() == self.thread
        if not on or name in _INTERNAL or name.startswith("__"):
            if on and module is self.owner and name in _ITERATION:
                self.iterates = True
            return object.__getattribute__(module, name)
        if module is self.owner:
            if name in self.hidden:
                return None
            if name in self.parts:
                return self.parts[name]
            self.iterates |= name in _ITERATION
        elif name in _TENSORS:  # as in `next(self.conv.parameters()).dtype`, which a graph would freeze
            raise TraceRefused("it looks at the tensors of its children")
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
        if name in module.__dict__ or isinstance(value, _PLAIN):
            self.note(module, name, value)
        return value

    def answer(self, state: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """In place of torch's own function that says whether something is enabled."""

        def answered(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self.thread:
                return original(*args, **kwargs)
            self.asked.add(state)
            return self.answers[state]

        return answered

    def note(self, module: nn.Module, name: str, value: Any) -> None:
        """Keep the first value that was read."""
        if isinstance(value, (Tensor, nn.Module)):
            return
        self.found.setdefault((id(module), name), (module, _frozen(value)))
        if _is_settings(value) and id(value) not in self.settings:
            self.settings[id(value)] = module, name
            self.watch(type(value))

    def watch(self, cls: Any) -> None:
        """Note what is read of a module's settings, too: `self.config.double` is one more attribute of the module."""
        if cls in self.watched:
            return
        original, self.watched[cls] = cls.__getattribute__, cls.__dict__.get("__getattribute__")

        def seen(thing: Any, name: str) -> Any:
            value = original(thing, name)
            here = self.on and threading.get_ident() == self.thread and not name.startswith("__")
            known = self.settings.get(id(thing)) if here else None
            if known and (name in original(thing, "__dict__") or isinstance(value, _PLAIN)):
                self.note(known[0], f"{known[1]}.{name}", value)
            return value

        cls.__getattribute__ = seen

    def unwatch(self) -> None:
        """May be cut short and started anew."""
        for cls, own in self.watched.items():
            if own is not None:
                cls.__getattribute__ = own  # type: ignore[method-assign]
            elif "__getattribute__" in cls.__dict__:
                del cls.__getattribute__


class NoWrites(Mode):
    """Refuses a trace that would write into a real tensor (a counter, a cache), since the trace alone would count."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if written_tensors(func, args, kwargs or {}):
            raise TraceRefused("its forward writes into a tensor that it did not make")
        return func(*args, **(kwargs or {}))


def _traceable(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes a tensor of a given size: part of the graph where the size is, which torch.fx misses."""

    def make(*args: Any, **kwargs: Any) -> Any:
        proxies: list[fx.Proxy] = []
        fx.node.map_aggregate(
            (args, kwargs), lambda a: proxies.append(a) if isinstance(a, fx.Proxy) else None
        )
        if proxies:
            return proxies[0].tracer.create_proxy("call_function", factory, args, kwargs)
        return factory(*args, **kwargs)

    return make


def _run_through(name: str, reads: AttributeReads) -> Any:
    """In place of a part of `torch.utils.checkpoint`: what it was given simply runs."""
    original: Any = getattr(torch.utils.checkpoint, name)

    def noted() -> bool:
        here = threading.get_ident() == reads.thread
        reads.checkpoints |= here
        return here

    class Function:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            return function(*args) if noted() else original.apply(function, preserve, *args)

    def around(*args: Any, **kwargs: Any) -> Iterator[None]:
        if noted():
            yield
        else:
            yield from original(*args, **kwargs)

    return Function if name == "CheckpointFunction" else around


class _Given:
    """Code that hands on to `_attninject`, for functions without a cell and with that of `super()`."""

    @staticmethod
    def plain(*args: Any, _attninject: Any) -> Any:
        return _attninject(*args)

    @staticmethod
    def of_class(*args: Any, _attninject: Any) -> Any:
        return __class__ and _attninject(*args)  # type: ignore[name-defined]


_GIVEN = {len(f.__code__.co_freevars): f.__code__ for f in (_Given.plain, _Given.of_class)}


@contextlib.contextmanager
def running(
    place: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Let a method run `wrap` of itself for a while, by its code where that can be.

    To set `__setattr__` of `nn.Module` itself, Python has to go through all subclasses, over a thousand where
    torchvision and timm are loaded: that took a third of a trace. A function's code is one pointer. The argument
    is there before the code that takes it, since other threads may be calling. What somebody else has put in the
    method's place may be no such function; then the attribute is set.
    """
    function: Any = getattr(place, name)
    code = _GIVEN.get(len(function.__closure__ or ())) if type(function) is FunctionType else None
    if code is None:
        with undoing(lambda: setattr(place, name, function)):
            setattr(place, name, wrap(function))
            yield
        return
    own, named = function.__code__, function.__kwdefaults__
    original = FunctionType(own, function.__globals__, name, function.__defaults__, function.__closure__)
    original.__kwdefaults__ = named

    def put_back() -> None:
        function.__code__ = own
        function.__kwdefaults__ = named

    with undoing(put_back):
        function.__kwdefaults__ = {"_attninject": wrap(original)}
        function.__code__ = code
        yield


@contextlib.contextmanager
def guarded(reads: AttributeReads, sized: bool) -> Iterator[None]:
    """Record attribute reads and questions; refuse what a graph would silently lose: writes, checkpoints, contexts.

    `sized`: a tensor made of a size that is part of the graph is part of it too, and so is what a checkpoint runs,
    which `reads` notes.
    Other threads may go on making and calling modules.
    """

    def refuse(why: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == reads.thread:
                raise TraceRefused(why)
            return original(*args, **kwargs)

        return refused

    refusals: list[tuple[Any, str, str]] = [
        (torch._C, "_set_grad_enabled", depends_on(GRAD)),
        *((torch.autocast, step, "its forward sets autocast") for step in ("__init__", "__enter__")),
        *((torch, name, depends_on(AUTOCAST)) for name in _AUTOCAST_DTYPES),
    ]
    checkpoints = [name for name in _CHECKPOINTS if hasattr(torch.utils.checkpoint, name)]
    if not sized:
        refusals += [(torch.utils.checkpoint, name, "it checkpoints its children") for name in checkpoints]
    patches = [(place, name, refuse(why, getattr(place, name))) for place, name, why in refusals]
    if sized:
        patches += [(torch.utils.checkpoint, name, _run_through(name, reads)) for name in checkpoints]
    patches += [
        (torch, name, reads.answer(state, getattr(torch, name))) for name, state in _QUESTIONS.items()
    ]
    patches += [(torch, name, _traceable(getattr(torch, name))) for name in _FACTORIES if sized]
    saved = [(place, name, getattr(place, name)) for place, name, _ in patches]

    def put_back() -> None:
        with contextlib.suppress(AttributeError):
            del nn.Module.__getattribute__
        reads.unwatch()
        for place, name, value in saved:
            setattr(place, name, value)

    def refuse_writes(original: Callable[..., Any]) -> Callable[..., Any]:
        return refuse("its forward writes an attribute", original)

    with (
        undoing(put_back),
        running(nn.Module, "__setattr__", refuse_writes),
        running(nn.Module, "__delattr__", refuse_writes),
    ):
        for place, name, patch in patches:
            setattr(place, name, patch)
        nn.Module.__getattribute__ = lambda self, name: reads.get(self, name)  # type: ignore[method-assign, arg-type]
        yield
