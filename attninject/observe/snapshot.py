"""Leaving no trace: what a run can change in a model, and in the process, is put back.

While a run lasts, stand-ins take the place of the model's own tensors. Everything else that a forward can
change in a module (plain attributes, caches in lists and dicts, modes) is put back, also when it raises.
"""

from __future__ import annotations

import contextlib
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

# Held while code of the whole process is patched: else two threads that plan put back each other's patches.
PATCHING = threading.RLock()


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
    return random.getstate(), torch.get_rng_state().tolist(), name, keys is not None and keys.tolist(), rest


_CONTAINERS = (dict, list, set)
_EMPTY: tuple[()] = ()  # the contents of any empty container: most of a module's are hooks that nobody set


class Snapshot:
    """The `__dict__` of every module under a root, with the contents of plain containers in it."""

    def __init__(self, root: nn.Module) -> None:
        self.attributes = [(m, m.__dict__, dict(m.__dict__)) for m in root.modules()]
        self.containers: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        for _, _, saved in self.attributes:
            for value in saved.values():
                if isinstance(value, _CONTAINERS):
                    self._save(value, seen)

    def _save(self, value: Any, seen: set[int]) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        self.containers.append((value, value.copy() if value else _EMPTY))
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, _CONTAINERS):
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
    if not saved:
        return True
    if isinstance(now, dict):  # the order of the keys counts too: state_dict has one
        return all(map(operator.is_, now, saved)) and all(map(operator.is_, now.values(), saved.values()))
    if isinstance(now, list):
        return all(map(operator.is_, now, saved))
    return bool(now == saved)


@contextlib.contextmanager
def stand_ins(
    root: nn.Module, make: Callable[[Tensor], Tensor], hooks: bool = False
) -> Iterator[dict[int, Tensor]]:
    """Replace every tensor held by the modules under `root` for the time of a run.

    `make` gives the stand-in of one tensor; a tensor held under two names has one stand-in. Also replaced
    are tensors in plain attributes and containers (an LSTM's flat weights, caches). Compiled forwards are set
    aside, and user hooks are silenced unless `hooks`. On the way out everything is put back.
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
            if attributes.get("_compiled_call_impl") is not None:
                attributes["_compiled_call_impl"] = None
            if not hooks:
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
