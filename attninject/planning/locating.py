"""From a spot to a location: whether a block goes into its owner's graph or hangs on a module, and what forbids it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from attninject.anatomy.dataflow import Spot, output_key
from attninject.errors import CannotRewriteError, TraceRefused
from attninject.layout import Layout
from attninject.observe.record import Call, Op
from attninject.surgery.injected_state import CONTAINERS, Insertion, base_class
from attninject.surgery.local_graph import (
    LocalGraph,
    Target,
    public_forwards,
    targets,
    uncalled_forwards,
    walks_modules,
)
from attninject.surgery.location import Location
from attninject.wording import listed

from . import inplace_hazards
from .inplace_hazards import Copies
from .scene import Scene, call_node, node_of


def locate(scene: Scene, spot: Spot, path: str) -> Location:
    """Decide where the block of a spot goes, and what in-place operations around it make necessary.

    Its insertion has no name, layout and slot yet: they depend on the rule, which the plan knows.

    Raises:
        CannotRewriteError: neither mechanism serves; the message says why.
        InPlaceHazardError: no identity could keep the function there.
    """
    owner = spot.owner
    check_bypass(owner, path)
    reason = _not_rewritable(scene, owner) or _shared(scene, owner)
    if not reason:
        assert owner is not None
        try:
            local = scene.graph(owner.module)
            return in_graph(scene, local, owner, spot, path)
        except TraceRefused as refused:
            reason = f"{type(owner.module).__name__}: {refused}"
    try:
        if isinstance(spot.event, Op):
            return _operation_in_root(scene, spot, path, reason)
        return _at_module(scene, spot, path, reason)
    except CannotRewriteError:
        if owner is None or _not_rewritable(scene, owner, parted=True) or _shared(scene, owner):
            raise
        # a graph that asks about arguments, checkpoints, or joins parted forwards is only made where one must be
        with contextlib.suppress(TraceRefused):
            return in_graph(scene, scene.graph(owner.module, decide=True), owner, spot, path)
        raise


def check_bypass(owner: Call | None, path: str) -> None:
    """Refuse what torch's encoder layer calls while training and passes by in eval mode without gradients."""
    around = owner
    while around is not None:
        layer = around.module
        if isinstance(layer, nn.TransformerEncoderLayer) and _has_fast_path(layer):
            raise CannotRewriteError(
                f"{path}: in eval mode without gradients nn.TransformerEncoderLayer takes a fast path that calls none "
                "of its children, so a block there would not run; name the layer itself, or call "
                "torch.backends.mha.set_fastpath_enabled(False) wherever the model is built"
            )
        around = around.parent


def _has_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    own = base_class(layer).forward is nn.TransformerEncoderLayer.forward
    fits = layer.self_attn.batch_first and bool(layer.activation_relu_or_gelu)
    return own and fits and torch.backends.mha.get_fastpath_enabled()


def _not_rewritable(scene: Scene, owner: Call | None, parted: bool = False) -> str:
    """Why an owner's graph is never rewritten; empty if it may be.

    `parted`: it may be where all other forwards are parts that the forward itself calls.
    """
    if owner is None:
        return "the root itself"
    module = owner.module
    if module is scene.model:
        return "owner is the model"
    if module is scene.root:
        return "owner is the root"
    if issubclass(base_class(module), CONTAINERS):
        return f"owner is a container ({type(module).__name__})"
    if isinstance(module, _NormBase):
        return f"owner is a batch norm ({type(module).__name__}), which converting or freezing norms replaces"
    if hasattr(module, "parametrizations"):
        return f"owner is parametrized ({type(module).__name__}): its class is swapped when that ends"
    if walks_modules(base_class(module)):
        return f"owner goes over its own children ({type(module).__name__})"
    if _sheds_children(module):
        return f"owner is copied without what hangs on it ({type(module).__name__})"
    if others := (uncalled_forwards if parted else public_forwards)(base_class(module)):
        return f"owner has other forwards ({', '.join(others[:2])})"
    return ""


def _shared(scene: Scene, owner: Call | None) -> str:
    """Why an owner's forward is not ours to rewrite; empty if no net but this one runs it."""
    assert owner is not None
    others = scene.sharing.others(owner.module)
    return f"{listed(others)} {has(others)} the owner too" if others else ""


