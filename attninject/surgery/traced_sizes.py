"""Whole numbers of traced sizes: `int(windows.shape[0] / count)` as a part of a graph.

Python lets no object but a number answer to `int`, so what a trace calls in its place is another `int`: the global name
of a copy of the forward, and of the functions that it calls. Nobody else sees these copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from torch import fx


class _WholeNumber(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, int)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], fx.Proxy):
            return args[0].tracer.create_proxy("call_function", int, args, kwargs)
        return int(*args, **kwargs)


class _Int(int, metaclass=_WholeNumber):
    """`int` to the code that a trace runs."""


def with_traced_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, in which `int` of a traced size is a node of the graph; itself where it asks for none."""
    return _copy(function, {}) if type(function) is FunctionType and _asks(function, set()) else function


def _copy(function: FunctionType, known: dict[FunctionType, FunctionType]) -> FunctionType:
    """A copy with globals of its own, in which the functions that it calls and that ask, too, are copies."""
    if function not in known:
        own = {"int": _Int, **function.__globals__}
        made = FunctionType(
            function.__code__, own, function.__name__, function.__defaults__, function.__closure__
        )
        made.__kwdefaults__ = function.__kwdefaults__
        known[function] = made
        own.update((name, _copy(f, known)) for name, f in _called(function).items() if _asks(f, set()))
    return known[function]


def _asks(function: FunctionType, seen: set[FunctionType]) -> bool:
    """Whether a function, or one that it calls by a global name, names `int`."""
    seen.add(function)
    if "int" in _names(function.__code__):
        return True
    return any(_asks(f, seen) for f in _called(function).values() if f not in seen)


def _called(function: FunctionType) -> dict[str, FunctionType]:
    """The functions that a function names, but for torch's own."""
    named = {name: function.__globals__.get(name) for name in _names(function.__code__)}
    return {
        name: f
        for name, f in named.items()
        if isinstance(f, FunctionType) and not str(f.__module__).startswith("torch.")
    }


@functools.lru_cache(maxsize=1024)
def _names(code: CodeType) -> frozenset[str]:
    """The global names and attributes that some code reads, functions within it included."""
    inner = (_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(code.co_names).union(*inner)
