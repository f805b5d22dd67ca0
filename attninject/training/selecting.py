"""What a word, a pattern or a stage's number means: parameters of a model, and norms that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from attninject import api
from attninject.anatomy.place_map import PlaceMap
from attninject.errors import NoMatchError
from attninject.observe.probe import probe
from attninject.recipe.patterns import compile_pattern
from attninject.surgery import injected_state
from attninject.wording import nearest_hint

from .dotted_names import below, joined, parents
from .heads import head_of
from .words import WORDS

What = str | int | Sequence[str | int]


@dataclass
class Chosen:
    """Parameters as (module, name); norms with the module around each."""

    parameters: list[tuple[nn.Module, str]] = field(default_factory=list)
    norms: dict[nn.Module, nn.Module] = field(default_factory=dict)


def select(model: nn.Module, what: What) -> Chosen:
    """All that is meant by `what`, which `freeze` explains.

    Raises:
        NoMatchError: nothing in the model is meant.
        NoHeadError: backbone or head is meant, and the head was not found.
        TypeError: neither a word, a pattern nor a number.
    """
    parts = [what] if isinstance(what, str | int) else list(what)
    wanted: set[str] = set()
    for part in parts:
        wanted |= _keys(model, part)
    chosen, modules = Chosen(), dict(model.named_modules())
    for path, module in modules.items():
        own = [n for n, p in module._parameters.items() if p is not None]
        taken = [n for n in own if joined(path, n) in wanted]
        chosen.parameters += [(module, n) for n in taken]
        if _has_statistics(module) and (path in wanted or (own and len(taken) == len(own))):
            chosen.norms[module] = modules[path.rpartition(".")[0]]
    return chosen


def _keys(model: nn.Module, part: str | int) -> set[str]:
    """Names of modules and parameters that a word, a stage's number or a pattern means."""
    if isinstance(part, bool) or not isinstance(part, str | int):
        raise TypeError(f"what: expected a word, a pattern or a stage's number, found {part!r}")
    names, blocks = _names(model), list(api.injected(model))
    every = set(names.values())
    inside = {n for n in every if below(n, blocks)}
    if isinstance(part, int):
        return _stage(model, part) - inside
    if part == "injected":
        if not blocks:
            raise NoMatchError("the model has no injected blocks to freeze or unfreeze")
        return inside
    if part in ("backbone", "head"):
        head = {n for n in every if below(n, head_of(model))} - inside
        return head if part == "head" else every - head - inside
    pattern = compile_pattern(part)
    found = {names[n] for n in names if any(pattern.matches(name) for name in (n, *parents(n)))}
    if not found:
        hint = nearest_hint(part, [n for n in names if n])
        raise NoMatchError(
            f"no module or parameter matches {part!r}{hint}; it may also be {', '.join(WORDS)}, or a "
            f"stage's number"
        )
    return (found - inside) or found


def _names(model: nn.Module) -> dict[str, str]:
    """Every name of a module or parameter → the one by which `named_modules` knows it, where it has several."""
    found: dict[str, str] = {}
    first: dict[nn.Module, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = found[path] = first.setdefault(module, path)
        found |= {joined(path, n): joined(own, n) for n, p in module._parameters.items() if p is not None}
    return found


def _stage(model: nn.Module, number: int) -> set[str]:
    """Names of all that is first called within a stage."""
    with injected_state.as_original(model):
        record, _ = probe(model, partial=True)
    if not record.complete:
        record.input_values = record.calls[0].ins
    net = PlaceMap(record)
    count = len(net.spans)
    wanted = number if number > 0 else count + 1 + number
    if not 1 <= wanted <= count:
        raise NoMatchError(f"there is no stage {number}: {type(model).__name__} has {count} stages, from 1")
    began = {id(call.module): call.start for call in reversed(record.calls)}
    inside = [n for n, m in model.named_modules() if n and net.stage_of(began.get(id(m), -1)) == wanted]
    # below: a module that is never called itself (nn.MultiheadAttention's out_proj) goes with its owner
    return {n for n in _names(model).values() if below(n, inside)}


def _has_statistics(module: nn.Module) -> bool:
    return any(b is not None and n.startswith("running_") for n, b in module._buffers.items())
