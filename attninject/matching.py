"""From a rule to spots: match, filter, pick. Looks at the recorded run, changes nothing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from .edits import base_class, injected_blocks, injected_in
from .errors import (
    AllExcludedError,
    CannotRewriteError,
    NoMatchError,
    NoSuchPlaceError,
    NotCalledError,
    NoTensorError,
    PlanError,
    SeveralCallsError,
    TraceRefused,
)
from .flow import Spot
from .layout import Layout, evident, frame, measure
from .patterns import Pattern, compile_pattern, listed, nearest_hint
from .places import Map
from .positions import Positions
from .reading import read_positions
from .recipe import Every, Rule
from .record import Call, Op, Record, Ref, refs
from .trace import Arguments, LocalGraph, check, find, targets, trace
from .units import channels_of


class Scene:
    """A model as its recorded run showed it: names, calls, layouts, places, local graphs (made on demand)."""

    def __init__(
        self, model: nn.Module, record: Record, root: str, rerun: Callable[[str], Record | None]
    ) -> None:
        """`rerun` records the model again: "larger" at an oblong input size, "training" in training mode."""
        self.model, self.record, self.root_path = model, record, root
        self.root = model.get_submodule(root)
        self._rerun = rerun
        self.graphs: dict[int, LocalGraph | TraceRefused] = {}
        self.templates: list[LocalGraph] = []  # of owners alike, one trace serves all; each is checked
        blocks = {id(m) for b in injected_blocks(model).values() for m in b.modules()}
        self.paths: dict[int, str] = {}
        self.names: dict[str, nn.Module] = {}  # below the root, aliases too
        prefix = f"{root}." if root else ""
        for path, module in model.named_modules(remove_duplicate=False):
            if id(module) in blocks:
                continue
            self.paths.setdefault(id(module), path)
            if path == root:
                self.names[""] = module
            elif path.startswith(prefix):
                self.names[path[len(prefix) :]] = module

    def path(self, module: nn.Module) -> str:
        """The module's (first) name in the whole model.

        Raises:
            CannotRewriteError: it has none, since its owner keeps it in a plain list or the like.
        """
        if id(module) in self.paths:
            return self.paths[id(module)]
        raise CannotRewriteError(
            f"the model calls a {type(module).__name__} that is not among its modules; register it (nn.ModuleList in "
            "place of a plain list) or name another module"
        )

    @functools.cached_property
    def places(self) -> Map:
        """Places below the root, from its first run."""
        calls = self.record.calls_of(self.root)
        if not calls:
            raise NotCalledError(f"the root {self.root_path!r} is never called in the model's forward")
        return Map(self.record, calls[0])

    @functools.cached_property
    def other(self) -> Record | None:
        """A run of the same model at another, oblong input size; None where the model takes no other."""
        return self._rerun("larger")

    @functools.cached_property
    def training_record(self) -> Record | None:
        """A run of the same model in training mode; None where it fails (detectors want targets)."""
        return self._rerun("training")

    def graph(self, owner: nn.Module) -> LocalGraph:
        """The faithful graph of a module's own forward, before any injection.

        Raises:
            TraceRefused: there is none; the message says why.
        """
        found = self.graphs.get(id(owner))
        if found is None:
            try:
                found = self._trace(owner)
            except TraceRefused as refused:
                found = refused
            self.graphs[id(owner)] = found
        if isinstance(found, TraceRefused):
            raise found
        return found

    def _trace(self, owner: nn.Module) -> LocalGraph:
        if "forward" in owner.__dict__:
            raise TraceRefused("the instance has a forward of its own")
        call = self.record.calls_of(owner)[0]
        known = injected_in(owner)
        forward = base_class(owner).forward
        try:
            arguments = Arguments.of(forward, call.args, call.kwargs)
        except (TypeError, ValueError) as error:
            raise TraceRefused(f"its forward's arguments cannot be told ({error})") from error
        slots = known.slots if known else frozenset()
        known_one = next((t for t in self.templates if t.fits(owner, forward, arguments)), None)
        if known_one is not None and not slots:
            with contextlib.suppress(TraceRefused):  # its forward may look at more than they are alike in
                return self._checked(known_one, owner, call)
        local = trace(owner, forward, arguments, slots)
        self.templates.append(local)
        return self._checked(local, owner, call)

    def _checked(self, local: LocalGraph, owner: nn.Module, call: Call) -> LocalGraph:
        if local.train is not local.eval:
            local = self._check_training(local, owner)
        return check(local, owner, call, self.record, training=False)

    def _check_training(self, local: LocalGraph, owner: nn.Module) -> LocalGraph:
        record = self.training_record
        if record is None:
            raise TraceRefused("its training forward differs, and the model cannot be run in training mode")
        return check(local, owner, record.calls_of(owner)[0], record, training=True)

    @functools.cached_property
    def ops(self) -> list[Op]:
        """Every operation of the run, in order."""
        return list(self.record.calls[0].ops())

    @functools.cached_property
    def writers(self) -> dict[int, list[Op]]:
        """Storage → the operations that write to it, in order."""
        found: dict[int, list[Op]] = {}
        for op in self.ops:
            for storage in op.writes:
                found.setdefault(storage, []).append(op)
        return found

    @functools.cached_property
    def users(self) -> dict[tuple[int, int], list[Call | Op]]:
        """(run of an owner, by id; value) → the events of that run which take or give the value, in order."""
        found: dict[tuple[int, int], list[Call | Op]] = {}
        for call in self.record.calls:
            for event in call.events:
                for value in dict.fromkeys((*event.ins, *event.outs)):
                    found.setdefault((id(call), value), []).append(event)
        return found

    def layout(self, spot: Spot) -> Layout | None:
        """The layout measured at a spot, or None where the axes do not say."""
        if not self.record.input_values:
            return None
        shape = self.record.shape(spot.value)
        given = self.record.shape(self.record.input_values[0])
        channels = self._channels(spot)
        batch, size = frame(shape, given)
        quick = measure(shape, batch, size, channels)
        if (
            quick is not None
            and quick.kind != "NLC"
            and (shape.count(channels) == 1 or evident(shape, size) == quick)
        ):
            return quick
        if found := self.positions.find(spot.value):
            return found.layout
        twin = self._twin(spot)
        return measure(shape, batch, size, channels, twin) if twin else quick

    @functools.cached_property
    def positions(self) -> Positions:
        """Which position of the map each element of a value belongs to."""
        return Positions(self.record)

    def unread(self, value: int) -> bool:
        """Whether nothing behind looks at the positions among a sequence's tokens."""
        return bool(self.record.complete and self.positions.numbered(value) and value not in self._read)

    @functools.cached_property
    def _read(self) -> frozenset[int]:
        return read_positions(self.record, self.positions)

    def _channels(self, spot: Spot) -> int | None:
        if isinstance(spot.event, Call) and spot.output is None:
            if spot.position == "after":
                return channels_of(spot.event.module)
            taken = getattr(spot.event.module, "in_channels", None) or getattr(
                spot.event.module, "num_features", None
            )
            return taken if isinstance(taken, int) else None
        return None

    def _twin(self, spot: Spot) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Shape at the same spot in the other run, and that run's input size."""
        other = self.other
        if other is None or len(other.values) != len(self.record.values):
            return None
        shape = other.shape(spot.value)
        same_rank = len(shape) == len(self.record.shape(spot.value))
        return (shape, frame(shape, other.shape(other.input_values[0]))[1]) if same_rank else None


