"""Residual parts that one forward goes through in a loop over a list: each run of the loop is a unit of its own.

So are written the transformers of many small packages, `for attn, ff in self.layers: x = attn(x) + x; x = ff(x) + x`, and
entry flows whose parts are called `conv3`, `conv4`, `conv5`. What tells the runs apart are the numbers in the names of
the layers that they call.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable

from attninject.observe.record import Call, Op

from .dataflow import Flow
from .residual_adds import ResidualAdd, producer


class LoopRun(Call):
    """One run of a loop in a forward, as if it were a call: `parent` is that of the module whose forward it is.

    It takes the first shortcut and gives the last sum.
    """


def loop_runs(
    flow: Flow,
    owner: Call,
    adds: Iterable[ResidualAdd],
    name: Callable[[Call], str],
    weights: Callable[[Call], int],
) -> list[LoopRun]:
    """The runs of the loop that a forward is, in order; none where it is no loop.

    Args:
        flow: the net's dataflow.
        owner: the run of the module whose forward may be a loop.
        adds: the residual adds of the trunk.
        name: of a call's module below the root.
        weights: how many convolutions and linear layers run in a call.
    """
    groups: list[tuple[int, set[str], list[ResidualAdd]]] = []  # number, rest of the names, adds
    for add in (a for a in adds if a.owner is owner):
        layers = [e for e in _calls(owner) if weights(e) and any(flow.bit(o) & add.inside for o in e.outs)]
        parts = [_parted(name(e)[len(name(owner)) :]) for e in layers]
        numbers, rest = {n for n, _ in parts}, {text for _, text in parts}
        if len(numbers) != 1 or (groups and not flow.depends(add.shortcut, groups[-1][2][-1].out)):
            return []
        if groups and numbers == {groups[-1][0]}:
            rest |= groups[-1][1]
            groups[-1] = (groups[-1][0], rest, [*groups[-1][2], add])
        else:
            groups.append((numbers.pop(), rest, [add]))
    if not _counts([(number, rest) for number, rest, _ in groups]):
        return []
    given = _given(flow, owner, groups[0][2][0])
    ends = [given, *(adds[-1].out for _, _, adds in groups)]
    return [_run(owner, a, b) for a, b in itertools.pairwise(ends)]


def part_before_pooling(
    flow: Flow, owner: Call, adds: Iterable[ResidualAdd], positions: Callable[[int], int]
) -> list[LoopRun]:
    """What a forward does up to its last residual sum where it pools that map: as a loop that runs once; else none.

    Args:
        flow: the net's dataflow.
        owner: the run of the module that ends the trunk.
        adds: the residual adds of the trunk.
        positions: of a value; 0 where it is no map.
    """
    own = [a for a in adds if a.owner is owner]
    sizes = {positions(a.out) for a in own}
    if any(map(positions, owner.outs)) or len(sizes) != 1 or sizes == {0}:
        return []
    return [_run(owner, _given(flow, owner, own[0]), own[-1].out)]


def _counts(groups: list[tuple[int, set[str]]]) -> bool:
    """Whether names count upwards from run to run and are alike else.

    Two items of a list are enough; `conv1` and `conv2` are the parts of one block, which three or more are not.
    """
    listed = all(re.search(r"\.#(\.|$)", text) for _, rest in groups for text in rest)
    alike = all(b[0] == a[0] + 1 and a[1] == b[1] for a, b in itertools.pairwise(groups))
    return len(groups) > (1 if listed else 2) and groups[0][0] >= 0 and alike


def _calls(owner: Call) -> list[Call]:
    return [e for e in owner.events if isinstance(e, Call)]


def _parted(name: str) -> tuple[int, str]:
    """The first number in a name, and the name without it; -1 where it has none."""
    found = re.search(r"\d+", name)
    return (int(found[0]), name[: found.start()] + "#" + name[found.end() :]) if found else (-1, name)


def _given(flow: Flow, owner: Call, add: ResidualAdd) -> int:
    """What the first run is given: its shortcut, or, where that is projected, what the branch's first layer reads."""
    first = next(e for e in _calls(owner) if any(flow.bit(o) & add.inside for o in e.outs))
    return add.shortcut if flow.depends(add.branch, add.shortcut) else first.ins[0]


def _run(owner: Call, given: int, made: int) -> LoopRun:
    start, end = (_end(owner, producer(owner, value)) for value in (given, made))
    events = [e for e in owner.events if start < _end(owner, e) <= end]
    return LoopRun(owner.module, owner, 1, start, ins=(given,), outs=(made,), end=end, events=events)


def _end(owner: Call, event: Call | Op | None) -> int:
    """When an event of a forward is over; what the forward is given is there when it begins."""
    return owner.start if event is None else event.end if isinstance(event, Call) else event.time
