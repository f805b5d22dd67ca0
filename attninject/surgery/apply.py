"""The only file that changes a model's structure: `apply` puts blocks in, `revert` takes them out.

`take_out` keeps what `put_back` needs to have the same blocks in again, without a plan.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from attninject.errors import CannotRewriteError, TraceRefused
from attninject.observe.snapshot import undoing
from attninject.observe.walking import named_modules_in

from .generated_class import generate, set_class, settled
from .injected_state import OWN, Contents, Injected, Insertion, base_class, injected_in, insertions
from .layout_adapters import EXTENT, LENGTH, Extent
from .location import Location
from .own_forward import own_signature, refuse_wrapped

Placed = tuple[Location, nn.Module]  # a block, and where it goes


@contextlib.contextmanager
def apply(blocks: Sequence[Placed]) -> Iterator[None]:
    """Put blocks in, for good unless something raises, here or in the body: then every carrier is as it was.

    All classes are generated before the first carrier is touched.
    """
    groups = _by_carrier(blocks)
    prepared = _prepared(groups)
    with _all_or_nothing([module for module, _ in prepared]):
        for location, block in (placed for group in groups for placed in group):
            _attach(location.carrier, location.insertion, block)
            for name, source in ((EXTENT, location.source), (LENGTH, location.packer)):
                if source is not None:
                    block.__dict__[name] = source.__dict__.setdefault(EXTENT, Extent())
        for module, cls in prepared:
            set_class(module, cls)
        yield


def _by_carrier(blocks: Sequence[Placed]) -> list[list[Placed]]:
    """The blocks of each carrier, in the order in which they run there.

    Within a graph they are placed one by one; around one carrier `before units` runs before `before units.0`.
    """
    groups: dict[int, list[Placed]] = {}
    for location, block in blocks:
        groups.setdefault(id(location.carrier), []).append((location, block))
    for group in groups.values():
        group.sort(key=lambda placed: placed[0].time if placed[0].insertion.target is None else -1)
    return list(groups.values())


def _prepared(groups: list[list[Placed]]) -> list[tuple[nn.Module, type]]:
    """Each module that changes, with its generated class: the carriers, then the layers to be watched."""
    sources = {
        id(s): s for group in groups for at, _ in group for s in (at.source, at.packer) if s is not None
    }
    prepared: list[tuple[nn.Module, type]] = []
    for group in groups:
        carrier = group[0][0].carrier
        known = injected_in(carrier) or Injected(base_class(carrier))
        grown = replace(
            known,
            edit=known.edit + tuple(location.insertion for location, _ in group),
            local=next((at.local for at, _ in group if at.local), known.local),
            watched=sources.pop(id(carrier), None) is not None or known.watched,
        )
        prepared.append((carrier, generate(grown, own_signature(carrier))))
    for source in sources.values():
        known = injected_in(source) or Injected(type(source))
        prepared.append((source, generate(replace(known, watched=True), own_signature(source))))
    return prepared


def revert(model: nn.Module, names: Sequence[str]) -> None:
    """Take blocks out by qualified name; carriers without any left get their original class back."""
    wanted = set(names)
    gone: dict[int, list[Insertion]] = {}
    in_use: set[int] = set()  # extents that blocks which stay look at
    for name, carrier, insertion in insertions(model):
        if name in wanted:
            gone.setdefault(id(carrier), []).append(insertion)
        else:
            block = getattr(carrier, insertion.name)
            in_use |= {id(block.__dict__.get(name)) for name in (EXTENT, LENGTH)}
    prepared = []
    for module in model.modules():
        known = injected_in(module)
        if known is None:
            continue
        left = tuple(i for i in known.edit if i not in gone.get(id(module), ()))
        watched = known.watched and id(module.__dict__.get(EXTENT)) in in_use
        if len(left) < len(known.edit) or watched is not known.watched:
            refuse_wrapped(module)
            rest = replace(known, edit=left, watched=watched)
            cls = generate(rest, own_signature(module)) if left or watched else known.base
            prepared.append((module, gone.get(id(module), []), cls, watched))
    with _all_or_nothing([module for module, *_ in prepared]):
        for module, blocks, cls, watched in prepared:
            for insertion in blocks:
                _detach(module, insertion)
            if not watched:
                module.__dict__.pop(EXTENT, None)
            set_class(module, cls)
            if injected_in(module) is None and OWN in module.__dict__:
                module.__dict__["forward"] = module.__dict__.pop(OWN)


@dataclass(frozen=True, eq=False)
class Removed:
    """What one module had of an injection. A copy has blocks of its own; a pickle leaves the graph out.

    Attributes:
        known: its original class, and how its forward called the blocks.
        blocks: name among the module's children → block.
        extent: what the module wrote the size of its result into.
    """

    known: Injected
    blocks: dict[str, nn.Module]
    extent: Extent | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Removed:
        blocks, extent = copy.deepcopy((self.blocks, self.extent), memo)
        return replace(self, blocks=blocks, extent=extent)

    def __reduce__(self) -> tuple[Any, ...]:
        known = replace(self.known, local=None, arguments=self.known.names_from)
        return Removed, (known, self.blocks, self.extent)


def take_out(model: nn.Module) -> dict[str, Removed]:
    """Take every block out; returns what `put_back` needs, by the names of the modules that they hung on."""
    names = [name for name, *_ in insertions(model)]
    outer = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    removed = {}
    for path, module in named_modules_in(model):
        known = injected_in(module)
        if known is not None and not any(f"{path}.".startswith(f"{block}.") for block in outer):
            blocks = {i.name: getattr(module, i.name) for i in known.edit}
            removed[path] = Removed(known, blocks, module.__dict__.get(EXTENT))
    revert(model, outer)
    return removed


def put_back(model: nn.Module, removed: Mapping[str, Removed]) -> None:
    """Put the blocks of `take_out` into the same model again, or into a copy of it.

    Raises:
        CannotRewriteError: a module has another class since, or no place for its block; the model is as it was.
    """
    prepared = [(_module_for(model, path, was), was) for path, was in removed.items()]
    classes = [_class_again(module, was.known) for module, was in prepared]
    with _all_or_nothing([module for module, _ in prepared]):
        for (module, was), cls in zip(prepared, classes, strict=True):
            for insertion in was.known.edit:
                _attach(module, insertion, was.blocks[insertion.name])
            if was.extent is not None:
                module.__dict__[EXTENT] = was.extent
            set_class(module, cls)


def _class_again(module: nn.Module, known: Injected) -> type[nn.Module]:
    """The class that a module had; it traces its graph when it is called where that cannot be done at rest."""
    try:
        return settled(module, known)
    except TraceRefused:
        return generate(known, own_signature(module))


def _module_for(model: nn.Module, path: str, was: Removed) -> nn.Module:
    """The module that blocks were taken from, as it must be to have them back."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise CannotRewriteError(f"{path} is gone, which {', '.join(was.blocks)} hung on") from None
    if type(module) is not was.known.base:
        raise CannotRewriteError(
            f"{path or 'the model'} is a {type(module).__name__} by now and was a plain {was.known.base.__name__}: "
            f"{', '.join(was.blocks)} cannot be put back there"
        )
    for i in was.known.edit:
        free = {"free": not hasattr(module, i.name)}.get(i.slot, getattr(module, i.name, module) is None)
        if not free:
            raise CannotRewriteError(f"{path or 'the model'} has another {i.name!r} by now")
    return module


@contextlib.contextmanager
def _all_or_nothing(modules: list[nn.Module]) -> Iterator[None]:
    """Put classes, attributes and children of some modules back when the body raises."""
    saved = [Contents(module) for module in modules]

    def put_back() -> None:
        for contents in saved:
            contents.restore()

    try:
        yield
    except BaseException:
        with undoing(put_back):
            raise


def _attach(carrier: nn.Module, insertion: Insertion, block: nn.Module) -> None:
    if insertion.slot == "attribute":
        del carrier.__dict__[insertion.name]
    nn.Module.add_module(carrier, insertion.name, block)


def _detach(carrier: nn.Module, insertion: Insertion) -> None:
    if insertion.slot == "module":
        carrier._modules[insertion.name] = None
        return
    del carrier._modules[insertion.name]
    if insertion.slot == "attribute":
        carrier.__dict__[insertion.name] = None