@dataclass(frozen=True, eq=False)
class Match:
    """A spot that a rule chose, with what the table says of it."""

    spot: Spot
    path: str  # layer1.0.bn3, layer1.0::add
    module: nn.Module  # that the filters look at: the matched module, or the operation's owner
    layout: Layout | None
    channels: int | None


# --- one rule ----------------------------------------------------------------------------------


def match(rule: Rule, scene: Scene, label: str) -> tuple[list[Match], list[str]]:
    """The matches of one rule in call order, and notes on what it left aside.

    Args:
        rule: what to match.
        scene: the model.
        label: how messages call the rule.

    Raises:
        PlanError: of the kind that fits; `NoMatchError` and `AllExcludedError` when nothing is left.
    """
    notes: list[str] = []
    if rule.place:
        try:
            spots = scene.places.spots(rule.place)
        except NoSuchPlaceError as error:
            raise NoSuchPlaceError(f"{label}: {error}") from error
        first = {(id(s.event), s.position, s.value): s for s in (_in_first_run(scene, s) for s in spots)}
        found = [_as_match(scene, s) for s in _with_positions(scene, list(first.values()), label, notes)]
    else:
        found = _by_pattern(rule, scene, label, notes)
    kept = [m for m in sorted(found, key=lambda m: m.spot.time) if _passes(rule, scene, m)]
    picked = _pick(rule, scene, kept)
    if not picked:
        raise AllExcludedError(_nothing_left(rule, label, found, kept))
    return picked, notes


