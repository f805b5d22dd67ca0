"""Who else has a module: a block must change the model that it was put into, and no other.

A module can serve nets that know nothing of one another: an activation made once, as an attribute of a class or a
default argument, or a trunk that a student and its teacher share. Looking for holders goes through every object of
the process, so it is done once, and only where a module has more references than the model itself explains.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from types import FunctionType
from typing import Any

from torch import nn

from attninject.observe.walking import modules_in

_CONTAINERS = frozenset({list, tuple, dict})
_VIEWS = (nn.ModuleList, nn.ModuleDict)  # of modules, without a forward: no net of its own


class Sharing:
    """The modules of a model that something outside holds too. Made before a recorded run adds its references."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.parents = _parents(model)
        self.inside = {id(model), *self.parents}
        self.suspects = self._suspects(model)

    def _suspects(self, model: nn.Module) -> set[int]:
        """Ids of the modules with more references than the registries of the model, and the list here, explain."""
        alone = [nn.Identity()]
        (usual,) = [sys.getrefcount(module) for module in alone]
        return {
            id(module)
            for module in modules_in(model)
            if sys.getrefcount(module) - usual > len(self.parents.get(id(module), ()))
        }

    def others(self, module: nn.Module) -> list[str]:
        """What else has a module, or a part of the model that contains it, in words; [] where nothing has.

        A variable or a list of the user's is nothing else, nor is a net that the model itself is a part of.
        """
        suspects = self.suspects & self._upward(module)
        if not any(self._holders.get(part) for part in suspects):
            return []
        gc.collect()  # a net that nobody uses any more may only wait to be cleared away
        self.__dict__.pop("_holders")
        return list(dict.fromkeys(name for part in suspects for name in self._holders.get(part, ())))

    def _upward(self, module: nn.Module) -> set[int]:
        """The module and what contains it, the model itself left out: that may be part of anything."""
        found: set[int] = set()
        todo = [id(module)]
        while todo:
            part = todo.pop()
            if part not in found and part in self.parents:
                found.add(part)
                todo += self.parents[part]
        return found

    @functools.cached_property
    def _holders(self) -> dict[int, list[str]]:
        """Id of a suspect -> who outside the model has it, of all that lives in the process."""
        found: dict[int, list[str]] = {}
        outside: dict[int, list[nn.Module]] = {}  # id of anything -> the modules outside that have it
        model = self.model()
        homes = {type(module).__module__ for module in model.modules()} if model is not None else set()
        for user in _users(homes):
            held = _held(user)
            if not isinstance(user, nn.Module):
                for key in self.suspects.intersection(held):
                    found.setdefault(key, []).append(_described(user))
            elif id(user) not in self.inside:
                for key in held:
                    outside.setdefault(key, []).append(user)
        for key in self.suspects:
            nets = [user for user in outside.get(key, ()) if self._is_other_net(user, outside)]
            found.setdefault(key, []).extend(sorted({_described(user) for user in nets}))
        return found

    def _is_other_net(self, user: nn.Module, outside: dict[int, list[nn.Module]]) -> bool:
        """Whether a module outside is a net that does without the model, and no mere list of its parts."""
        model = self.model()
        if any(part is model for part in user.modules()):
            return False
        if type(user) not in _VIEWS:
            return True
        return any(self._is_other_net(up, outside) for up in outside.get(id(user), ()) if up is not user)


def _parents(model: nn.Module) -> dict[int, list[int]]:
    """Id of each module below the model -> those of the modules that have it as a child."""
    found: dict[int, list[int]] = {}
    for parent in modules_in(model):
        for child in parent._modules.values():
            found.setdefault(id(child), []).append(id(parent))
    return found


def _users(homes: set[str]) -> list[Any]:
    """Every live module, and the classes and functions that may hold one: of networks, or written beside one.

    Args:
        homes: the Python modules in which the model's classes were written.
    """
    kinds: dict[type, type] = {FunctionType: FunctionType}
    found: list[Any] = []
    for thing in gc.get_objects():
        kind = kinds.get(type(thing)) or kinds.setdefault(type(thing), _kind(type(thing)))
        if kind is object:
            continue
        if kind is FunctionType:
            wanted = thing.__defaults__ or thing.__kwdefaults__
        else:
            wanted = kind is nn.Module or issubclass(thing, nn.Module) or thing.__module__ in homes
        if wanted:
            found.append(thing)
    return found


def _kind(cls: type) -> type:
    """What instances of a class are here: modules, classes, or nothing that matters."""
    return next((kind for kind in (nn.Module, type) if issubclass(cls, kind)), object)


def _held(user: Any) -> list[int]:
    """Ids of what a module or class keeps, itself or in a list, tuple or dict; a function's default arguments."""
    if isinstance(user, FunctionType):
        return [*map(id, user.__defaults__ or ()), *map(id, (user.__kwdefaults__ or {}).values())]
    values = list(user.__dict__.values())
    held = list(map(id, values))
    for value in values:
        if type(value) in _CONTAINERS and value:
            held += map(id, list(value.values() if type(value) is dict else value))
    return held


def _described(user: Any) -> str:
    if isinstance(user, nn.Module):
        return f"another {type(user).__name__}"
    if isinstance(user, type):
        return f"the class {user.__qualname__}"
    return f"a default argument of {user.__qualname__}"
