"""Leaving no trace: what a run can change in a model, and in the process, is put back.

While a run lasts, stand-ins take the place of the model's own tensors. Everything else that a forward can
change in a module (plain attributes, caches in lists and dicts, modes) is put back, also when it raises.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .walking import modules_in

# Held while code of the whole process is patched: else two threads that plan put back each other's patches.
PATCHING = threading.RLock()
_Function = TypeVar("_Function", bound=Callable[..., Any])


def alone(function: _Function) -> _Function:
    """Let a function wait until no other thread has code of the whole process patched: it looks at classes' forwards."""

    @functools.wraps(function)
    def waits(*args: Any, **kwargs: Any) -> Any:
        with PATCHING:
            return function(*args, **kwargs)

    return cast(_Function, waits)


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
    cuda = torch.cuda.get_rng_state_all() if cast(Any, torch.cuda).is_initialized() else []
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
    mine = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), mine, name, keys is not None and keys.tobytes(), rest


_CONTAINERS = (dict, list, set)
_PLAIN = (bool, int, float, str, tuple)


@functools.lru_cache(maxsize=4096)
def _kind(cls: type) -> str:
    """What a value of a class is to a snapshot: a `tensor`, a `container`, or nothing to look into."""
    if issubclass(cls, Tensor):
        return "tensor"
    return "container" if issubclass(cls, _CONTAINERS) else ""


def _kind_of(value: Any) -> str:
    """The same of a value; a metaclass may leave its classes without a hash."""
    cls: Any = type(value)
    try:
        return _kind(cls)
    except TypeError:
        return _kind.__wrapped__(cls)


class Snapshot:
    """The `__dict__` of every module under a root, with the contents of plain containers in it.

    Attributes:
        attributes: of each module its `__dict__`, and a copy of that.
        containers: those with something in them, and copies.
        empty: containers without anything: most of a module's are hooks that nobody set.
        tensors: where a tensor is held, by container and key.
    """

    def __init__(self, root: nn.Module) -> None:
        self.attributes = [(m.__dict__, dict(m.__dict__)) for m in modules_in(root)]
        self.containers: list[tuple[Any, Any]] = []
        self.empty: list[Any] = []
        self.tensors: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        for now, saved in self.attributes:
            self._look_into(now, saved.items(), seen)

    def _look_into(self, holder: Any, items: Iterable[tuple[Any, Any]], seen: set[int]) -> None:
        for key, value in items:
            kind = _kind_of(value)
            if kind == "tensor" and not isinstance(holder, set):
                self.tensors.append((holder, key))
            elif kind == "container" and not value:
                self.empty.append(value)
            elif kind == "container" and id(value) not in seen:
                seen.add(id(value))
                self.containers.append((value, value.copy()))
                self._look_into(value, value.items() if isinstance(value, dict) else enumerate(value), seen)

    def changed(self) -> bool:
        """Whether anything differs from what was saved (by identity)."""
        pairs = (*self.attributes, *self.containers)
        return any(self.empty) or any(not _same(now, saved) for now, saved in pairs)

    def numbers_set(self) -> dict[int, dict[str, Any]]:
        """Id of a module's `__dict__` -> the plain values in it that are new or others than they were."""
        return {
            id(now): {
                name: value
                for name, value in now.items()
                if type(value) in _PLAIN and name != "training" and value is not saved.get(name, now)
            }
            for now, saved in self.attributes
            if not _same(now, saved)
        }

    def restore(self) -> None:
        """Put back what differs, in the saved order."""
        for now in filter(None, self.empty):
            now.clear()
        for now, saved in (*self.containers, *self.attributes):
            if not _same(now, saved):
                now.clear()
                now.extend(saved) if isinstance(now, list) else now.update(saved)


def _same(now: Any, saved: Any) -> bool:
    if len(now) != len(saved):
        return False
    if isinstance(now, dict):  # the order of the keys counts too: state_dict has one
        return all(map(operator.is_, now, saved)) and all(map(operator.is_, now.values(), saved.values()))
    if isinstance(now, list):
        return all(map(operator.is_, now, saved))
    return bool(now == saved)


@contextlib.contextmanager
def stand_ins(
    root: nn.Module,
    make: Callable[[Tensor], Tensor],
    hooks: bool = False,
    numbers: dict[int, dict[str, Any]] | None = None,
) -> Iterator[dict[int, Tensor]]:
    """Replace every tensor held by the modules under `root` for the time of a run.

    `make` gives the stand-in of one tensor; a tensor held under two names has one stand-in. Also replaced
    are tensors in plain attributes and containers (an LSTM's flat weights, caches). Compiled forwards are set
    aside, and user hooks are silenced unless `hooks`. On the way out everything is put back; `numbers` gets what
    plain attributes were set then, see `Snapshot.numbers_set`.
    """
    memo: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            made = make(tensor)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = made
        return memo[id(tensor)]

    snapshot = Snapshot(root)
    with undoing(snapshot.restore):
        with torch.no_grad():
            for holder, key in snapshot.tensors:
                holder[key] = stand_in(holder[key])
        for attributes, _ in snapshot.attributes:
            if attributes.get("_compiled_call_impl") is not None:
                attributes["_compiled_call_impl"] = None
            for name in () if hooks else ("_forward_hooks", "_forward_pre_hooks"):
                if attributes[name]:
                    attributes[name] = type(attributes[name])()
        yield memo
        if numbers is not None:
            numbers.update(snapshot.numbers_set())
