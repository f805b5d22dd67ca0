"""From a pattern over names to spots: calls of modules, and operations in their forwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from attninject.anatomy.dataflow import Spot
from attninject.errors import (
    CannotRewriteError,
    NoMatchError,
    NotCalledError,
    NoTensorError,
    PlanError,
    SeveralCallsError,
    TraceRefused,
)
from attninject.observe.record import Call, Op, Ref, refs
from attninject.recipe.patterns import Pattern, compile_pattern
from attninject.recipe.rules import Rule
from attninject.surgery.local_graph import LocalGraph, targets
from attninject.wording import listed, nearest_hint

from .picking import wanted
from .scene import Match, Scene, instead, match_at

# --- by pattern --------------------------------------------------------------------------------


def by_pattern(rule: Rule, scene: Scene, label: str, notes: list[str]) -> list[Match]:
    """The matches of a rule's `after` or `before`, in any order; notes on patterns that found nothing."""
    position = "after" if rule.after else "before"
    patterns = [compile_pattern(p) for p in (rule.after or rule.before or ())]
    spots: dict[Any, Match] = {}
    uncalled: list[str] = []
    unused: list[Pattern] = []
    unfit: PlanError | None = None
    for pattern in patterns:
        found: list[Match] = []
        named = False
        for name, module in scene.names.items():
            if pattern.operation is not None:
                found += _operations(rule, scene, pattern, name, module, position, label)
            elif pattern.matches(name):
                named = True
                try:
                    hits = list(_calls(rule, scene, name, module, position, label))
                except PlanError as error:
                    if wanted(rule, name, module):
                        raise
                    unfit = error  # of a module that the filters leave out anyway
                    continue
                found += hits
                uncalled += [] if hits else [name]
        if not (named or found):
            unused.append(pattern)
        for hit in found:
            spots.setdefault((id(hit.spot.event), hit.spot.target, hit.spot.position, hit.spot.output), hit)
    if len(unused) == len(patterns):
        raise NoMatchError(_no_match(patterns[0], scene, label))
    notes += [_no_match(pattern, scene, label) for pattern in unused]
    if not spots and not uncalled and unfit:
        raise unfit
    if not spots:
        raise NotCalledError(
            f"{label}: {listed(sorted(uncalled), 5)} "
            f"{'is' if len(uncalled) == 1 else 'are'} never called in the model's forward"
        )
    if uncalled:
        notes.append(f"{label}: left aside, since never called: {', '.join(sorted(set(uncalled)))}")
    return list(spots.values())


def _no_match(pattern: Pattern, scene: Scene, label: str) -> str:
    if there := _operation_names(pattern, scene):
        hint = f"; the operations there are {listed(there, 8)}"
    else:
        hint = nearest_hint(str(pattern).split("::")[0], [n for n in scene.names if n])
    what = "operation" if pattern.operation is not None else "module"
    where = f" under {scene.root_path!r}" if scene.root_path else ""
    return f"{label}: no {what}{where} matches {str(pattern)!r}{hint}"


def _operation_names(pattern: Pattern, scene: Scene) -> list[str]:
    """What the operations are called in the owners that a pattern names; [] where it names none."""
    found: list[str] = []
    for name, module in scene.names.items():
        if pattern.owner is None or not pattern.owner.matches(name) or not module._modules:
            continue
        if scene.record.calls_of(module):
            with contextlib.suppress(TraceRefused):
                named = targets(scene.graph(module).eval).values()
                found += [target.name for target in named if target.kind == "op"]
    return list(dict.fromkeys(found))


def _calls(
    rule: Rule, scene: Scene, name: str, module: nn.Module, position: str, label: str
) -> Iterator[Match]:
    """One match per call in the first run of each owner (or per call that `call:` chooses)."""
    by_owner: dict[int, list[Call]] = {}
    owners: set[int] = set()
    for call in scene.record.calls_of(module):
        owner_run = id(call.parent)
        owner = id(call.parent.module) if call.parent else 0
        if owner_run not in by_owner and owner in owners:
            continue  # a later run of the same owner: the same sites
        owners.add(owner)
        by_owner.setdefault(owner_run, []).append(call)
    for calls in by_owner.values():
        for call in _choose_calls(rule, calls, name, label):
            yield match_at(scene, _spot(rule, call, position, name, label), scene.path(module), module)


