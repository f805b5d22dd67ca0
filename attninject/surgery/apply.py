"""The only file that changes a model's structure: `apply` puts blocks in, `revert` takes them out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from attninject.observe.snapshot import undoing

from .block_call import EXTENT, Extent
from .generated_class import generate, set_class
from .injected_state import Change, Contents, Injected, Insertion, base_class, injected_in, insertions

# --- apply and revert --------------------------------------------------------------------------


@contextlib.contextmanager
def apply(changes: Sequence[Change]) -> Iterator[None]:
    """Put blocks in, for good unless something raises, here or in the body: then every holder is as it was.

    All classes are generated before the first holder is touched.
    """
    sources = {id(s): s for change in changes for s in change.sources if s is not None}
    prepared: list[tuple[nn.Module, type]] = []
    for change in changes:
        known = injected_in(change.holder)
        edit = (known.edit if known else ()) + tuple(i for i, _ in change.blocks)
        local = change.local or (known.local if known else None)
        watched = id(change.holder) in sources or (known is not None and known.watched)
        prepared.append((change.holder, generate(base_class(change.holder), edit, local, watched)))
    holders = {id(change.holder) for change in changes}
    for source in (s for key, s in sources.items() if key not in holders):
        known = injected_in(source) or Injected(type(source), (), None)
        prepared.append((source, generate(known.base, known.edit, known.local, True)))
    with _all_or_nothing([module for module, _ in prepared]):
        for change in changes:
            for (insertion, block), made_by in zip(change.blocks, change.sources, strict=True):
                _attach(change.holder, insertion, block)
                if made_by is not None:
                    block.__dict__[EXTENT] = made_by.__dict__.setdefault(EXTENT, Extent())
        for module, cls in prepared:
            set_class(module, cls)
        yield


def revert(model: nn.Module, names: Sequence[str]) -> None:
    """Take blocks out by qualified name; holders without any left get their original class back."""
    wanted = set(names)
    gone: dict[int, list[Insertion]] = {}
    in_use: set[int] = set()  # extents that blocks which stay look at
    for name, holder, insertion in insertions(model):
        if name in wanted:
            gone.setdefault(id(holder), []).append(insertion)
        else:
            in_use.add(id(getattr(holder, insertion.name).__dict__.get(EXTENT)))
    prepared = []
    for module in model.modules():
        known = injected_in(module)
        if known is None:
            continue
        left = tuple(i for i in known.edit if i not in gone.get(id(module), ()))
        watched = known.watched and id(module.__dict__.get(EXTENT)) in in_use
        if len(left) < len(known.edit) or watched is not known.watched:
            local = known.local if any(i.target for i in left) else None
            cls = generate(known.base, left, local, watched) if left or watched else known.base
            prepared.append((module, gone.get(id(module), []), cls, watched))
    with _all_or_nothing([module for module, *_ in prepared]):
        for module, blocks, cls, watched in prepared:
            for insertion in blocks:
                _detach(module, insertion)
            if not watched:
                module.__dict__.pop(EXTENT, None)
            set_class(module, cls)


@contextlib.contextmanager
def _all_or_nothing(holders: list[nn.Module]) -> Iterator[None]:
    """Put classes, attributes and children of some modules back when the body raises."""
    saved = [Contents(holder) for holder in holders]

    def put_back() -> None:
        for contents in saved:
            contents.restore()

    try:
        yield
    except BaseException:
        with undoing(put_back):
            raise


def _attach(holder: nn.Module, insertion: Insertion, block: nn.Module) -> None:
    if insertion.slot == "attribute":
        del holder.__dict__[insertion.name]
    nn.Module.add_module(holder, insertion.name, block)


def _detach(holder: nn.Module, insertion: Insertion) -> None:
    if insertion.slot == "module":
        holder._modules[insertion.name] = None
        return
    del holder._modules[insertion.name]
    if insertion.slot == "attribute":
        holder.__dict__[insertion.name] = None
