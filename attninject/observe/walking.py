"""The modules of a network, each once, in the order of `modules()`, whose nested generators take longer."""

from __future__ import annotations

from torch import nn


def modules_in(root: nn.Module) -> list[nn.Module]:
    """The root and every module below it."""
    found: dict[int, nn.Module] = {}
    todo: list[nn.Module | None] = [root]
    while todo:
        module = todo.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            if module._modules:
                todo.extend([*module._modules.values()][::-1])
    return list(found.values())


def named_modules_in(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """The same with their names, the first of each."""
    found: dict[int, tuple[str, nn.Module]] = {}
    todo: list[tuple[str, nn.Module | None]] = [("", root)]
    while todo:
        name, module = todo.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = name, module
            if module._modules:
                below = f"{name}." if name else ""
                todo.extend([(below + key, child) for key, child in module._modules.items()][::-1])
    return list(found.values())