def _choose_calls(rule: Rule, calls: list[Call], name: str, label: str) -> list[Call]:
    if rule.call == "all" or (len(calls) == 1 and rule.call in (None, "last", 1)):
        return calls
    if rule.call == "last":
        return calls[-1:]
    if isinstance(rule.call, int):
        if rule.call > len(calls):
            raise NotCalledError(
                f"{label}: {name} is called {len(calls)} times, so there is no call {rule.call}"
            )
        return [calls[rule.call - 1]]
    raise SeveralCallsError(
        f"{label}: {name} is called {len(calls)} times in one forward of its owner; "
        "say which with call: a number from 1, last, or all"
    )


def _spot(rule: Rule, call: Call, position: str, name: str, label: str) -> Spot:
    if position == "after":
        tree, key = call.out, rule.output
    else:
        tree, key = {**dict(enumerate(call.args)), **call.kwargs}, rule.input or 0
        if key == 0 and not call.args and call.kwargs:
            key = next(iter(call.kwargs))
    item = _item(tree, key)
    if not isinstance(item, Ref):
        raise NoTensorError(_no_tensor(position, tree, key, name, label))
    if position == "after":
        return Spot(call, position, item.value, output=key)
    return Spot(call, position, item.value, operand=key or 0)


def _item(tree: Any, key: int | str | None) -> Any:
    """What a key chooses from a tuple, list or dict (None: the whole); None where there is nothing to choose."""
    if key is None:
        return tree
    try:
        return None if isinstance(tree, Ref) else tree[key]
    except (KeyError, IndexError, TypeError):
        return None


def _no_tensor(position: str, tree: Any, key: Any, name: str, label: str) -> str:
    if position == "before":
        return f"{label}: operand {key!r} of {name} is no tensor; choose another with input:"
    if isinstance(tree, Ref):
        return f"{label}: the output of {name} is one tensor, so output: {key!r} has nothing to choose from"
    if isinstance(tree, dict):
        options = [k for k, v in tree.items() if isinstance(v, Ref)]
    elif isinstance(tree, (tuple, list)):
        options = [i for i, v in enumerate(tree) if isinstance(v, Ref)]
    else:
        options = []
    advice = f"; choose one with output: {' or '.join(map(repr, options))}" if options else ""
    return f"{label}: the output of {name or 'the root'} is a {type(tree).__name__}, no tensor{advice}"


def _operations(
    rule: Rule, scene: Scene, pattern: Pattern, name: str, module: nn.Module, position: str, label: str
) -> Iterator[Match]:
    """Operations in the forward of one owner; an owner without a faithful graph has none by name."""
    if not pattern.owner or not pattern.owner.matches(name):
        return
    by_wildcard = any(c in str(pattern.owner) for c in "*?[{:")
    if by_wildcard and not module._modules and type(module).__module__.startswith("torch.nn."):
        return  # torch's own layers are named by their calls
    calls = scene.record.calls_of(module)
    if not calls:
        return
    try:
        local = scene.graph(module)
    except TraceRefused as refused:
        if not by_wildcard:
            raise CannotRewriteError(
                f"{label}: the operations of {name or 'the root'} ({type(module).__name__}) cannot be named: {refused}"
                f"{instead(scene, calls[0])}"
            ) from refused
        return
    for node, target in targets(local.eval).items():
        if target.kind != "op" or not pattern.match_operation(name, target.name):
            continue
        spot = _operation_spot(rule, local, node, calls[0], position)
        path = f"{scene.path(module)}::{target.name}"
        if spot is None:
            raise NoTensorError(f"{label}: {path} has no tensor there; choose another with input: or output:")
        yield match_at(scene, spot, path, module)


def _operation_spot(rule: Rule, local: LocalGraph, node: Any, call: Call, position: str) -> Spot | None:
    if position == "after":
        tree, key = local.effects[node].out, rule.output
        operand: int | str = 0
    else:
        key = None
        operand = 0 if rule.input is None else rule.input
        source = node.kwargs.get(operand) if isinstance(operand, str) else None
        if isinstance(operand, int) and operand < len(node.args):
            source = node.args[operand]
        tree = local.effects[source].out if isinstance(source, fx.Node) and source in local.effects else None
    item = _item(tree, key)
    event = _event_of(call, local, node)
    if event is None or not isinstance(item, Ref):
        return None
    return Spot(event, position, item.value, output=key, operand=operand, target=targets(local.eval)[node])


def _event_of(call: Call, local: LocalGraph, node: Any) -> Op | None:
    """The ATen operation that a node made (its last one)."""
    out = {r.value for r in refs(local.effects[node].out)}
    events = [e for e in call.events if isinstance(e, Op) and set(e.outs) & out]
    return events[-1] if events else None