def _with_positions(scene: Scene, spots: list[Spot], label: str, notes: list[str]) -> list[Spot]:
    """Without those at vectors (batch, channels), as in a residual head behind the pooling, unless all are."""
    vectors = [s for s in spots if len(scene.record.shape(s.value)) == 2]
    if not vectors or len(vectors) == len(spots):
        return spots
    owners = [s.event.module if isinstance(s.event, Call) else s.event.call.module for s in vectors]
    names = list(dict.fromkeys(scene.path(m) or "the root" for m in owners))
    notes.append(f"{label}: left aside, since vectors have no positions: {listed(names, 4)}")
    return [s for s in spots if s not in vectors]


def _in_first_run(scene: Scene, spot: Spot) -> Spot:
    """The same spot in the first run of its owner, whose later runs have the same sites; itself where they differ."""
    owner, event = spot.owner, spot.event
    if owner is None or (first := scene.record.calls_of(owner.module)[0]) is owner:
        return spot
    if len(first.events) != len(owner.events):
        return spot
    twin = next(b for a, b in zip(owner.events, first.events, strict=True) if a is event)
    if _what(twin) != _what(event):
        return spot
    given, its = (event.outs, twin.outs) if spot.position == "after" else (event.ins, twin.ins)
    if len(given) != len(its) or spot.value not in given:
        return spot
    return replace(spot, event=twin, value=its[given.index(spot.value)])


def _what(event: Call | Op) -> object:
    return event.module if isinstance(event, Call) else event.name


def _as_match(scene: Scene, spot: Spot) -> Match:
    event = spot.event
    if isinstance(event, Call):
        return _match(scene, spot, scene.path(event.module), event.module)
    owner = event.call.module
    try:
        name = operation_of(scene.graph(owner), spot)
    except TraceRefused as refused:
        if (beside := _before_its_reader(scene, spot)) is not None:
            return beside
        raise CannotRewriteError(
            f"{scene.path(owner) or 'the root'}: the value sits inside the forward of {type(owner).__name__}, "
            f"and {refused}{_instead(scene, event.call)}"
        ) from refused
    return _match(scene, spot, f"{scene.path(owner)}::{name}", owner)


def _before_its_reader(scene: Scene, spot: Spot) -> Match | None:
    """The site before the one module that reads an operation's result, or that first hands it on (a drop-path)."""
    owner = spot.owner
    if owner is None or spot.position != "after":
        return None
    events = scene.users[id(owner), spot.value]
    readers = [e for e in events if e is not spot.event and spot.value in e.ins]
    first = readers[0] if readers else None
    if not isinstance(first, Call) or (len(readers) > 1 and spot.value not in first.outs):
        return None
    at = next((i for i, a in enumerate(first.args) if isinstance(a, Ref) and a.value == spot.value), None)
    if at is None:
        return None
    beside = Spot(first, "before", spot.value, operand=at)
    return _match(scene, beside, scene.path(first.module), first.module)


def _instead(scene: Scene, call: Call) -> str:
    """What to name in place of an operation in a forward that has no graph: the modules that it calls."""
    called = [e.module for e in call.events if isinstance(e, Call) and id(e.module) in scene.paths]
    names = list(dict.fromkeys(map(scene.path, called)))
    if not names:
        return f"; name {scene.path(call.module) or 'another module'} itself with after or before"
    return f"; name a module that it calls with after or before: {listed(names, 4)}"


def _match(scene: Scene, spot: Spot, path: str, module: nn.Module) -> Match:
    layout = scene.layout(spot)
    channels = layout.channels(scene.record.shape(spot.value)) if layout else None
    return Match(spot, path, module, layout, channels)


def operation_of(local: LocalGraph, spot: Spot) -> str:
    """The name of the spot's operation in its owner's graph.

    Raises:
        TraceRefused: no operation of the graph is it.
    """
    node = node_of(local, spot)
    if node is None:
        raise TraceRefused("no operation of its graph makes the value")
    return targets(local.eval)[node].name


