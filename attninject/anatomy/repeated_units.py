"""The repeated units of a net's trunk: residual, transformer, dense and inception blocks, found by how they recur.

A unit is what owns a residual add, or the block around several such parts, or, in nets without residual
adds, a module of several layers beside others of its class. What a module is called enters in one way only:
two names that differ in their numbers alone (`stages.0.2`, `stages.1.0`) play one role.
"""

from __future__ import annotations

import bisect
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from torch.nn import RNNBase

from attninject.observe.record import Call, Record
from attninject.surgery.injected_state import CONTAINERS, base_class

from .axes import frame, measure
from .dataflow import Flow
from .loops import loop_runs, part_before_pooling
from .residual_adds import ResidualAdd


def channels_of(module: object) -> int | None:
    """Channels that a module says it gives, for layers whose channel axis is known."""
    for name in ("out_channels", "num_features", "out_features", "embed_dim"):
        value = getattr(module, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    shape = getattr(module, "normalized_shape", None)
    return shape[0] if isinstance(shape, (tuple, list)) and len(shape) == 1 else None


def resolution(record: Record, value: int, module: object = None) -> tuple[int, ...] | None:
    """Spatial extents of a value by the run's own input size; None where it has none, as a lone token.

    A map keeps the input's aspect, within rounding: (image blocks, tokens) side by side do not.
    """
    if not record.input_values:
        return None
    shape, given = record.shape(value), record.shape(record.input_values[0])
    channels = channels_of(module) or record.channels(shape)
    layout = measure(shape, *frame(shape, given), channels) if len(shape) > 2 else None
    if layout is None or shape[1:-1] == (1,):
        return None
    at = layout.positions(shape)
    if len(at) > 1 and len(given) > 3 and channels is None:
        stride = given[-2] / max(at[-2], 1)
        if abs(given[-1] / stride - at[-1]) > 1.5:
            return None
    return at


def positions(at: tuple[int, ...] | None) -> int:
    """How many positions a resolution has; 0 for what is no map: a vector, or one that was pooled to one position."""
    return math.prod(at) if at and max(at) > 1 else 0


def contains(outer: Call, inner: Call) -> bool:
    """Whether the second call happened within the first; one that a run stopped in has no end."""
    return outer.start < inner.start and (outer.end < 0 or 0 <= inner.end < outer.end)


def is_leaf(call: Call) -> bool:
    """Whether a call is one layer's; what makes the weight of a parametrized one does not count."""
    return hasattr(call.module, "parametrizations") or not any(isinstance(e, Call) for e in call.events)


class Units:
    """Finds the units among the calls within one root."""

    def __init__(self, flow: Flow, root: Call, adds: list[ResidualAdd]) -> None:
        self.flow, self.record, self.root, self.adds = flow, flow.record, root, adds
        self.names = {id(m): name for name, m in root.module.named_modules()}
        self.calls = [c for c in self.record.calls if contains(root, c) and id(c.module) in self.names]

    def find(self) -> list[Call]:
        """The units in order; none lies within another."""
        known = {id(c) for c in self.calls}
        owners = list({id(a.owner): a.owner for a in self.adds if id(a.owner) in known}.values())
        if owners:
            found = self._with_siblings(self._residual(self._without_transitions(owners)))
            return [part for unit in found for part in self.loops.get(id(unit), (unit,))]
        return self._of_main_role()

    @functools.cached_property
    def loops(self) -> dict[int, Sequence[Call]]:
        """Id of a call whose forward is a loop over residual parts -> its runs; a class that recurs is a unit itself.

        Or goes on behind its residual part, and pools: one run then, where the net has other units.
        """
        owners = {id(a.owner): a.owner for a in self.adds if a.owner is not self.root}.values()
        recurring = {base_class(o.module) for o in owners if self._recurs_beside(o)}
        alone = [o for o in owners if base_class(o.module) not in recurring]
        found = {id(o): loop_runs(self.flow, o, self.adds, self._name, self.weights) for o in alone}
        if recurring or any(found.values()):
            for owner in (o for o in alone if not found[id(o)]):
                if not any(contains(owner, a.owner) for a in self.adds):
                    found[id(owner)] = part_before_pooling(self.flow, owner, self.adds, self._positions)
        return {key: runs for key, runs in found.items() if runs}

    def _positions(self, value: int) -> int:
        return positions(resolution(self.record, value))

    def _name(self, call: Call) -> str:
        name: str = self.names.get(id(call.module), "")
        return name

    # --- what is known of one call --------------------------------------------------------

    def role(self, call: Call) -> str:
        """The module's name with its numbers left open."""
        return re.sub(r"\d+[a-z]?(?![a-z])", "#", self._name(call))

    def parents(self, call: Call) -> Iterable[Call]:
        """The calls around this one below the root, from inside out."""
        parent = call.parent
        while parent is not None and parent is not self.root:
            if id(parent.module) in self.names:  # no slice of a Sequential, made for the call
                yield parent
            parent = parent.parent

    def roles(self, call: Call) -> set[str]:
        """The roles of a call and of what is around it."""
        return {self.role(c) for c in (call, *self.parents(call))}

    def resolution(self, call: Call) -> tuple[int, ...] | None:
        """Spatial extents of a call's first result."""
        return resolution(self.record, call.outs[0], call.module) if call.outs else None

    def shape(self, call: Call) -> tuple[int, ...]:
        """Shape of a call's first result."""
        return self.record.shape(call.outs[0]) if call.outs else ()

    def weights(self, call: Call) -> int:
        """How many convolutions and linear layers run in a call."""
        end = bisect.bisect(self.heavy, call.end) if call.end >= 0 else len(self.heavy)
        return end - bisect.bisect(self.heavy, call.start)

    @functools.cached_property
    def heavy(self) -> list[int]:
        """The times at which a convolution or linear layer ran."""
        flow = self.flow
        return [s.time for s in flow.steps if any(flow.bit(o) & flow.weighted for o in s.outs)]

    def reduces(self, call: Call) -> bool:
        """Whether a call's result has fewer positions than its input."""
        before = resolution(self.record, call.ins[0]) if call.ins else None
        after = self.resolution(call)
        return before is not None and after is not None and before != after

    @functools.cached_property
    def siblings(self) -> dict[tuple[int, str], list[Call]]:
        """Calls of one role within one parent's run."""
        found: dict[tuple[int, str], list[Call]] = {}
        for call in self.calls:
            found.setdefault((id(call.parent), self.role(call)), []).append(call)
        return found

    def beside(self, call: Call) -> list[Call]:
        """The other calls of the same role within the same parent's run."""
        return [c for c in self.siblings[id(call.parent), self.role(call)] if c is not call]

    # --- nets with residual adds ----------------------------------------------------------

    def _residual(self, owners: list[Call]) -> list[Call]:
        whole = {id(o): self._block(o, owners) for o in owners}
        blocks = {id(b): b for b in whole.values()}.values()
        parts = {base_class(o.module) for o in owners if whole[id(o)] is not o}
        around = {self.role(b) for b in blocks if not any(b is o for o in owners)}
        roles = {self.role(b) for b in blocks}
        classes = {base_class(b.module) for b in blocks} - set(CONTAINERS)
        chosen = {id(b) for b in blocks}
        outer = {id(p): p for o in owners for p in self.parents(o)}.values()
        inside = ((p, [o for o in owners if contains(p, o)]) for p in outer)
        nested = {id(p) for p, inner in inside if self._goes_down_and_up(p, inner)}
        return [
            c
            for c in self.calls
            if (id(c) in chosen or base_class(c.module) in classes)
            and self.role(c) in roles
            and id(c) not in nested
            and (base_class(c.module) not in parts or self.role(c) in around or (nested and id(c) in chosen))
        ]

    def _block(self, owner: Call, owners: list[Call]) -> Call:
        """The owner of a residual add, or the outermost module around it that is itself a unit."""
        classes = {base_class(o.module) for o in owners}
        best = owner
        for around in self.parents(owner):
            if any(around is o for o in owners):
                best = around
                continue
            inner = [o for o in owners if contains(around, o)]
            if self._goes_down_and_up(around, inner):
                break
            among_units = any(base_class(c.module) in classes for c in self.beside(around))
            if among_units or (self._recurs(around) and self._is_more(around, inner)):
                best = around
        return best

    def _goes_down_and_up(self, call: Call, inner: list[Call]) -> bool:
        """Whether a module gives a map of its input's resolution, with residual parts at a lower one: a whole U-Net."""
        at = self.resolution(call)
        given = {resolution(self.record, i) for i in call.ins}
        lower = (r for c in inner if (r := self.resolution(c)) and max(r) > 1)
        return bool(at) and given == {at} and any(math.prod(r) < math.prod(at or ()) for r in lower)

    def _recurs(self, call: Call) -> bool:
        """Whether the same class runs again beside it and keeps the shape."""
        alike = [c for c in self.beside(call) if base_class(c.module) is base_class(call.module)]
        keeps = any(c.ins and self.record.shape(c.ins[0]) == self.shape(call) for c in (call, *alike))
        return len(call.outs) == 1 and keeps and any(self.shape(c) == self.shape(call) for c in alike)

    def _is_more(self, call: Call, inner: list[Call]) -> bool:
        """Whether a module around residual parts is a block of different parts, not a row of equal blocks."""
        if isinstance(call.module, CONTAINERS):
            classes = {base_class(c.module) for c in inner}
            alike = [c for c in self.calls if contains(call, c) and base_class(c.module) in classes]
            return len(alike) == 1 and self.weights(call) > self.weights(alike[0])
        # what has no weights differs within a row: the first blocks have an Identity for a drop path
        made = [tuple(base_class(m) for m in c.module.modules() if m._parameters) for c in inner]
        return len(made) == 1 or len(set(made)) > 1

    def _without_transitions(self, owners: list[Call]) -> list[Call]:
        """Without residual parts of a transition between stages, unless their class is one that recurs."""
        recurring = [c for c in owners if id(c) in self.loops or self._recurs_beside(c)]
        classes = {base_class(c.module) for c in recurring}
        roles = {self.role(c) for c in recurring}
        return [
            c
            for c in owners
            if not recurring
            or base_class(c.module) in classes
            or self.role(c) in roles
            or not self._in_transition(c, recurring)
        ]

    def _recurs_beside(self, call: Call) -> bool:
        alike = (c for c in self.beside(call) if base_class(c.module) is base_class(call.module))
        return any(self.shape(c) == self.shape(call) for c in alike)

    def _in_transition(self, call: Call, recurring: list[Call]) -> bool:
        """Whether a call changes the resolution, or lies in a module that does and has no recurring unit."""
        around = [
            p for p in self.parents(call)
            if not isinstance(p.module, CONTAINERS) and not any(contains(p, c) for c in recurring)
        ]  # fmt: skip
        return any(self.reduces(c) for c in (call, *around))

    # --- nets without ---------------------------------------------------------------------

    def _of_main_role(self) -> list[Call]:
        """Modules of one role, most of two layers or more: the role that has most of the net's layers.

        Of these the classes that recur beside each other at one resolution, if any does.
        """
        groups: dict[str, list[Call]] = {}
        for call in self.calls:
            if base_class(call.module) not in CONTAINERS and self.weights(call) > 1 and not _recurrent(call):
                groups.setdefault(self.role(call), []).append(call)
        rows = [group for group in groups.values() if len({id(c.module) for c in group}) > 1]
        row = max(rows, key=lambda group: (sum(map(self.weights, group)), len(group)), default=[])
        found = self._recurring(row) or self._recurring(self._of_classes(row))
        if not found:
            return self._with_siblings(row)
        classes = {base_class(c.module) for c in found}
        roles = {self.role(c) for c in found}
        alike = [c for c in self.calls if self.role(c) in roles and base_class(c.module) in classes]
        first = min(alike, key=lambda c: c.start)
        more = self._with_siblings(alike)  # those before the first, at other resolutions, are the stem
        return [c for c in more if c.start >= first.start or self.resolution(c) == self.resolution(first)]

    def _recurring(self, row: list[Call]) -> list[Call]:
        """Those of a row whose class is there more than once at one resolution."""
        at = Counter((base_class(c.module), self.resolution(c), id(c.parent)) for c in row)
        classes = {cls for (cls, *_), count in at.items() if count > 1}
        return [c for c in row if base_class(c.module) in classes]

    def _of_classes(self, row: list[Call]) -> list[Call]:
        """All modules of a row's classes, where names do not tell that they play one role: `a3`, `b3`, `a4`."""
        classes = {base_class(c.module) for c in row}
        return outermost([c for c in self.calls if base_class(c.module) in classes])

    def of_main_class(self) -> list[Call]:
        """Modules of the one class that has most of the net's layers: an encoder's and a decoder's have other roles."""
        groups: dict[type, list[Call]] = {}
        for call in self.calls:
            if base_class(call.module) not in CONTAINERS and self.weights(call) > 1:
                groups.setdefault(base_class(call.module), []).append(call)
        rows = [row for group in groups.values() if len(row := outermost(group)) > 1]
        return max(rows, key=lambda row: (sum(map(self.weights, row)), len(row)), default=[])

    def _with_siblings(self, found: list[Call]) -> list[Call]:
        """With modules of the same role that are more than a pointwise or a strided convolution."""
        units = outermost(found)
        roles, known = {self.role(c) for c in units}, {id(c) for c in units}
        more = [
            c
            for c in self.calls
            if self.role(c) in roles
            and id(c) not in known
            and not any(contains(c, u) or contains(u, c) for u in units)
            and (self.weights(c) > 1 or self._is_plain_layer(c))
        ]
        return outermost([*units, *more])

    def _is_plain_layer(self, call: Call) -> bool:
        """A module around one convolution over neighbours that keeps the resolution."""
        kernels = [getattr(m, "kernel_size", None) for m in call.module.modules()]
        wide = any(isinstance(k, tuple) and max(k) > 1 for k in kernels)
        leaf = not any(isinstance(e, Call) for e in call.events)
        return wide and not leaf and self.weights(call) == 1 and not self.reduces(call)


def _recurrent(call: Call) -> bool:
    """Whether an LSTM or the like runs in a call: it reads what the trunk gave as a sequence."""
    return any(isinstance(m, RNNBase) for m in call.module.modules())


def outermost(calls: list[Call]) -> list[Call]:
    """The calls that lie in none of the others, in order."""
    found: list[Call] = []
    for call in sorted(calls, key=lambda c: c.start):
        if not found or call.start > found[-1].end:
            found.append(call)
    return found