def why_not_rewritten(scene: Scene, owner: Call, parted: bool = False) -> str:
    """Why no block goes into the graph of an owner; empty if one may. `parted`: see `_not_rewritable`."""
    return _not_rewritable(scene, owner, parted) or _shared(scene, owner)


def is_open_root(scene: Scene, owner: Call) -> bool:
    """Whether an owner is a root whose one forward may be rewritten where nothing else serves."""
    is_root = owner.module is scene.model or owner.module is scene.root
    return is_root and not public_forwards(base_class(owner.module))


def has(names: Sequence[str]) -> str:
    """The verb behind some names."""
    return "has" if len(names) == 1 else "have"


def _operation_in_root(scene: Scene, spot: Spot, path: str, reason: str) -> Location:
    owner = spot.owner
    assert owner is not None
    others = public_forwards(base_class(owner.module))
    if owner.module in (scene.model, scene.root) and not others:
        try:
            return in_graph(scene, scene.graph(owner.module), owner, spot, path)
        except TraceRefused as refused:
            reason = str(refused)
    elif others:
        reason = f"it is in a root with several forward methods ({', '.join(others)})"
    raise CannotRewriteError(f"{path}: an operation cannot be reached here: {reason}")


# --- in the owner's graph ----------------------------------------------------------------------


def in_graph(scene: Scene, local: LocalGraph, owner: Call, spot: Spot, path: str) -> Location:
    """The location of a spot in its owner's graph.

    Raises:
        TraceRefused: the spot is not in it.
        InPlaceHazardError: no identity could keep the function there.
    """
    node = call_node(local.eval, spot.event) if isinstance(spot.event, Call) else node_of(local, spot)
    if node is None:
        raise TraceRefused("the call is not in its graph")
    target = targets(local.eval)[node]
    if local.train is not local.eval and target not in targets(local.train).values():
        raise TraceRefused("the call is not in its training graph")
    operand = inplace_hazards.graph_operand(node, spot)
    if not inplace_hazards.alike_in_all_runs(scene, spot, owner):
        raise TraceRefused("its runs in one forward differ in their channels")
    copies = inplace_hazards.in_graph(scene, local, spot, node, operand, path)
    insertion = _insertion(spot, target, operand, copies)
    return Location(insertion, owner.module, local, written=copies.written)


def _insertion(spot: Spot, target: Target | None, operand: int | str, copies: Copies) -> Insertion:
    """The insertion at a spot, as far as it does not depend on the rule: `planner` completes it."""
    given, result = copies.given, copies.result
    return Insertion("", spot.position, target, operand, spot.output, copy_given=given, copy_result=result)


# --- at a module -------------------------------------------------------------------------------


def _at_module(scene: Scene, spot: Spot, path: str, reason: str) -> Location:
    call = spot.event
    assert isinstance(call, Call)
    if several := _several(call):
        location, reason = _in_root(scene, spot, path, reason)
        if location is not None:
            return location
        raise CannotRewriteError(f"{path}: {several} ({reason})")
    copies = inplace_hazards.at_module(scene, spot, path)
    moved = _carrier(scene, spot)
    carrier = moved.event
    if isinstance(carrier, Call) and _bears_none(carrier.module):
        try:
            moved = _beside(scene, moved, path, reason)
        except CannotRewriteError:
            if location := _in_root(scene, spot, path, reason)[0]:
                return location
            raise
        if not _not_rewritable(scene, moved.owner):
            return locate(scene, moved, path)
    carrier = moved.event
    assert isinstance(carrier, Call)
    check_carrier(scene, carrier, moved, path)
    if why := _serves_others(scene, spot, moved):
        location, reason = _in_root(scene, spot, path, reason)
        if location is not None:
            return location
        raise CannotRewriteError(f"{path}: {why} ({reason})")
    operand = parameter(carrier, moved, path) if moved.position == "before" else 0
    insertion = replace(_insertion(moved, None, operand, copies), mask=_mask_of(carrier.module, operand))
    return Location(insertion, carrier.module, reason=reason, written=copies.written)


