"""Dotted names of modules and parameters: what stands above and below what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def below(name: str, modules: Iterable[str]) -> bool:
    """Whether a name is one of these modules' or stands below one of them."""
    above = {name, *parents(name)}
    return any(module in above for module in modules)


def parents(name: str) -> Iterator[str]:
    """The names above, the nearest first: layer1.0.conv → layer1.0, layer1."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def joined(path: str, name: str) -> str:
    """The name of what a module at `path` ("" for the model) calls `name`."""
    return f"{path}.{name}" if path else name
