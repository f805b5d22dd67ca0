"""From a rule's patterns over names to spots: calls of modules, and operations in their forwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
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
from attninject.recipe.targets import Target, as_ending
from attninject.surgery.local_graph import LocalGraph, operands, targets
from attninject.terms import Position
from attninject.wording import listed, nearest_hint

from .picking import wanted
from .scene import Scene, instead


def by_pattern(rule: Rule, scene: Scene, label: str, notes: list[str]) -> list[Spot]:
    """The spots of a rule's `after`, `before` or `replace`, in any order; notes on patterns that found nothing.

    Raises:
        NoMatchError: no pattern matches anything.
        NotCalledError: what they match is never called.
        PlanError: of the kind that fits, where a match has no such call, operation or tensor.
    """
    search = _Search(rule, scene, label)
    for pattern in search.patterns:
        search.look_for(pattern)
    search.refuse_nothing()
    notes += search.notes()
    return list(search.spots.values())


class _Search:
    """What the patterns of one rule found, and what they found in vain."""

    def __init__(self, rule: Rule, scene: Scene, label: str) -> None:
        self.rule, self.scene, self.label = rule, scene, label
        self.position: Position = "after" if rule.after else "before" if rule.before else "replace"
        given = rule.after or rule.before or rule.replace or ()
        self.patterns = [p if isinstance(p, Target) else compile_pattern(p) for p in given]
        self.spots: dict[Any, Spot] = {}
        self.unused: list[Pattern | Target] = []  # match no name
        self.uncalled: list[str] = []  # matched, but never called
        self.unfit: PlanError | None = None  # of a module that the filters leave out anyway

    def look_for(self, pattern: Pattern | Target) -> None:
        """Add what one pattern finds; a target that is still one chooses nothing."""
        if isinstance(pattern, Target):
            self.unused.append(pattern)
            return
        if pattern.operation is not None:
            found = [s for n, m in self.scene.names.items() for s in self.operations(pattern, n, m)]
            named = bool(found)
        else:
            modules = {n: m for n, m in self.scene.names.items() if pattern.matches(n)}
            found = [s for n, m in modules.items() for s in self.calls_of(n, m)]
            named = bool(modules)
        if not named:
            self.unused.append(pattern)
        for spot in found:
            self.spots.setdefault((id(spot.event), spot.target, spot.position, spot.output), spot)

    def calls_of(self, name: str, module: nn.Module) -> list[Spot]:
        """The spots at a matched module; one that the filters leave out anyway may be unfit."""
        try:
            found = list(self.calls(name, module))
        except PlanError as error:
            if wanted(self.rule, name, module):
                raise
            self.unfit = error
            return []
        self.uncalled += [] if found else [name]
        return found

    def refuse_nothing(self) -> None:
        """Say why, where no pattern found a spot."""
        if len(self.unused) == len(self.patterns):
            raise NoMatchError(self.no_match(self.patterns[0]))
        if self.spots:
            return
        if self.unfit and not self.uncalled:
            raise self.unfit
        raise NotCalledError(
            f"{self.label}: {listed(sorted(self.uncalled), 5)} "
            f"{'is' if len(self.uncalled) == 1 else 'are'} never called in the model's forward"
        )

    def notes(self) -> list[str]:
        """What is left aside beside what was found."""
        notes = [self.no_match(pattern) for pattern in self.unused]
        if names := {n for n in self.uncalled if wanted(self.rule, n, self.scene.names[n])}:
            notes.append(f"{self.label}: left aside, since never called: {', '.join(sorted(names))}")
        return notes

    def no_match(self, pattern: Pattern | Target) -> str:
        """That a pattern matches nothing, and what is near."""
        if isinstance(pattern, Target):
            kinds = sorted({type(module).__name__ for module in self.scene.names.values()})
            return f"{self.label}: the {pattern} chooses no module; there are {listed(kinds, 8)}"
        if there := _operation_names(pattern, self.scene):
            hint = f"; the operations there are {listed(there, 8)}"
        else:
            text, names = str(pattern).split("::")[0], [n for n in self.scene.names if n]
            hint = as_ending(text, names) or nearest_hint(text, names)
        what = "operation" if pattern.operation is not None else "module"
        where = f" under {self.scene.root_path!r}" if self.scene.root_path else ""
        return f"{self.label}: no {what}{where} matches {str(pattern)!r}{hint}"

    # --- calls of modules ----------------------------------------------------------------------

    def calls(self, name: str, module: nn.Module) -> Iterator[Spot]:
        """One spot per call in the first run of each owner (or per call that `call:` chooses)."""
        by_run: dict[int, list[Call]] = {}
        owners: set[int] = set()
        every = self.scene.record.calls_of(module)
        if self.position == "replace":
            yield from (self.at_call(call, name) for call in every[:1])  # whoever calls it, and how often
            return
        for call in every:
            run = id(call.parent)
            owner = id(call.parent.module) if call.parent else 0
            if run not in by_run and owner in owners:
                continue  # a later run of the same owner: the same sites
            owners.add(owner)
            by_run.setdefault(run, []).append(call)
        for calls in by_run.values():
            for call in self.chosen(calls, name):
                yield self.at_call(call, name)

    def chosen(self, calls: list[Call], name: str) -> list[Call]:
        """Which calls within one run of an owner the rule means."""
        number, count = self.rule.call, len(calls)
        if number == "all" or (count == 1 and number in (None, "last", 1)):
            return calls
        if number == "last":
            return calls[-1:]
        if not isinstance(number, int):
            raise SeveralCallsError(
                f"{self.label}: {name} is called {count} times in one forward of its owner; "
                "say which with call: a number from 1, last, or all"
            )
        if number > count:
            raise NotCalledError(
                f"{self.label}: {name} is called {count} times, so there is no call {number}"
            )
        return [calls[number - 1]]

    def at_call(self, call: Call, name: str) -> Spot:
        """The spot at one tensor of a call: the rule's `output`, or its `input`."""
        if self.position == "after":
            item = _item(call.out, self.rule.output)
            if not isinstance(item, Ref):
                raise NoTensorError(_no_output(call.out, self.rule.output, name, self.label))
            return Spot(call, "after", item.value, output=self.rule.output)
        key = self.rule.input or 0
        if key == 0 and not call.args and call.kwargs:
            key = next(iter(call.kwargs))
        item = _item({**dict(enumerate(call.args)), **call.kwargs}, key)
        if not isinstance(item, Ref):
            raise NoTensorError(
                f"{self.label}: operand {key!r} of {name} is no tensor; {self._instead(call, item)}"
            )
        return Spot(call, self.position, item.value, operand=key)

    def _instead(self, call: Call, operand: Any) -> str:
        """What to do about an operand that is no tensor: of a list of them, name who made one."""
        values = [r.value for r in refs(operand)]
        makers = (
            next((c for c in self.scene.record.calls if v in c.outs and c.start < call.start), None)
            for v in values
        )
        names = [self.scene.path(c.module) for c in makers if c is not None]
        if not names:
            return "choose another with input:"
        return f"several tensors enter in it; take `after` with what made one of them: {listed(names, 4)}"

    # --- operations in a forward ---------------------------------------------------------------

    def operations(self, pattern: Pattern, name: str, module: nn.Module) -> Iterator[Spot]:
        """Operations in the forward of one owner; an owner without a faithful graph has none by name."""
        if not pattern.owner or not pattern.owner.matches(name):
            return
        by_wildcard = any(c in str(pattern.owner) for c in "*?[{:")
        if by_wildcard and not module._modules and type(module).__module__.startswith("torch.nn."):
            return  # torch's own layers are named by their calls
        calls = self.scene.record.calls_of(module)
        local = self.graph_of(name, calls[0], by_wildcard) if calls else None
        if local is None:
            return
        for node, target in targets(local.eval).items():
            if target.kind == "op" and pattern.match_operation(name, target.name):
                yield self.at_operation(local, node, calls[0])

    def graph_of(self, name: str, call: Call, by_wildcard: bool) -> LocalGraph | None:
        """The graph of an owner, which one that is named outright must have."""
        try:
            return self.scene.graph(call.module)
        except TraceRefused as refused:
            if by_wildcard:
                return None
            raise CannotRewriteError(
                f"{self.label}: the operations of {name or 'the root'} ({type(call.module).__name__}) cannot be named: "
                f"{refused}{instead(self.scene, call)}"
            ) from refused

    def at_operation(self, local: LocalGraph, node: fx.Node, call: Call) -> Spot:
        """The spot at one tensor of a node: the rule's `output`, or its `input`."""
        target = targets(local.eval)[node]
        output, operand = self.rule.output, self.rule.input or 0  # one of them is not given
        after = self.position == "after"
        item = _item(local.effects[node].out, output) if after else _operand(local, node, operand)
        event = _event_of(call, local, node)
        if event is None or not isinstance(item, Ref):
            path = f"{self.scene.path(call.module)}::{target.name}"
            raise NoTensorError(
                f"{self.label}: {path} has no tensor there; choose another with input: or output:"
            )
        return Spot(event, self.position, item.value, output=output, operand=operand, target=target)


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


