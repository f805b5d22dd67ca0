"""What injection leaves in a model, as data: which blocks hang where. What is set aside here is put back."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .layout import Layout
from .snapshot import undoing
from .trace import LocalGraph, Target

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
FLAG = "_attninject_disabled"  # attribute of a block while it is passed through
SITE = "_attninject_site"  # attribute of a block: the Site that it was planned for
FROZEN = "_attninject_frozen"  # of a module: its parameters that `freeze` froze → had they changed before?
HELD = "_attninject_held"  # of a norm that `freeze` keeps in eval: had its statistics changed before?


@dataclass(frozen=True)
class Insertion:
    """One block in one holder.

    Attributes:
        name: of the block among the holder's children.
        position: `after` or `before`.
        target: the node of the holder's own forward (`graph`); None: the holder's result or input (`module`).
        operand: `before`: which operand, by position or name.
        output: `after`: which item of a tuple, list or dict; None: the result itself.
        layout: of the value.
        slot: what the name held: `free` nothing, `attribute` None, `module` a child registered as None.
        copy_given: give the block a copy, since the value is written to in place later.
        copy_result: copy what it gives, since a view of that is read after an in-place operation.
    """

    name: str
    position: str
    target: Target | None
    operand: int | str = 0
    output: int | str | None = None
    layout: Layout = Layout("NCHW")  # noqa: RUF009 (frozen)
    slot: str = "free"
    copy_given: bool = False
    copy_result: bool = False


@dataclass(frozen=True)
class Injected:
    """What a generated class remembers. `watched`: it writes the size of its result into an `Extent`."""

    base: type[nn.Module]
    edit: tuple[Insertion, ...]
    local: LocalGraph | None
    watched: bool = False

    @property
    def slots(self) -> frozenset[str]:
        """Names that the original forward must see as None."""
        return frozenset(i.name for i in self.edit if i.slot != "free")


@dataclass(frozen=True, eq=False)
class Change:
    """What `apply` does at one holder. `sources`: for each block on tokens the layer that makes their map."""

    holder: nn.Module
    blocks: tuple[tuple[Insertion, nn.Module], ...]
    local: LocalGraph | None
    sources: tuple[nn.Module | None, ...]


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
    return {name: getattr(holder, i.name) for name, holder, i in insertions(model)}


def insertions(model: nn.Module) -> Iterator[tuple[str, nn.Module, Insertion]]:
    """Qualified name of each block, its holder, and its insertion there, in the order of `named_modules`."""
    for path, module in model.named_modules():
        if found := injected_in(module):
            for insertion in found.edit:
                yield f"{path}.{insertion.name}".lstrip("."), module, insertion


def sites_of(model: nn.Module) -> dict[str, Any]:
    """Qualified name of each injected block → the `Site` that it was planned for."""
    return {name: block.__dict__.get(SITE) for name, block in injected_blocks(model).items()}


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
    """Let every holder run the forward of its original class, its slots empty: what a probe is to see.

    `bypassed` leaves the rewritten forward in place, whose operations may differ from the original's.
    """
    holders = [(m, found) for m in model.modules() if (found := injected_in(m))]
    saved = [Contents(m) for m, _ in holders]

    def put_back() -> None:
        for contents in saved:
            contents.restore()

    with undoing(put_back):
        for holder, found in holders:
            for insertion in found.edit:
                if insertion.slot == "module":
                    holder._modules[insertion.name] = None
                elif insertion.slot == "attribute":
                    del holder._modules[insertion.name]
                    holder.__dict__[insertion.name] = None
            holder.__dict__["forward"] = types.MethodType(found.base.forward, holder)
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


# --- what has changed since injection ----------------------------------------------------------

_born: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter or batch norm → its state at injection


def remember(model: nn.Module) -> None:
    """Note the state of every parameter and batch norm at injection: version counters, batches seen.

    Weak and outside the model, so that nothing is added to it; a copy of a model is unknown here.
    """
    first = not injected_blocks(model)
    things: list[Tensor | nn.Module] = [*model.parameters(), *model.modules()]
    for thing in things:
        if first or thing not in _born:
            state = _state_now(thing)
            if state is not None:
                _born[thing] = state


def _state_now(thing: Tensor | nn.Module) -> Any:
    """What an optimizer's step, or a batch in train mode, changes; None: cannot tell."""
    if isinstance(thing, Tensor):
        return None if thing.is_inference() else thing._version
    # the running statistics have no use for this: their version counters stay still in train mode
    batches = thing._buffers.get("num_batches_tracked")
    return None if batches is None or batches.is_meta else batches.detach().clone()


def changed_since_injection(thing: Tensor | nn.Module, unknown: bool = True) -> bool:
    """Whether a parameter or a norm's statistics may have changed; `unknown`: the answer if nobody noted."""
    then, now = _born.get(thing), _state_now(thing)
    if then is None or now is None:
        return unknown
    return bool((then != now.to(then.device)) if isinstance(now, Tensor) else then != now)


def kept_by_freeze(model: nn.Module) -> set[str]:
    """Keys of base parameters and buffers that `freeze` holds, and that were as at injection when it did."""
    kept = set()
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        for name, changed in module.__dict__.get(FROZEN, {}).items():
            parameter = module._parameters.get(name)
            if parameter is not None and not parameter.requires_grad and not changed:
                kept.add(dot + name)
        if module.__dict__.get(HELD) is False:
            kept.update(dot + name for name in module._buffers)
    return kept
