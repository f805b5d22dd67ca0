"""The head of a network: as it was named, as timm says, or as it is usually built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from attninject import api
from attninject.errors import AttnInjectError, NoHeadError
from attninject.planning import support
from attninject.recipe.patterns import compile_pattern
from attninject.wording import nearest

from .dotted_names import below

Head = str | nn.Module | Sequence[str | nn.Module]

_NAMED = "_attninject_head"  # attribute of a model: names of the head's modules, as `freeze(head=…)` said


def remember_head(model: nn.Module, head: Head) -> None:
    """Keep a head with its model, for `head_of`.

    Raises:
        NoHeadError: no module of the model is meant.
    """
    model.__dict__[_NAMED] = _named_head(model, head)


def head_of(model: nn.Module) -> list[str]:
    """Names of the head's modules; empty where timm says that there is none (`num_classes=0`).

    As `freeze(head=…)` said; else timm's own word; else all beside a child named `backbone` (torchvision's
    detectors and segmenters); else the last Linear; else a child named `classifier`, or children whose names
    end in `_head` (`segmentation_head`).

    Raises:
        NoHeadError: none of these is there.
    """
    model = support.unwrapped(model)
    if _NAMED in model.__dict__:
        return list(model.__dict__[_NAMED])
    names = {id(m): n for n, m in model.named_modules()}
    own = _timm_head(model)
    if own is not None:
        return [names[id(m)] for m in own if id(m) in names and any(True for _ in m.parameters())]
    children = dict(model.named_children())
    if len(children) > 1 and "backbone" in children:
        return [n for n in children if n != "backbone"]
    blocks = list(api.injected(model))
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not below(n, blocks)]
    if linears:
        return [linears[-1]]
    if "classifier" in children:
        return ["classifier"]
    if named := [n for n in children if n.endswith("_head")]:
        return named
    raise NoHeadError(
        f"the head of {type(model).__name__} was not found (no get_classifier, no Linear, no child named "
        f"'classifier'); name it, as in ai.freeze(model, head=\"fc\")"
    )


def _timm_head(model: nn.Module) -> list[nn.Module] | None:
    getter: Any = getattr(model, "get_classifier", None)
    if not callable(getter):
        return None
    found = getter()
    if isinstance(found, Mapping):
        found = list(found.values())
    several = isinstance(found, list | tuple | nn.ModuleList)
    return [m for m in (found if several else [found]) if isinstance(m, nn.Module)]


def _named_head(model: nn.Module, head: Head) -> tuple[str, ...]:
    """The head as the caller says it: patterns over module names, or modules."""
    parts: list[Any] = [head] if isinstance(head, str | nn.Module) else list(head)
    names = {id(m): n for n, m in model.named_modules()}
    found: list[str] = []
    for part in parts:
        if isinstance(part, nn.Module):
            if id(part) not in names:
                raise NoHeadError(f"the head given, a {type(part).__name__}, is no module of this model")
            found.append(names[id(part)])
            continue
        pattern = compile_pattern(part)
        matched = [n for n in names.values() if n and pattern.matches(n)]
        if not matched:
            near = nearest(part, [n for n in names.values() if n])
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            raise NoHeadError(f"no module matches head={part!r}{hint}")
        found += matched
    if "" in found:
        raise AttnInjectError("the whole model cannot be its own head")
    return tuple(dict.fromkeys(found))
