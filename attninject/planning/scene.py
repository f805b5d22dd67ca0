"""A model as its recorded run showed it: names, calls, layouts, places, local graphs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from attninject.anatomy.axes import channels_first, evident, frame, measure
from attninject.anatomy.dataflow import Spot
from attninject.anatomy.liveness import read_positions
from attninject.anatomy.place_map import PlaceMap
from attninject.anatomy.repeated_units import channels_of
from attninject.anatomy.token_grid import Positions
from attninject.errors import CannotRewriteError, NotCalledError, TraceRefused
from attninject.layout import Layout
from attninject.observe.record import Call, Op, Record, map_refs, refs
from attninject.observe.snapshot import undoing
from attninject.surgery.alignment import name_after
from attninject.surgery.faithfulness import check
from attninject.surgery.injected_state import OWN, base_class, injected_blocks, injected_in
from attninject.surgery.local_graph import Arguments, LocalGraph, Target, find, targets
from attninject.surgery.tracer import trace
from attninject.wording import listed

from .sharing import Sharing


class Scene:
    """A model as its recorded run showed it: names, calls, layouts, places, local graphs (made on demand)."""

    def __init__(
        self,
        model: nn.Module,
        record: Record,
        root: str,
        rerun: Callable[[str], Record | None],
        sharing: Sharing | None = None,
    ) -> None:
        """`rerun` records the model again: "larger" at an oblong input size, "training" in training mode."""
        self.sharing = sharing or Sharing(model)
        self.model, self.record, self.root_path = model, record, root
        self.root = model.get_submodule(root)
        self._rerun = rerun
        self.layouts: dict[tuple[Any, ...], Layout | None] = {}
        self._users: dict[int, dict[int, list[Call | Op]]] = {}  # by id of a run of an owner, then by value
        self.graphs: dict[tuple[int, bool], LocalGraph | TraceRefused] = {}
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

    def names_at(self, call: Call) -> list[str]:
        """The names below the root that the module of a call has; of several, those below the names of its caller."""
        names = [name for name, module in self.names.items() if module is call.module]
        if len(names) < 2 or call.parent is None:
            return names
        above = [f"{name}." if name else "" for name in self.names_at(call.parent)]
        return [name for name in names if name.startswith(tuple(above))] or names

    def owner(self, call: Call | None) -> str:
        """The name of the module whose forward made a call; of the one around it for a slice of a Sequential."""
        while call is not None and call.parent is not None and id(call.module) not in self.paths:
            call = call.parent
        return self.path(call.module) if call else ""

    def name(self, spot: Spot) -> str:
        """What plans and messages call a spot: `layer1.0.bn3`, or `layer1.0::add` where its operation is known.

        Raises:
            CannotRewriteError: see `path`.
        """
        path = self.path(spot.module)
        return path if spot.target is None else f"{path}::{spot.target.name}"

    @property
    def root_ran(self) -> bool:
        """Whether the root's first run was recorded to its end, though the model's may not have been."""
        calls = self.record.calls_of(self.root)
        return bool(calls) and calls[0].end >= 0

    @functools.cached_property
    def places(self) -> PlaceMap:
        """Places below the root, from its first run."""
        calls = self.record.calls_of(self.root)
        if not calls:
            raise NotCalledError(f"the root {self.root_path!r} is never called in the model's forward")
        return PlaceMap(self.record, calls[0])

    def forget(self) -> None:
        """Let go of what was recorded; see `Record.forget`. The scene is of no use afterwards."""
        for record in (self.record, self.__dict__.get("other"), self.__dict__.get("training_record")):
            if record is not None:
                record.forget()
        self.__dict__.clear()

    @functools.cached_property
    def other(self) -> Record | None:
        """A run of the same model at another, oblong input size; None where the model takes no other."""
        return self._rerun("larger")

    @functools.cached_property
    def training_record(self) -> Record | None:
        """A run of the same model in training mode; None where it fails (detectors want targets)."""
        return self._rerun("training")

    def graph(self, owner: nn.Module, decide: bool = False) -> LocalGraph:
        """The faithful graph of a module's own forward, before any injection.

        Args:
            owner: the module.
            decide: let it decide by its arguments, which generated code then asks about at every call.

        Raises:
            TraceRefused: there is none; the message says why.
        """
        key = id(owner), decide
        found = self.graphs.get(key)
        if found is None:
            try:
                found = self._as_in_its_run(owner) if decide else self._trace(owner, decide)
            except TraceRefused as refused:
                found = refused
            self.graphs[key] = found
        if isinstance(found, TraceRefused):
            raise found
        return found

    def _as_in_its_run(self, owner: nn.Module) -> LocalGraph:
        """The graph with what the recorded run left in plain attributes: a map's size, which the caller sets."""
        now, before = vars(owner), dict(vars(owner))
        numbers = self.record.numbers.get(id(now), {})

        def put_back() -> None:
            now.clear()
            now.update(before)

        with undoing(put_back):
            now.update(numbers)
            local = self._trace(owner, decide=True)
        reads = (replace(r, set_by_run=not r.path and r.name in numbers) for r in local.reads)
        return replace(local, reads=tuple(reads))

    def _trace(self, owner: nn.Module, decide: bool) -> LocalGraph:
        if "forward" in owner.__dict__ or OWN in owner.__dict__:
            raise TraceRefused("the instance has a forward of its own")
        call = self.record.calls_of(owner)[0]
        for event in call.events:
            if isinstance(event, Call) and event.direct:
                raise TraceRefused(
                    f"it calls {self.path(event.module)}.forward itself, which a graph would inline"
                )
        known = injected_in(owner)
        forward = base_class(owner).forward
        try:
            args, kwargs = map_refs((call.args, call.kwargs), lambda r: self.record.values[r.value].twin)
            arguments = Arguments.of(forward, args, kwargs)
        except (TypeError, ValueError) as error:
            raise TraceRefused(f"its forward's arguments cannot be told ({error})") from error
        slots, named = (known.slots, known.local) if known else (frozenset(), None)
        templates = self.templates if named is None else [named]
        fitting = (t for t in templates if decide or not t.arguments.decisions)
        template = next((t for t in fitting if t.fits(owner, forward, arguments)), None)
        if template is not None and not slots:
            with contextlib.suppress(TraceRefused):  # its forward may look at more than they are alike in
                return self._checked(template, owner, call)
        local = trace(owner, forward, arguments, slots, decide)
        if named is None:
            self.templates.append(local)
        else:  # whose names the blocks in it go by
            name_after(local, named)
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

    def users(self, owner: Call, value: int) -> Sequence[Call | Op]:
        """The events of a run of an owner which take or give a value, in order."""
        found = self._users.get(id(owner))
        if found is None:
            found = self._users[id(owner)] = {}
            for event in owner.events:
                for each in dict.fromkeys((*event.ins, *event.outs)):
                    found.setdefault(each, []).append(event)
        return found.get(value, ())

    def layout(self, spot: Spot) -> Layout | None:
        """The layout measured at a spot, or None where the axes do not say."""
        key = (id(spot.event), spot.position, spot.value, spot.output)
        if key not in self.layouts:
            self.layouts[key] = self._measured(spot)
        return self.layouts[key]

    def channels(self, spot: Spot) -> int | None:
        """Extent of the channel axis measured at a spot, or None where the axes do not say."""
        layout = self.layout(spot)
        return layout.channels(self.record.shape(spot.value)) if layout else None

    def _measured(self, spot: Spot) -> Layout | None:
        if not self.record.input_values:
            return None
        shape = self.record.shape(spot.value)
        given = self.record.shape(self.record.input_values[0])
        channels = self._declared_channels(spot)
        if channels is None and shape in self.record.projected:
            channels = self.record.channels(shape)
        batch, size = frame(shape, given)
        quick = measure(shape, batch, size, channels)
        convolved = channels_first(shape) if shape in self.record.convolved else None
        if (
            quick is not None
            and quick.kind != "NLC"
            and convolved in (None, quick)
            and (shape.count(channels) == 1 or evident(shape, size) == quick)
        ):
            return quick
        if found := self.positions.find(spot.value):
            return found.layout
        if convolved:
            return convolved
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

    def _declared_channels(self, spot: Spot) -> int | None:
        """How many channels the module at the spot says it gives or takes."""
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


def instead(scene: Scene, call: Call) -> str:
    """What to name in place of an operation in a forward that has no graph: the modules that it calls."""
    called = [e.module for e in call.events if isinstance(e, Call) and id(e.module) in scene.paths]
    names = list(dict.fromkeys(map(scene.path, called)))
    if not names:
        return f"; name {scene.path(call.module) or 'another module'} itself with after or before"
    return f"; name a module that it calls with after or before: {listed(names, 4)}"


def operation_of(local: LocalGraph, spot: Spot) -> Target:
    """The name of the spot's operation in its owner's graph.

    Raises:
        TraceRefused: no operation of the graph is it.
    """
    node = node_of(local, spot)
    if node is None:
        raise TraceRefused("no operation of its graph makes the value")
    return targets(local.eval)[node]


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