def call_node(graph: fx.Graph, call: Call) -> fx.Node | None:
    """The node of a module's call in a graph of the forward that made the call."""
    assert call.parent is not None
    owner = call.parent.module
    alike = {name for name, m in owner.named_modules(remove_duplicate=False) if m is call.module}
    calls = [n for n in graph.nodes if n.op == "call_module" and str(n.target) in alike]
    return calls[call.number - 1] if len(calls) >= call.number else None


def node_of(local: LocalGraph, spot: Spot) -> fx.Node | None:
    """The node of an operation's spot: the one that it names, or whose result the recorded operation made."""
    if spot.target is not None:
        return find(local.eval, spot.target)
    names = targets(local.eval)
    for node, effect in local.effects.items():
        made = refs(effect.out) if node in names and names[node].kind == "op" else ()
        if {r.value for r in made} & set(spot.event.outs):
            return node
    return None


# --- by pattern --------------------------------------------------------------------------------


def _by_pattern(rule: Rule, scene: Scene, label: str, notes: list[str]) -> list[Match]:
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
                    if _wanted(rule, name, module):
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
            yield _match(scene, _spot(rule, call, position, name, label), scene.path(module), module)


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
                f"{_instead(scene, calls[0])}"
            ) from refused
        return
    for node, target in targets(local.eval).items():
        if target.kind != "op" or not pattern.match_operation(name, target.name):
            continue
        spot = _operation_spot(rule, local, node, calls[0], position)
        path = f"{scene.path(module)}::{target.name}"
        if spot is None:
            raise NoTensorError(f"{label}: {path} has no tensor there; choose another with input: or output:")
        yield _match(scene, spot, path, module)


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


# --- filters -----------------------------------------------------------------------------------


def _wanted(rule: Rule, name: str, module: nn.Module) -> bool:
    """Whether a module passes the filters that ask for its class and its name alone."""
    if rule.type and not ({c.__name__ for c in type(module).__mro__} & set(rule.type)):
        return False
    return not any(compile_pattern(text).matches(name) for text in rule.exclude)


def _passes(rule: Rule, scene: Scene, found: Match) -> bool:
    inner = found.path[len(scene.root_path) + 1 :] if scene.root_path else found.path
    if not _wanted(rule, inner.split("::")[0], found.module):
        return False
    for text in rule.exclude if "::" in inner else ():
        pattern = compile_pattern(text)
        if pattern.operation is not None and pattern.match_operation(*inner.split("::")):
            return False
    if rule.stages and scene.places.stage_of(found.spot.time) not in _stages(rule, scene):
        return False
    return found.channels is None or found.channels >= rule.min_channels


def _stages(rule: Rule, scene: Scene) -> set[int]:
    count = len(scene.places.spans)
    return {s if s > 0 else count + 1 + s for s in rule.stages}


def _pick(rule: Rule, scene: Scene, found: list[Match]) -> list[Match]:
    groups: dict[Any, list[Match]] = {}
    for m in found:
        key: Any = 0
        if rule.per == "owner":
            owner = m.spot.owner
            key = id(owner.module) if owner else 0
        elif rule.per == "stage":
            key = scene.places.stage_of(m.spot.time)
        groups.setdefault(key, []).append(m)
    chosen = [m for group in groups.values() for m in _picked(rule.pick, group)]
    return sorted(chosen, key=lambda m: m.spot.time)


def _picked(pick: Any, group: list[Match]) -> list[Match]:
    if pick == "all":
        return group
    if pick == "first":
        return group[:1]
    if pick == "last":
        return group[-1:]
    if isinstance(pick, Every):
        return group[pick.offset :: pick.every]
    indices = {i if i >= 0 else len(group) + i for i in pick}
    return [m for i, m in enumerate(group) if i in indices]


def _nothing_left(rule: Rule, label: str, found: list[Match], kept: list[Match]) -> str:
    filters = [f for f in ("type", "exclude", "stages", "min_channels") if getattr(rule, f)]
    if kept:
        pick = list(rule.pick) if isinstance(rule.pick, tuple) else rule.pick
        return f"{label}: pick: {pick} chooses none of the {len(kept)} sites that are left"
    kinds = ", ".join(sorted({type(m.module).__name__ for m in found}))
    return (
        f"{label}: {len(found)} sites match ({listed([m.path for m in found])}; {kinds}), "
        f"but {' and '.join(filters) or 'the filters'} leave none of them"
    )