def at_call(scene: Scene, spot: Spot, path: str, reason: str) -> Location:
    """On the very module of a spot, where a block is given another argument of the same call as well.

    Raises:
        CannotRewriteError: no block can hang there; the message says why.
        InPlaceHazardError: no block could keep the function there.
    """
    call = spot.event
    assert isinstance(call, Call)
    copies = inplace_hazards.at_module(scene, spot, path)
    check_carrier(scene, call, spot, path)
    if why := _several(call) or _serves_others(scene, spot, spot):
        raise CannotRewriteError(f"{path}: {why} ({reason})")
    operand = parameter(call, spot, path) if spot.position == "before" else 0
    return Location(
        _insertion(spot, None, operand, copies), call.module, reason=reason, written=copies.written
    )


def _several(call: Call) -> str:
    """Why a module cannot carry the block of one of its calls; empty if its owner calls it once."""
    runs = call.parent.runs[id(call.module)] if call.parent else 1
    return f"it is called {runs} times in one forward and its calls cannot be told apart" if runs > 1 else ""


def _mask_of(carrier: nn.Module, operand: int | str) -> str:
    """The parameter of an encoder layer of torch's that says which of its tokens (B, L, C) are padding; empty: none."""
    if not isinstance(carrier, nn.TransformerEncoderLayer) or not carrier.self_attn.batch_first:
        return ""
    _, *names = inspect.signature(base_class(carrier).forward).parameters
    mask = "src_key_padding_mask"
    return mask if mask in names and operand in (0, names[0]) else ""


def _in_root(scene: Scene, spot: Spot, path: str, reason: str) -> tuple[Location | None, str]:
    """The site in the graph of a root, which is rewritten only where no module serves; else why not."""
    owner = spot.owner
    if owner is None or not is_open_root(scene, owner) or _shared(scene, owner):
        return None, reason
    for decide in (False, True):
        try:
            return in_graph(scene, scene.graph(owner.module, decide), owner, spot, path), ""
        except TraceRefused as refused:
            reason = str(refused)
    return None, reason


def _serves_others(scene: Scene, spot: Spot, moved: Spot) -> str:
    """Why a module that would carry a spot's block carries none, since it would run elsewhere too; empty if not."""
    call, carrier = spot.event, moved.event
    assert isinstance(call, Call)
    assert isinstance(carrier, Call)
    named = f"its block would hang on {scene.path(carrier.module)} ({base_class(carrier.module).__name__})"
    around = scene.owner(call.parent)
    fix = f"name the module around it{f', {around}' if around else ''}, or give each its own"
    if others := scene.sharing.others(carrier.module):
        return f"{named}, which {listed(others)} {has(others)} too, and would run there as well; {fix}"
    calls = scene.record.calls_of(carrier.module)
    if len(calls) != len(scene.record.calls_of(call.module)):
        owners = [scene.owner(c.parent) or "the model" for c in calls if c.parent]
        return f"{named}, which is called {len(calls)} times ({listed(_distinct(owners))}); {fix}"
    shapes = [
        scene.record.shape(v) for c in calls for v in (c.outs if moved.position == "after" else c.ins)[:1]
    ]
    layout = scene.layout(spot)
    if layout and moved.output is None and len({len(s) for s in shapes}) == 1:
        channels = {layout.channels(s) for s in shapes}
        if len(channels) > 1:
            return f"{named}, which is called with {listed(sorted(map(str, channels)))} channels; {fix}"
    return ""


def _distinct(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))


def refuse_partly_matched(scene: Scene, located: Sequence[tuple[Spot, Location]]) -> None:
    """Refuse a carrier that several owners call where a rule takes some of its sites and leaves others.

    Raises:
        CannotRewriteError: the block would run at the sites that were left, too.
    """
    taken: dict[int, set[int]] = {}  # id of a carrier -> the owners of the sites that it is to serve
    for spot, at in located:
        taken.setdefault(id(at.carrier), set()).add(id(spot.owner.module) if spot.owner else 0)
    for spot, at in located:
        if at.mechanism == "graph" or not isinstance(spot.event, Call):
            continue
        calls = scene.record.calls_of(spot.event.module)
        left = [
            c.parent.module for c in calls if c.parent and id(c.parent.module) not in taken[id(at.carrier)]
        ]
        if left:
            names = _distinct([scene.path(module) or "the model" for module in left])
            raise CannotRewriteError(
                f"{scene.name(spot)}: its block would hang on {scene.path(at.carrier)}, which {listed(names)} "
                f"{'calls' if len(names) == 1 else 'call'} too, where the rule puts none; take all of its sites, or "
                "give each owner a module of its own"
            )