def _item(tree: Any, key: int | str | None) -> Any:
    """What a key chooses from a tuple, list or dict (None: the whole); None where there is nothing to choose."""
    if key is None:
        return tree
    try:
        return None if isinstance(tree, Ref) else tree[key]
    except (KeyError, IndexError, TypeError):
        return None


def _no_output(tree: Any, key: int | str | None, name: str, label: str) -> str:
    """Why a call's result gives no tensor, and which keys of it would."""
    if isinstance(tree, Ref):
        return f"{label}: the output of {name} is one tensor, so output: {key!r} has nothing to choose from"
    items: Mapping[Any, Any] = tree if isinstance(tree, dict) else {}
    if isinstance(tree, (tuple, list)):
        items = dict(enumerate(tree))
    options = [repr(k) for k, item in items.items() if isinstance(item, Ref)]
    advice = (
        f"choose one with output: {' or '.join(options)}"
        if options
        else "name the module inside that makes one"
    )
    return f"{label}: the output of {name or 'the root'} is a {type(tree).__name__}, no tensor; {advice}"


def _operand(local: LocalGraph, node: fx.Node, operand: int | str) -> Any:
    """What the probe saw as a node's operand; None where it has none there, or one that no node made."""
    source = operands(node).get(operand)
    return local.effects[source].out if isinstance(source, fx.Node) and source in local.effects else None


def _event_of(call: Call, local: LocalGraph, node: fx.Node) -> Op | None:
    """The ATen operation that a node made (its last one)."""
    out = {r.value for r in refs(local.effects[node].out)}
    events = [e for e in call.events if isinstance(e, Op) and set(e.outs) & out]
    return events[-1] if events else None
