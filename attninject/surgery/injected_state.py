"""What injection leaves in a model, as data: which blocks hang where. What is set aside here is put back."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from attninject.layout import Layout
from attninject.observe.snapshot import undoing
from attninject.observe.walking import modules_in, named_modules_in
from attninject.terms import Position, Slot

from .local_graph import Arguments, LocalGraph, Target

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
OWN = "_attninject_forward"  # attribute of a carrier: the forward that was assigned to it since injection
FLAG = "_attninject_disabled"  # attribute of a block while it is passed through
SITE = "_attninject_site"  # attribute of a block: the Site that it was planned for, or a tuple of several


@dataclass(frozen=True)
class Second:
    """The other value that a block of two inputs is given: one of the same forward, which is there by then.

    Attributes:
        position: `after` or `before` the node; only says what is read, nothing is put there.
        target: the node; None: the carrier's own call, of which `before` gives an argument.
        operand: `before`: which operand, by position or name.
        output: `after`: which item of a tuple, list or dict; None: the result itself.
        layout: of the value.
        copied: keep a copy from the start, since the value is written to in place later.
        watched: its tokens are of the map whose size the block is told as it runs (`layout_adapters.Extent`).
    """

    position: Position
    target: Target | None
    operand: int | str = 0
    output: int | str | None = None
    layout: Layout = Layout("NCHW")  # noqa: RUF009 (frozen)
    copied: bool = False
    watched: bool = False


@dataclass(frozen=True)
class Insertion:
    """One block on one carrier, the module whose child it becomes.

    Attributes:
        name: of the block among the carrier's children.
        position: `after`, `before` or `replace`.
        target: the node of the carrier's own forward (`graph`); None: the carrier's result or input (`module`).
        operand: `before`, `replace`: which operand, by position or name.
        output: `after`: which item of a tuple, list or dict; None: the result itself.
        layout: of the value.
        slot: what the name held: `free` nothing, `attribute` None, `module` a child registered as None.
        copy_given: give the block a copy, since the value is written to in place later.
        copy_result: copy what it gives, since a view of that is read after an in-place operation.
        splits: the layer and the batch norm that it stands between, by path below the carrier ("": the carrier); a
            norm further out has none. None: it parts no such pair.
        alone: `replace`: what the module itself would give is not asked for, so that its own forward does not run.
        second: what a block of two inputs is given besides.
        mask: parameter of the carrier's forward that says which tokens are padding, see `run_masked`; empty: none.
    """

    name: str
    position: Position
    target: Target | None
    operand: int | str = 0
    output: int | str | None = None
    layout: Layout = Layout("NCHW")  # noqa: RUF009 (frozen)
    slot: Slot = "free"
    copy_given: bool = False
    copy_result: bool = False
    splits: tuple[str, str] | None = field(default=None, repr=False)
    alone: bool = field(default=False, repr=False)
    second: Second | None = field(default=None, repr=False)
    mask: str = field(default="", repr=False)


@dataclass(frozen=True)
class Injected:
    """What a generated class remembers.

    Attributes:
        base: the carrier's original class.
        edit: all its insertions, in the order in which they apply.
        local: the graph of the original forward; None where nothing stands in it, or where it has yet to be traced.
        watched: it writes the size of its result (an encoder of torch's: that of its input) into an `Extent`.
        arguments: how the forward was called, where its graph has yet to be traced.
    """

    base: type[nn.Module]
    edit: tuple[Insertion, ...] = ()
    local: LocalGraph | None = None
    watched: bool = False
    arguments: Arguments | None = None

    @property
    def names_from(self) -> Arguments | None:
        """The arguments whose trace names the nodes that the insertions stand at."""
        return self.local.names_from if self.local else self.arguments

    @property
    def in_graph(self) -> tuple[Insertion, ...]:
        """The insertions that stand within the forward of the original class."""
        return tuple(i for i in self.edit if i.target is not None)

    @property
    def slots(self) -> frozenset[str]:
        """Names that the original forward must see as None."""
        return frozenset(i.name for i in self.edit if i.slot != "free")


def injected_in(module: nn.Module) -> Injected | None:
    """What injection did to this very module, or None; also where FSDP or a parametrization extended its class."""
    return getattr(type(module), "_attninject", None)


def extended_since(module: nn.Module) -> bool:
    """Whether somebody made a subclass of a generated class: such a class cannot be swapped under them."""
    return injected_in(module) is not None and "_attninject" not in type(module).__dict__


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before any injection."""
    found = injected_in(module)
    return found.base if found else type(module)


def injected_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name → block, in the order of `named_modules`."""
    return {name: getattr(carrier, i.name) for name, carrier, i in insertions(model)}


def insertions(model: nn.Module) -> Iterator[tuple[str, nn.Module, Insertion]]:
    """Qualified name of each block, its carrier, and its insertion there, in the order of `named_modules`."""
    for path, module in named_modules_in(model):
        if found := injected_in(module):
            for insertion in found.edit:
                yield f"{path}.{insertion.name}".lstrip("."), module, insertion


def sites_of(model: nn.Module) -> dict[str, Any]:
    """Qualified name of each injected block → the `Site` that it was planned for."""
    return {name: _site_of(block, name) for name, block in injected_blocks(model).items()}


def keep_site(block: nn.Module, site: Any) -> None:
    """Note the site that a block was planned for; a block that serves several keeps them all."""
    known = block.__dict__.get(SITE)
    if known is not None:
        site = (*known, site) if isinstance(known, tuple) else (known, site)
    block.__dict__[SITE] = site


def _site_of(block: nn.Module, name: str) -> Any:
    """The site that a block serves under a name; the model may have become a part of another since."""
    known = block.__dict__.get(SITE)
    if not isinstance(known, tuple):
        return known
    fitting = [site for site in known if f".{name}".endswith(f".{site.name}")]
    return max(fitting, key=lambda site: len(site.name), default=None)


@contextlib.contextmanager
def bypassed(model: nn.Module) -> Iterator[None]:
    """Pass every injected block through for a while: the model computes what its base does."""
    blocks = list(injected_blocks(model).values())
    before = [block.__dict__.get(FLAG) for block in blocks]

    def put_back() -> None:
        for block, flag in zip(blocks, before, strict=True):
            if flag is None:
                block.__dict__.pop(FLAG, None)
            else:
                block.__dict__[FLAG] = flag

    with undoing(put_back):
        for block in blocks:
            block.__dict__[FLAG] = True
        yield


@contextlib.contextmanager
def as_original(model: nn.Module) -> Iterator[None]:
    """Let every carrier run the forward of its original class, its slots empty: what a probe is to see.

    `bypassed` leaves the rewritten forward in place, whose operations may differ from the original's.
    """
    carriers = [(m, found) for m in modules_in(model) if (found := injected_in(m))]
    saved = [Contents(m) for m, _ in carriers]

    def put_back() -> None:
        for contents in saved:
            contents.restore()

    with undoing(put_back):
        for carrier, found in carriers:
            for insertion in found.edit:
                if insertion.slot == "module":
                    carrier._modules[insertion.name] = None
                elif insertion.slot == "attribute":
                    del carrier._modules[insertion.name]
                    carrier.__dict__[insertion.name] = None
            original = types.MethodType(found.base.forward, carrier)
            carrier.__dict__["forward"] = carrier.__dict__.get(OWN, original)
        yield


class Contents:
    """Class, attributes and children of one module, to put back in their order."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls = module, type(module)
        self.places = [(d, dict(d)) for d in (module._modules, module.__dict__)]

    def restore(self) -> None:
        """May be cut short and started anew."""
        object.__setattr__(self.module, "__class__", self.cls)
        for place, content in self.places:
            place.clear()
            place.update(content)