def _carrier(scene: Scene, spot: Spot) -> Spot:
    """Go down Sequentials (and modules that go over their own children) to the child that ends or begins them."""
    call = spot.event
    assert isinstance(call, Call)
    children = [e for e in call.events if isinstance(e, Call)]
    goes_over = inplace_hazards.is_chain(call.module) or id(call.module) in scene.record.iterating
    if not children or not goes_over or isinstance(call.module, nn.ModuleDict):
        return spot
    child = children[-1] if spot.position == "after" else children[0]
    as_often = len(scene.record.calls_of(child.module)) == len(scene.record.calls_of(call.module))
    if not as_often or _bears_none(child.module) or "forward" in child.module.__dict__:
        return spot
    if scene.sharing.others(child.module):
        return spot
    if spot.position == "after" and child.outs == call.outs and spot.output is None:
        return _carrier(scene, Spot(child, "after", spot.value, output_key(child, spot.value)))
    if spot.position == "before" and child.ins[:1] == (spot.value,):
        return _carrier(scene, Spot(child, "before", spot.value))
    return spot


def _bears_none(module: nn.Module) -> bool:
    """Whether no block hangs on it: it is replaced, swaps its class, is copied without, or would call it as a layer."""
    if isinstance(module, _NormBase) or hasattr(module, "parametrizations"):
        return True
    return _sheds_children(module) or walks_modules(base_class(module))


def _sheds_children(module: nn.Module) -> bool:
    """Whether a copy, or a pickle, is made from a state of its class's own that has no children (einops' layers)."""
    if type(module).__getstate__ in (object.__getstate__, nn.Module.__getstate__):
        return False
    try:
        state: Any = module.__getstate__()
    except Exception:
        return False
    return isinstance(state, dict) and "_modules" not in state


def _beside(scene: Scene, spot: Spot, path: str, reason: str) -> Spot:
    """Where the block of a norm or a parametrized module hangs.

    `after` moves before the module's only consumer, or after the Sequential that it ends; `before` moves after
    the only producer of its input.
    """
    call = spot.event
    assert isinstance(call, Call)
    owner = call.parent
    assert owner is not None
    events = scene.users(owner, spot.value)
    if spot.position == "after":
        users = [e for e in events if e is not call and spot.value in e.ins]
        if spot.value not in owner.outs and len(users) == 1 and isinstance(users[0], Call):
            if not _bears_none(users[0].module):
                return _carrier(scene, Spot(users[0], "before", spot.value))
        elif not users and owner.outs == call.outs and isinstance(owner.module, nn.Sequential):
            return Spot(owner, "after", spot.value)
    else:
        makers = [e for e in events if e is not call and spot.value in e.outs and spot.value not in e.ins]
        users = [e for e in events if spot.value in e.ins]
        if (
            len(makers) == len(users) == 1
            and isinstance(makers[0], Call)
            and not _bears_none(makers[0].module)
        ):
            return _carrier(scene, Spot(makers[0], "after", spot.value, output_key(makers[0], spot.value)))
    raise CannotRewriteError(f"{path}: {_bearing(scene, spot, call)} ({reason})")


def _bearing(scene: Scene, spot: Spot, call: Call) -> str:
    """Why nothing serves, and what to name instead."""
    what = f"{base_class(call.module).__name__} is parametrized; remove the parametrization first, or"
    if _sheds_children(call.module):
        what = f"{base_class(call.module).__name__} is copied and pickled without what hangs on it;"
    elif walks_modules(base_class(call.module)):
        what = f"{base_class(call.module).__name__} goes over its own children, so a new one would be called as a layer;"
    if isinstance(call.module, _NormBase):
        what = (
            "a batch norm cannot carry a block, and this one neither ends a Sequential nor has a single module as its "
            "consumer;"
            if spot.position == "after"
            else "a batch norm cannot carry a block;"
        )
    events = call.parent.events if call.parent else []
    makers = [
        e.module for e in events if isinstance(e, Call) and e is not call and set(e.outs) & set(call.ins)
    ]
    near = [scene.path(m) for m in makers if id(m) in scene.paths]
    return f"{what} name the module in front of it{f', {near[0]},' if near else ''} or the one around it"


