"""What is done to a carrier after injection that would lose its block: a forward of its own, a folded batch norm.

Networks put a function over an instance's forward: Ultralytics' `fuse` a shorter one, accelerate one that calls the
old. An attribute wins over a class, so the first would lose the block without a word. The generated class sees the
assignment: what replaces the forward becomes what the blocks work around; what calls the block's forward stays an
attribute; what would replace a forward that blocks stand within is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from attninject.errors import CannotRewriteError

from .injected_state import OWN, Insertion, extended_since, injected_in

GENERATED = "<attninject "  # how the file names of generated code begin
_ENOUGH = 2000  # objects that a search for the block's forward looks at


def guards(
    base: type[nn.Module], edit: tuple[Insertion, ...], regenerate: Callable[[nn.Module], None]
) -> dict[str, Any]:
    """Methods of a generated class that see `carrier.forward = …` and the folding of a norm across a block.

    Args:
        base: the carrier's original class, which does everything else.
        edit: its insertions.
        regenerate: makes the carrier's class anew after its own forward has come or gone.
    """
    convs = frozenset(i.splits[0] for i in edit if i.splits and i.splits[0])
    norms = frozenset(i.splits[1] for i in edit if i.splits and i.splits[0])

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if name == "forward" and not isinstance(value, nn.Module):
            assign(self, value, regenerate)
            return
        if (name in convs and _gains_bias(getattr(self, name), value)) or (
            name in norms and isinstance(value, nn.Identity)
        ):
            _refuse_fold(base, edit)
        base.__setattr__(self, name, value)

    def delete_attribute(self: nn.Module, name: str) -> None:
        if name in norms:
            _refuse_fold(base, edit)
        if name != "forward" or not withdraw(self, regenerate):
            base.__delattr__(self, name)

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        old = self._parameters.get(name)
        if param is not None and (
            (name == "bias" and old is None and "bias" in self._parameters)
            or (name == "weight" and old is not None and _rescaled(old, param))
        ):
            _refuse_fold(base, edit)
        base.register_parameter(self, name, param)

    found: dict[str, Any] = {"__setattr__": set_attribute, "__delattr__": delete_attribute}
    if any(i.splits and not i.splits[0] for i in edit):
        found["register_parameter"] = register
    return found


def _gains_bias(old: Any, new: Any) -> bool:
    return getattr(old, "bias", 0) is None and getattr(new, "bias", None) is not None


def _rescaled(old: Tensor, new: Tensor) -> bool:
    """Whether weights (O, I, …), or (I, O, …), changed by one factor per output channel, as folding a norm does it.

    Where a channel has but one weight, any change looks like that, and none is taken for it. A tensor of another kind
    is the same weight sharded, or gathered again.
    """
    if type(old.data) is not type(new.data):
        return False
    if old.shape != new.shape or old.ndim < 2 or old.is_meta or new.is_meta:
        return False
    with torch.no_grad():
        return _by_rows(old, new) or _by_rows(old.transpose(0, 1), new.transpose(0, 1))


def _by_rows(old: Tensor, new: Tensor) -> bool:
    if old[0].numel() < 2:
        return False
    a, b = (t.detach().double().cpu().flatten(1) for t in (old, new))
    factor = (a * b).sum(1, keepdim=True) / a.square().sum(1, keepdim=True).clamp_min(1e-300)
    near = 1e-3 * b.abs().amax(1, keepdim=True)
    return bool(((b - factor * a).abs() <= near).all()) and not torch.allclose(a, b, rtol=1e-6)


def _refuse_fold(base: type[nn.Module], edit: tuple[Insertion, ...]) -> None:
    names = ", ".join(i.name for i in edit if i.splits)
    raise CannotRewriteError(
        f"{base.__qualname__}: {names} stands between a layer and its batch norm, and folding the norm into the layer "
        "would reach across it and change the function; eject the block before folding, or place it after the norm "
        "(where a fold goes on in place, the layer's weight may be changed already: load it again)"
    )


# --- a forward of the instance's own -----------------------------------------------------------


def own_signature(carrier: nn.Module) -> inspect.Signature | None:
    """How the forward that was assigned to a carrier is called; None where there is none."""
    own = carrier.__dict__.get(OWN)
    return None if own is None else _signature(own, carrier)


def _signature(own: Any, carrier: nn.Module) -> inspect.Signature:
    known = injected_in(carrier)
    assert known is not None
    try:
        found = inspect.signature(own)
    except (TypeError, ValueError):  # builtin
        found = inspect.signature(MethodType(known.base.forward, carrier))
    plain = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    return inspect.Signature(plain)


def assign(carrier: nn.Module, value: Any, regenerate: Callable[[nn.Module], None]) -> None:
    """`carrier.forward = value`: blocks run on around it, or inside it where it calls what was there.

    Raises:
        CannotRewriteError: blocks stand within the forward that this would replace.
    """
    known = injected_in(carrier)
    assert known is not None
    if _is_forward_of(value, carrier):  # what was there is put back
        carrier.__dict__.pop("forward", None)
        if getattr(value, "__func__", value) is not type(carrier).forward:
            _change(carrier, None, regenerate)
        return
    if calls_forward_of(value, carrier):
        carrier.__dict__["forward"] = value
        return
    names, cls = ", ".join(i.name for i in known.in_graph), known.base.__qualname__
    if names:
        raise CannotRewriteError(
            f"{cls}: the forward given to this instance would replace the one that {names} stands in, and the block "
            "would run no more; eject it first, assign, and inject again with a site that the new forward has"
        )
    if extended_since(carrier):
        raise CannotRewriteError(
            f"{cls}: its class was extended since blocks were injected ({type(carrier).__name__}), so that a forward "
            "of the instance's own would lose them; assign it before that"
        )
    parameters = _signature(value, carrier).parameters
    for i in known.edit:
        if i.position != "after" and isinstance(i.operand, str) and i.operand not in parameters:
            raise CannotRewriteError(
                f"{cls}: the forward given to this instance takes no {i.operand!r}, which {i.name} works on; "
                "eject it first"
            )
    _change(carrier, value, regenerate)


def withdraw(carrier: nn.Module, regenerate: Callable[[nn.Module], None]) -> bool:
    """`del carrier.forward`; false where the instance has none of its own."""
    if "forward" in carrier.__dict__:
        del carrier.__dict__["forward"]
    elif OWN in carrier.__dict__:
        _change(carrier, None, regenerate)
    else:
        return False
    return True


def _change(carrier: nn.Module, own: Any, regenerate: Callable[[nn.Module], None]) -> None:
    before = dict(carrier.__dict__)
    try:
        carrier.__dict__.pop("forward", None)
        carrier.__dict__.pop(OWN, None)
        if own is not None:
            carrier.__dict__[OWN] = own
        regenerate(carrier)
    except BaseException:
        carrier.__dict__.clear()
        carrier.__dict__.update(before)
        raise


def refuse_wrapped(carrier: nn.Module) -> None:
    """Refuse to take the block's forward from under an attribute that calls it.

    Raises:
        CannotRewriteError: with what to do.
    """
    own = carrier.__dict__.get("forward")
    if own is not None and calls_forward_of(own, carrier):
        raise CannotRewriteError(
            f"{type(carrier).__name__}: a forward that was assigned to this instance calls the one with the block in it; "
            "take it off first (del module.forward), then eject"
        )


# --- does a function call the block's forward? -------------------------------------------------


def _is_forward_of(value: Any, carrier: nn.Module) -> bool:
    """Whether something is the generated forward of a carrier, of now or of an earlier injection."""
    if isinstance(value, MethodType):
        return value.__self__ is carrier and _is_forward_of(value.__func__, carrier)
    known = injected_in(carrier)
    base = known.base if known else type(carrier)
    name = f"{GENERATED}{base.__module__}.{base.__qualname__} "
    return isinstance(value, FunctionType) and value.__code__.co_filename.startswith(name)


def calls_forward_of(value: Any, carrier: nn.Module) -> bool:
    """Whether a function keeps hold of a carrier's generated forward, as every wrapper does in some way."""
    seen: dict[int, Any] = {}
    todo = [value]
    while todo and len(seen) < _ENOUGH:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if _is_forward_of(thing, carrier):
            return True
        todo += _reached(thing, carrier)
    return False


def _reached(thing: Any, carrier: nn.Module) -> Iterator[Any]:
    """What a callable keeps: closures, defaults, arguments, attributes, and the names that its code uses."""
    if isinstance(thing, MethodType):
        yield thing.__func__
        yield thing.__self__
    elif isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, FunctionType):
        for cell in thing.__closure__ or ():
            if cell != type(cell)():  # not empty
                yield cell.cell_contents
        yield from (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())
        for name in thing.__code__.co_names:
            yield carrier.__dict__.get(name)
            named = thing.__globals__.get(name)
            if isinstance(named, (FunctionType, MethodType, functools.partial)):
                yield named
    elif isinstance(thing, (list, tuple)):
        yield from thing
    elif isinstance(thing, dict):
        yield from thing.values()
    if not isinstance(thing, (nn.Module, type)):
        yield from getattr(thing, "__dict__", {}).values()