def check_carrier(scene: Scene, carrier: Call, spot: Spot, path: str) -> None:
    """Refuse a module that no block can hang on."""
    module = carrier.module
    cls = base_class(module)
    if "forward" in module.__dict__:
        raise CannotRewriteError(
            f"{path}: the instance has a forward of its own (an attribute), which would win; name a module beside it, "
            "or patch the class in place of the instance"
        )
    if id(module) in scene.record.iterating and not issubclass(cls, CONTAINERS):
        raise CannotRewriteError(
            f"{path}: {cls.__name__} goes over its own children, so a new one would be called as a layer; "
            "name one of its children"
        )
    if isinstance(module, _NormBase):
        raise CannotRewriteError(f"{path}: a batch norm cannot carry a block")
    if hasattr(module, "parametrizations"):
        raise CannotRewriteError(f"{path}: {cls.__name__} is parametrized; remove the parametrization first")
    hooks = module._forward_hooks if spot.position == "after" else module._forward_pre_hooks
    if scene.record.hooks and hooks:
        raise CannotRewriteError(
            f"{path}: the block would run on the inner side of a hook that may change the shape; "
            "inject before the hook is registered, or name a module beside it"
        )


def parameter(carrier: Call, spot: Spot, path: str) -> int | str:
    """The operand as the forward's parameter: its name, or its position where it was passed by position."""
    parameters = list(inspect.signature(base_class(carrier.module).forward).parameters.values())[1:]
    names = [p.name if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) else "" for p in parameters]
    operand = spot.operand
    if isinstance(operand, int) and operand < len(carrier.args) and any(names[operand : operand + 1]):
        return names[operand]
    if isinstance(operand, str) and operand in names:
        return operand
    raise CannotRewriteError(
        f"{path}: operand {operand!r} of {type(carrier.module).__name__} is no parameter of its forward by name; "
        "name the module that makes the value, with after"
    )


# --- a layer and its batch norm, parted --------------------------------------------------------


def parted(scene: Scene, spot: Spot, carrier: nn.Module) -> tuple[str, str] | None:
    """The layer and the batch norm that a block would stand between, as an `Insertion` names them; None: none.

    Such a pair is folded into one layer for inference, which would reach across the block.
    """
    owner = spot.owner
    events = scene.users(owner, spot.value) if owner else ()
    makers = [e for e in events if spot.value in e.outs]
    readers = [e for e in events if spot.value in e.ins]
    if len(makers) != 1 or len(readers) != 1:
        return None
    layer, norm = (getattr(e, "module", None) for e in (makers[0], readers[0]))
    if not isinstance(layer, (_ConvNd, nn.Linear)) or not isinstance(norm, _BatchNorm):
        return None
    names = {id(m): name for name, m in carrier.named_modules()}
    return (names[id(layer)], names.get(id(norm), "")) if id(layer) in names else None


# --- the layer behind tokens -------------------------------------------------------------------


def token_source(scene: Scene, spot: Spot, layout: Layout, time: int) -> nn.Module | None:
    """The layer whose map the tokens of a spot are, where it can be watched for the map's size; `time`: of asking it."""
    found = scene.positions.find(spot.value) if layout.grid else None
    op = found.source.op if found and found.source else None
    if op is None or op.call.outs != op.outs[:1] or not _watchable(op.call.module):
        return None
    before = [c for c in scene.record.calls_of(op.call.module) if c.start < time]
    return op.call.module if before[-1] is op.call else None


def _watchable(module: nn.Module) -> bool:
    """Whether a module's class may be extended, so that what it gives is seen."""
    own = "forward" in module.__dict__ or hasattr(module, "parametrizations")
    return not own and not isinstance(module, _NormBase)
